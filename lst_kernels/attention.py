"""Attention in which every query reads one contiguous range of keys.

    out[i] = Σ_j softmax_j(scale · q[i]·k[j]) v[j]      over start[i] <= j < stop[i]
    lse[i] = log Σ_j exp(scale · q[i]·k[j])

    >>> import torch
    >>> from lst_kernels import PatchLayout, range_attention
    >>> layout = PatchLayout.from_lengths([1, 3, 2], [3])
    >>> slots = torch.randn(3, 8, 64)                 # a query per patch
    >>> tokens = torch.randn(6, 2, 64)                # keys and values, 4 query heads to each head
    >>> range_attention(slots, tokens, tokens, layout.patches_read_tokens()).shape
    torch.Size([3, 8, 64])

Shape letters: T tokens, N documents, Q queries, K keys, Hq/Hkv heads, D head size.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lst_kernels import backends, flash
from lst_kernels.checks import check_float, check_offset_values, check_offsets
from lst_kernels.ranges import KeyRanges, assemble, causal_ranges

__all__ = ["block_causal_attention", "range_attention", "sliding_window_attention"]

MAX_HEAD_DIM = 256


@overload
def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
    return_lse: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to its range of keys.

    Args:
        q: (Q, Hq, D), float32, bfloat16, float16 or float64; D from 1 to 256.
        k, v: (K, Hkv, D), in q's dtype. Hkv divides Hq: query head h reads key head h·Hkv // Hq.
        ranges: Q ranges of K keys.
        scale: factor of the scores; None for D ** -0.5.
        return_lse: also return lse.
        backend: a backend's name, or "auto" (see `lst_kernels.backends`).

    Returns:
        out (Q, Hq, D) in q's dtype, 0 where a range is empty; with ``return_lse`` also lse (Q, Hq),
        float32 (float64 for float64 inputs), −inf where a range is empty. An empty range sends no
        gradient. lse is not differentiable.

    Raises:
        ValueError: a shape or a device does not fit, or the backend asked for cannot run this.
        TypeError: a dtype does not fit.
    """
    _check_heads(q, k, v)
    _check_ranges(q, k, ranges)
    chosen = _choose("range_attention", q, backend)
    out, lse = _attend(q, k, v, ranges, scale, chosen)
    return (out, lse) if return_lse else out


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tokens: Tensor,
    *,
    window: int,
    max_length: int,
    ranges: KeyRanges | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every token to the last ``window`` tokens of its document, itself included.

    Args:
        q: (T, Hq, D), as in `range_attention`.
        k, v: (T, Hkv, D).
        cu_tokens: (N+1,) int32, token offset of each document; last = T.
        window: tokens, the query's own counted. (FlashAttention and torch count without it.)
        max_length: tokens of the longest document, or more: `PatchLayout.max_document_tokens`.
        ranges: the same pattern, `PatchLayout.sliding_window`, for the backends that are not
            FlashAttention. Without it they make it anew, which ``torch.compile`` cannot trace.
        scale, backend: as in `range_attention`.

    Returns:
        (T, Hq, D) in q's dtype. Dead tokens get 0, from FlashAttention values without meaning.

    Raises:
        ValueError: as in `range_attention`; or, told on the CPU alone, the offsets do not fit, or
            ``ranges`` are of a longer window.
        TypeError: as in `range_attention`.
    """
    if window < 1:
        raise ValueError(f"window counts the token itself, so it is at least 1; got {window}")
    _check_heads(q, k, v)
    chosen = _choose("sliding_window_attention", q, backend)
    return _attend_causally(
        q, k, v, cu_tokens, "cu_tokens", window, max_length, ranges, scale, chosen
    )


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_units: Tensor,
    *,
    max_length: int,
    ranges: KeyRanges | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every unit to the units of its document up to itself.

    Args:
        q: (U, Hq, D), as in `range_attention`, for U units: patches, or the tokens of a baseline.
        k, v: (U, Hkv, D).
        cu_units: (N+1,) int32, unit offset of each document; last = U.
        max_length: units of the longest document, or more: `PatchLayout.max_document_patches`.
        ranges: the same pattern, `PatchLayout.block_causal`; as in `sliding_window_attention`.
        scale, backend: as in `range_attention`.

    Returns:
        (U, Hq, D) in q's dtype. Dead units get 0, from FlashAttention values without meaning.

    Raises:
        ValueError: as in `range_attention`; or, told on the CPU alone, the offsets do not fit.
        TypeError: as in `range_attention`.
    """
    _check_heads(q, k, v)
    chosen = _choose("block_causal_attention", q, backend)
    return _attend_causally(q, k, v, cu_units, "cu_units", None, max_length, ranges, scale, chosen)


