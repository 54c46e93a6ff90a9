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
    """A kernel's arguments ``x_row`` and ``x_head`` for every tensor x (rows, heads, D)."""
    return {
        f"{name}_{dim}": x.stride(i)
        for name, x in tensors.items() for i, dim in enumerate(("row", "head"))
    }  # fmt: skip


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
