"""Kernels for models that group tokens into variable-length patches.

A packed stream of documents is described once, on the CPU, by a `PatchLayout`; the layout says
which keys each query reads (`KeyRanges`); the ops take both:

    >>> import torch
    >>> from lst_kernels import PatchLayout, patch_pool, range_attention
    >>> layout = PatchLayout.from_lengths([1, 4, 2, 1, 3], [3, 2])    # two documents
    >>> tokens = torch.randn(11, 2, 32)
    >>> patches = patch_pool(tokens, layout, "max")
    >>> range_attention(patches, tokens, tokens, layout.patches_read_tokens()).shape
    torch.Size([5, 2, 32])
"""

from lst_kernels.attention import (
    block_causal_attention,
    range_attention,
    sliding_window_attention,
)
from lst_kernels.backends import backend, explain
from lst_kernels.layout import PatchLayout
from lst_kernels.pooling import patch_expand, patch_pool
from lst_kernels.ranges import KeyRanges
from lst_kernels.scan import segment_scan

__all__ = [
    "KeyRanges",
    "PatchLayout",
    "backend",
    "block_causal_attention",
    "explain",
    "patch_expand",
    "patch_pool",
    "range_attention",
    "segment_scan",
    "sliding_window_attention",
]