def _attend_causally(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    cu_name: str,
    window: int | None,
    max_length: int,
    ranges: KeyRanges | None,
    scale: float | None,
    chosen: str,
) -> Tensor:
    _check_causal(q, k, cu, cu_name)
    if chosen == "flash":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return flash.causal_attention(
            q, k, v, cu, window=window, max_length=max_length, scale=scale
        )
    if ranges is None:
        _check_lengths(cu, cu_name, len(q), max_length)
        ranges = causal_ranges(
            cu, num_rows=len(q), window=window, max_length=max_length, num_live=len(q)
        )
    _check_ranges(q, k, ranges)
    _check_window(ranges, window)
    return _attend(q, k, v, ranges, scale, chosen)[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float | None, chosen: str
) -> tuple[Tensor, Tensor]:
    return torch.ops.lst_kernels.range_attention(
        q, k, v,
        ranges.start, ranges.stop, ranges.query_start, ranges.query_stop,
        ranges.query_order, ranges.key_order,
        q.shape[-1] ** -0.5 if scale is None else scale,
        ranges.num_pairs, ranges.max_keys, ranges.max_queries, ranges.disjoint, ranges.slots,
        chosen,
    )  # fmt: skip


def _choose(op: str, q: Tensor, asked: str) -> str:
    if torch.compiler.is_compiling():
        head_dim = len(range(q.shape[-1]))  # a constant where dynamic shapes make it a symbol
        return backends.choose_traced(asked, op, q.device.type, q.dtype, head_dim, None)
    return backends.choose(_call(op, q), asked)


def _call(op: str, q: Tensor) -> backends.Call:
    return backends.Call(op, q.device.type, q.dtype, head_dim=q.shape[-1])


for _op in __all__:
    backends.describes(_op)(lambda q, *_, op=_op, **__: _call(op, q))


