"""One kernel launch as a value, so that the same description runs a kernel and compiles it ahead.

The op files build a `Launch` from tensors; calling it launches the kernel. `lst_kernels.aot` builds
the same values from tensors that hold nothing and compiles them for a GPU that is not there.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """``kernel`` over ``programs`` programs, all on grid-x: y and z end at 65,535."""

    kernel: Any
    programs: int
    #: every argument of the kernel by name, constexprs too
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        """Run the kernel on the current device; nothing for no programs."""
        if self.programs:
            self.kernel[(self.programs,)](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
            )


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def strides(**tensors: Tensor) -> dict[str, int]:
    """A kernel's arguments ``x_row`` and ``x_head`` for every tensor x (rows, heads, D), counted in
    UNIT elements (`in_elements`).

    Loads are as wide as strides are known to be multiples of. Of a multiple of 16 Triton knows that
    by itself; of the 8 numbers in 16 bytes, as heads of 72 are apart, it would not.
    """
    found = {
        f"{name}_{dim}": x.stride(i)
        for name, x in tensors.items() for i, dim in enumerate(("row", "head"))
    }  # fmt: skip
    width = 16 // next(iter(tensors.values())).element_size()
    wide = all(stride % width == 0 for stride in found.values())
    unit = width if wide and any(stride % 16 for stride in found.values()) else 1
    return {name: stride // unit for name, stride in found.items()} | {"UNIT": unit}


@triton.jit
def in_elements(row, head, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two of `strides`, in elements."""
    if UNIT == 1:
        return row, head
    else:
        return tl.cast(row, tl.int64) * UNIT, tl.cast(head, tl.int64) * UNIT


def rows(x: Tensor) -> Tensor:
    """``x`` with elements of a row side by side; its other strides are free, also 0."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def architecture(device: torch.device) -> str:
    """Which column of the tables a device reads."""
    return "interpreter" if device.type != "cuda" else _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    # Consumer parts (8.6, 8.9, 12.0) have 99 KB of shared memory: the tables of sm_80 fit those.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def interpreter_fault() -> str | None:
    """Why the interpreter runs no loop of a kernel here, or None: Triton before 3.7 makes numbers
    of arrays of one element, which NumPy refuses from 2.4 on."""
    versions = triton.__version__, np.__version__
    old, new = (tuple(map(int, version.split(".")[:2])) for version in versions)
    if old >= (3, 7) or new < (2, 4):
        return None
    return f"the interpreter of Triton {versions[0]} needs NumPy before 2.4; {versions[1]} is here"
