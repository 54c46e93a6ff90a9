"""Range attention by tiles: query tile × key tiles, for every pattern but the patch encoder's.

    forward  a program owns a tile of queries (rows of out and lse), loops over key tiles
    dq       the same; it also stores what the pass after it reads of each row: Σ do ⊙ out, and lse
    dk, dv   a program owns a tile of keys, loops over tiles of the queries that read them

So each output row has one owner: no atomics, and the same bits from run to run. The columns that a
tile reads are one interval, and those that all of its rows read are another inside it (see
`lst_kernels.schedule`). Full tiles cover the inner interval and need no mask; the two edges left
and right of it are walked in one masked loop. Heavy tiles come first, and of the heads as many
together as have their columns in the L2 cache: heavy tiles of all documents, each of its own
columns, run side by side, and with all heads of each every column would come from memory again.

The query heads that share a key head are rows of one tile: row r is query r // PACK, head r % PACK
of the program's heads. So a key tile is read once for all of them, and dK and dV sum over them.

Per pair of query and key and query head: 4·D FLOPs forward, 6·D for dq, 8·D for dk and dv. Bytes
are those of q and out plus, per query tile, its interval of k and v, from the L2 cache.

Products of float32 are exact ("ieee"), so they run without tensor cores.

Scores are kept in units of log 2, so that exp is exp2: qk_scale = scale · log2(e). Shape letters: Q
queries, K keys, Hq/Hkv heads, D head size.
"""

# Jitted functions take what Triton passes: pointers, scalars, constants.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lst_kernels.ranges import KeyRanges
from lst_kernels.schedule import BLOCK_ROWS
from lst_kernels.triton.launch import Launch, ceil_div, in_elements, power_of_2, strides
from lst_kernels.triton.tables import Tile

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
MAX_PACKED_HEADS = 16
# What k and v of the heads in flight may take of the L2 cache: half of an H100's, whose other half
# is the far one.
CACHE_BYTES = 24 * 2**20
COUNTS = ["num_queries", "num_keys", "heads_together"]


# --- device helpers ---


@triton.jit
def _load_tile(base, offsets, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows at ``base + offsets``, every row of them in bounds; columns past D are 0."""
    if D == BLOCK_D:
        return tl.load(base + offsets)
    return tl.load(base + offsets, mask=columns[None, :] < D, other=0.0)


@triton.jit
def _load_edge(base, offsets, inside, columns, D: tl.constexpr):
    """Rows where ``inside``; 0 elsewhere."""
    return tl.load(base + offsets, mask=inside[:, None] & (columns[None, :] < D), other=0.0)


@triton.jit
def _split(low, high, inner_low, inner_high, TILE: tl.constexpr):
    """Cut the interval [low, high) for a tile of rows that all read [inner_low, inner_high).

    Full tiles fill the inner interval from its left; what remains is two edges:
    [low, inner) in left_tiles tiles, then ``full_tiles`` unmasked ones, then [right, high).
    """
    full_tiles = tl.maximum(inner_high - inner_low, 0) // TILE
    inner = tl.where(full_tiles > 0, inner_low, low)
    right = inner + full_tiles * TILE
    left_tiles = (inner - low + TILE - 1) // TILE
    right_tiles = tl.maximum(high - right + TILE - 1, 0) // TILE
    return inner, right, full_tiles, left_tiles, left_tiles + right_tiles


@triton.jit
def _edge_tile(i, left_tiles, low, inner, right, high, TILE: tl.constexpr):
    """First column of edge tile i, and the end of its edge."""
    first = tl.where(i < left_tiles, low + i * TILE, right + (i - left_tiles) * TILE)
    return first, tl.where(i < left_tiles, inner, high)


@triton.jit
def _owned_tile(order, num_rows, heads_together, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Which rows [first, stop) and which head this program owns; no rows where first >= stop."""
    TILES: tl.constexpr = (BLOCK_ROWS + TILE - 1) // TILE  # in a block of rows
    programs = tl.cdiv(num_rows, BLOCK_ROWS) * TILES * heads_together  # of the heads together
    program = tl.program_id(0) % programs
    head = tl.program_id(0) // programs * heads_together + program % heads_together
    tile = program // heads_together
    block_first = tl.load(order + tile // TILES) * BLOCK_ROWS
    first = block_first + tile % TILES * TILE
    stop = tl.minimum(tl.minimum(first + TILE, block_first + BLOCK_ROWS), num_rows)
    return first, stop, head


# --- forward ---


@triton.jit
def _attend(q, k_tile, v_tile, keep, accumulator, peak, total, qk_scale, MASKED: tl.constexpr):
    """One key tile of the online softmax: accumulator and total are in units of exp2(peak)."""
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    if MASKED:
        scores = tl.where(keep, scores * qk_scale, -float("inf"))
        raised = tl.maximum(peak, tl.max(scores, 1))
        # A row that has read nothing yet: exp2(-inf - 0) = 0, not exp2(-inf + inf).
        level = tl.where(raised == -float("inf"), 0.0, raised)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
    else:
        raised = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - raised[:, None])
        shrink = tl.exp2(peak - raised)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision="ieee")
    return accumulator, raised, total


