"""What the ops are called with, checked: each rule once, told in the caller's words."""

import torch
from torch import Tensor

__all__ = ["check_float", "check_offset_values", "check_offsets"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
