"""Which implementation runs, why, and how to choose.

Every op takes ``backend=``. ``"auto"`` takes the first backend of the table below that can run the
call. A backend asked for by name, there, by ``with backend("reference"):`` or by the environment
variable ``LST_KERNELS_BACKEND``, in this order, is used or refused, never replaced:

    >>> import torch
    >>> from lst_kernels import PatchLayout, backend, explain, patch_pool
    >>> layout = PatchLayout.from_lengths([2, 1], [2])
    >>> explain("patch_pool", torch.ones(3, 4), layout)["flash"]
    'has no patch_pool'
    >>> with backend("reference"):
    ...     patch_pool(torch.tensor([[1.0], [3.0], [5.0]]), layout)
    tensor([[2.],
            [5.]])

The choice is made when an op is called, and its backward pass runs on the same backend. Inside
``torch.compile`` it is made while tracing and stays in the compiled code.
"""

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["backend", "explain"]


@dataclass(frozen=True, slots=True)
class Call:
    """What the choice of a backend may depend on."""

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int | None = None  # of the attention ops
    reduce: str | None = None  # of patch_pool


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation: its module has a function named after each op it covers."""

    name: str
    module: str
    refuses: Callable[[Call], str | None]  # why it does not cover this call, whatever the machine
    unavailable: Callable[[], str | None]  # why it cannot run on this machine
    #: of a backend that calls another library: each one tried, and "used" or the reason against it
    providers: Callable[[], dict[str, str]] = dict


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Ask for a backend by name for every op called inside the ``with`` block.

    Raises:
        ValueError: there is no backend of that name.
    """
    _check_name(name)
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Say for every backend why it would run this call, or why not.

    Args:
        op: an op of this package, or its name.
        args, kwargs: what the op would be called with.

    Returns:
        For each backend, in the order of preference: ``"chosen"``, ``"can run"``, or the reason
        against it. After a backend that covers the call, also its providers (``"flash/torch"``):
        ``"used"``, or the reason against them.

    Raises:
        ValueError: there is no op, or no backend, of that name.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _describe:
        raise ValueError(f"op must be one of {', '.join(_describe)}; got {name!r}")
    asked = kwargs.pop("backend", "auto")
    _check_name(asked)
    call = _describe[name](*args, **kwargs)
    try:
        chosen = choose(call, asked)
    except ValueError:
        chosen = None
    told: dict[str, str] = {}
    for b in BACKENDS:
        told[b.name] = "chosen" if b.name == chosen else _reason(b, call) or "can run"
        if b.refuses(call) is None:
            told |= {f"{b.name}/{name}": reason for name, reason in b.providers().items()}
    return told


def describes(op: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Register how an op's arguments become a `Call`, for `explain`."""

    def register(describe: Callable[..., Call]) -> Callable[..., Call]:
        _describe[op] = describe
        return describe

    return register


def choose(call: Call, asked: str) -> str:
    """The name of the backend that runs ``call``.

    Raises:
        ValueError: the backend asked for does not exist or cannot run the call.
    """
    asked = _resolve(asked)
    if asked != "auto":
        _check_name(asked)
        if _reason(_BY_NAME[asked], call) is not None:
            reasons = "; ".join(f"{b.name}: {_reason(b, call) or 'can run'}" for b in BACKENDS)
            raise ValueError(f"backend {asked!r} cannot run this {call.op} ({reasons})")
        return asked
    for candidate in BACKENDS:
        if candidate.refuses(call) is None:
            missing = candidate.unavailable()
            if missing is None:
                return candidate.name
            _warn_once(candidate.name, missing)
    raise AssertionError("the reference refuses nothing")


def choose_traced(
    asked: str, op: str, device: str, dtype: torch.dtype, head_dim: int | None, reduce: str | None
) -> str:
    """`choose` for traced code, where it becomes a constant."""
    return choose(Call(op, device, dtype, head_dim, reduce), asked)


# All that torch.compiler.assume_constant_result does, but for an import of the whole compiler, as
# long as that of torch itself: those who compile nothing need not wait for it.
choose_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load(name: str) -> Any:
    """The module of a backend."""
    return importlib.import_module(_BY_NAME[name].module)


def _resolve(asked: str) -> str:
    if asked != "auto":
        return asked
    if _asked.get() != "auto":
        return _asked.get()
    return os.environ.get("LST_KERNELS_BACKEND") or "auto"


def _reason(candidate: Backend, call: Call) -> str | None:
    return candidate.refuses(call) or candidate.unavailable()


def _check_name(name: str) -> None:
    if name != "auto" and name not in _BY_NAME:
        raise ValueError(f"backend must be auto or one of {', '.join(_BY_NAME)}; got {name!r}")


@functools.cache
def _warn_once(name: str, missing: str) -> None:
    warnings.warn(f"lst_kernels runs without its {name} backend: {missing}", stacklevel=2)


# --- the table, in the order of preference ---


def _flash_refuses(call: Call) -> str | None:
    if call.op not in ("sliding_window_attention", "block_causal_attention"):
        return f"has no {call.op}"
    if call.device != "cuda":
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {_name(call.dtype)}"
    if call.head_dim is not None and (call.head_dim % 8 or call.head_dim > 256):
        return f"takes head sizes up to 256 that are multiples of 8, not {call.head_dim}"
    from lst_kernels import flash

    return None if call.head_dim is None else flash.refusal(call.dtype, call.head_dim)


def _flash_unavailable() -> str | None:
    from lst_kernels import flash

    return flash.unavailable_reason()


def _flash_providers() -> dict[str, str]:
    from lst_kernels import flash

    return flash.providers()


def _native_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return f"runs on the CPU, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"takes float32, bfloat16, float16 and float64, not {_name(call.dtype)}"
    if call.head_dim is not None and call.head_dim > 256:
        return f"takes head sizes up to 256, not {call.head_dim}"
    return None


def _native_unavailable() -> str | None:
    from lst_kernels import native

    return native.unavailable_reason()


def _triton_refuses(call: Call) -> str | None:
    if call.device != "cuda" and not (call.device == "cpu" and _interprets()):
        return f"runs on cuda (ROCm too), not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {_name(call.dtype)}"
    if call.device == "cpu" and call.dtype == torch.bfloat16:
        return "computes no bfloat16 in Triton's interpreter"
    if call.head_dim is not None and call.head_dim > 256:
        return f"takes head sizes up to 256, not {call.head_dim}"
    return None


def _triton_unavailable() -> str | None:
    from lst_kernels import triton

    return triton.unavailable_reason()


def _interprets() -> bool:
    """Kernels run in Triton's interpreter, on the CPU, where this was set before Triton came in."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BACKENDS = (
    Backend("flash", "lst_kernels.flash", _flash_refuses, _flash_unavailable, _flash_providers),
    Backend("native", "lst_kernels.native", _native_refuses, _native_unavailable),
    Backend("triton", "lst_kernels.triton", _triton_refuses, _triton_unavailable),
    Backend("reference", "lst_kernels.reference", lambda call: None, lambda: None),
)
_BY_NAME = {b.name: b for b in BACKENDS}
_describe: dict[str, Callable[..., Call]] = {}
_asked: contextvars.ContextVar[str] = contextvars.ContextVar("_asked", default="auto")
