"""Every op in plain PyTorch: the specification, on any device and in float64 too.

Attention is computed in blocks. The keys that a run of successive queries reads form one interval,
for both ends of a range never decrease; so a run of queries and its interval are one small dense
problem, masked only at its two staircase edges. Memory is linear in queries and keys, forward and
backward. Blocks follow each other in order, so results are the same bits from run to run.

With s = scale · q kᵀ over the keys of a query's range:

    out = softmax(s) v        lse = log Σ exp(s)
    dv = pᵀ do      ds = p ⊙ (do vᵀ − Σ do ⊙ out)      dq = scale · ds k      dk = scale · dsᵀ q

Products and sums are float32, of float64 inputs float64.

Shape letters: T tokens, P patches, F features, Q queries, K keys, Hq/Hkv heads, D head size,
G query heads per key head; of one block: R queries (rows), C keys (columns).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lst_kernels.ranges import KeyRanges

# A block has BLOCK_ROWS queries: few, so that its scores stay in a CPU's cache and little of it
# lies outside the ranges. Fewer where its scores over all heads would exceed BLOCK_ELEMENTS.
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 2**23


class Block(NamedTuple):
    """Queries ``first … last - 1`` and the interval of all the keys they read."""

    first: int
    last: int
    start: int
    stop: int


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over ranges of keys.

    Args:
        q: (Q, Hq, D).
        k, v: (K, Hkv, D).

    Returns:
        out (Q, Hq, D), in q's dtype; lse (Q, Hq), float32 or float64. An empty range gives 0, −inf.
    """
    queries, keys, values = _queries(q, k.shape[1]) * scale, _keys(k), _keys(v)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=_precise(q.dtype), device=q.device)
    for block in _blocks(ranges, q.shape[1]):
        rows, columns = slice(block.first, block.last), slice(block.start, block.stop)
        scores = _scores(queries[:, rows], keys[:, columns], ranges, block)
        peak = scores.amax(-1, keepdim=True)
        peak.masked_fill_(peak == -torch.inf, 0)  # an empty range: exp(-inf - 0) = 0
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)  # at least 1, or 0 for an empty range
        read = torch.bmm(weights, values[:, columns]) / total.clamp(min=1)
        out[rows] = _by_query(read, block).to(q.dtype)
        lse[rows] = _by_query(peak + total.log(), block).squeeze(-1)
    return out, lse


