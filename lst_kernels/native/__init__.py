"""The CPU kernels: C++ behind a C interface, loaded with ctypes the first time they are needed.

The library is built on install (``setup.py``, ``CMakeLists.txt``) and lies beside this file. It may
be absent, where no compiler was found, or stale, where the sources moved on in an editable install;
:func:`unavailable_reason` says which. The other functions hand torch tensors' buffers to it and may
be called only where it answers ``None``. They run on ``torch.get_num_threads()`` threads, those of
torch where they can be had (threads.cpp), and give the same bits for every number of them.
"""

import ctypes
import functools
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from lst_kernels.schedule import BLOCK_ROWS

if TYPE_CHECKING:
    from lst_kernels.ranges import KeyRanges

__all__ = [
    "patch_expand",
    "patch_expand_backward",
    "patch_pool",
    "patch_pool_backward",
    "plan_layout",
    "plan_ranges",
    "range_attention",
    "range_attention_backward",
    "segment_scan",
    "segment_scan_backward",
    "set_level",
    "unavailable_reason",
]

Family: TypeAlias = Literal["auto", "patch-owned", "tiled"]
Reduce: TypeAlias = Literal["mean", "sum", "max", "min", "first", "last"]

# What follows mirrors the sources: setup.py gives the file its name, interface.cpp its version,
# levels.h the numbers of the levels, attention.h those of dtypes and families and the structure,
# patch_pool.cpp those of the reductions, scan.h the features of a tile.
LIBRARY = Path(__file__).with_name(
    "liblst_kernels" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
)
ABI_VERSION = 7
LEVELS = ("portable", "avx2", "avx512")
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_FAMILY_CODES = {"auto": 0, "patch-owned": 1, "tiled": 2}
_REDUCE_CODES = {"mean": 0, "sum": 1, "max": 2, "min": 3, "first": 4, "last": 5}
_SCAN_FEATURES = 128

_IMPORTED_BY = os.getpid()


class _RangeAttention(ctypes.Structure):
    """LstRangeAttention of attention.h."""

    _BUFFERS = (
        "q",
        "k",
        "v",
        "start",
        "stop",
        "out",
        "lse",
        "grad_out",
        "grad_q",
        "grad_k",
        "grad_v",
    )
    _STRIDES = tuple(f"{x}_{of}" for x in ("q", "k", "v", "grad_out") for of in ("row", "head"))
    _SIZES = ("num_queries", "num_keys", "num_heads", "num_kv_heads", "head_dim")
    _CODES = ("dtype", "family", "num_threads")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _BUFFERS),
        *((name, ctypes.c_int64) for name in _STRIDES + _SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in _CODES),
    )


