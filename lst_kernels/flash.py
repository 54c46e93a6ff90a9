"""Sliding-window and block-causal attention by the best FlashAttention that is installed.

Providers, in the order of preference:

    torch         `torch.nn.attention.varlen.varlen_attn`: torch's FlashAttention-2, or the
                  FlashAttention-3 or -4 that `activate` (or the user) has put in its place
    flash_attn    `flash_attn_varlen_func` of the package flash-attn 2
    xformers      `memory_efficient_attention` under a block-diagonal mask. ``torch.compile`` does
                  not trace it

A provider counts as present when the very function imports with the signature that is called here,
and a small attention runs through it on the device, forward and backward; otherwise it has a reason
against it, which `providers` tells. (Looking for the package is no proof: FlashAttention-4 alone
installs a ``flash_attn`` without the functions of flash-attn 2.)

What there is to bridge is the window. Ours counts the query's own key. The ``window_size`` of
FlashAttention and torch, (left, right), counts the keys on either side of it, −1 for all of them:
``(window - 1, 0)``. xformers' ``make_local_attention(window)`` counts as we do. ``window - 1``
occurs in this file alone.

The backward pass of FlashAttention adds up dQ in no fixed order, unless
``torch.use_deterministic_algorithms(True)`` asks for one and the provider has it.

Shape letters: T tokens, N documents, Hq/Hkv heads, D head size.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["activate", "causal_attention", "providers", "refusal", "unavailable_reason"]


class Provider(NamedTuple):
    """``attend(q, k, v, cu, window, max_length, scale)``, with causal_attention's arguments."""

    name: str
    attend: Callable[..., Tensor]
    takes_gqa: bool  # whether fewer key than query heads are its own business


#: The provider in use: found by the first call that asks whether this backend can run.
PROVIDER: Provider | None = None


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
    assert PROVIDER is not None, "nobody asked whether flash can run"
    if q.shape[0] == 0:
        return q.clone()
    if q.shape[1] != k.shape[1] and not PROVIDER.takes_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _ContiguousGradient.apply(PROVIDER.attend(q, k, v, cu, window, max_length, scale))


class _ContiguousGradient(torch.autograd.Function):
    """Hands a contiguous gradient on: FlashAttention refuses the stride-0 one of ``sum()``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()


# --- what can run here, and why not ---


def unavailable_reason() -> str | None:
    """Say in one line why this backend cannot run here; None where it can."""
    reason = _device_reason()
    if reason is None and _find() is None:
        reason = "; ".join(f"{name}: {why}" for name, why in providers().items())
    return reason


def refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the provider in use does not take heads of this size, tried out once for each; None
    where it takes them, or where `unavailable_reason` has the answer."""
    if unavailable_reason() is not None:
        return None
    assert PROVIDER is not None
    return _trial(PROVIDER, dtype, head_dim)


def providers() -> dict[str, str]:
    """``"used"`` for the provider in use, and for those before it the reason against them."""
    if (reason := _device_reason()) is not None:
        return dict.fromkeys(CANDIDATES, reason)
    used = _find()
    return _reasons if used is None else {**_reasons, used.name: "used"}


def activate() -> dict[str, str]:
    """Put the newest FlashAttention that is installed and runs here in the place of torch's own.

    This holds for the whole process, ``scaled_dot_product_attention`` included (where
    FlashAttention-3 and -4 refuse dropout), so it is the program's decision and not this
    library's: nothing here calls it.

    Returns:
        For each implementation that was tried, ``"active"``, or the reason against it.
    """
    if (reason := _device_reason()) is not None:
        return {"FA3": reason, "FA4": reason}
    from torch.nn import attention

    told: dict[str, str] = {}
    for name in ("FA3", "FA4") if torch.cuda.get_device_capability()[0] == 9 else ("FA4",):
        try:
            take_back = attention.restore_flash_attention_impl  # a torch without it has none
            attention.activate_flash_attention_impl(name)
            provider = _torch()
        except Exception as error:
            told[name] = _line(error)
            continue
        _trial.cache_clear()
        failure = _trial(provider, torch.bfloat16, 64)
        told[name] = failure or "active"
        if failure is None:
            break
        take_back()
        _trial.cache_clear()
    return told


