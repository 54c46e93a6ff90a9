"""From rows to a batch: one packed stream with its whole plan.

    records -> interleave -> patching -> packing -> [batch]

A training batch ends with a dead tail: ``<pad>`` tokens that round the number of tokens up to a
multiple of 256, so that kernels see few sizes. Each row gives one unit to it, and so what a row
holds never depends on which rows it shares a stream with.

The forward pass makes nothing of this itself: offsets, key ranges, positions, maxima and counts
are all here, made on the CPU and moved to the device once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lst.data.interleave import Document
from lst.data.packing import IGNORE, Packed, concatenate, patch_document
from lst.data.patching import Strategy
from lst.vocabulary import PAD, Vocabulary
from lst_kernels import KeyRanges, PatchLayout

__all__ = ["IGNORE", "Batch", "PlanConfig", "make_batch", "pack_documents", "plan_batch"]

TOKENS_MULTIPLE = 256  # of a training batch


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a model wants to have planned."""

    slots: int = 2  # vectors of a patch on the local side
    local_window: int = 512  # tokens that a local layer reads, the query's own counted
    decoder_window: int | None = 512  # patches that a token reads; None: all of its document
    local: bool = True  # False: token-level baseline, without patch encoder and decoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One packed stream of T tokens in P patches, with its plan."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next token of the same document, or IGNORE
    speech_targets: Tensor  # (T,) bool, whether the target is a speech unit
    layout: PatchLayout
    encoder_ranges: KeyRanges | None  # P·S × T; this and the next two: None without local modules
    decoder_ranges: KeyRanges | None  # T × P·S
    local_ranges: KeyRanges | None  # T × T
    global_ranges: KeyRanges  # P × P
    num_targets: int
    num_speech_targets: int
    num_text_tokens: int  # text pieces; neither specials nor speech
    num_speech_tokens: int  # speech units, 25 to the second; all that a BPE piece stands for
    record_ids: tuple[str, ...]  # of the N documents, the dead one left out
    step: int  # the rows' number in their lanes

    @property
    def num_units(self) -> int:
        """Patches, the dead tail left out."""
        return self.layout.num_patches - self.layout.num_dead_patches

    @property
    def num_tokens(self) -> int:
        """Tokens, the dead tail left out."""
        return self.layout.num_tokens - self.layout.num_dead_tokens

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; host values stay as they are."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor | PatchLayout | KeyRanges):
                values[name] = value.to(device, non_blocking=non_blocking)
        return Batch(**values)


def make_batch(
    rows: Sequence[Packed], vocabulary: Vocabulary, plan: PlanConfig, *, step: int
) -> Batch:
    """A training batch: the rows' documents, then a dead document of as many patches as rows."""
    num_tokens = sum(len(row.tokens) for row in rows)
    padding = TOKENS_MULTIPLE - num_tokens % TOKENS_MULTIPLE
    dead_lengths = np.zeros(len(rows), np.int32)
    dead_lengths[-1] = padding
    dead = Packed(
        tokens=np.full(padding, PAD, np.int32),
        targets=np.full(padding, IGNORE, np.int32),
        lengths=dead_lengths,
        closed_late=np.zeros(len(rows), bool),
        patches_per_document=np.array([len(rows)], np.int32),
        record_ids=(),
    )
    packed = concatenate([*rows, dead])
    return plan_batch(packed, vocabulary, plan, num_dead_patches=len(rows), step=step)


def pack_documents(
    documents: Sequence[Document], vocabulary: Vocabulary, strategy: Strategy, plan: PlanConfig
) -> Batch:
    """Whole documents, at least one, end to end and without a dead tail: for evaluation."""
    packed = concatenate([patch_document(each, vocabulary, strategy) for each in documents])
    return plan_batch(packed, vocabulary, plan)


def plan_batch(
    packed: Packed,
    vocabulary: Vocabulary,
    plan: PlanConfig,
    *,
    num_dead_patches: int = 0,
    step: int = 0,
) -> Batch:
    """A stream with everything that follows from it; its last document may be a dead one."""
    layout = PatchLayout.from_lengths(
        packed.lengths,
        packed.patches_per_document,
        closed_late=packed.closed_late,
        num_dead_patches=num_dead_patches,
    )
    speech_targets = vocabulary.is_unit(packed.targets)
    encoder = decoder = local = None
    if plan.local:
        encoder = layout.patches_read_tokens(window=1, slots=plan.slots)
        decoder = layout.tokens_read_patches(window=plan.decoder_window, slots=plan.slots)
        local = layout.sliding_window(plan.local_window)
    return Batch(
        tokens=torch.from_numpy(packed.tokens).long(),
        targets=torch.from_numpy(packed.targets).long(),
        speech_targets=torch.from_numpy(speech_targets),
        layout=layout,
        encoder_ranges=encoder,
        decoder_ranges=decoder,
        local_ranges=local,
        global_ranges=layout.block_causal(),
        num_targets=int((packed.targets != IGNORE).sum()),
        num_speech_targets=int(speech_targets.sum()),
        num_text_tokens=int(vocabulary.is_piece(packed.tokens).sum()),
        num_speech_tokens=int(vocabulary.num_frames(packed.tokens).sum()),
        record_ids=packed.record_ids,
        step=step,
    )
