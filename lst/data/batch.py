"""From rows to a batch: one packed stream with its whole plan.

    records -> interleave -> patching -> packing -> [batch]

A training batch ends with a dead tail: ``<pad>`` tokens that round the number of tokens that pass
the local modules up to a multiple of 256, so that kernels see few sizes. Each row gives one unit to
it, and so what a row holds never depends on which rows it shares a stream with. What rows of whole
documents lack of their units it has more.

Where text belongs to the global transformer alone (``text_path="global"``), the stream falls into
two, and each patch belongs to one. The dead tail counts as speech, so there always is some::

    stream      <bos> ▁Once ▁upon <s> 1 2 3 4 5 6 <eos> | <bos> ▁The ▁cat <eos> | <pad> … <pad>
    text        <bos> ▁Once ▁upon <s>             <eos> | <bos> ▁The ▁cat <eos> |
    speech                            1 2 3 4 5 6       |                       | <pad> … <pad>

The forward pass makes nothing of this itself: offsets, key ranges, positions, maxima and counts
are all here, made on the CPU and moved to the device once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from lst.data.buffer import flatten, unflatten
from lst.data.interleave import Document
from lst.data.packing import IGNORE, Packed, concatenate, patch_document
from lst.data.patching import Strategy
from lst.vocabulary import PAD, Vocabulary
from lst_kernels import KeyRanges, PatchLayout

__all__ = [
    "IGNORE",
    "Batch",
    "PlanConfig",
    "Split",
    "TextPath",
    "make_batch",
    "pack_documents",
    "plan_batch",
    "rows_of",
]

TOKENS_MULTIPLE = 256  # of what passes the local modules in a training batch

TextPath = Literal["local", "global"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a model wants to have planned."""

    slots: int = 2  # vectors of a patch on the local side
    local_window: int = 512  # tokens that a local layer reads, the query's own counted
    decoder_window: int | None = 512  # patches that a token reads; None: all of its document
    local: bool = True  # False: token-level baseline, without patch encoder and decoder
    text_path: TextPath = "local"  # "global": text and specials pass no local module

    @property
    def splits(self) -> bool:
        """Whether speech alone passes the local modules."""
        return self.local and self.text_path == "global"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A stream as speech and text, each with its ids; a text token, or special, is a patch."""

    speech_tokens: Tensor  # (Ts,) int64, ids of the speech vocabulary: specials, then units
    speech_targets: Tensor  # (Ts,) int64, the same, or IGNORE
    text_tokens: Tensor  # (Tt,) int64, ids of the joint vocabulary; T = Ts + Tt
    text_targets: Tensor  # (Tt,) int64, the same, or IGNORE
    text_patches: Tensor  # (Tt,) int64, the patch that each is
    patch_rows: Tensor  # (P,) int64, where each patch is in [speech patches; text tokens]
    token_rows: Tensor  # (T,) int64, where each token is in [speech tokens; text tokens]
    read_patches: Tensor  # (Pr,) int64, the patches that some speech token reads, and dead ones


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One packed stream of T tokens in P patches, with its plan."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next token of the same document, or IGNORE
    speech_targets: Tensor  # (T,) bool, whether the target is a speech unit
    layout: PatchLayout
    global_ranges: KeyRanges  # P × P
    # Of what passes the local modules: everything, or speech alone; None without them.
    local_layout: PatchLayout | None
    encoder_ranges: KeyRanges | None  # P·S × T
    decoder_ranges: KeyRanges | None  # T × P·S, of the patches that are read
    local_ranges: KeyRanges | None  # T × T
    split: Split | None  # where speech alone passes the local modules
    num_targets: int
    num_speech_targets: int
    num_units_to_predict: int  # speech units, 25 to the second, that those targets stand for
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
        """The same batch on another device, moved as one buffer; host values stay as they are."""
        if self.tokens.device == torch.device(device):
            return self
        buffer, skeleton = flatten(self)
        return cast(Batch, unflatten(buffer.to(device, non_blocking=non_blocking), skeleton))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, so that ``to`` a GPU need not wait."""
        buffer, skeleton = flatten(self)
        return cast(Batch, unflatten(buffer.pin_memory(), skeleton))

    def __reduce__(self) -> tuple[Any, ...]:
        return unflatten, flatten(self)  # to another process as one buffer


