"""Tile sizes of the tiled attention kernels, for each architecture, kernel, dtype and head size.

None is measured yet. They were chosen from what the kernels compile to (`python -m lst_kernels.aot`):
the largest query tile that spills no register, for a key tile costs block_m FLOPs a byte, and
128 of them keep the L2 cache of an H100 below its bandwidth; then the deepest pipeline whose shared
memory leaves room for as many programs as the registers do. Forward tiles for 16-bit numbers agree
with those that torch's flex_attention ships for the same head sizes. sm_80's also serve 8.6, 8.9
and 12.0, whose 99 KB of shared memory bound them (but for float32 at head sizes over 128).
"""

import functools
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Kernel: TypeAlias = Literal["forward", "backward_q", "backward_kv"]


@dataclass(frozen=True, slots=True)
class Tile:
    """block_m rows of queries (query × packed head) by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# float32 products are exact and so run without tensor cores. Their operands are held in registers,
# head size and all, which leaves room for small tiles alone.
_FLOAT32: dict[tuple[Kernel, int], dict[int, Tile]] = {
    ("forward", 4): {64: Tile(32, 32, 4, 2), 128: Tile(16, 16, 4, 1), 256: Tile(32, 16, 8, 1)},
    ("backward_q", 4): {64: Tile(32, 32, 8, 2), 128: Tile(16, 16, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("backward_kv", 4): {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}

#: architecture → (kernel, bytes of a number) → largest head size of each row → tile
TILES: dict[str, dict[tuple[Kernel, int], dict[int, Tile]]] = {
    "sm_80": _FLOAT32 | {
        ("forward", 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("backward_q", 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
        ("backward_kv", 2): {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    },
    # dK and dV of head size 256 take tiles of 32 keys and mma.sync: the two sums over 64 keys, which
    # wgmma asks for, do not fit the registers.
    "sm_90": _FLOAT32 | {
        ("forward", 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
        ("backward_q", 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("backward_kv", 2): {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 2)},
    },
    "sm_100": _FLOAT32 | {
        ("forward", 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("backward_q", 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("backward_kv", 2): {64: Tile(64, 128, 8, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
    },
    "gfx942": {
        ("forward", 2): {64: Tile(128, 64, 4, 1), 128: Tile(128, 32, 4, 1), 256: Tile(64, 32, 4, 1)},
        ("backward_q", 2): {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
        ("backward_kv", 2): {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
        ("forward", 4): {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
        ("backward_q", 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
        ("backward_kv", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    },
    # Small enough for a handful of rows to make several tiles, and of different shapes.
    "interpreter": {
        (kernel, size): {256: tile}
        for kernel, tile in (
            ("forward", Tile(64, 32, 4, 1)),
            ("backward_q", Tile(32, 32, 4, 1)),
            ("backward_kv", Tile(32, 64, 4, 1)),
        )
        for size in (2, 4)
    },
}  # fmt: skip


@functools.cache
def tile(kernel: Kernel, architecture: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile for a head size."""
    table = TILES[architecture][kernel, dtype.itemsize]
    return table[min(size for size in table if size >= head_dim)]
