"""Range attention by patches: short disjoint ranges, as a patch encoder's slots read its tokens.

A program owns the S queries of one range (a patch's slots), some of its heads, and the range's
keys, which nobody else reads. It walks the keys a few at a time, all of its heads side by side: of
a token it takes one contiguous stretch of k and one of v. So every byte is read once, no lane waits
for a longer patch, and the backward pass writes dq, dk and dv in one go, without atomics. Keys that
lie between ranges belong to the range before them, and get their zeros from it.

Memory-bound: D·itemsize·(2·Hkv per key + 2·S·Hq per range) bytes for 4·S·Hq·D FLOPs a key, under
one FLOP a byte. There is nothing for tensor cores to do. Sums are float32.

Shape letters: Q queries, K keys, Hq/Hkv heads, D head size, S slots. In a program: R rows (slot ×
query head of the group) to each of H key heads, TOKENS keys at a time.
"""

# Jitted functions take what Triton passes: pointers, scalars, constants.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lst_kernels.ranges import KeyRanges
from lst_kernels.triton.launch import Launch, ceil_div, in_elements, power_of_2, strides

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

# Keys that a program reads at once for one row in a thread (twice as many in float32, where a
# thread holds half as much of each), and its warps. Chosen from what the kernels compile to for
# sm_90 (`lst_kernels.aot`), not measured: at 16 heads of 64 in bfloat16, 56 registers forward and
# 80 backward leave 24 to 36 warps a multiprocessor, each with 4 KB on the way, well over the 23 KB
# that Little's law asks of a 4.3 TB/s memory at 700 ns.
TOKENS = 4
WARPS = 4


# Every tensor is (tokens, R, H, D), with 1 where a dimension does not matter, and reductions keep
# their dimension. So all of them share one layout, that of the loads: 16 bytes of D to a thread, D
# and H over lanes and warps, tokens and R within a thread. Nothing moves through shared memory, and
# only sums over D cross lanes. (Leaving dimensions out costs a conversion at every load.)
#
# After D, Triton deals lanes out from the last dimension on, before 3.7 from the first on: there
# tensors are (H, R, tokens, D), or a program would take twice the registers.
LANES_FROM_LAST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
TOKEN_AXIS = tl.constexpr(0 if LANES_FROM_LAST else 2)
HEAD_AXIS = tl.constexpr(2 if LANES_FROM_LAST else 0)
ROW_AXIS = tl.constexpr(1)


# --- device helpers ---


@triton.jit
def _along(AXIS: tl.constexpr, x):
    """A vector as a tensor of four dimensions, along one of them."""
    if AXIS == 0:
        return x[:, None, None, None]
    elif AXIS == 1:
        return x[None, :, None, None]
    elif AXIS == 2:
        return x[None, None, :, None]
    else:
        return x[None, None, None, :]


