"""A first-order recurrence over the rows of each segment, in three kernels.

The stream is cut into chunks of ROWS rows, wherever segments end, so that one long document gives
as many programs as many short ones:

    ends        a program owns a chunk and some features: the state after its rows, begun from none
    carries     a program owns some features and joins the chunks: the state before each of them
    rows        a program owns a chunk and some features: its rows again, begun from that state

A *gate* is what a row keeps of the state before it: its decay, and 0 where a segment starts. A gate
of 0 selects the row instead of multiplying, so nothing crosses it, NaN neither; no quotient and no
logarithm is formed. Backward, the same kernels walk from the last row to the first, where a row's
gate is that of the row behind it; the decay's gradient leaves as a part for each block of features.

Memory-bound: forward 3·e·P·F bytes (x twice, y), backward 4·e·P·F (dy twice, y, dx), and for the
states 16/ROWS·P·F more of each; 4·P·F FLOPs forward, 6·P·F backward. No atomics: the same bits from
run to run. States are float32.

Shape letters: P rows, F features, C chunks; a program has BLOCK_F features.
"""

# Jitted functions take what Triton passes: pointers, scalars, constants.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lst_kernels.triton.launch import Launch, ceil_div, power_of_2

# A warp walks a chunk row by row, 16 bytes a thread: no thread waits for another, and the decay's
# gradient is summed within the warp. A chunk is long enough that its state, read and written twice
# in float32, is little beside its rows. Chosen, not measured.
ROWS = 64
ROW_BYTES = 512
# The chunks and features of a tile of `scan_carries`.
JOINED, JOINED_F = 32, 32
# A loop that writes what it walks would load a row only after the row before it is written. With
# this it loads three rows ahead. (`scan_ends` writes nothing: its loads move ahead by themselves.)
STAGES = tl.constexpr(4)


# --- device helpers ---


@triton.jit
def _step(gate, state, value):
    return tl.where(gate == 0, value, gate * state + value)


@triton.jit
def _join(gate, state, next_gate, next_state):
    """Two neighbouring stretches as one: what it keeps of the state before it, and its own."""
    return gate * next_gate, _step(next_gate, state, next_state)


@triton.jit
def _place(i, num_rows, REVERSE: tl.constexpr):
    """The row that is walked i-th, and where its gate is."""
    if REVERSE:
        return num_rows - 1 - i, num_rows - i
    else:
        return i, i


