"""The Triton backend: which kernel family runs a call, and in what order.

Attention has two families. Disjoint ranges with at most `MAX_ROWS` rows to a range, and no range
longer than `MAX_PATCH` keys, go to `patch_attention`; everything else goes to `tiled_attention`.
"""

import functools

import torch
from torch import Tensor

from lst_kernels.ranges import KeyRanges

__all__ = [
    "patch_expand",
    "patch_expand_backward",
    "patch_pool",
    "patch_pool_backward",
    "range_attention",
    "range_attention_backward",
    "segment_scan",
    "segment_scan_backward",
]

# A program of the patch-owned family walks its range alone, so a long range holds up the kernel's
# end; and its rows must fit its registers.
MAX_PATCH = 512
MAX_ROWS = 32


@functools.cache
def unavailable_reason() -> str | None:
    """Why no kernel of this package can run here, or None."""
    try:
        from lst_kernels.triton import launch
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with torch for Linux GPUs"
    if launch.interpreted():
        return launch.interpreter_fault()
    if torch.cuda.is_available():
        return None
    return "there is no GPU, and TRITON_INTERPRET=1 is not set"


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """As `lst_kernels.reference.range_attention`."""
    from lst_kernels.triton import patch_attention, tables, tiled_attention
    from lst_kernels.triton.launch import architecture, rows

    q, k, v = rows(q), rows(k), rows(v)
    if scale < 0:  # the tiled kernels move a factor past a maximum
        q, scale = -q, -scale
    with torch.cuda.device_of(q):
        if _patch_owned(q, k, ranges):
            launch, out, lse = patch_attention.forward(q, k, v, ranges, scale)
        else:
            tile = tables.tile("forward", architecture(q.device), q.dtype, q.shape[2])
            launch, out, lse = tiled_attention.forward(q, k, v, ranges, scale, tile)
        launch()
    return out, lse


def range_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    ranges: KeyRanges, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `lst_kernels.reference.range_attention_backward`."""
    from lst_kernels.triton import patch_attention, tables, tiled_attention
    from lst_kernels.triton.launch import architecture, rows

    grad, q, k, v, out = rows(grad), rows(q), rows(k), rows(v), out.contiguous()
    if scale < 0:
        grad_q, grad_k, grad_v = range_attention_backward(grad, -q, k, v, out, lse, ranges, -scale)
        return -grad_q, grad_k, grad_v
    arch = architecture(q.device)
    with torch.cuda.device_of(q):
        if _patch_owned(q, k, ranges) and ranges.num_queries:
            launch, *grads = patch_attention.backward(grad, q, k, v, out, lse, ranges, scale)
            launch()
            return grads[0], grads[1], grads[2]
        tile = tables.tile("backward_q", arch, q.dtype, q.shape[2])
        launch, grad_q, row_sums = tiled_attention.backward_q(
            grad, q, k, v, out, lse, ranges, scale, tile
        )
        launch()
        tile = tables.tile("backward_kv", arch, q.dtype, q.shape[2])
        launch, grad_k, grad_v = tiled_attention.backward_kv(
            grad, q, k, v, row_sums, ranges, scale, tile
        )
        launch()
    return grad_q, grad_k, grad_v


def patch_pool(x: Tensor, cu_patches: Tensor, reduce: str) -> tuple[Tensor, Tensor | None]:
    """As `lst_kernels.reference.patch_pool`."""
    from lst_kernels.triton import pooling
    from lst_kernels.triton.launch import rows

    with torch.cuda.device_of(x):
        launch, out, index = pooling.pool(rows(x), cu_patches[:-1], cu_patches[1:], reduce)
        launch()
    return out, index


def patch_pool_backward(
    grad: Tensor, cu_patches: Tensor, reduce: str, index: Tensor | None, num_tokens: int
) -> Tensor:
    """As `lst_kernels.reference.patch_pool_backward`."""
    from lst_kernels.triton import pooling
    from lst_kernels.triton.launch import rows

    start, stop = cu_patches[:-1], cu_patches[1:]
    with torch.cuda.device_of(grad):
        launch, out = pooling.pool_backward(rows(grad), start, stop, reduce, index, num_tokens)
        launch()
    return out


def patch_expand(z: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """As `lst_kernels.reference.patch_expand`, added to ``residual`` (T, F) in the same pass."""
    from lst_kernels.triton import pooling
    from lst_kernels.triton.launch import rows

    with torch.cuda.device_of(z):
        residual = None if residual is None else rows(residual)
        launch, out = pooling.expand(rows(z), ids, residual)
        launch()
    return out


def patch_expand_backward(grad: Tensor, ids: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """As `lst_kernels.reference.patch_expand_backward`."""
    from lst_kernels.triton import pooling
    from lst_kernels.triton.launch import rows

    with torch.cuda.device_of(grad):
        launch, out, _ = pooling.pool(rows(grad), start, stop, "sum")
        launch()
    return out


def segment_scan(x: Tensor, decay: Tensor, cu_segments: Tensor) -> Tensor:
    """As `lst_kernels.reference.segment_scan`."""
    from lst_kernels.triton import scan
    from lst_kernels.triton.launch import rows

    with torch.cuda.device_of(x):
        launches, y = scan.scan(rows(x), scan.gates(decay, cu_segments))
        for launch in launches:
            launch()
    return y


def segment_scan_backward(
    grad: Tensor, decay: Tensor, cu_segments: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """As `lst_kernels.reference.segment_scan_backward`."""
    from lst_kernels.triton import scan
    from lst_kernels.triton.launch import rows

    with torch.cuda.device_of(grad):
        gates = scan.gates(decay, cu_segments)
        launches, grad_x, parts = scan.scan_backward(rows(grad), gates, rows(y))
        for launch in launches:
            launch()
        return grad_x, scan.gates(parts.sum(0), cu_segments)[:-1]


def _patch_owned(q: Tensor, k: Tensor, ranges: KeyRanges) -> bool:
    num_rows = ranges.slots * (q.shape[1] // k.shape[1])
    return 1 <= num_rows <= MAX_ROWS and ranges.max_keys <= MAX_PATCH