_reasons: dict[str, str] = {}


def _find() -> Provider | None:
    """The first provider that runs; looked for once."""
    global PROVIDER
    if PROVIDER is None and not _reasons:
        for name, make in CANDIDATES.items():
            try:
                provider = make()
            except Exception as error:  # a package that is found need not import
                _reasons[name] = _line(error)
                continue
            failure = _trial(provider, torch.bfloat16, 64)
            if failure is None:
                PROVIDER = provider
                break
            _reasons[name] = failure
    return PROVIDER


@functools.cache
def _device_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 or more"
    return None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _trial(provider: Provider, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run two short sequences forward and backward; what the provider says against it.

    Asks the device nothing, so that a wrong number would pass: those are for the tests. Runs as it
    would outside of whatever mode the caller is in (tracing, counting FLOPs, inference, autocast).
    """
    try:
        device = _device()
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
        ):
            q, k, v = (
                torch.ones(32, 2, head_dim, dtype=dtype, device=device, requires_grad=True)
                for _ in range(3)
            )
            cu = torch.arange(0, 33, 16, dtype=torch.int32, device=device)
            for window in (4, None):
                out = provider.attend(q, k, v, cu, window, 16, head_dim**-0.5)
                if out.shape != q.shape:
                    return f"gave shape {tuple(out.shape)} for {tuple(q.shape)}"
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    except Exception as error:
        return _line(error)
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# --- the providers: each imports, checks the signature, and says how it counts a window ---


def _torch() -> Provider:
    from torch.nn.attention.varlen import varlen_attn

    call: Callable[..., Any] = varlen_attn  # its arguments depend on torch's version
    _needs(call, "scale", "window_size")
    takes_gqa = "enable_gqa" in inspect.signature(call).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor,
        window: int | None, max_length: int, scale: float,
    ) -> Tensor:  # fmt: skip
        options = {"enable_gqa": True} if takes_gqa and q.shape[1] != k.shape[1] else {}
        return call(
            q, k, v, cu, cu, max_length, max_length,
            scale=scale, window_size=_left_right(window), **options,
        )  # fmt: skip

    return Provider("torch", attend, takes_gqa)


def _flash_attn() -> Provider:
    from flash_attn import flash_attn_varlen_func

    _needs(flash_attn_varlen_func, "softmax_scale", "causal", "window_size", "deterministic")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor,
        window: int | None, max_length: int, scale: float,
    ) -> Tensor:  # fmt: skip
        return flash_attn_varlen_func(
            q, k, v, cu, cu, max_length, max_length,
            softmax_scale=scale,
            causal=True,
            window_size=_left_right(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return Provider("flash_attn", attend, takes_gqa=True)


def _xformers() -> Provider:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, _SeqLenInfo

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor,
        window: int | None, max_length: int, scale: float,
    ) -> Tensor:  # fmt: skip
        # Its constructor from_seqlens takes the lengths on the host, and to have them there would
        # wait for the device. The kernels read only the offsets on the device; the host's list
        # serves to check that queries and keys are cut alike, which they are.
        lengths = _SeqLenInfo(
            seqstart=cu, max_seqlen=max_length, min_seqlen=0, seqstart_py=[0, q.shape[0]]
        )
        mask: Any = BlockDiagonalCausalMask(q_seqinfo=lengths, k_seqinfo=lengths)
        if window is not None:
            mask = mask.make_local_attention(window)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]

    return Provider("xformers", attend, takes_gqa=False)


CANDIDATES: dict[str, Callable[[], Provider]] = {
    "torch": _torch,
    "flash_attn": _flash_attn,
    "xformers": _xformers,
}


def _left_right(window: int | None) -> tuple[int, int]:
    return (-1 if window is None else window - 1, 0)


def _needs(function: Callable[..., Any], *names: str) -> None:
    parameters = inspect.signature(function).parameters
    missing = [name for name in names if name not in parameters]
    if missing:
        raise TypeError(f"{function.__name__} takes no {' and no '.join(missing)}")