def range_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: KeyRanges,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the gradient (Q, Hq, D) of out."""
    num_kv_heads = k.shape[1]
    queries, keys, values = _queries(q, num_kv_heads) * scale, _keys(k), _keys(v)
    grads = _queries(grad, num_kv_heads)
    dots = (grads * _queries(out, num_kv_heads)).sum(-1, keepdim=True)
    # exp(-inf - inf) = 0: an empty range has no weights
    lses = _queries(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None], num_kv_heads)
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(ranges, q.shape[1]):
        rows, columns = slice(block.first, block.last), slice(block.start, block.stop)
        block_q, block_k, block_v = queries[:, rows], keys[:, columns], values[:, columns]
        block_grad = grads[:, rows].flatten(1, 2)
        scores = _scores(block_q, block_k, ranges, block)
        weights = scores.sub_(lses[:, rows].flatten(1, 2)).exp_()
        grad_values[:, columns].baddbmm_(weights.mT, block_grad)
        grad_scores = torch.bmm(block_grad, block_v.mT)
        grad_scores.sub_(dots[:, rows].flatten(1, 2)).mul_(weights)
        grad_keys[:, columns].baddbmm_(grad_scores.mT, block_q.flatten(1, 2))
        block_grad_q = torch.bmm(grad_scores, block_k).mul_(scale)
        grad_q[rows] = _by_query(block_grad_q, block).to(q.dtype)
    grad_k, grad_v = (x.transpose(0, 1).to(q.dtype) for x in (grad_keys, grad_values))
    return grad_q, grad_k.contiguous(), grad_v.contiguous()


def patch_pool(x: Tensor, cu_patches: Tensor, reduce: str) -> tuple[Tensor, Tensor | None]:
    """Reduce the tokens of each patch.

    Args:
        x: (T, F).
        cu_patches: (P+1,) int32, token offset of each patch.
        reduce: mean, sum, max, min, first or last.

    Returns:
        (P, F) in x's dtype, 0 for an empty patch; and the token (P, F) int32 that won, -1 in an
        empty patch, for max and min. The first of equal values wins, and NaN over any number.
    """
    starts, stops = cu_patches[:-1], cu_patches[1:]
    empty = (starts == stops)[:, None]
    num_patches, num_features = len(starts), x.shape[1]
    if reduce in ("first", "last"):
        token = starts if reduce == "first" else stops - 1
        if len(x) == 0:
            return x.new_zeros(num_patches, num_features), None
        return x[token.clamp(0, len(x) - 1)].masked_fill(empty, 0), None
    patch_ids = _patch_ids(cu_patches, len(x))
    if reduce in ("mean", "sum"):
        precise = x.to(_precise(x.dtype))
        out = precise.new_zeros(num_patches, num_features).index_add_(0, patch_ids, precise)
        if reduce == "mean":
            out /= (stops - starts).clamp(min=1)[:, None]
        return out.to(x.dtype), None
    owner = patch_ids[:, None].expand_as(x)
    best = x.new_zeros(num_patches, num_features)
    best.scatter_reduce_(0, owner, x, "a" + reduce, include_self=False)
    wins = (x == best[patch_ids]) | x.isnan()
    token = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    index = token.new_full((num_patches, num_features), len(x))
    index.scatter_reduce_(0, owner, torch.where(wins, token, len(x)), "amin")
    return best, index.masked_fill_(empty, -1)


def patch_pool_backward(
    grad: Tensor, cu_patches: Tensor, reduce: str, index: Tensor | None, num_tokens: int
) -> Tensor:
    """The share (T, F) of each token in the gradient (P, F) of its patch."""
    patch_ids = _patch_ids(cu_patches, num_tokens)
    if reduce == "mean":
        lengths = torch.diff(cu_patches).clamp(min=1)[:, None]
        grad = (grad.to(_precise(grad.dtype)) / lengths).to(grad.dtype)
    share = grad[patch_ids]
    if reduce in ("mean", "sum"):
        return share
    token = torch.arange(num_tokens, dtype=torch.int32, device=grad.device)[:, None]
    if index is None:
        index = cu_patches[:-1, None] if reduce == "first" else cu_patches[1:, None] - 1
    return share.masked_fill_(index[patch_ids] != token, 0)


def patch_expand(z: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """Row ``ids[t]`` of z (P, F) for every token t, 0 where the id is -1, plus row t of the
    residual (T, F) where there is one. → (T, F)."""
    if len(z) == 0:
        rows = z.new_zeros(len(ids), z.shape[1])
    else:
        rows = z[ids.clamp(min=0)].masked_fill_((ids < 0)[:, None], 0)
    return rows if residual is None else rows.add_(residual)


def patch_expand_backward(grad: Tensor, ids: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Sum the gradients (T, F) of each patch's readers, ``start[p] … stop[p] - 1``. → (P, F).

    ``ids`` names the same readers: the patch of each token, -1 for none.
    """
    precise = grad.to(_precise(grad.dtype))
    total = precise.new_zeros(len(start) + 1, grad.shape[1])  # the last row takes those of no patch
    total.index_add_(0, torch.where(ids < 0, len(start), ids), precise)
    return total[:-1].to(grad.dtype, copy=True)


def segment_scan(x: Tensor, decay: Tensor, cu_segments: Tensor) -> Tensor:
    """``y[t] = decay[t] · y[t-1] + x[t]`` over the rows of each segment. → (P, F) in x's dtype.

    Args:
        x: (P, F).
        decay: (P,), float32 or float64. A decay of 0, and a segment's first row, take x as it is:
            0 · NaN would not be 0.
        cu_segments: (N+1,) int32, row offset of each segment.
    """
    precise, out = x.to(decay.dtype), torch.empty_like(x)
    state = precise.new_zeros(x.shape[1])
    for row, keeps in enumerate(_keeps(decay, cu_segments)):
        state = torch.addcmul(precise[row], decay[row], state) if keeps else precise[row]
        out[row] = state
    return out