_POINTER, _SIZE, _CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = {
    "lst_plan_layout": [_POINTER] * 11 + [_SIZE] * 4 + [_CODE],
    "lst_plan_ranges": [_POINTER] * 7 + [_SIZE] * 3,
    "lst_patch_pool_forward": [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 3,
    "lst_patch_pool_backward": [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 3,
    "lst_patch_expand_forward": [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 2,
    "lst_patch_expand_backward": [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 2,
    "lst_segment_scan_forward": [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 2,
    "lst_segment_scan_backward": [_POINTER] * 7 + [_SIZE] * 3 + [_CODE] * 2,
    "lst_range_attention_forward": [ctypes.POINTER(_RangeAttention)],
    "lst_range_attention_backward": [ctypes.POINTER(_RangeAttention)],
}


def unavailable_reason() -> str | None:
    """Say in one line why the native library cannot be used; ``None`` where it can."""
    loaded = _load(LIBRARY)
    return loaded if isinstance(loaded, str) else None


def set_level(highest: str) -> str:
    """Let attention use no instruction set above this one from now on, for tests of the others.

    Args:
        highest: one of ``LEVELS``; ``"portable"`` is the baseline of the architecture.

    Returns:
        The level that then runs: the highest allowed one that the library and the machine have.
    """
    library = _load(LIBRARY)
    if isinstance(library, str):
        raise RuntimeError(library)
    return LEVELS[library.lst_set_level(LEVELS.index(highest))]


def plan_layout(
    cu_patches: Tensor,
    cu_documents: Tensor,
    closed_late: Tensor,
    num_tokens: int,
    num_dead_patches: int,
    readable_from: Tensor | None,
) -> dict[str, Tensor | int]:
    """What :class:`lst_kernels.PatchLayout` keeps beside its offsets, by its fields' names.

    Args:
        cu_patches: (P + 1,) int32, contiguous, on the CPU, as the others: from 0 to ``num_tokens``.
        cu_documents: (N + 1,) int32, from 0 to P.
        closed_late: (P,) bool.
        num_dead_patches: of the end of the stream.
        readable_from: (P,) int32, where it does not follow from these.

    Raises:
        ValueError: offsets fall, or end elsewhere.
    """
    num_patches, num_documents = closed_late.shape[0], cu_documents.shape[0] - 1
    for name, offsets in (("cu_patches", cu_patches), ("cu_documents", cu_documents)):
        _check_offsets(offsets, name)
    _check("closed_late", closed_late, torch.bool, 1)
    if cu_patches.shape[0] != num_patches + 1:
        raise ValueError(f"cu_patches has {cu_patches.shape[0]} offsets for {num_patches} patches")
    plan = {
        "cu_tokens": torch.empty_like(cu_documents),
        **{
            name: cu_patches.new_empty(num_tokens)
            for name in ("patch_ids", "token_positions", "readable_ids")
        },
        "patch_positions": cu_patches.new_empty(num_patches),
        "readable_from": readable_from,
        "replaced_at": cu_patches.new_empty(num_patches),
    }
    if readable_from is None:
        plan["readable_from"] = cu_patches.new_empty(num_patches)
    else:
        _check("readable_from", readable_from, torch.int32, 1)
        if readable_from.shape[0] != num_patches:
            raise ValueError(f"readable_from has {readable_from.shape[0]} of {num_patches} patches")
    longest = (ctypes.c_int64 * 3)()
    sizes = (num_tokens, num_patches, num_documents, num_dead_patches)
    buffers = (cu_patches, cu_documents, closed_late, *plan.values(), longest)
    _call("lst_plan_layout", *buffers, *sizes, int(readable_from is not None))
    names = ("max_patch_length", "max_document_tokens", "max_document_patches")
    return plan | dict(zip(names, longest, strict=True))


def plan_ranges(start: Tensor, stop: Tensor, num_keys: int) -> dict[str, Tensor | int | bool]:
    """What :class:`lst_kernels.KeyRanges` keeps beside its ranges, by its fields' names.

    Args:
        start, stop: (Q,) int32, contiguous, on the CPU.
        num_keys: K.

    Raises:
        ValueError: the ranges fall or leave the keys.
    """
    _check("start", start, torch.int32, 1)
    _check("stop", stop, torch.int32, 1)
    num_queries = start.shape[0]
    if stop.shape[0] != num_queries:
        raise ValueError(f"stop has {stop.shape[0]} queries, but start has {num_queries}")
    sizes = (num_keys, num_keys, *(-(-rows // BLOCK_ROWS) for rows in (num_queries, num_keys)))
    tensors = [start.new_empty(size) for size in sizes]
    facts = (ctypes.c_int64 * 6)()
    _call("lst_plan_ranges", start, stop, *tensors, facts, num_queries, num_keys, BLOCK_ROWS)
    num_pairs, max_keys, max_queries, disjoint, slots, key_slots = facts
    return {
        **dict(
            zip(("query_start", "query_stop", "query_order", "key_order"), tensors, strict=True)
        ),
        "num_pairs": num_pairs,
        "max_keys": max_keys,
        "max_queries": max_queries,
        "disjoint": bool(disjoint),
        "slots": slots,
        "key_slots": key_slots,
    }


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: "KeyRanges", scale: float, *, family: Family = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over ranges of keys.

    Args:
        q: (Q, Hq, D) on the CPU, with any strides. float32, bfloat16 or float64, or float16, which
            is computed as float32.
        k, v: (K, Hkv, D) of the same dtype. D is at most 256.
        family: ``"patch-owned"`` reads each range directly and needs ranges that share no key;
            ``"tiled"`` takes tiles of queries and keys; ``"auto"`` chooses by the ranges.

    Returns:
        out (Q, Hq, D), in q's dtype; lse (Q, Hq), float32 or float64. An empty range gives 0, −inf.

    Raises:
        ValueError: the ranges fall or leave the keys, or are not for the family asked for.
    """
    dtype = q.dtype
    q, k, v = map(_computable, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=_lse_dtype(q))
    _attend("lst_range_attention_forward", q, k, v, ranges, scale, family, out=out, lse=lse)
    return out.to(dtype), lse


def range_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: "KeyRanges",
    scale: float,
    *,
    family: Family = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the gradient (Q, Hq, D) of out; the rest as in the forward."""
    dtype = q.dtype
    q, k, v, grad, out = map(_computable, (q, k, v, grad, out))
    if not (grad.shape == out.shape == q.shape and grad.dtype == out.dtype == q.dtype):
        got = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in (grad, out))
        raise ValueError(f"grad and out: expected {tuple(q.shape)} of {q.dtype}, got {got}")
    if lse.shape != q.shape[:2] or lse.dtype != _lse_dtype(q):
        raise ValueError(f"lse: expected {tuple(q.shape[:2])}, got {tuple(lse.shape)} {lse.dtype}")
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    _attend(
        "lst_range_attention_backward", q, k, v, ranges, scale, family,
        out=out.contiguous(), lse=lse.contiguous(), grad_out=grad,
        grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
    )  # fmt: skip
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def patch_pool(x: Tensor, cu_patches: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
    """Reduce each patch's tokens to one row.

    Args:
        x: (T, F), contiguous, on the CPU: float32, bfloat16, float64, or float16, which is computed
            as float32. Sums of float32 are carried in float64.
        cu_patches: (P + 1,) int32, token offset of each patch, from 0 to T.
        reduce: an empty patch gives 0 under each. Under ``"max"`` and ``"min"`` the first of equal
            values wins, and a NaN wins over every number, as in :func:`torch.amax`.

    Returns:
        out (P, F) in x's dtype, and for ``"max"`` and ``"min"`` index (P, F) int32, the token that
        won (-1 in an empty patch), else ``None``.

    Raises:
        ValueError: an argument is not as above.
    """
    code = _code(reduce)
    dtype, x = x.dtype, _rows("x", x)
    _check_offsets(cu_patches)
    shape = (cu_patches.shape[0] - 1, x.shape[1])
    out = x.new_empty(shape)
    index = cu_patches.new_empty(shape) if reduce in ("max", "min") else None
    sizes = (x.shape[0], *shape)
    _call("lst_patch_pool_forward", x, cu_patches, out, index, *sizes, code, *_dtype_threads(x))
    return out.to(dtype), index


def patch_pool_backward(
    grad: Tensor, cu_patches: Tensor, reduce: Reduce, index: Tensor | None, num_tokens: int
) -> Tensor:
    """Give each token its share of its patch's gradient.

    Args:
        grad: (P, F), as x in the forward pass.
        cu_patches: (P + 1,) int32, token offset of each patch, from 0 to ``num_tokens``.
        reduce: as in the forward pass. ``"max"`` and ``"min"`` give the whole gradient to the token
            that won.
        index: (P, F) int32, contiguous, from the forward pass; ``None`` unless one of these two.
        num_tokens: T.

    Returns:
        (T, F) in grad's dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    code = _code(reduce)
    dtype, grad = grad.dtype, _rows("grad", grad)
    _check_offsets(cu_patches)
    num_patches, num_features = grad.shape
    if cu_patches.shape[0] != num_patches + 1:
        raise ValueError(f"cu_patches has {cu_patches.shape[0]} offsets for {num_patches} patches")
    if reduce in ("max", "min"):
        if index is None:
            raise ValueError(f'reduce="{reduce}" needs the index that the forward pass returned')
        _check("index", index, torch.int32, 2)
        if index.shape != grad.shape:
            raise ValueError(f"index is {tuple(index.shape)} where grad is {tuple(grad.shape)}")
    grad_x = grad.new_empty(num_tokens, num_features)
    sizes = (num_tokens, num_patches, num_features)
    buffers = (grad, cu_patches, index, grad_x)
    _call("lst_patch_pool_backward", *buffers, *sizes, code, *_dtype_threads(grad))
    return grad_x.to(dtype)


def patch_expand(z: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """Give every token t the row ``ids[t]``, or add it to the token's own.

    Args:
        z: (P, F), contiguous, on the CPU, of a dtype as in :func:`patch_pool`.
        ids: (T,) int32 in -1 … P - 1; -1 gives 0.
        residual: (T, F), contiguous, in z's dtype: what the rows are added to.

    Returns:
        (T, F) in z's dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    dtype, z = z.dtype, _rows("z", z)
    _check("ids", ids, torch.int32, 1)
    shape = (ids.shape[0], z.shape[1])
    if residual is not None:
        residual = _rows("residual", residual)
        if residual.shape != shape or residual.dtype != z.dtype:
            got = f"{tuple(residual.shape)} of {residual.dtype}"
            raise ValueError(f"residual: expected {shape} of {z.dtype}, got {got}")
    out = z.new_empty(shape)
    buffers = (z, ids, residual, out)
    _call("lst_patch_expand_forward", *buffers, ids.shape[0], *z.shape, *_dtype_threads(z))
    return out.to(dtype)


def patch_expand_backward(grad: Tensor, ids: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Sum the gradients of each patch's readers.

    Args:
        grad: (T, F), as z in the forward pass.
        ids: (T,) int32, as in the forward pass; ``start`` and ``stop`` say the same.
        start, stop: (P,) int32, patch p was given to tokens ``start[p] … stop[p] - 1``.

    Returns:
        (P, F) in grad's dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    dtype, grad = grad.dtype, _rows("grad", grad)
    start, stop = start.contiguous(), stop.contiguous()
    _check("start", start, torch.int32, 1)
    _check("stop", stop, torch.int32, 1)
    grad_z = grad.new_empty(start.shape[0], grad.shape[1])
    sizes = (grad.shape[0], start.shape[0], grad.shape[1])
    _call("lst_patch_expand_backward", grad, start, stop, grad_z, *sizes, *_dtype_threads(grad))
    return grad_z.to(dtype)


def segment_scan(x: Tensor, decay: Tensor, cu_segments: Tensor) -> Tensor:
    """``y[t] = decay[t] · y[t-1] + x[t]`` over the rows of each segment.

    Args:
        x: (P, F), contiguous, on the CPU: float32, bfloat16, float64, or float16, which is computed
            as float32. The state is carried as sums are in :func:`patch_pool`.
        decay: (P,) float32, contiguous; float64 where x is. Nothing is read of a segment's first.
        cu_segments: (N + 1,) int32, row offset of each segment, from 0 to P.

    Returns:
        (P, F) in x's dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    dtype, x = x.dtype, _rows("x", x)
    _check_scan(x, decay, cu_segments)
    y = torch.empty_like(x)
    sizes = (x.shape[0], cu_segments.shape[0] - 1, x.shape[1])
    _call("lst_segment_scan_forward", x, decay, cu_segments, y, *sizes, *_dtype_threads(x))
    return y.to(dtype)


def segment_scan_backward(
    grad: Tensor, decay: Tensor, cu_segments: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in grad's dtype, and of the decay, from the gradient (P, F) of y.

    Args:
        grad, y: (P, F), as x in the forward pass, which returned y.
        decay, cu_segments: those of the forward pass.

    Raises:
        ValueError: an argument is not as above.
    """
    dtype, grad, y = grad.dtype, _rows("grad", grad), _rows("y", y)
    _check_scan(grad, decay, cu_segments)
    if y.shape != grad.shape or y.dtype != grad.dtype:
        got = f"{tuple(y.shape)} of {y.dtype}"
        raise ValueError(f"y: expected {tuple(grad.shape)} of {grad.dtype}, got {got}")
    num_rows, num_features = grad.shape
    grad_x, grad_decay = torch.empty_like(grad), torch.empty_like(decay)
    carried = torch.float32 if grad.dtype == torch.bfloat16 else torch.float64
    partial = torch.empty(-(-num_features // _SCAN_FEATURES), num_rows, dtype=carried)
    buffers = (grad, decay, cu_segments, y, grad_x, grad_decay, partial)
    sizes = (num_rows, cu_segments.shape[0] - 1, num_features)
    _call("lst_segment_scan_backward", *buffers, *sizes, *_dtype_threads(grad))
    return grad_x.to(dtype), grad_decay


def _computable(x: Tensor) -> Tensor:
    """The tensor in a dtype that the library computes, its last dimension contiguous."""
    x = x.float() if x.dtype == torch.float16 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: "KeyRanges",
    scale: float,
    family: Family,
    **buffers: Tensor,
) -> None:
    """Call one of the two attention functions; ``buffers`` are those that it has beyond q, k, v."""
    buffers |= {"q": q, "k": k, "v": v, "start": ranges.start, "stop": ranges.stop}
    for name in ("start", "stop"):
        _check(name, buffers[name], torch.int32, 1)
    num_queries, num_heads, head_dim = q.shape
    if (
        k.shape != v.shape
        or k.shape[2] != head_dim
        or not q.dtype == k.dtype == v.dtype
        or not len(ranges.start) == len(ranges.stop) == num_queries
    ):
        shapes = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in buffers.items())
        raise ValueError(f"the buffers do not fit each other: {shapes}")
    arguments = _RangeAttention(
        **{name: buffer.data_ptr() for name, buffer in buffers.items()},
        **{
            f"{name}_{kind}": buffers[name].stride(dimension)
            for name in ("q", "k", "v", "grad_out")
            if name in buffers
            for dimension, kind in enumerate(("row", "head"))
        },
        num_queries=num_queries,
        num_keys=k.shape[0],
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        head_dim=head_dim,
        scale=scale,
        dtype=_DTYPE_CODES[q.dtype],
        family=_FAMILY_CODES[family],
        num_threads=torch.get_num_threads(),
    )
    _call(function, ctypes.byref(arguments))


def _rows(name: str, x: Tensor) -> Tensor:
    """A checked (rows, F) tensor in a dtype that the library computes."""
    x = x.float() if x.dtype == torch.float16 else x
    if x.dtype not in _DTYPE_CODES:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    _check(name, x, x.dtype, 2)
    return x


def _dtype_threads(x: Tensor) -> tuple[int, int]:
    return _DTYPE_CODES[x.dtype], torch.get_num_threads()


def _check(name: str, tensor: Tensor, dtype: torch.dtype, num_dimensions: int) -> None:
    """Refuse a tensor whose buffer the library would misread."""
    expected = f"contiguous {dtype} of {num_dimensions} dimensions on the CPU"
    if tensor.dtype != dtype or tensor.dim() != num_dimensions or tensor.device.type != "cpu":
        got = f"{tensor.dtype} of {tensor.dim()} dimensions on {tensor.device}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {expected}, got strides {tensor.stride()}")


def _check_offsets(cu: Tensor, name: str = "cu_patches") -> None:
    _check(name, cu, torch.int32, 1)
    if cu.numel() == 0:
        raise ValueError(f"{name}: expected at least the offset 0, got none")


def _check_scan(x: Tensor, decay: Tensor, cu_segments: Tensor) -> None:
    _check("decay", decay, torch.float64 if x.dtype == torch.float64 else torch.float32, 1)
    if decay.shape[0] != x.shape[0]:
        raise ValueError(f"decay: expected {x.shape[0]} of them, got {decay.shape[0]}")
    _check_offsets(cu_segments, "cu_segments")


def _code(reduce: Reduce) -> int:
    if reduce not in _REDUCE_CODES:
        raise ValueError(f"reduce: expected one of {', '.join(_REDUCE_CODES)}, got {reduce!r}")
    return _REDUCE_CODES[reduce]


def _call(function: str, *arguments: Any) -> None:
    library = _load(LIBRARY)
    if isinstance(library, str):
        raise RuntimeError(library)
    message = getattr(library, function)(
        *(item.data_ptr() if isinstance(item, Tensor) else item for item in arguments)
    )
    if message == b"out of memory":
        raise MemoryError(f"{function}: out of memory")
    if message is not None:
        raise ValueError(message.decode())


def _torch_team() -> ctypes.c_void_p | None:
    """What runs a parallel region on the threads of torch's OpenMP runtime, where that has GNU's
    interface; None in a forked child, where it hangs."""
    if os.getpid() != _IMPORTED_BY:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _POINTER)
    except (OSError, TypeError, AttributeError):  # another runtime; TypeError: on Windows
        return None


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its last part, the table of sections, does. Loading it then
    ends the process by a signal, as nothing else that may be wrong with a file does."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02"):
        return False
    order = "<" if header[5] == 1 else ">"
    (table,) = struct.unpack_from(order + "Q", header, 40)
    entry_size, num_entries = struct.unpack_from(order + "HH", header, 58)
    return path.stat().st_size < table + entry_size * num_entries


@functools.cache
def _load(path: Path) -> ctypes.CDLL | str:
    """Load the library, or say why not. Cached: the answer holds for the life of the process."""
    remedy = "reinstall lst where there is a C++17 compiler"
    if not path.exists():
        return f"the native library was not built; {remedy}"
    if _is_cut_short(path):
        return f"the native library is cut short; {remedy}"
    try:
        library = ctypes.CDLL(str(path))
        version = library.lst_abi_version()
        if version != ABI_VERSION:
            return f"the native library is of version {version}, not {ABI_VERSION}; {remedy}"
        for function, argument_types in _ARGUMENTS.items():
            getattr(library, function).argtypes = argument_types
            getattr(library, function).restype = ctypes.c_char_p
        library.lst_use_team.argtypes, library.lst_use_team.restype = [_POINTER], None
        library.lst_use_team(_torch_team())
    except (OSError, AttributeError) as error:
        return f"the native library does not load ({error}); {remedy}"
    return library
