"""The streams that kernels are measured on, their inputs, and the oracle that checks them.

The paper's 1B model: 16 local heads of 64 (d = 1024), 2 slots to a patch, 16 global heads of 128.
A stream has four documents; each opens with a ``<bos>`` patch of one token, so that every token has
a patch to read and no patch starts at a multiple of four. Patches are static (4 tokens) or
word-like (a word of 5.8 frames on average and 30 at most; after every other word a silence of 3.7).

Shape letters: T tokens, P patches, Q queries, K keys, H heads, D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lst_kernels import KeyRanges, PatchLayout

__all__ = [
    "FEATURES", "LAYOUTS", "LOCAL_HEADS", "SLOTS", "WINDOW", "Case", "attention_inputs",
    "causal_cases", "decoder_cases", "dense_attention", "encoder_cases", "excess_error",
    "static_layout", "word_layout",
]  # fmt: skip

DOCUMENTS = 4
FEATURES = 1024
LOCAL_HEADS, GLOBAL_HEADS = (16, 64), (16, 128)  # number, size
SLOTS, WINDOW = 2, 512  # of a patch; patches or tokens that are read


def static_layout(num_tokens: int, num_documents: int = DOCUMENTS) -> PatchLayout:
    """Patches of 4 tokens after the first, the last of a document shorter."""
    return _layout(num_tokens, num_documents, lambda: 4)


def word_layout(num_tokens: int, num_documents: int = DOCUMENTS) -> PatchLayout:
    """Words and silences, as an aligner finds them in units of 25 Hz; always the same ones."""
    rng = np.random.default_rng(0)

    def length() -> int:
        if rng.random() < 1 / 3:  # of three patches two are words
            return int(rng.geometric(1 / 3.7))
        return int(np.clip(round(rng.lognormal(1.52, 0.7)), 1, 30))

    return _layout(num_tokens, num_documents, length)


LAYOUTS: dict[str, Callable[[int], PatchLayout]] = {
    "static 4": static_layout,
    "word-like": word_layout,
}


def _layout(num_tokens: int, num_documents: int, length: Callable[[], int]) -> PatchLayout:
    lengths: list[int] = []
    patches: list[int] = []
    for _ in range(num_documents):
        document, left = [1], num_tokens // num_documents - 1
        while left:
            document.append(min(length(), left))
            left -= document[-1]
        lengths += document
        patches.append(len(document))
    return PatchLayout.from_lengths(lengths, patches)


@dataclass(frozen=True)
class Case:
    """A pattern of attention: ``op`` is what checks and figures of it go by."""

    op: str
    name: str
    layout: PatchLayout
    ranges: KeyRanges
    heads: tuple[int, int] = LOCAL_HEADS
    cu: Tensor | None = None  # offsets of the documents, where the pattern is causal
    window: int | None = None
    max_length: int = 0

    def facts(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "case": self.name,
            "dtype": "bfloat16",
            "shape": {
                "queries": self.ranges.num_queries,
                "keys": self.ranges.num_keys,
                "heads": self.heads[0],
                "head_dim": self.heads[1],
                "pairs": self.ranges.num_pairs,
                "max_keys": self.ranges.max_keys,
            },
        }


def encoder_cases(num_tokens: int, device: torch.device) -> Iterator[Case]:
    for name, make in LAYOUTS.items():
        layout = make(num_tokens)
        for slots in (1, SLOTS):
            ranges = layout.patches_read_tokens(slots=slots)
            yield _case("encoder", f"encoder, {name}, slots {slots}", layout, ranges, device)


def decoder_cases(num_tokens: int, device: torch.device, window: int = WINDOW) -> Iterator[Case]:
    for name, make in LAYOUTS.items():
        layout = make(num_tokens)
        for patches in (window, None):
            ranges = layout.tokens_read_patches(patches, slots=SLOTS)
            told = f"decoder, window {patches or 'all'}, {name}"
            yield _case("decoder", told, layout, ranges, device)


def causal_cases(num_tokens: int, device: torch.device, window: int = WINDOW) -> Iterator[Case]:
    layout = static_layout(num_tokens)
    yield _case(
        "causal", f"sliding window {window}", layout, layout.sliding_window(window), device,
        cu=layout.cu_tokens.to(device), window=window, max_length=layout.max_document_tokens,
    )  # fmt: skip
    yield _case(
        "causal", "block-causal", layout, layout.block_causal(), device, heads=GLOBAL_HEADS,
        cu=layout.cu_documents.to(device), max_length=layout.max_document_patches,
    )  # fmt: skip


def _case(
    op: str, name: str, layout: PatchLayout, ranges: KeyRanges, device: torch.device, **rest: Any
) -> Case:
    return Case(op, name, layout.to(device), ranges.to(device), **rest)


def attention_inputs(
    ranges: KeyRanges, heads: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """q (Q, H, D), k and v (K, H, D), leaves that want gradients; and the gradient of out."""
    device = ranges.device
    generator = torch.Generator(device).manual_seed(seed)

    def rows(number: int) -> Tensor:
        return torch.randn(number, *heads, generator=generator, device=device, dtype=dtype)

    qkv = [rows(n) for n in (ranges.num_queries, ranges.num_keys, ranges.num_keys)]
    return [x.requires_grad_() for x in qkv], rows(ranges.num_queries)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    """The definition, under a dense mask and in the inputs' dtype."""
    scores = torch.einsum("qhd,khd->qhk", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~ranges.dense_mask()[:, None], -torch.inf)
    empty = (ranges.start == ranges.stop)[:, None, None]
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1).masked_fill(empty, 0), v)


def excess_error(ours: Tensor, eager: Tensor, oracle: Tensor, eps: float) -> float:
    """The largest error of ``ours`` over what is allowed: twice that of eager PyTorch in the same
    dtype, plus four roundings of the largest value. Over 1 is wrong; NaN is infinitely so."""
    error, eager_error = (float((x.double() - oracle).abs().max()) for x in (ours, eager))
    allowed = 2 * eager_error + 4 * eps * float(oracle.abs().max())
    return error / max(allowed, 1e-30) if error == error else float("inf")