# --- checks, each rule once ---


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, shape in (
        ("q", q, "(Q, Hq, D)"),
        ("k", k, "(K, Hkv, D)"),
        ("v", v, "(K, Hkv, D)"),
    ):
        check_float(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must be {shape}; got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, but k has {tuple(k.shape)}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head size {k.shape[2]}, but q has {q.shape[2]}")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q has head size {q.shape[2]}; expected 1 to {MAX_HEAD_DIM}")
    if q.shape[1] == 0:
        raise ValueError(f"q must have heads; got shape {tuple(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}; expected shapes "
            f"(rows, heads, head size), got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )


def _check_ranges(q: Tensor, k: Tensor, ranges: KeyRanges) -> None:
    if not isinstance(ranges, KeyRanges):
        raise TypeError(
            "ranges must be KeyRanges, as the methods of a PatchLayout make; got "
            f"{type(ranges).__name__}"
        )
    if q.shape[0] != ranges.start.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, but ranges has {ranges.num_queries} queries")
    num_keys = ranges.query_start.shape[0] or ranges.num_keys  # `part_ranges` has no transpose
    if k.shape[0] != num_keys:
        raise ValueError(f"k has {k.shape[0]} rows, but ranges is over {ranges.num_keys} keys")
    if q.device != ranges.start.device:
        raise ValueError(f"ranges is on {ranges.start.device}, but q is on {q.device}")


def _check_causal(q: Tensor, k: Tensor, cu: Tensor, cu_name: str) -> None:
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k has {k.shape[0]} rows, but q has {q.shape[0]}")
    check_offsets(cu_name, cu, "q", q)


def _check_window(ranges: KeyRanges, window: int | None) -> None:
    """On the CPU alone, where the host values of ranges are exact."""
    if torch.compiler.is_compiling() or ranges.start.device.type != "cpu" or window is None:
        return
    if ranges.max_keys > window:
        raise ValueError(f"window is {window}, but a query of ranges reads {ranges.max_keys} keys")


def _check_lengths(cu: Tensor, cu_name: str, num_rows: int, max_length: int) -> None:
    """Reads the offsets, so on the CPU alone."""
    if cu.device.type != "cpu":
        return
    check_offset_values(cu_name, cu, "q", num_rows)
    longest = int(torch.diff(cu).max()) if len(cu) > 1 else 0
    if longest > max_length:
        raise ValueError(f"max_length is {max_length}, but a document of {longest} rows is longer")


# --- the operator ---

_RANGES = (
    "Tensor start, Tensor stop, Tensor query_start, Tensor query_stop, "
    "Tensor query_order, Tensor key_order, float scale, "
    "SymInt num_pairs, SymInt max_keys, SymInt max_queries, bool disjoint, SymInt slots, "
    "str backend"
)
_lib = torch.library.Library("lst_kernels", "FRAGMENT")
_lib.define(
    f"range_attention(Tensor q, Tensor k, Tensor v, {_RANGES}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "range_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RANGES}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_lib, "range_attention", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    ranges, scale, backend = _unpack(plan, len(k))
    with torch.autocast(q.device.type, enabled=False):
        return backends.load(backend).range_attention(q, k, v, ranges, scale)


@torch.library.register_fake("lst_kernels::range_attention", lib=_lib)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype)


@torch.library.impl(_lib, "range_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *plan: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ranges, scale, backend = _unpack(plan, len(k))
    if len(ranges.query_start) != len(k):
        raise RuntimeError("these ranges have no transpose: they are for a forward pass alone")
    with torch.autocast(q.device.type, enabled=False):
        return backends.load(backend).range_attention_backward(
            grad, q, k, v, out, lse, ranges, scale
        )


@torch.library.register_fake("lst_kernels::range_attention_backward", lib=_lib)
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _unpack(plan: tuple[Any, ...], num_keys: int) -> tuple[KeyRanges, float, str]:
    start, stop, query_start, query_stop, query_order, key_order, scale, *rest, name = plan
    num_pairs, max_keys, max_queries, disjoint, slots = rest
    ranges = assemble(
        start=start, stop=stop, num_keys=num_keys,
        query_start=query_start, query_stop=query_stop,
        query_order=query_order, key_order=key_order,
        num_pairs=num_pairs, max_keys=max_keys, max_queries=max_queries, disjoint=disjoint,
        slots=slots, key_slots=0,
    )  # fmt: skip
    return ranges, scale, name


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (q, k, v), plan, ctx.rest = inputs[:3], inputs[3:9], inputs[9:]
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lst_kernels.range_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * 13)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("range_attention has no second derivative")


torch.library.register_autograd(
    "lst_kernels::range_attention", _differentiate, setup_context=_setup_context, lib=_lib
)
torch.library.register_autograd(
    "lst_kernels::range_attention_backward", _no_second_derivative, lib=_lib
)


# Two products a pair forward (q·k and p·v), four backward (dv, dp, dq, dk). The scores that the
# backward pass computes again are its own affair: training counts three times the forward pass.
@register_flop_formula(torch.ops.lst_kernels.range_attention)
def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *plan: Any, **_: Any) -> int:
    return 4 * plan[7] * q[1] * q[2]


@register_flop_formula(torch.ops.lst_kernels.range_attention_backward)
def _backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: torch.Size,
    lse: torch.Size, *plan: Any, **_: Any,
) -> int:  # fmt: skip
    return 8 * plan[7] * q[1] * q[2]