@triton.jit
def _tile(num_rows, FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's chunk, its first and last place in the walk, and its features."""
    chunk = (tl.program_id(0) // FEATURE_BLOCKS).to(tl.int64)
    first = chunk * ROWS
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    return chunk, first, tl.minimum(first + ROWS, num_rows), feature


# --- forward and backward ---


@triton.jit(do_not_specialize=["num_rows"])
def scan_ends(
    x, gates, ends, products, x_row, end_row, num_rows, F: tl.constexpr, REVERSE: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The state after each chunk begun from 0, and what the chunk keeps of an earlier one."""
    chunk, first, last, feature = _tile(num_rows, FEATURE_BLOCKS, ROWS, BLOCK_F)
    state = tl.zeros([BLOCK_F], tl.float32)
    product = tl.full([], 1.0, tl.float32)
    for i in range(first, last):
        row, at = _place(i, num_rows, REVERSE)
        gate = tl.load(gates + at)
        value = tl.load(x + row * x_row + feature, mask=feature < F, other=0.0).to(tl.float32)
        state = _step(gate, state, value)
        product = tl.where(gate == 0, 0.0, product * gate)
    tl.store(ends + chunk * end_row + feature, state, mask=feature < F)
    if tl.program_id(0) % FEATURE_BLOCKS == 0:
        tl.store(products + chunk, product)


@triton.jit(do_not_specialize=["num_chunks"])
def scan_carries(
    ends, products, carries, end_row, carry_row, num_chunks, F: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The state before each chunk but the first, which begins a segment."""
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    within = tl.arange(0, CHUNKS)[:, None]
    carry = tl.zeros([1, BLOCK_F], tl.float32)
    for first in tl.range(0, num_chunks, CHUNKS, num_stages=2):
        chunk = (first + within).to(tl.int64)
        exists = (chunk < num_chunks) & (feature < F)
        end = tl.load(ends + chunk * end_row + feature, mask=exists, other=0.0)
        product = tl.load(products + chunk, mask=chunk < num_chunks, other=1.0)
        product = tl.broadcast_to(product, [CHUNKS, BLOCK_F])
        kept, end = tl.associative_scan((product, end), 0, _join)
        state = _step(kept, carry, end)
        following = chunk + 1
        tl.store(carries + following * carry_row + feature, state,
                 mask=(following < num_chunks) & (feature < F))  # fmt: skip
        carry = tl.sum(tl.where(within == CHUNKS - 1, state, 0.0), 0, keep_dims=True)


@triton.jit(do_not_specialize=["part_row", "num_rows"])
def scan_rows(
    x, gates, carries, out, y, parts, x_row, carry_row, y_row, part_row, num_rows,
    F: tl.constexpr, REVERSE: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The state after each row; backward, also this block's part of each decay's gradient."""
    chunk, first, last, feature = _tile(num_rows, FEATURE_BLOCKS, ROWS, BLOCK_F)
    # one comparison of blocks: Triton 3.9's interpreter makes no mask of a block and a scalar
    has_carry = feature < tl.where(chunk > 0, F, 0)
    state = tl.load(carries + chunk * carry_row + feature, mask=has_carry, other=0.0)
    part = parts + (tl.program_id(0) % FEATURE_BLOCKS).to(tl.int64) * part_row if REVERSE else parts
    for i in tl.range(first, last, num_stages=STAGES):
        row, at = _place(i, num_rows, REVERSE)
        gate = tl.load(gates + at)
        value = tl.load(x + row * x_row + feature, mask=feature < F, other=0.0).to(tl.float32)
        state = _step(gate, state, value)
        tl.store(out + row * F + feature, state.to(out.dtype.element_ty), mask=feature < F)
        if REVERSE:
            inside = feature < tl.where(row > 0, F, 0)
            before = tl.load(y + (row - 1) * y_row + feature, mask=inside, other=0.0)
            tl.store(part + row, tl.sum(state * before.to(tl.float32), 0))


# --- launchers ---


def gates(decay: Tensor, cu_segments: Tensor) -> Tensor:
    """What each row keeps of the state before it (P+1,); nothing follows the last."""
    padded = torch.cat((decay, decay.new_zeros(1)))
    return padded.index_fill_(0, cu_segments.long(), 0)


def scan(x: Tensor, gates: Tensor) -> tuple[list[Launch], Tensor]:
    """The recurrence (P, F) over x (P, F), and the launches that fill it, in their order."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return [*_walk(x, gates, out, None, None)], out


def scan_backward(grad: Tensor, gates: Tensor, y: Tensor) -> tuple[list[Launch], Tensor, Tensor]:
    """The gradient (P, F) of x, the parts (blocks of features, P) that the decay's gradient is the
    sum of, and the launches that fill them. Parts of a segment's first row have no meaning."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    shape = (ceil_div(grad.shape[1], _block_f(grad)), len(grad))
    parts = torch.empty(shape, dtype=torch.float32, device=grad.device)
    return [*_walk(grad, gates, out, y, parts)], out, parts


def _walk(
    x: Tensor, gates: Tensor, out: Tensor, y: Tensor | None, parts: Tensor | None
) -> Iterator[Launch]:
    num_rows, num_features = x.shape
    num_chunks, block_f = ceil_div(num_rows, ROWS), _block_f(x)
    blocks = ceil_div(num_features, block_f)
    ends, carries = (
        torch.empty(num_chunks, num_features, dtype=torch.float32, device=x.device)
        for _ in range(2)
    )
    products = torch.empty(num_chunks, dtype=torch.float32, device=x.device)
    shared: dict[str, Any] = {
        "x": x, "gates": gates, "x_row": x.stride(0), "num_rows": num_rows,
        "F": num_features, "REVERSE": y is not None,
        "FEATURE_BLOCKS": blocks, "ROWS": ROWS, "BLOCK_F": block_f,
    }  # fmt: skip
    end_row, carry_row = ends.stride(0), carries.stride(0)
    if num_chunks > 1:
        yield Launch(
            kernel=scan_ends, programs=num_chunks * blocks, num_warps=1, num_stages=1,
            arguments=shared | {"ends": ends, "products": products, "end_row": end_row},
        )  # fmt: skip
        joined_f = min(power_of_2(num_features), JOINED_F)
        yield Launch(
            kernel=scan_carries, programs=ceil_div(num_features, joined_f),
            num_warps=4, num_stages=1,
            arguments={
                "ends": ends, "products": products, "carries": carries, "end_row": end_row,
                "carry_row": carry_row, "num_chunks": num_chunks, "F": num_features,
                "CHUNKS": JOINED, "BLOCK_F": joined_f,
            },
        )  # fmt: skip
    yield Launch(
        kernel=scan_rows, programs=num_chunks * blocks, num_warps=1, num_stages=1,
        arguments=shared | {
            "carries": carries, "out": out, "y": y, "parts": parts, "carry_row": carry_row,
            "y_row": 0 if y is None else y.stride(0),
            "part_row": 0 if parts is None else parts.stride(0),
        },
    )  # fmt: skip


def _block_f(x: Tensor) -> int:
    return min(power_of_2(x.shape[1]), ROW_BYTES // x.element_size())
