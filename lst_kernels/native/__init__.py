"""The CPU kernels: C++ behind a C interface, loaded with ctypes the first time they are needed.

The library is built on install (``setup.py``, ``CMakeLists.txt``) and lies beside this file. It may
be absent, where no compiler was found, or stale, where the sources moved on in an editable install;
:func:`unavailable_reason` says which. The other functions hand torch tensors' buffers to it and may
be called only where it answers ``None``. They run on ``torch.get_num_threads()`` threads and give
the same bits for every number of them.
"""

import ctypes
import functools
import sys
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["patch_pool", "patch_pool_backward", "unavailable_reason"]

Reduce: TypeAlias = Literal["mean", "sum", "max"]

# What follows mirrors the C++ sources: setup.py gives the file its name, interface.cpp its version,
# patch_pool.cpp the numbers of the reductions.
LIBRARY = Path(__file__).with_name(
    "liblst_kernels" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
)
ABI_VERSION = 1
_REDUCE_CODES = {"mean": 0, "sum": 1, "max": 2}

_BUFFERS_SIZES_CODES = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int32] * 2
_ARGUMENTS = {
    "lst_patch_pool_f32": _BUFFERS_SIZES_CODES,
    "lst_patch_pool_backward_f32": _BUFFERS_SIZES_CODES,
}


def unavailable_reason() -> str | None:
    """Say in one line why the native library cannot be used; ``None`` where it can."""
    loaded = _load(LIBRARY)
    return loaded if isinstance(loaded, str) else None


def patch_pool(x: Tensor, cu_patches: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
    """Reduce each patch's tokens to one row.

    Args:
        x: (T, F) float32, contiguous, on the CPU.
        cu_patches: (P + 1,) int32, token offset of each patch, from 0 to T.
        reduce: an empty patch gives 0 under each. Under ``"max"`` the first of equal values wins,
            and a NaN wins over every number, as in :func:`torch.amax`.

    Returns:
        out (P, F) float32, and for ``"max"`` index (P, F) int32, the token that won (-1 in an empty
        patch), else ``None``.

    Raises:
        ValueError: an argument is not as above.
    """
    _check("x", x, torch.float32, 2)
    _check("cu_patches", cu_patches, torch.int32, 1)
    num_tokens, num_features = x.shape
    num_patches = cu_patches.shape[0] - 1
    out = x.new_empty(num_patches, num_features)
    index = cu_patches.new_empty(num_patches, num_features) if reduce == "max" else None
    _call(
        "lst_patch_pool_f32",
        *(x, cu_patches, out, index),
        *(num_tokens, num_patches, num_features),
        *(_code(reduce), torch.get_num_threads()),
    )
    return out, index


def patch_pool_backward(
    grad: Tensor, cu_patches: Tensor, reduce: Reduce, index: Tensor | None, num_tokens: int
) -> Tensor:
    """Give each token its share of its patch's gradient.

    Args:
        grad: (P, F) float32, contiguous, on the CPU.
        cu_patches: (P + 1,) int32, token offset of each patch, from 0 to ``num_tokens``.
        reduce: as in the forward pass. ``"max"`` gives the whole gradient to the token that won.
        index: (P, F) int32, contiguous, from the forward pass; ``None`` unless ``"max"``.
        num_tokens: T.

    Returns:
        (T, F) float32.

    Raises:
        ValueError: an argument is not as above.
    """
    _check("grad", grad, torch.float32, 2)
    _check("cu_patches", cu_patches, torch.int32, 1)
    num_patches, num_features = grad.shape
    if cu_patches.shape[0] != num_patches + 1:
        raise ValueError(f"cu_patches has {cu_patches.shape[0]} offsets for {num_patches} patches")
    if reduce == "max":
        if index is None:
            raise ValueError('reduce="max" needs the index that the forward pass returned')
        _check("index", index, torch.int32, 2)
        if index.shape != grad.shape:
            raise ValueError(f"index is {tuple(index.shape)} where grad is {tuple(grad.shape)}")
    grad_x = grad.new_empty(num_tokens, num_features)
    _call(
        "lst_patch_pool_backward_f32",
        *(grad, cu_patches, index, grad_x),
        *(num_tokens, num_patches, num_features),
        *(_code(reduce), torch.get_num_threads()),
    )
    return grad_x


def _check(name: str, tensor: Tensor, dtype: torch.dtype, num_dimensions: int) -> None:
    """Refuse a tensor whose buffer the library would misread."""
    expected = f"contiguous {dtype} of {num_dimensions} dimensions on the CPU"
    if tensor.dtype != dtype or tensor.dim() != num_dimensions or tensor.device.type != "cpu":
        got = f"{tensor.dtype} of {tensor.dim()} dimensions on {tensor.device}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {expected}, got strides {tensor.stride()}")
    if num_dimensions == 1 and tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least the offset 0, got none")


def _code(reduce: Reduce) -> int:
    if reduce not in _REDUCE_CODES:
        raise ValueError(f"reduce: expected one of {', '.join(_REDUCE_CODES)}, got {reduce!r}")
    return _REDUCE_CODES[reduce]


def _call(function: str, *arguments: Tensor | int | None) -> None:
    library = _load(LIBRARY)
    if isinstance(library, str):
        raise RuntimeError(library)
    message = getattr(library, function)(
        *(item.data_ptr() if isinstance(item, Tensor) else item for item in arguments)
    )
    if message is not None:
        raise ValueError(message.decode())


@functools.cache
def _load(path: Path) -> ctypes.CDLL | str:
    """Load the library, or say why not. Cached: the answer holds for the life of the process."""
    remedy = "reinstall lst where there is a C++17 compiler"
    if not path.exists():
        return f"the native library was not built; {remedy}"
    try:
        library = ctypes.CDLL(str(path))
        version = library.lst_abi_version()
        if version != ABI_VERSION:
            return f"the native library is of version {version}, not {ABI_VERSION}; {remedy}"
        for function, argument_types in _ARGUMENTS.items():
            getattr(library, function).argtypes = argument_types
            getattr(library, function).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"the native library does not load ({error}); {remedy}"
    return library
