"""Between tokens and patches, without attention.

    patch_pool:    out[p] = reduce of x[t] over the tokens t of patch p
    patch_expand:  out[t] = z[p], of the token's own patch (shift 0) or the last readable one (1),
                   and with a residual  out[t] = residual[t] + z[p]

    >>> import torch
    >>> from lst_kernels import PatchLayout, patch_expand, patch_pool
    >>> layout = PatchLayout.from_lengths([1, 3, 2], [3])
    >>> sums = patch_pool(torch.ones(6), layout, "sum")
    >>> sums
    tensor([1., 3., 2.])
    >>> patch_expand(sums, layout)
    tensor([1., 3., 3., 3., 2., 2.])
    >>> patch_expand(sums, layout, shift=1)      # a patch is readable from its last token on
    tensor([1., 1., 1., 3., 3., 2.])

Shape letters: T tokens, P patches, F features (all of a row's dimensions as one).
"""

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lst_kernels import backends
from lst_kernels.checks import check_float
from lst_kernels.layout import PatchLayout

__all__ = ["patch_expand", "patch_pool"]

Reduce: TypeAlias = Literal["mean", "sum", "max", "min", "first", "last"]
REDUCES = ("mean", "sum", "max", "min", "first", "last")


def patch_pool(
    x: Tensor, layout: PatchLayout, reduce: Reduce = "mean", *, backend: str = "auto"
) -> Tensor:
    """Reduce the tokens of each patch to one row.

    Args:
        x: (T, …), float32, bfloat16, float16 or float64. Sums accumulate in float32.
        layout: of T tokens, on x's device.
        reduce: mean, sum, max, min, first or last. Of equal values in max and min the first token
            wins and receives the whole gradient; NaN wins over any number.
        backend: a backend's name, or "auto" (see `lst_kernels.backends`).

    Returns:
        (P, …) in x's dtype. An empty patch gives 0, without gradient.

    Raises:
        ValueError: a shape or a device does not fit, or the backend asked for cannot run this.
        TypeError: x is of another dtype.
    """
    if reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(REDUCES)}; got {reduce!r}")
    _check_rows("x", x, layout, "tokens")
    chosen = _choose("patch_pool", x, reduce, backend)
    pooled, _ = torch.ops.lst_kernels.patch_pool(_flat(x), layout.cu_patches, reduce, chosen)
    return pooled.view(layout.num_patches, *x.shape[1:])


