"""What a machine does at best: how fast it copies, and how fast it multiplies matrices.

    floor of a piece of work = max(bytes / copy bandwidth, FLOPs / rate of a matrix product)

A copy counts what it reads and what it writes. Measured in the run whose figures are held against
it, for a machine that others use too has other limits an hour later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

CPU = torch.device("cpu")
ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    bytes_per_second: float  # of a large copy, read and written
    flops_per_second: float  # of a square matrix product: float32, bfloat16 on a GPU

    def floor(self, flops: float, nbytes: float) -> float:
        """The least seconds in which so many FLOPs and bytes can be done."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def bound(self, flops: float, nbytes: float) -> str:
        """Which of the two the floor comes from."""
        computing = flops / self.flops_per_second > nbytes / self.bytes_per_second
        return "FLOPs" if computing else "bytes"


def measure_limits(device: torch.device = CPU) -> Limits:
    """The best of some rounds: of the processor, with the threads that torch uses, or of a GPU."""
    size, rows, dtype, calls = (2**27, 2048, torch.float32, 1)  # well beyond the caches
    if device.type == "cuda":
        size, rows, dtype, calls = (2**30, 8192, torch.bfloat16, 10)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    # Of random numbers: a GPU multiplies ones faster than anything real, for they take less power.
    a, b, product = (torch.randn(rows, rows, dtype=dtype, device=device) for _ in range(3))

    def least_seconds(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(ROUNDS):
            begun = perf_counter()
            for _ in range(calls):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((perf_counter() - begun) / calls)
        return min(taken)

    return Limits(
        bytes_per_second=2 * size / least_seconds(lambda: target.copy_(source)),
        flops_per_second=2 * rows**3 / least_seconds(lambda: torch.mm(a, b, out=product)),
    )
