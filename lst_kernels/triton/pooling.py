"""Pooling patches and expanding them again: rows in, rows out, every byte once.

    pool        a program owns the output row of one patch, some of its features, and reads its rows
    pool back   the same owner writes the gradient rows of the patch's tokens
    expand      a program owns a tile of tokens and gathers their patches' rows, onto a residual
                where there is one; so does the pool of first or last tokens, by patches
    expand back a program owns the gradient row of one patch and sums its readers' rows: a pool

So there are no atomics, and the same bits from run to run. Memory-bound: T·F read and P·F written,
or the other way round, at 16 bytes a thread. Sums are float32.

Shape letters: T tokens, P patches, F features; a program has ROWS tokens of BLOCK_F at a time.
"""

# Jitted functions take what Triton passes: pointers, scalars, constants.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lst_kernels.triton.launch import Launch, ceil_div, power_of_2

# Features and rows of a tile: 16 bytes a thread of 4 warps, 4 rows each. Chosen as widest loads
# with most bytes on the way at no more than 64 registers, not measured.
BLOCK_F = 1024
ROWS = 4


# --- device helpers ---


@triton.jit
def _tile(FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's patch (or tile of tokens), and its rows and features within."""
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return tl.program_id(0) // FEATURE_BLOCKS, tl.arange(0, ROWS)[:, None], feature


# --- forward ---


@triton.jit
def pool_sum(
    x, out, start, stop, x_row, F: tl.constexpr, MEAN: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    patch, within, feature = _tile(FEATURE_BLOCKS, ROWS, BLOCK_F)
    first, end = tl.load(start + patch), tl.load(stop + patch)
    total = tl.zeros([1, BLOCK_F], tl.float32)
    for t in range(first, end, ROWS):
        token = (t + within).to(tl.int64)
        tile = tl.load(x + token * x_row + feature, mask=(token < end) & (feature < F), other=0.0)
        total += tl.sum(tile.to(tl.float32), 0, keep_dims=True)
    if MEAN:
        total = total / tl.maximum(end - first, 1).to(tl.float32)
    row = patch.to(tl.int64) * F
    tl.store(out + row + feature, total.to(out.dtype.element_ty), mask=feature < F)


@triton.jit
def pool_extreme(
    x, out, index, start, stop, x_row, F: tl.constexpr, SIGN: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The largest SIGN · x, and the first token that has it; NaN is larger than any number."""
    patch, within, feature = _tile(FEATURE_BLOCKS, ROWS, BLOCK_F)
    first, end = tl.load(start + patch), tl.load(stop + patch)
    best = tl.full([1, BLOCK_F], -float("inf"), tl.float32)
    winner = tl.zeros([1, BLOCK_F], tl.int32) + first  # also where all are -inf
    for t in range(first, end, ROWS):
        token = (t + within).to(tl.int64)
        inside = (token < end) & (feature < F)
        tile = tl.load(x + token * x_row + feature, mask=inside, other=0.0).to(tl.float32) * SIGN
        tile = tl.where(inside, tile, -float("inf"))
        # Comparisons with NaN are false, so it must be looked for by name.
        nan = tl.min(tl.where(tile != tile, within, ROWS), 0, keep_dims=True)
        peak = tl.max(tl.where(tile != tile, -float("inf"), tile), 0, keep_dims=True)
        place = tl.min(tl.where(tile == peak, within, ROWS), 0, keep_dims=True)
        wins = (peak > best) | (nan < ROWS)
        wins = wins & (best == best)
        winner = tl.where(wins, t + tl.where(nan < ROWS, nan, place), winner)
        best = tl.where(wins, tl.where(nan < ROWS, float("nan"), peak), best)
    some = end > first
    row = patch.to(tl.int64) * F
    best = tl.where(some, best * SIGN, 0.0)
    tl.store(out + row + feature, best.to(out.dtype.element_ty), mask=feature < F)
    tl.store(index + row + feature, tl.where(some, winner, -1), mask=feature < F)


@triton.jit(do_not_specialize=["num_rows"])
def gather_rows(
    source, residual, out, ids, start, stop, source_row, residual_row, num_rows,
    F: tl.constexpr, ROW: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[r] = source[id] (+ residual[r]), without source where id < 0. The id is ids[r], or the
    first or last token of patch r."""
    tile, within, feature = _tile(FEATURE_BLOCKS, ROWS, BLOCK_F)
    row = tile.to(tl.int64) * ROWS + within
    exists = row < num_rows
    if ROW == "id":
        chosen = tl.load(ids + row, mask=exists, other=-1)
    else:
        first = tl.load(start + row, mask=exists, other=0)
        end = tl.load(stop + row, mask=exists, other=0)
        chosen = tl.where(first < end, first if ROW == "first" else end - 1, -1)
    inside = (chosen >= 0) & (feature < F)
    value = tl.load(source + chosen.to(tl.int64) * source_row + feature, mask=inside, other=0.0)
    owned = exists & (feature < F)
    if residual is not None:
        rest = tl.load(residual + row * residual_row + feature, mask=owned, other=0.0)
        value = (value.to(tl.float32) + rest.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * F + feature, value, mask=owned)


# --- backward ---


@triton.jit
def pool_share(
    grad, out, index, start, stop, grad_row, F: tl.constexpr, REDUCE: tl.constexpr,
    FEATURE_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Each token's share of its patch's gradient: all, an equal part, or the winner's all."""
    patch, within, feature = _tile(FEATURE_BLOCKS, ROWS, BLOCK_F)
    first, end = tl.load(start + patch), tl.load(stop + patch)
    row = patch.to(tl.int64)
    # one comparison of blocks: Triton 3.9's interpreter makes no mask of a block and a scalar
    some = feature < tl.where(first < end, F, 0)
    share = tl.load(grad + row * grad_row + feature, mask=some, other=0.0)
    if REDUCE == "mean":
        share = share.to(tl.float32) / tl.maximum(end - first, 1).to(tl.float32)
    if REDUCE == "max" or REDUCE == "min":
        winner = tl.load(index + row * F + feature, mask=some, other=-1)
    elif REDUCE == "first":
        winner = first
    elif REDUCE == "last":
        winner = end - 1
    for t in range(first, end, ROWS):
        token = t + within
        tile = tl.zeros([ROWS, BLOCK_F], share.dtype) + share
        if REDUCE != "mean" and REDUCE != "sum":
            tile = tl.where(token == winner, tile, 0.0)
        tl.store(out + token.to(tl.int64) * F + feature, tile.to(out.dtype.element_ty),
                 mask=(token < end) & (feature < F))  # fmt: skip


# --- launchers ---


def pool(
    x: Tensor, start: Tensor, stop: Tensor, reduce: str
) -> tuple[Launch, Tensor, Tensor | None]:
    """The reduction (P, F) of rows start[p] … stop[p] - 1 of x (T, F), the token (P, F) that won
    for max and min, and the launch that fills them."""
    num_patches, num_features = len(start), x.shape[1]
    out = torch.empty(num_patches, num_features, dtype=x.dtype, device=x.device)
    if reduce in ("first", "last"):
        return _gather(x, None, out, None, start, stop, reduce), out, None
    arguments = {
        "x": x,
        "out": out,
        "start": start,
        "stop": stop,
        "x_row": x.stride(0),
        "F": num_features,
    }
    if reduce in ("mean", "sum"):
        launch = _launch(pool_sum, num_patches, x, arguments | {"MEAN": reduce == "mean"})
        return launch, out, None
    index = torch.empty(out.shape, dtype=torch.int32, device=x.device)
    arguments |= {"index": index, "SIGN": 1.0 if reduce == "max" else -1.0}
    return _launch(pool_extreme, num_patches, x, arguments), out, index


def pool_backward(
    grad: Tensor, start: Tensor, stop: Tensor, reduce: str, index: Tensor | None, num_tokens: int
) -> tuple[Launch, Tensor]:
    """Each token's share (T, F) of the gradient (P, F), and the launch that fills it. Every token
    lies in a patch."""
    out = torch.empty(num_tokens, grad.shape[1], dtype=grad.dtype, device=grad.device)
    arguments = {
        "grad": grad, "out": out, "index": index, "start": start, "stop": stop,
        "grad_row": grad.stride(0), "F": grad.shape[1], "REDUCE": reduce,
    }  # fmt: skip
    return _launch(pool_share, len(start), grad, arguments), out


def expand(z: Tensor, ids: Tensor, residual: Tensor | None = None) -> tuple[Launch, Tensor]:
    """z[ids] (T, F), 0 where an id is -1, plus the residual; and the launch that fills it."""
    out = torch.empty(len(ids), z.shape[1], dtype=z.dtype, device=z.device)
    return _gather(z, residual, out, ids, None, None, "id"), out


def _gather(
    source: Tensor, residual: Tensor | None, out: Tensor, ids: Tensor | None,
    start: Tensor | None, stop: Tensor | None, row: str,
) -> Launch:  # fmt: skip
    arguments = {
        "source": source, "residual": residual, "out": out,
        "ids": ids, "start": start, "stop": stop, "source_row": source.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "num_rows": len(out), "F": out.shape[1], "ROW": row,
    }  # fmt: skip
    return _launch(gather_rows, ceil_div(len(out), ROWS), out, arguments)


def _launch(kernel: Any, tiles: int, x: Tensor, arguments: dict[str, Any]) -> Launch:
    block_f = min(power_of_2(x.shape[1]), BLOCK_F)
    feature_blocks = ceil_div(x.shape[1], block_f)
    sizes = {"FEATURE_BLOCKS": feature_blocks, "ROWS": ROWS, "BLOCK_F": block_f}
    warps = min(max(block_f * x.element_size() // 512, 1), 8)
    return Launch(
        kernel=kernel, programs=tiles * feature_blocks, arguments=arguments | sizes,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