def patch_expand(
    z: Tensor,
    layout: PatchLayout,
    shift: Literal[0, 1] = 0,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Give every token the row of a patch, or add that row to the token's own.

    Args:
        z: (P, …), float32, bfloat16, float16 or float64.
        layout: of P patches, on z's device.
        shift: 0 for the token's own patch; 1 for the last patch of its document that is readable at
            it (`PatchLayout.closed_late`), so that no row tells of later tokens.
        residual: (T, …), in z's dtype and with z's row shape, to add the rows to: in the same pass
            over memory, in float32. Its gradient is that of the result.
        backend: a backend's name, or "auto" (see `lst_kernels.backends`).

    Returns:
        (T, …) in z's dtype. Where no patch is readable yet, 0 or the residual alone.

    Raises:
        ValueError: a shape or a device does not fit, or the backend asked for cannot run this.
        TypeError: z is of another dtype, or residual is not of z's.
    """
    if shift not in (0, 1):
        raise ValueError(f"shift must be 0 or 1; got {shift!r}")
    _check_rows("z", z, layout, "patches")
    if residual is not None:
        _check_residual(residual, z, layout)
        residual = _flat(residual)
    if shift == 0:
        ids, start, stop = layout.patch_ids, layout.cu_patches[:-1], layout.cu_patches[1:]
    else:
        ids, start, stop = layout.readable_ids, layout.readable_from, layout.replaced_at
    chosen = _choose("patch_expand", z, None, backend)
    rows = torch.ops.lst_kernels.patch_expand(_flat(z), ids, start, stop, residual, chosen)
    return rows.view(layout.num_tokens, *z.shape[1:])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _choose(op: str, x: Tensor, reduce: str | None, asked: str) -> str:
    if torch.compiler.is_compiling():
        return backends.choose_traced(asked, op, x.device.type, x.dtype, None, reduce)
    return backends.choose(backends.Call(op, x.device.type, x.dtype, reduce=reduce), asked)


@backends.describes("patch_pool")
def _describe_pool(x: Tensor, layout: PatchLayout, reduce: Reduce = "mean") -> backends.Call:
    return backends.Call("patch_pool", x.device.type, x.dtype, reduce=reduce)


@backends.describes("patch_expand")
def _describe_expand(
    z: Tensor, layout: PatchLayout, shift: Literal[0, 1] = 0, residual: Tensor | None = None
) -> backends.Call:
    return backends.Call("patch_expand", z.device.type, z.dtype)


def _check_rows(
    name: str, x: Tensor, layout: PatchLayout, kind: Literal["tokens", "patches"]
) -> None:
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout must be a PatchLayout; got {type(layout).__name__}")
    check_float(name, x)
    num_rows = layout.num_tokens if kind == "tokens" else layout.num_patches
    if x.ndim == 0 or x.shape[0] != num_rows:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but the layout has {num_rows} {kind}")
    if x.device != layout.device:
        raise ValueError(f"layout is on {layout.device}, but {name} is on {x.device}")


def _check_residual(residual: Tensor, z: Tensor, layout: PatchLayout) -> None:
    _check_rows("residual", residual, layout, "tokens")
    if residual.dtype != z.dtype:
        raise TypeError(f"residual is {residual.dtype}, but z is {z.dtype}")
    if residual.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"residual has rows of shape {tuple(residual.shape[1:])}, but z of {tuple(z.shape[1:])}"
        )


# --- the operators ---

_lib = torch.library.Library("lst_kernels", "FRAGMENT")
for _schema in (
    "patch_pool(Tensor x, Tensor cu_patches, str reduce, str backend) -> (Tensor, Tensor)",
    "patch_pool_backward(Tensor grad, Tensor cu_patches, Tensor index, str reduce, "
    "SymInt num_tokens, str backend) -> Tensor",
    "patch_expand(Tensor z, Tensor ids, Tensor start, Tensor stop, Tensor? residual, str backend)"
    " -> Tensor",
    "patch_expand_backward(Tensor grad, Tensor ids, Tensor start, Tensor stop, str backend)"
    " -> Tensor",
):
    _lib.define(_schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_lib, "patch_pool", "CompositeExplicitAutograd")
def _pool(x: Tensor, cu_patches: Tensor, reduce: str, backend: str) -> tuple[Tensor, Tensor]:
    out, index = backends.load(backend).patch_pool(x.contiguous(), cu_patches, reduce)
    return out, cu_patches.new_empty(0, 0) if index is None else index


@torch.library.register_fake("lst_kernels::patch_pool", lib=_lib)
def _pool_fake(x: Tensor, cu_patches: Tensor, reduce: str, backend: str) -> tuple[Tensor, Tensor]:
    shape = (cu_patches.shape[0] - 1, x.shape[1])
    return x.new_empty(shape), cu_patches.new_empty(shape if reduce in ("max", "min") else (0, 0))


@torch.library.impl(_lib, "patch_pool_backward", "CompositeExplicitAutograd")
def _pool_backward(
    grad: Tensor, cu_patches: Tensor, index: Tensor, reduce: str, num_tokens: int, backend: str
) -> Tensor:
    winners = index if reduce in ("max", "min") else None
    return backends.load(backend).patch_pool_backward(
        grad.contiguous(), cu_patches, reduce, winners, num_tokens
    )


@torch.library.register_fake("lst_kernels::patch_pool_backward", lib=_lib)
def _pool_backward_fake(
    grad: Tensor, cu_patches: Tensor, index: Tensor, reduce: str, num_tokens: int, backend: str
) -> Tensor:
    return grad.new_empty(num_tokens, grad.shape[1])


@torch.library.impl(_lib, "patch_expand", "CompositeExplicitAutograd")
def _expand(
    z: Tensor, ids: Tensor, start: Tensor, stop: Tensor, residual: Tensor | None, backend: str
) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    return backends.load(backend).patch_expand(z.contiguous(), ids, residual)


@torch.library.register_fake("lst_kernels::patch_expand", lib=_lib)
def _expand_fake(
    z: Tensor, ids: Tensor, start: Tensor, stop: Tensor, residual: Tensor | None, backend: str
) -> Tensor:
    return z.new_empty(ids.shape[0], z.shape[1])


@torch.library.impl(_lib, "patch_expand_backward", "CompositeExplicitAutograd")
def _expand_backward(
    grad: Tensor, ids: Tensor, start: Tensor, stop: Tensor, backend: str
) -> Tensor:
    return backends.load(backend).patch_expand_backward(grad.contiguous(), ids, start, stop)


@torch.library.register_fake("lst_kernels::patch_expand_backward", lib=_lib)
def _expand_backward_fake(
    grad: Tensor, ids: Tensor, start: Tensor, stop: Tensor, backend: str
) -> Tensor:
    return grad.new_empty(start.shape[0], grad.shape[1])


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_patches, ctx.reduce, ctx.backend = inputs
    ctx.num_tokens = x.shape[0]
    ctx.save_for_backward(cu_patches, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_pool(ctx: Any, grad: Tensor, grad_index: Tensor) -> tuple[Tensor | None, ...]:
    share = torch.ops.lst_kernels.patch_pool_backward(
        grad, *ctx.saved_tensors, ctx.reduce, ctx.num_tokens, ctx.backend
    )
    return share, None, None, None


def _setup_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, start, stop, residual, ctx.backend = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(ids, start, stop)


def _differentiate_expand(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    total = torch.ops.lst_kernels.patch_expand_backward(grad, *ctx.saved_tensors, ctx.backend)
    return total, None, None, None, grad if ctx.has_residual else None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("patch_pool and patch_expand have no second derivative")


torch.library.register_autograd(
    "lst_kernels::patch_pool", _differentiate_pool, setup_context=_setup_pool, lib=_lib
)
torch.library.register_autograd(
    "lst_kernels::patch_expand", _differentiate_expand, setup_context=_setup_expand, lib=_lib
)
for _op in ("patch_pool_backward", "patch_expand_backward"):
    torch.library.register_autograd(f"lst_kernels::{_op}", _no_second_derivative, lib=_lib)