@triton.jit
def _axes(head_block, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row (R), key head (H) and column (D) of this program, each along its dimension."""
    kv_head = _along(HEAD_AXIS, head_block * BLOCK_H + tl.arange(0, BLOCK_H))
    return _along(ROW_AXIS, tl.arange(0, BLOCK_R)), kv_head, _along(3, tl.arange(0, BLOCK_D))


@triton.jit
def _query_rows(g, row, kv_head, SLOTS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr):
    """Of each (R, H) of range g: its query, its query head, and whether it exists."""
    exists = (row < SLOTS * GROUP) & (kv_head < KV_HEADS)
    return g.to(tl.int64) * SLOTS + row // GROUP, kv_head * GROUP + row % GROUP, exists


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


# --- forward ---


@triton.jit
def patch_forward(
    q, k, v, out, lse, start, stop,
    q_row, q_head, k_row, k_head, v_row, v_head, qk_scale,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_row, q_head = in_elements(q_row, q_head, UNIT)
    k_row, k_head = in_elements(k_row, k_head, UNIT)
    v_row, v_head = in_elements(v_row, v_head, UNIT)
    g = tl.program_id(0) // HEAD_BLOCKS
    row, kv_head, column = _axes(tl.program_id(0) % HEAD_BLOCKS, BLOCK_R, BLOCK_H, BLOCK_D)
    query, head, exists = _query_rows(g, row, kv_head, SLOTS, GROUP, KV_HEADS)
    q_offsets = query * q_row + head.to(tl.int64) * q_head
    q_tile = _load(q + q_offsets + column, exists & (column < D))

    first = tl.load(start + g * SLOTS)
    end = tl.load(stop + g * SLOTS)
    k += kv_head.to(tl.int64) * k_head + column
    v += kv_head.to(tl.int64) * v_head + column
    token = _along(TOKEN_AXIS, tl.arange(0, TOKENS))
    peak = tl.full(exists.shape, -float("inf"), tl.float32)
    total = tl.zeros(exists.shape, tl.float32)
    accumulator = tl.zeros(q_tile.shape, tl.float32)
    for t in range(first, end, TOKENS):
        key = (t + token).to(tl.int64)
        mask = (key < end) & (kv_head < KV_HEADS) & (column < D)
        k_tile = _load(k + key * k_row, mask)
        v_tile = _load(v + key * v_row, mask)
        scores = tl.sum(k_tile * q_tile, 3, keep_dims=True) * qk_scale
        scores = tl.where(key < end, scores, -float("inf"))
        raised = tl.maximum(
            peak, tl.max(scores, TOKEN_AXIS, keep_dims=True)
        )  # key t is in the range
        weights = tl.exp2(scores - raised)
        shrink = tl.exp2(peak - raised)
        total = total * shrink + tl.sum(weights, TOKEN_AXIS, keep_dims=True)
        accumulator = accumulator * shrink + tl.sum(weights * v_tile, TOKEN_AXIS, keep_dims=True)
        peak = raised

    some = total > 0
    accumulator = accumulator / tl.where(some, total, 1.0)
    level = tl.where(some, peak, 0.0) + tl.log2(tl.where(some, total, 1.0))
    out_row = query * (KV_HEADS * GROUP) + head
    tl.store(lse + out_row, tl.where(some, level * LN_2, -float("inf")), mask=exists)
    tl.store(out + out_row * D + column, accumulator.to(out.dtype.element_ty),
             mask=exists & (column < D))  # fmt: skip


# --- backward ---


@triton.jit(do_not_specialize=["num_ranges", "num_keys"])
def patch_backward(
    grad, q, k, v, out, lse, grad_q, grad_k, grad_v, start, stop,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head,
    num_ranges, num_keys, qk_scale, scale,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    grad_row, grad_head = in_elements(grad_row, grad_head, UNIT)
    q_row, q_head = in_elements(q_row, q_head, UNIT)
    k_row, k_head = in_elements(k_row, k_head, UNIT)
    v_row, v_head = in_elements(v_row, v_head, UNIT)
    g = tl.program_id(0) // HEAD_BLOCKS
    row, kv_head, column = _axes(tl.program_id(0) % HEAD_BLOCKS, BLOCK_R, BLOCK_H, BLOCK_D)
    query, head, exists = _query_rows(g, row, kv_head, SLOTS, GROUP, KV_HEADS)
    head = head.to(tl.int64)
    out_row = query * (KV_HEADS * GROUP) + head
    owned = exists & (column < D)
    q_tile = _load(q + (query * q_row + head * q_head) + column, owned)
    grad_tile = _load(grad + (query * grad_row + head * grad_head) + column, owned)
    out_tile = _load(out + out_row * D + column, owned)
    dots = tl.sum(grad_tile * out_tile, 3, keep_dims=True)
    # A row that does not exist has no weight; one with an empty range has no keys.
    row_lse = tl.load(lse + out_row, mask=exists, other=float("inf")) * LOG2_E

    first = tl.load(start + g * SLOTS)
    end = tl.load(stop + g * SLOTS)
    k += kv_head.to(tl.int64) * k_head + column
    v += kv_head.to(tl.int64) * v_head + column
    grad_k += kv_head.to(tl.int64) * D + column
    grad_v += kv_head.to(tl.int64) * D + column
    token = _along(TOKEN_AXIS, tl.arange(0, TOKENS))
    accumulator = tl.zeros(q_tile.shape, tl.float32)
    for t in range(first, end, TOKENS):
        key = (t + token).to(tl.int64)
        inside = (key < end) & (kv_head < KV_HEADS) & (column < D)
        k_tile = _load(k + key * k_row, inside)
        v_tile = _load(v + key * v_row, inside)
        scores = tl.sum(k_tile * q_tile, 3, keep_dims=True) * qk_scale
        weights = tl.where(key < end, tl.exp2(scores - row_lse), 0.0)
        grad_weights = tl.sum(v_tile * grad_tile, 3, keep_dims=True)
        grad_scores = weights * (grad_weights - dots) * scale
        accumulator += tl.sum(grad_scores * k_tile, TOKEN_AXIS, keep_dims=True)
        k_sum = tl.sum(grad_scores * q_tile, ROW_AXIS, keep_dims=True)
        v_sum = tl.sum(weights * grad_tile, ROW_AXIS, keep_dims=True)
        offsets = key * (KV_HEADS * D)
        tl.store(grad_k + offsets, k_sum.to(grad_k.dtype.element_ty), mask=inside)
        tl.store(grad_v + offsets, v_sum.to(grad_v.dtype.element_ty), mask=inside)
    tl.store(grad_q + out_row * D + column, accumulator.to(grad_q.dtype.element_ty), mask=owned)

    # Zeros for the keys that no query reads: up to the next range, and before the first one.
    after = tl.load(start + (g + 1) * SLOTS, mask=g + 1 < num_ranges, other=num_keys)
    gap = tl.where(g == 0, 0, end)
    for t in range(gap, after, TOKENS):
        key = (t + token).to(tl.int64)
        unread = (key < after) & ((key < first) | (key >= end))
        unread = unread & (kv_head < KV_HEADS) & (column < D)
        tl.store(grad_k + key * (KV_HEADS * D), 0.0, mask=unread)
        tl.store(grad_v + key * (KV_HEADS * D), 0.0, mask=unread)


# --- launchers ---


def forward(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Launch, Tensor, Tensor]:
    """out (Q, Hq, D), lse (Q, Hq), and the launch that fills them."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    num_ranges = len(q) // ranges.slots
    sizes, num_warps = _sizes(q, k, ranges.slots)
    launch = Launch(
        kernel=patch_forward,
        programs=num_ranges * sizes["HEAD_BLOCKS"],
        arguments=dict(
            q=q, k=k, v=v, out=out, lse=lse, start=ranges.start, stop=ranges.stop,
            **strides(q=q, k=k, v=v), qk_scale=scale * LOG2_E.value, **sizes,
        ),
        num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    return launch, out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    ranges: KeyRanges, scale: float,
) -> tuple[Launch, Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_q (Q, Hq, D), grad_k and grad_v (K, Hkv, D), and the launch that fills them."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    num_ranges = len(q) // ranges.slots
    sizes, num_warps = _sizes(q, k, ranges.slots)
    launch = Launch(
        kernel=patch_backward,
        programs=num_ranges * sizes["HEAD_BLOCKS"],
        arguments=dict(
            grad=grad, q=q, k=k, v=v, out=out, lse=lse,
            grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, start=ranges.start, stop=ranges.stop,
            **strides(grad=grad, q=q, k=k, v=v), num_ranges=num_ranges, num_keys=len(k),
            qk_scale=scale * LOG2_E.value, scale=scale, **sizes,
        ),
        num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    return launch, grad_q, grad_k, grad_v


def _sizes(q: Tensor, k: Tensor, slots: int) -> tuple[dict[str, int], int]:
    """The constants of both kernels, and the warps of a program.

    A thread holds 16 bytes of each token's k, the widest load there is, and up to 4 rows, which
    take about 30 registers each in the backward pass; further rows go to further warps.
    """
    num_kv_heads, head_dim = k.shape[1], k.shape[2]
    group = q.shape[1] // num_kv_heads
    block_r, block_d = power_of_2(slots * group), max(power_of_2(head_dim), 16)
    warps = max(WARPS // max(block_r // 4, 1), 1)  # side by side over heads and columns
    block_h = min(power_of_2(num_kv_heads), max(warps * 512 // (block_d * k.element_size()), 1))
    warps = max(block_h * block_d * k.element_size() // 512, 1) * max(block_r // 4, 1)
    tokens = TOKENS * k.element_size() // 2 // block_r
    sizes = {
        "SLOTS": slots, "GROUP": group, "KV_HEADS": num_kv_heads, "D": head_dim,
        "HEAD_BLOCKS": ceil_div(num_kv_heads, block_h), "TOKENS": max(tokens, 1),
        "BLOCK_R": block_r, "BLOCK_H": block_h, "BLOCK_D": block_d,
    }  # fmt: skip
    return sizes, min(warps, 16)