@triton.jit(do_not_specialize=COUNTS)
def tiled_forward(
    q, k, v, out, lse, start, stop, order,
    q_row, q_head, k_row, k_head, v_row, v_head, num_queries, heads_together, qk_scale,
    HEADS: tl.constexpr, KV_PROGRAMS: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    first, end, head_program = _owned_tile(order, num_queries, heads_together, QUERIES, BLOCK_ROWS)
    if first >= end:
        return
    q_row, q_head = in_elements(q_row, q_head, UNIT)
    k_row, k_head = in_elements(k_row, k_head, UNIT)
    v_row, v_head = in_elements(v_row, v_head, UNIT)
    kv_head = head_program // KV_PROGRAMS
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head

    row = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    owned = (row // PACK < QUERIES) & (first + row // PACK < end)
    query = tl.minimum(first + row // PACK, end - 1)  # spare rows repeat the last query
    head = head_program * PACK + row % PACK
    q_offsets = query.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q_tile = _load_tile(q, q_offsets[:, None] + columns[None, :], columns, D, BLOCK_D)
    row_start = tl.load(start + query)
    row_stop = tl.load(stop + query)

    low, high = tl.load(start + first), tl.load(stop + end - 1)
    inner, right, full_tiles, left_tiles, edge_tiles = _split(
        low, high, tl.load(start + end - 1), tl.load(stop + first), BLOCK_N
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    within = tl.arange(0, BLOCK_N)
    k_offsets = within.to(tl.int64)[:, None] * k_row + columns[None, :]
    v_offsets = within.to(tl.int64)[:, None] * v_row + columns[None, :]

    for i in range(0, full_tiles):
        first_key = (inner + i * BLOCK_N).to(tl.int64)
        k_tile = _load_tile(k + first_key * k_row, k_offsets, columns, D, BLOCK_D)
        v_tile = _load_tile(v + first_key * v_row, v_offsets, columns, D, BLOCK_D)
        accumulator, peak, total = _attend(
            q_tile, k_tile, v_tile, owned, accumulator, peak, total, qk_scale, False
        )
    for i in range(0, edge_tiles):
        first_key, edge = _edge_tile(i, left_tiles, low, inner, right, high, BLOCK_N)
        key = first_key + within
        k_tile = _load_edge(k + first_key.to(tl.int64) * k_row, k_offsets, key < edge, columns, D)
        v_tile = _load_edge(v + first_key.to(tl.int64) * v_row, v_offsets, key < edge, columns, D)
        row_edge = tl.minimum(row_stop, edge)
        keep = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_edge[:, None])
        accumulator, peak, total = _attend(
            q_tile, k_tile, v_tile, keep, accumulator, peak, total, qk_scale, True
        )

    read = total > 0
    accumulator = accumulator / tl.where(read, total, 1.0)[:, None]
    level = tl.where(read, peak, 0.0) + tl.log2(tl.where(read, total, 1.0))
    lse_row = tl.where(read, level * LN_2, -float("inf"))
    out_row = query.to(tl.int64) * HEADS + head
    tl.store(lse + out_row, lse_row, mask=owned)
    tl.store(out + out_row[:, None] * D + columns[None, :], accumulator.to(out.dtype.element_ty),
             mask=owned[:, None] & (columns[None, :] < D))  # fmt: skip


# --- backward ---


@triton.jit
def _grad_scores(a, b, grad_a, grad_b, keep, level, dots, qk_scale, MASKED: tl.constexpr):
    """Softmax weights p and p ⊙ (dp − dots) of a tile of scores a bᵀ, either way round."""
    scores = tl.dot(a, tl.trans(b), input_precision="ieee")
    weights = tl.exp2(scores * qk_scale - level)
    if MASKED:
        weights = tl.where(keep, weights, 0.0)
    grad_weights = tl.dot(grad_a, tl.trans(grad_b), input_precision="ieee")
    return weights, weights * (grad_weights - dots)


@triton.jit(do_not_specialize=COUNTS)
def tiled_backward_q(
    grad, q, k, v, out, lse, levels, dots, grad_q, start, stop, order,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head,
    num_queries, heads_together, qk_scale, scale,
    HEADS: tl.constexpr, KV_PROGRAMS: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    first, end, head_program = _owned_tile(order, num_queries, heads_together, QUERIES, BLOCK_ROWS)
    if first >= end:
        return
    grad_row, grad_head = in_elements(grad_row, grad_head, UNIT)
    q_row, q_head = in_elements(q_row, q_head, UNIT)
    k_row, k_head = in_elements(k_row, k_head, UNIT)
    v_row, v_head = in_elements(v_row, v_head, UNIT)
    kv_head = head_program // KV_PROGRAMS
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head

    row = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    owned = (row // PACK < QUERIES) & (first + row // PACK < end)
    query = tl.minimum(first + row // PACK, end - 1)
    head = head_program * PACK + row % PACK
    q_offsets = query.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    grad_offsets = query.to(tl.int64) * grad_row + head.to(tl.int64) * grad_head
    out_row = query.to(tl.int64) * HEADS + head
    q_tile = _load_tile(q, q_offsets[:, None] + columns[None, :], columns, D, BLOCK_D)
    grad_tile = _load_tile(grad, grad_offsets[:, None] + columns[None, :], columns, D, BLOCK_D)
    out_tile = _load_tile(out, out_row[:, None] * D + columns[None, :], columns, D, BLOCK_D)
    row_dots = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_lse = tl.load(lse + out_row)
    # An empty range: exp2(score - inf) = 0.
    row_level = tl.where(row_lse == -float("inf"), float("inf"), row_lse * LOG2_E)
    place = (head_program.to(tl.int64) * num_queries + first) * PACK
    tl.store(levels + place + row, row_level, mask=owned)
    tl.store(dots + place + row, row_dots, mask=owned)
    row_start = tl.load(start + query)
    row_stop = tl.load(stop + query)

    low, high = tl.load(start + first), tl.load(stop + end - 1)
    inner, right, full_tiles, left_tiles, edge_tiles = _split(
        low, high, tl.load(start + end - 1), tl.load(stop + first), BLOCK_N
    )
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    within = tl.arange(0, BLOCK_N)
    k_offsets = within.to(tl.int64)[:, None] * k_row + columns[None, :]
    v_offsets = within.to(tl.int64)[:, None] * v_row + columns[None, :]

    for i in range(0, full_tiles):
        first_key = (inner + i * BLOCK_N).to(tl.int64)
        k_tile = _load_tile(k + first_key * k_row, k_offsets, columns, D, BLOCK_D)
        v_tile = _load_tile(v + first_key * v_row, v_offsets, columns, D, BLOCK_D)
        _, grad_scores = _grad_scores(
            q_tile, k_tile, grad_tile, v_tile, owned, row_level[:, None], row_dots[:, None],
            qk_scale, False,
        )  # fmt: skip
        accumulator = tl.dot(
            grad_scores.to(k_tile.dtype), k_tile, accumulator, input_precision="ieee"
        )
    for i in range(0, edge_tiles):
        first_key, edge = _edge_tile(i, left_tiles, low, inner, right, high, BLOCK_N)
        key = first_key + within
        k_tile = _load_edge(k + first_key.to(tl.int64) * k_row, k_offsets, key < edge, columns, D)
        v_tile = _load_edge(v + first_key.to(tl.int64) * v_row, v_offsets, key < edge, columns, D)
        row_edge = tl.minimum(row_stop, edge)
        keep = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_edge[:, None])
        _, grad_scores = _grad_scores(
            q_tile, k_tile, grad_tile, v_tile, keep, row_level[:, None], row_dots[:, None],
            qk_scale, True,
        )  # fmt: skip
        accumulator = tl.dot(
            grad_scores.to(k_tile.dtype), k_tile, accumulator, input_precision="ieee"
        )
    tl.store(grad_q + out_row[:, None] * D + columns[None, :],
             (accumulator * scale).to(grad_q.dtype.element_ty),
             mask=owned[:, None] & (columns[None, :] < D))  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def tiled_backward_kv(
    grad, q, k, v, levels, dots, grad_k, grad_v, query_start, query_stop, order,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head,
    num_queries, num_keys, heads_together, qk_scale, scale,
    KV_HEADS: tl.constexpr, KV_PROGRAMS: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    first, end, kv_head = _owned_tile(order, num_keys, heads_together, BLOCK_N, BLOCK_ROWS)
    if first >= end:
        return
    grad_row, grad_head = in_elements(grad_row, grad_head, UNIT)
    q_row, q_head = in_elements(q_row, q_head, UNIT)
    k_row, k_head = in_elements(k_row, k_head, UNIT)
    v_row, v_head = in_elements(v_row, v_head, UNIT)
    columns = tl.arange(0, BLOCK_D)
    key = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1)  # spare rows repeat the last key
    k_offsets = key.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
    v_offsets = key.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head
    k_tile = _load_tile(k, k_offsets[:, None] + columns[None, :], columns, D, BLOCK_D)
    v_tile = _load_tile(v, v_offsets[:, None] + columns[None, :], columns, D, BLOCK_D)
    key_start = tl.load(query_start + key)
    key_stop = tl.load(query_stop + key)

    low, high = tl.load(query_start + first), tl.load(query_stop + end - 1)
    inner, right, full_tiles, left_tiles, edge_tiles = _split(
        low, high, tl.load(query_start + end - 1), tl.load(query_stop + first), QUERIES
    )
    k_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = tl.arange(0, BLOCK_M)
    used = row // PACK < QUERIES  # all rows, where PACK divides the tile
    within = tl.minimum(row // PACK, QUERIES - 1)
    head = kv_head * KV_PROGRAMS * PACK + row % PACK
    q_offsets = (within.to(tl.int64) * q_row + head.to(tl.int64) * q_head)[:, None] + columns[None]
    grad_offsets = (within.to(tl.int64) * grad_row + head.to(tl.int64) * grad_head)[:, None]
    grad_offsets += columns[None, :]
    # Rows of a tile lie side by side in levels and dots.
    places = row if PACK * QUERIES == BLOCK_M else tl.minimum(row, PACK * QUERIES - 1)
    levels += kv_head.to(tl.int64) * KV_PROGRAMS * num_queries * PACK
    dots += kv_head.to(tl.int64) * KV_PROGRAMS * num_queries * PACK

    # With more heads than one tile packs, a tile of queries comes once for each KV_PROGRAMS packs.
    for i in range(0, full_tiles * KV_PROGRAMS):
        first_query = (inner + i // KV_PROGRAMS * QUERIES).to(tl.int64)
        pack = tl.cast(i % KV_PROGRAMS, tl.int64)
        q_base = first_query * q_row + pack * PACK * q_head
        grad_base = first_query * grad_row + pack * PACK * grad_head
        q_tile = _load_tile(q + q_base, q_offsets, columns, D, BLOCK_D)
        grad_tile = _load_tile(grad + grad_base, grad_offsets, columns, D, BLOCK_D)
        place = (pack * num_queries + first_query) * PACK
        row_level = tl.load(levels + place + places)
        if PACK * QUERIES != BLOCK_M:
            row_level = tl.where(used, row_level, float("inf"))
        row_dots = tl.load(dots + place + places)
        weights, grad_scores = _grad_scores(
            k_tile, q_tile, v_tile, grad_tile, used, row_level[None, :], row_dots[None, :],
            qk_scale, False,
        )  # fmt: skip
        v_sum = tl.dot(weights.to(grad_tile.dtype), grad_tile, v_sum, input_precision="ieee")
        k_sum = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sum, input_precision="ieee")
    for i in range(0, edge_tiles * KV_PROGRAMS):
        edge_first, edge = _edge_tile(
            i // KV_PROGRAMS, left_tiles, low, inner, right, high, QUERIES
        )
        first_query = edge_first.to(tl.int64)
        pack = tl.cast(i % KV_PROGRAMS, tl.int64)
        query = edge_first + row // PACK
        inside = used & (query < edge)
        q_base = first_query * q_row + pack * PACK * q_head
        grad_base = first_query * grad_row + pack * PACK * grad_head
        q_tile = _load_edge(q + q_base, q_offsets, inside, columns, D)
        grad_tile = _load_edge(grad + grad_base, grad_offsets, inside, columns, D)
        place = (pack * num_queries + first_query) * PACK
        row_level = tl.load(levels + place + places, mask=inside, other=float("inf"))
        row_dots = tl.load(dots + place + places, mask=inside, other=0.0)
        keep = (query[None, :] >= key_start[:, None]) & (query[None, :] < key_stop[:, None])
        weights, grad_scores = _grad_scores(
            k_tile, q_tile, v_tile, grad_tile, keep & inside[None, :],
            row_level[None, :], row_dots[None, :], qk_scale, True,
        )  # fmt: skip
        v_sum = tl.dot(weights.to(grad_tile.dtype), grad_tile, v_sum, input_precision="ieee")
        k_sum = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sum, input_precision="ieee")

    owned = first + tl.arange(0, BLOCK_N) < end
    offsets = (key.to(tl.int64) * KV_HEADS + kv_head)[:, None] * D + columns[None, :]
    mask = owned[:, None] & (columns[None, :] < D)
    tl.store(grad_k + offsets, (k_sum * scale).to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_v + offsets, v_sum.to(grad_v.dtype.element_ty), mask=mask)


# --- launchers ---


def forward(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float, tile: Tile
) -> tuple[Launch, Tensor, Tensor]:
    """out (Q, Hq, D), lse (Q, Hq), and the launch that fills them."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    pack, sizes = _by_query(q, k, tile)
    heads = q.shape[1] // pack
    launch = Launch(
        kernel=tiled_forward, programs=_programs(len(q), sizes["QUERIES"], heads),
        arguments=dict(
            q=q, k=k, v=v, out=out, lse=lse,
            start=ranges.start, stop=ranges.stop, order=ranges.query_order,
            **strides(q=q, k=k, v=v), num_queries=len(q),
            heads_together=heads_together(heads, k, v), qk_scale=scale * LOG2_E.value,
            HEADS=q.shape[1], **sizes,
        ),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return launch, out, lse


def backward_q(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    ranges: KeyRanges, scale: float, tile: Tile,
) -> tuple[Launch, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """grad_q (Q, Hq, D), what `backward_kv` takes of each row, and the launch that fills them.

    Of each row: levels, its lse in units of log 2, ∞ for an empty range; dots = Σ grad ⊙ out. Both
    (Hq / PACK, Q, PACK), so that the rows of a tile lie side by side.
    """
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pack, sizes = _by_query(q, k, tile)
    heads = q.shape[1] // pack
    levels, dots = (
        torch.empty(heads, len(q), pack, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    launch = Launch(
        kernel=tiled_backward_q, programs=_programs(len(q), sizes["QUERIES"], heads),
        arguments=dict(
            grad=grad, q=q, k=k, v=v, out=out, lse=lse, levels=levels, dots=dots, grad_q=grad_q,
            start=ranges.start, stop=ranges.stop, order=ranges.query_order,
            **strides(grad=grad, q=q, k=k, v=v), num_queries=len(q),
            heads_together=heads_together(heads, k, v), qk_scale=scale * LOG2_E.value,
            scale=scale, HEADS=q.shape[1], **sizes,
        ),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return launch, grad_q, (levels, dots)


def backward_kv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, row_sums: tuple[Tensor, Tensor],
    ranges: KeyRanges, scale: float, tile: Tile,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """grad_k and grad_v (K, Hkv, D), and the launch that fills them once `backward_q`'s has run,
    whose levels and dots ``row_sums`` are."""
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    pack, sizes = _sizes(q, k, tile)
    levels, dots = row_sums
    heads = k.shape[1]
    launch = Launch(
        kernel=tiled_backward_kv, programs=_programs(len(k), tile.block_n, heads),
        arguments=dict(
            grad=grad, q=q, k=k, v=v, levels=levels, dots=dots, grad_k=grad_k, grad_v=grad_v,
            query_start=ranges.query_start, query_stop=ranges.query_stop, order=ranges.key_order,
            **strides(grad=grad, q=q, k=k, v=v), num_queries=len(q), num_keys=len(k),
            heads_together=heads_together(heads, q, grad), qk_scale=scale * LOG2_E.value,
            scale=scale, KV_HEADS=heads, QUERIES=tile.block_m // pack, **sizes,
        ),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return launch, grad_k, grad_v


def heads_together(heads: int, *columns: Tensor) -> int:
    """Of the heads, how many at a time: as many as have their part of ``columns`` in the cache. A
    divisor of ``heads``, or the last ones would be fewer."""
    size = sum(x.numel() * x.element_size() for x in columns)
    fitting = [n for n in range(2, heads + 1) if heads % n == 0 and n * size <= heads * CACHE_BYTES]
    return max(fitting, default=1)


def _sizes(q: Tensor, k: Tensor, tile: Tile) -> tuple[int, dict[str, Any]]:
    """How many query heads share a tile, and the constants that all three kernels take."""
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    pack = max(n for n in range(1, min(group, MAX_PACKED_HEADS) + 1) if group % n == 0)
    return pack, {
        "KV_PROGRAMS": group // pack, "PACK": pack,
        "D": head_dim, "BLOCK_D": max(power_of_2(head_dim), 16),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_ROWS": BLOCK_ROWS,
    }  # fmt: skip


def _by_query(q: Tensor, k: Tensor, tile: Tile) -> tuple[int, dict[str, Any]]:
    """`_sizes` of the kernels that own queries. Tiles must cut a block of rows evenly, or nearly
    so: as many tiles a block as it takes, each with as few queries as that allows."""
    pack, sizes = _sizes(q, k, tile)
    tiles = ceil_div(BLOCK_ROWS, tile.block_m // pack)
    return pack, sizes | {"QUERIES": ceil_div(BLOCK_ROWS, tiles)}


def _programs(num_rows: int, tile_rows: int, heads: int) -> int:
    return ceil_div(num_rows, BLOCK_ROWS) * ceil_div(BLOCK_ROWS, tile_rows) * heads
