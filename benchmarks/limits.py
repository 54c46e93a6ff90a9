"""What a machine does at best: how fast it copies, and how fast it multiplies matrices.

    floor of a piece of work = max(bytes / copy bandwidth, FLOPs / rate of a matrix product)

A copy counts what it reads and what it writes. Measured in the run whose figures are held against
it, for a machine that others use too has other limits an hour later.
"""

from dataclasses import dataclass
from time import perf_counter

import torch

COPY_BYTES = 2**27  # well beyond the caches
PRODUCT = 2048  # rows and columns
ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    bytes_per_second: float  # of a large copy, read and written
    flops_per_second: float  # of a square float32 matrix product

    def floor(self, flops: float, nbytes: float) -> float:
        """The least seconds in which so many FLOPs and bytes can be done."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def bound(self, flops: float, nbytes: float) -> str:
        """Which of the two the floor comes from."""
        computing = flops / self.flops_per_second > nbytes / self.bytes_per_second
        return "FLOPs" if computing else "bytes"


def measure_limits() -> Limits:
    """Of this machine's processor, with the threads that torch uses: the best of some rounds."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8)
    target = torch.empty_like(source)
    a, b, product = (torch.ones(PRODUCT, PRODUCT) for _ in range(3))
    copies, products = [], []
    for _ in range(ROUNDS):
        begun = perf_counter()
        target.copy_(source)
        copied = perf_counter()
        torch.mm(a, b, out=product)
        copies.append(copied - begun)
        products.append(perf_counter() - copied)
    return Limits(
        bytes_per_second=2 * COPY_BYTES / min(copies),
        flops_per_second=2 * PRODUCT**3 / min(products),
    )
