"""Tile sizes of the tiled attention kernels, for each architecture, kernel, dtype and head size.

None is measured yet. They were chosen from what the kernels compile to, read off with
`python -m lst_kernels.aot`: the largest query tile that spills no register, in Triton 3.6 (that of
torch 2.11) as in 3.7, for a key tile yields block_m FLOPs a byte, and 128 of them keep the L2 cache
of an H100 below its bandwidth; then the deepest pipeline whose shared memory leaves room for as
many programs as the registers do. sm_80's also serve 8.6, 8.9 and 12.0, whose 99 KB of shared
memory bound them (but for float32 at head sizes over 128).
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


Table: TypeAlias = dict[tuple[Kernel, int], dict[int, Tile]]


def _row(up_to_64: Tile, up_to_128: Tile, up_to_256: Tile) -> dict[int, Tile]:
    return {64: up_to_64, 128: up_to_128, 256: up_to_256}


# float32 products are exact and so run without tensor cores. Their operands are held in registers,
# head size and all, which leaves room for small tiles alone.
_FLOAT32: Table = {
    ("forward", 4): _row(Tile(32, 32, 4, 2), Tile(16, 16, 4, 1), Tile(32, 16, 8, 1)),
    ("backward_q", 4): _row(Tile(32, 32, 8, 2), Tile(16, 16, 8, 2), Tile(32, 32, 8, 2)),
    ("backward_kv", 4): _row(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

#: architecture → (kernel, bytes of a number) → largest head size of each tile → tile
TILES: dict[str, Table] = {
    "sm_80": _FLOAT32 | {
        ("forward", 4): _row(Tile(32, 32, 4, 2), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1)),
        ("backward_kv", 4): _row(Tile(16, 32, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        ("forward", 2): _row(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
        ("backward_q", 2): _row(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 2)),
        ("backward_kv", 2): _row(Tile(32, 64, 4, 1), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    },
    # dK and dV of head size 256 take tiles of 32 keys and mma.sync: two sums over the 64 keys that
    # wgmma asks for do not fit the registers.
    "sm_90": _FLOAT32 | {
        ("forward", 2): _row(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        ("backward_q", 2): _row(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        ("backward_kv", 2): _row(Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
    },
    "sm_100": _FLOAT32 | {
        ("forward", 4): _row(Tile(32, 32, 4, 2), Tile(16, 16, 4, 1), Tile(32, 32, 8, 1)),
        ("backward_q", 4): _row(Tile(32, 32, 8, 2), Tile(16, 16, 8, 2), Tile(32, 32, 16, 2)),
        ("forward", 2): _row(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        ("backward_q", 2): _row(Tile(128, 32, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        ("backward_kv", 2): _row(Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 8, 2)),
    },
    "gfx942": {
        ("forward", 2): _row(Tile(128, 64, 4, 1), Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
        ("backward_q", 2): _row(Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        ("backward_kv", 2): _row(Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(16, 32, 4, 1)),
        ("forward", 4): _row(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
        ("backward_q", 4): _row(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
        ("backward_kv", 4): _row(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    },
    # Small enough for a handful of rows to make several tiles, and of different shapes.
    "interpreter": {
        ("forward", 2): _row(*[Tile(64, 32, 4, 1)] * 3),
        ("backward_q", 2): _row(*[Tile(32, 32, 4, 1)] * 3),
        ("backward_kv", 2): _row(*[Tile(32, 64, 4, 1)] * 3),
        ("forward", 4): _row(*[Tile(32, 64, 4, 1)] * 3),
        ("backward_q", 4): _row(*[Tile(64, 32, 4, 1)] * 3),
        ("backward_kv", 4): _row(*[Tile(64, 32, 4, 1)] * 3),
    },
}  # fmt: skip


@functools.cache
def tile(kernel: Kernel, architecture: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile for a head size."""
    row = TILES[architecture][kernel, dtype.itemsize]
    return row[min(size for size in row if size >= head_dim)]
