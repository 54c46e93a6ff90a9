"""A running value over the rows of each segment: a first-order linear recurrence.

    y[t] = decay[t] · y[t-1] + x[t],   and y[t] = x[t] at the first row of a segment

An exponential moving average of chunks, H-Net's smoothing, is the scan of p·z with decay 1 - p:

    >>> import torch
    >>> from lst_kernels import PatchLayout, segment_scan
    >>> layout = PatchLayout.from_lengths([2, 3, 1, 2], [3, 1])    # two documents
    >>> z, p = torch.tensor([8.0, 0.0, 4.0, 6.0]), torch.tensor([1.0, 0.5, 0.25, 1.0])
    >>> segment_scan(p * z, 1 - p, layout.cu_documents)
    tensor([8., 4., 4., 6.])

Shape letters: P rows, N segments, F features (all of a row's dimensions as one).
"""

import math
from typing import Any

import torch
from torch import Tensor

from lst_kernels import backends
from lst_kernels.checks import check_float, check_offset_values, check_offsets

__all__ = ["segment_scan"]


def segment_scan(x: Tensor, decay: Tensor, cu_segments: Tensor, *, backend: str = "auto") -> Tensor:
    """Run ``y[t] = decay[t] · y[t-1] + x[t]`` through the rows of each segment.

    Args:
        x: (P, …), float32, bfloat16, float16 or float64. The state is carried in float32 or better.
        decay: (P,) float32, float64 where x is: one number for all features of a row, between -1
            and 1 (beyond, states may overflow). Exactly 0 forgets all earlier rows, infinities and
            NaN too. The decay of a segment's first row is not read and has no gradient.
        cu_segments: (N+1,) int32, row offset of each segment; last = P. ``layout.cu_documents`` for
            rows that are patches, ``cu_tokens`` for tokens, ``cu_patches`` within patches. Checked
            on the CPU alone.
        backend: a backend's name, or "auto" (see `lst_kernels.backends`).

    Returns:
        (P, …) in x's dtype. Differentiable in x and decay; the decay's gradient is formed from y as
        it was rounded to that dtype.

    Raises:
        ValueError: a shape, a device or the offsets do not fit, or the backend asked for cannot run
            this.
        TypeError: x, decay or cu_segments is of another dtype.
    """
    _check(x, decay, cu_segments)
    chosen = _choose(x, backend)
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return torch.ops.lst_kernels.segment_scan(flat, decay, cu_segments, chosen).view(x.shape)


def _choose(x: Tensor, asked: str) -> str:
    if torch.compiler.is_compiling():
        return backends.choose_traced(asked, "segment_scan", x.device.type, x.dtype, None, None)
    return backends.choose(_describe(x), asked)


@backends.describes("segment_scan")
def _describe(
    x: Tensor, decay: Tensor | None = None, cu_segments: Tensor | None = None
) -> backends.Call:
    return backends.Call("segment_scan", x.device.type, x.dtype)


def _check(x: Tensor, decay: Tensor, cu_segments: Tensor) -> None:
    check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must have rows; got shape ()")
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    got = decay.dtype if isinstance(decay, Tensor) else type(decay).__name__
    if got != precise:
        raise TypeError(f"decay must be {precise} for an x of {x.dtype}; got {got}")
    if decay.shape != x.shape[:1]:
        raise ValueError(f"decay has shape {tuple(decay.shape)}, but x has {x.shape[0]} rows")
    if decay.device != x.device:
        raise ValueError(f"decay is on {decay.device}, but x is on {x.device}")
    check_offsets("cu_segments", cu_segments, "x", x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offset_values("cu_segments", cu_segments, "x", x.shape[0])


# --- the operators ---

_lib = torch.library.Library("lst_kernels", "FRAGMENT")
for _schema in (
    "segment_scan(Tensor x, Tensor decay, Tensor cu_segments, str backend) -> Tensor",
    "segment_scan_backward(Tensor grad, Tensor decay, Tensor cu_segments, Tensor y, str backend)"
    " -> (Tensor, Tensor)",
):
    _lib.define(_schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_lib, "segment_scan", "CompositeExplicitAutograd")
def _scan(x: Tensor, decay: Tensor, cu_segments: Tensor, backend: str) -> Tensor:
    return backends.load(backend).segment_scan(
        x.contiguous(), decay.contiguous(), cu_segments.contiguous()
    )


@torch.library.register_fake("lst_kernels::segment_scan", lib=_lib)
def _scan_fake(x: Tensor, decay: Tensor, cu_segments: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl(_lib, "segment_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(
    grad: Tensor, decay: Tensor, cu_segments: Tensor, y: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).segment_scan_backward(
        grad.contiguous(), decay.contiguous(), cu_segments.contiguous(), y.contiguous()
    )


@torch.library.register_fake("lst_kernels::segment_scan_backward", lib=_lib)
def _scan_backward_fake(
    grad: Tensor, decay: Tensor, cu_segments: Tensor, y: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), decay.new_empty(decay.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, decay, cu_segments, ctx.backend = inputs
    ctx.save_for_backward(decay, cu_segments, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_decay = torch.ops.lst_kernels.segment_scan_backward(
        grad, *ctx.saved_tensors, ctx.backend
    )
    return grad_x, grad_decay, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("segment_scan has no second derivative")


torch.library.register_autograd(
    "lst_kernels::segment_scan", _differentiate, setup_context=_setup, lib=_lib
)
torch.library.register_autograd(
    "lst_kernels::segment_scan_backward", _no_second_derivative, lib=_lib
)
