"""What the ops are called with, checked: each rule once, told in the caller's words."""

import operator
import os
from typing import SupportsIndex

import torch
from torch import Tensor

__all__ = [
    "MAX_ROWS",
    "check_float",
    "check_offset_values",
    "check_offsets",
    "check_size",
    "is_checked",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Rows of a stream are numbered in int32.
MAX_ROWS = 2**31 - 1


def check_size(name: str, value: SupportsIndex) -> int:
    """A number of things, as a Python integer: NumPy's and tensors' integers are taken too."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # symbolic where code is being traced
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def is_checked(x: Tensor) -> bool:
    """Whether values are looked at: on the CPU, for reading them elsewhere waits for the device."""
    return x.device.type == "cpu" or os.environ.get("LST_KERNELS_CHECK") == "1"


def check_float(name: str, x: Tensor) -> None:
    """A tensor in a dtype that is computed."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")


def check_offsets(name: str, cu: Tensor, rows_name: str, rows: Tensor) -> None:
    """(N+1,) int32, beside the rows that they are offsets of; the values are not read."""
    expected = f"{name} must be (N+1,) int32 offsets"
    if not isinstance(cu, Tensor):
        raise TypeError(f"{expected}; got {type(cu).__name__}")
    if cu.ndim != 1 or cu.dtype != torch.int32 or cu.shape[0] == 0:
        raise TypeError(f"{expected}; got {cu.dtype} of shape {tuple(cu.shape)}")
    if cu.device != rows.device:
        raise ValueError(f"{name} is on {cu.device}, but {rows_name} is on {rows.device}")


def check_offset_values(name: str, cu: Tensor, rows_name: str, num_rows: int) -> None:
    """From 0 to ``num_rows``, never falling. Reads them, so it is for the CPU alone."""
    if cu[0] != 0:
        raise ValueError(f"{name} must start at 0; got {int(cu[0])}")
    falls = cu[1:] < cu[:-1]
    if falls.any():
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"{name} must not decrease; at offset {i + 1} it falls from "
            f"{int(cu[i])} to {int(cu[i + 1])}"
        )
    if cu[-1] != num_rows:
        raise ValueError(f"{name} ends at {int(cu[-1])}, but {rows_name} has {num_rows} rows")
