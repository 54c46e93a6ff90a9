"""In what order the tiles of a range problem are taken up, computed once per batch.

A kernel gives each of its programs a tile of consecutive rows: queries in the forward pass, keys
(through the transposed ranges) in the pass for dK and dV. Which columns a tile reads needs no
table, for both ends of a range never decrease: of rows ``a … b`` they are

    start[a] … stop[b] - 1     all columns that some row reads
    start[b] … stop[a] - 1     the columns that every row reads: no mask there

What is left to plan is the order. Rows come in blocks of `BLOCK_ROWS`, the largest tile of any
kernel, so that one order serves every tile size, and blocks with most columns come first: the last
programs to run are then short ones, and no multiprocessor ends the kernel alone with a long one.

    >>> import torch
    >>> stop = torch.arange(1, 301, dtype=torch.int32)       # causal: later rows read more
    >>> heavy_first(torch.zeros_like(stop), stop).tolist()
    [2, 1, 0]

Everything here is vectorised and asks a device nothing.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK_ROWS", "heavy_first", "queries_per_range"]

BLOCK_ROWS = 128


def heavy_first(start: Tensor, stop: Tensor) -> Tensor:
    """The blocks of rows in decreasing order of the columns they span.

    Args:
        start, stop: (R,) int32, the range of each row; neither decreases.

    Returns:
        (ceil(R / BLOCK_ROWS),) int32, a permutation. Blocks of equal work keep their order, so that
        neighbours, which read the same columns, run together.
    """
    last = torch.arange(BLOCK_ROWS - 1, start.shape[0] + BLOCK_ROWS - 1, BLOCK_ROWS,
                        device=stop.device).clamp_(max=start.shape[0] - 1)  # fmt: skip
    columns = stop[last] - start[::BLOCK_ROWS]
    return torch.argsort(columns, descending=True, stable=True).to(torch.int32)


def queries_per_range(start: Tensor, stop: Tensor) -> int:
    """How many consecutive queries share each range, where the ranges have no key in common.

    Args:
        start, stop: (Q,) int32 on the CPU, the range of each query; neither decreases.

    Returns:
        S such that queries ``i·S … (i+1)·S - 1`` have one range for every i, and share no key with
        other queries (a patch encoder with S slots). 0 where there is no such number.
    """
    num_queries = start.shape[0]
    for rows in (BLOCK_ROWS, num_queries):  # windows overlap from the first rows on: soon told
        a, b = start[:rows], stop[:rows]
        differs = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
        if (differs & (a[1:] < b[:-1])).any():
            return 0
    firsts = torch.cat((differs.new_ones(min(num_queries, 1)), differs)).nonzero().flatten()
    runs = torch.diff(firsts, append=firsts.new_tensor([num_queries]))
    shared = runs[start[firsts] < stop[firsts]]
    if len(shared) == 0:
        return 1  # nobody reads anything
    slots = int(shared[0])
    # Empty ranges that follow each other are one run, even of several groups.
    return slots if (shared == slots).all() and (runs % slots == 0).all() else 0
