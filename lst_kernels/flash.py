"""Sliding-window and block-causal attention by the FlashAttention that torch brings.

The one difference to bridge: a window here counts the query's own key, FlashAttention's counts the
keys to its left. So ``window - 1``, which occurs in this file alone.

Shape letters: T tokens, N documents, Hq/Hkv heads, D head size.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Provider(NamedTuple):
    """A function with the arguments of torch's ``varlen_attn``."""

    attend: Callable[..., Any]
    takes_gqa: bool  # whether fewer key than query heads are its own business


def probe() -> Provider | str:
    """torch's provider, or why it is of no use. The import itself is the probe: a package that is
    found need not import, and the signature has changed with torch's versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except Exception as error:
        return f"torch.nn.attention.varlen does not import ({error})"
    parameters = inspect.signature(varlen_attn).parameters
    missing = [name for name in ("scale", "window_size") if name not in parameters]
    if missing:
        return f"varlen_attn of torch {torch.__version__} takes no {' and no '.join(missing)}"
    return Provider(varlen_attn, "enable_gqa" in parameters)


PROVIDER = probe()


def unavailable_reason() -> str | None:
    """Say in one line why this backend cannot run here; None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 or more"
    return PROVIDER if isinstance(PROVIDER, str) else None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    *,
    window: int | None,
    max_length: int,
    scale: float,
) -> Tensor:
    """Every row of q attends to the last ``window`` rows of its own sequence, itself included.

    Args:
        q: (T, Hq, D).
        k, v: (T, Hkv, D).
        cu: (N+1,) int32, offset of each sequence; last = T.
        window: rows, the query's own counted; None for all of them.
        max_length: the longest sequence. Rows past it would be left unwritten.
    """
    assert isinstance(PROVIDER, Provider), PROVIDER
    if q.shape[0] == 0:
        return q.clone()
    options: dict[str, bool] = {}
    if q.shape[1] != k.shape[1]:
        if PROVIDER.takes_gqa:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    left = -1 if window is None else window - 1
    out = PROVIDER.attend(
        q, k, v, cu, cu, max_length, max_length, scale=scale, window_size=(left, 0), **options
    )
    return _ContiguousGradient.apply(out)


class _ContiguousGradient(torch.autograd.Function):
    """Hands a contiguous gradient on: FlashAttention refuses the stride-0 one of ``sum()``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()