def segment_scan_backward(
    grad: Tensor, decay: Tensor, cu_segments: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the decay, from the gradient (P, F) of y:
    ``dx[t] = dy[t] + decay[t+1] · dx[t+1]``, ``ddecay[t] = Σ dx[t] · y[t-1]`` over the features."""
    precise, grad_x = grad.to(decay.dtype), torch.empty_like(grad)
    grad_decay = torch.zeros_like(decay)
    first = _is_first(cu_segments, len(grad))
    keeps = [*_keeps(decay, cu_segments), False]
    state = precise.new_zeros(grad.shape[1])
    for row in reversed(range(len(grad))):
        given = precise[row]
        state = torch.addcmul(given, decay[row + 1], state) if keeps[row + 1] else given
        grad_x[row] = state
        if not first[row]:
            grad_decay[row] = torch.dot(state, y[row - 1].to(decay.dtype))
    return grad_x, grad_decay


def _blocks(ranges: KeyRanges, num_heads: int) -> Iterator[Block]:
    start, stop = ranges.start.cpu(), ranges.stop.cpu()  # on a device this waits: it is a reference
    last = ranges.num_queries
    firsts = range(0, last, BLOCK_ROWS)
    pending = [(first, min(first + BLOCK_ROWS, last)) for first in reversed(firsts)]
    while pending:
        first, last = pending.pop()
        block = Block(first, last, int(start[first]), int(stop[last - 1]))
        elements = (last - first) * (block.stop - block.start) * num_heads
        if elements > BLOCK_ELEMENTS and last - first > 1:
            middle = (first + last) // 2
            pending += [(middle, last), (first, middle)]
        elif elements:
            yield block


def _scores(queries: Tensor, keys: Tensor, ranges: KeyRanges, block: Block) -> Tensor:
    """(Hkv, R·G, C) products of (Hkv, R, G, D) and (Hkv, C, D), -inf outside the ranges."""
    num_kv_heads, num_rows, groups, _ = queries.shape
    scores = torch.bmm(queries.flatten(1, 2), keys.mT)
    by_row = scores.view(num_kv_heads, num_rows, groups, -1)
    start, stop = (x[block.first : block.last, None, None] for x in (ranges.start, ranges.stop))
    key = torch.arange(block.start, block.stop, dtype=torch.int32, device=keys.device)
    # every query of the block starts at its last query's start or before, and stops at its first
    # query's stop or after: only columns left of the one and right of the other need a mask
    left, right = int(start[-1]) - block.start, int(stop[0]) - block.start
    by_row[..., :left].masked_fill_(key[:left] < start, -torch.inf)
    by_row[..., right:].masked_fill_(key[right:] >= stop, -torch.inf)
    return scores


def _queries(x: Tensor, num_kv_heads: int) -> Tensor:
    """(Q, Hq, D) → (Hkv, Q, G, D), precise and contiguous."""
    by_group = x.to(_precise(x.dtype)).unflatten(1, (num_kv_heads, -1))
    return by_group.transpose(0, 1).contiguous()


def _keys(x: Tensor) -> Tensor:
    """(K, Hkv, D) → (Hkv, K, D), precise and contiguous."""
    return x.to(_precise(x.dtype)).transpose(0, 1).contiguous()


def _by_query(x: Tensor, block: Block) -> Tensor:
    """(Hkv, R·G, D) → (R, Hq, D)."""
    return x.unflatten(1, (block.last - block.first, -1)).transpose(0, 1).flatten(1, 2)


def _is_first(cu_segments: Tensor, num_rows: int) -> list[bool]:
    """Of each row, whether a segment starts there. On a device this waits: it is a reference."""
    starts = set(cu_segments.tolist())
    return [row in starts for row in range(num_rows)]


def _keeps(decay: Tensor, cu_segments: Tensor) -> list[bool]:
    """Of each row, whether it adds to the state before it."""
    first = _is_first(cu_segments, len(decay))
    return [d != 0 and not f for d, f in zip(decay.tolist(), first, strict=True)]


def _patch_ids(cu_patches: Tensor, num_tokens: int) -> Tensor:
    token = torch.arange(num_tokens, dtype=torch.int32, device=cu_patches.device)
    return torch.searchsorted(cu_patches, token, right=True) - 1


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