def make_batch(
    rows: Sequence[Packed],
    vocabulary: Vocabulary,
    plan: PlanConfig,
    *,
    step: int,
    units: int | None = None,
) -> Batch:
    """A training batch: the rows' documents, then a dead document of as many patches as rows.

    For a token-level model each of those is a token: it reads as many tokens as there are units.

    Args:
        units: of the batch: where rows are not full, the dead document is as much longer. None: all
            rows are.
    """
    num_dead = len(rows)
    if units is not None:
        num_dead = units - sum(len(row.lengths) for row in rows)
    if plan.local:
        masks = (vocabulary.is_unit(row.tokens) if plan.splits else row.tokens >= 0 for row in rows)
        dead_lengths = np.zeros(num_dead, np.int32)
        dead_lengths[-1] = TOKENS_MULTIPLE - sum(int(m.sum()) for m in masks) % TOKENS_MULTIPLE
    else:
        dead_lengths = np.ones(num_dead, np.int32)
    padding = int(dead_lengths.sum())
    dead = Packed(
        tokens=np.full(padding, PAD, np.int32),
        targets=np.full(padding, IGNORE, np.int32),
        lengths=dead_lengths,
        closed_late=np.zeros(num_dead, bool),
        patches_per_document=np.array([num_dead], np.int32),
        record_ids=(),
    )
    packed = concatenate([*rows, dead])
    return plan_batch(packed, vocabulary, plan, num_dead_patches=num_dead, step=step)


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
    split = local_layout = encoder = decoder = local = None
    if plan.local:
        local_layout = layout
        decoder = layout.tokens_read_patches(window=plan.decoder_window, slots=plan.slots)
        if plan.splits:
            split, local_layout, decoder = _split(packed, vocabulary, layout, decoder)
        encoder = local_layout.patches_read_tokens(window=1, slots=plan.slots)
        local = local_layout.sliding_window(plan.local_window)
    return Batch(
        tokens=torch.from_numpy(packed.tokens).long(),
        targets=torch.from_numpy(packed.targets).long(),
        speech_targets=torch.from_numpy(speech_targets),
        layout=layout,
        global_ranges=layout.block_causal(),
        local_layout=local_layout,
        encoder_ranges=encoder,
        decoder_ranges=decoder,
        local_ranges=local,
        split=split,
        num_targets=int((packed.targets != IGNORE).sum()),
        num_speech_targets=int(speech_targets.sum()),
        num_units_to_predict=int(vocabulary.num_frames(packed.targets).sum()),
        num_text_tokens=int(vocabulary.is_piece(packed.tokens).sum()),
        num_speech_tokens=int(vocabulary.num_frames(packed.tokens).sum()),
        record_ids=packed.record_ids,
        step=step,
    )


def _split(
    packed: Packed, vocabulary: Vocabulary, layout: PatchLayout, reads: KeyRanges
) -> tuple[Split, PatchLayout, KeyRanges]:
    """The two streams; the layout of speech; the ranges in which it reads the read patches' slots.

    Args:
        reads: of the whole stream, T × P·S.
    """
    is_speech = torch.from_numpy(vocabulary.is_unit(packed.tokens))
    is_speech[layout.num_tokens - layout.num_dead_tokens :] = True
    speech, text = (mask.nonzero().flatten() for mask in (is_speech, ~is_speech))

    text_patches = layout.patch_ids[text].long()
    is_speech_patch = torch.ones(layout.num_patches, dtype=torch.bool)
    is_speech_patch[text_patches] = False
    speech_patches_before = torch.nn.functional.pad(is_speech_patch.cumsum(0), (1, 0))
    speech_layout = PatchLayout.from_lengths(
        layout.cu_patches.diff()[is_speech_patch],
        speech_patches_before[layout.cu_documents].diff(),
        closed_late=layout.closed_late[is_speech_patch],
        num_dead_patches=layout.num_dead_patches,
    )

    # Keys that no speech token reads are left out: patches of text documents, above all.
    slots = reads.num_keys // layout.num_patches
    reads = reads.select_queries(speech)
    is_read = reads.query_start < reads.query_stop
    is_read[reads.num_keys - slots * layout.num_dead_patches :] = True
    read = is_read.nonzero().flatten()
    reads = reads.transpose().select_queries(read).transpose()

    targets = torch.from_numpy(packed.targets).long()
    speech_targets = targets[speech]
    if vocabulary.is_piece(speech_targets).any():
        raise ValueError("a speech unit is followed by a text piece; expected <t> between them")
    split = Split(
        speech_tokens=vocabulary.to_speech_id(torch.from_numpy(packed.tokens).long()[speech]),
        speech_targets=vocabulary.to_speech_id(speech_targets),
        text_tokens=torch.from_numpy(packed.tokens).long()[text],
        text_targets=targets[text],
        text_patches=text_patches,
        patch_rows=rows_of(is_speech_patch),
        token_rows=rows_of(is_speech),
        read_patches=read[::slots] // slots,
    )
    return split, speech_layout, reads


def rows_of(first: Tensor) -> Tensor:
    """Where each of M things is once those that are marked (M,) have moved to the front."""
    return torch.where(first, first.cumsum(0) - 1, first.sum() + (~first).cumsum(0) - 1)
