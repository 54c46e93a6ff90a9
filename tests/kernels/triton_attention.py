"""Both families of Triton attention are dense attention under the ranges' mask.

Not collected by itself: `test_triton_interpreter.py` runs this file in a process of its own, in
Triton's interpreter or on a GPU. The oracle is dense and float64; an error may be twice that of the
same dense computation in the same dtype, plus four roundings of the largest value.

Every `torch.empty` is poisoned, so that an element which no program writes is found. The
interpreter takes milliseconds for every step of a program, so shapes are small.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lst_kernels import KeyRanges, PatchLayout, range_attention
from lst_kernels.schedule import BLOCK_ROWS
from lst_kernels.triton import tiled_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's bfloat16 is garbage.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=4 if INTERPRETED else 30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

streams = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 9]), max_size=6), max_size=3)
heads = st.sampled_from([(1, 1, 16), (4, 2, 24), (3, 1, 16), (2, 2, 32)])
PATTERNS = {
    "encoder": lambda layout: layout.patches_read_tokens(),
    "encoder-slots": lambda layout: layout.patches_read_tokens(slots=3),
    "encoder-window": lambda layout: layout.patches_read_tokens(2, slots=2),
    "decoder": lambda layout: layout.tokens_read_patches(slots=2),
    "decoder-window": lambda layout: layout.tokens_read_patches(2),
    "sliding": lambda layout: layout.sliding_window(3),
    "causal": lambda layout: layout.block_causal(),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory comes filled with what nothing computes."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make):
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    return filled


def make(stream):
    lengths = [length for document in stream for length in document]
    late = [i % 3 == 0 for i in range(len(lengths))]
    return PatchLayout.from_lengths(lengths, [len(d) for d in stream], closed_late=late)


def inputs(ranges, shape, dtype):
    """q, k, v and the gradient of out, float64 values that ``dtype`` can hold."""
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    rows = [(ranges.num_queries, num_heads), *[(ranges.num_keys, num_kv_heads)] * 2]
    return [
        torch.randn(n, h, head_dim, generator=generator).to(DEVICE, dtype).double()
        for n, h in [*rows, rows[0]]
    ]


def dense(q, k, v, ranges, scale):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", q, k) * scale
    scores = scores.masked_fill(~ranges.dense_mask()[:, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill((ranges.start == ranges.stop)[:, None, None], 0)
    return torch.einsum("qhk,khd->qhd", weights, v), scores.logsumexp(-1)


def run(attend, tensors, dtype):
    """out, lse and the gradients of q, k and v."""
    *qkv, grad = (x.to(dtype) for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    out, lse = attend(*qkv)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, grad)]


def ours(ranges, scale=None):
    def attend(q, k, v):
        return range_attention(q, k, v, ranges, scale=scale, return_lse=True, backend="triton")

    return attend


def check(ranges, shape, dtype=torch.float32, scale=None):
    ranges = ranges.to(DEVICE)
    tensors = inputs(ranges, shape, dtype)
    factor = shape[2] ** -0.5 if scale is None else scale

    def attend(q, k, v):
        return dense(q, k, v, ranges, factor)

    oracle, eager = run(attend, tensors, torch.float64), run(attend, tensors, dtype)
    found = run(ours(ranges, scale), tensors, dtype)
    # A gradient may be a difference that cancels; what cancels is about as large as dv.
    gradients = max(map(largest, oracle[2:]))
    sizes = [largest(oracle[0]), largest(oracle[1]), gradients, gradients, gradients]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, y, z, size in zip(names, found, eager, oracle, sizes, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else dtype), name
        finite = z.isfinite()
        assert torch.equal(x[~finite].double(), z[~finite]), name
        error, eager_error = ((a.double() - z)[finite].abs() for a in (x, y))
        budget = 2 * largest(eager_error) + 4 * torch.finfo(dtype).eps * size
        assert error.isfinite().all(), f"{name} has elements that nothing wrote"
        assert largest(error) <= budget, f"{name}: {largest(error):.3g} > {budget:.3g}"


def largest(x):
    return max(x[x.isfinite()].abs().flatten().tolist(), default=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@FEW
@given(stream=streams, shape=heads)
def test_attention_is_dense_attention_under_the_mask(pattern, dtype, stream, shape):
    check(PATTERNS[pattern](make(stream)), shape, dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stream", [[], [[0, 0], [0]], [[1]]], ids=["nothing", "no-tokens", "one"])
def test_streams_of_nothing_or_of_one_token_are_right(pattern, stream):
    check(PATTERNS[pattern](make(stream)), (2, 1, 16))


@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder-window"])
def test_one_long_patch_among_short_ones_is_right(pattern):
    check(PATTERNS[pattern](make([[1] * 5 + [300] + [1] * 5])), (1, 1, 16))


@pytest.mark.parametrize("pattern", ["encoder", "decoder", "sliding"])
def test_many_documents_are_right(pattern):
    check(PATTERNS[pattern](make([[1, 2]] * 25)), (1, 1, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 1, 16)], ids=str)
def test_interior_tiles_between_masked_edges_are_right(shape, dtype):
    """Windows of several tiles, over more than one block of rows."""
    layout = PatchLayout.static([BLOCK_ROWS + 70, 30], 4)
    check(layout.sliding_window(150), shape, dtype)
    check(layout.tokens_read_patches(40, slots=3), shape, dtype)


@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 256])
@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder"])
def test_any_head_size_is_right(pattern, head_dim):
    check(PATTERNS[pattern](make([[2, 0, 5], [3]])), (2, 1, head_dim))


@pytest.mark.parametrize("shape", [(7, 1, 16), (12, 4, 16), (34, 2, 16), (40, 1, 16)], ids=str)
@pytest.mark.parametrize("pattern", ["encoder", "decoder"])
def test_any_number_of_query_heads_shares_a_key_head(pattern, shape):
    """7 share one tile; of 17 each has its own; 40 come ten at a time."""
    check(PATTERNS[pattern](make([[2, 0, 5], [3]])), shape)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_heads_that_take_turns_are_right(together, monkeypatch):
    """Six key heads, of which the L2 cache holds so many; several tiles of queries and of keys."""
    monkeypatch.setattr(tiled_attention, "heads_together", lambda heads, *_: together)
    check(make([[2] * 50, [1, 3] * 20]).tokens_read_patches(slots=2), (6, 6, 16))


@pytest.mark.parametrize("slots", [1, 0], ids=["patches", "tiles"])
def test_keys_that_nobody_reads_get_zero_gradients(slots):
    """Before the first range, between ranges, after the last one."""
    ranges = KeyRanges(torch.tensor([3, 9, 9, 21]), torch.tensor([5, 9, 14, 22]), 40)
    assert ranges.slots == 1
    object.__setattr__(ranges, "slots", slots)
    check(ranges, (2, 1, 16))


def test_dead_patches_at_the_end_read_and_give_nothing():
    layout = PatchLayout.from_lengths([2, 3, 0, 20], [2, 2], num_dead_patches=2)
    for ranges in (layout.patches_read_tokens(slots=2), layout.tokens_read_patches()):
        check(ranges, (2, 1, 16))


def test_selected_queries_are_right():
    ranges = make([[3, 1, 4], [2, 5]]).patches_read_tokens(slots=2)
    check(ranges.select_queries(torch.tensor([0, 1, 2, 7, 8])), (2, 1, 16))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("pattern", ["encoder", "decoder"])
def test_any_scale_is_right(pattern, scale):
    check(PATTERNS[pattern](make([[2, 0, 5], [3]])), (2, 1, 16), scale=scale)


@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder"])
def test_strided_inputs_and_expanded_gradients_change_nothing(pattern):
    ranges = PATTERNS[pattern](make([[2, 3, 1], [4, 2]])).to(DEVICE)
    q, k, v, _ = (x.float() for x in inputs(ranges, (4, 2, 16), torch.float32))

    def results(*tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse = ours(ranges)(*tensors)
        return [out, lse, *torch.autograd.grad(out.sum(), tensors)]

    strided = [
        q.transpose(0, 1).contiguous().transpose(0, 1),  # heads first
        torch.stack((k, v), dim=1)[:, 0],  # keys and values side by side
        torch.stack((k, v), dim=-1)[..., 1],  # elements of a row apart
    ]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(results(*strided), results(q, k, v), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder"])
def test_results_are_the_same_bits_from_run_to_run(pattern):
    ranges = PATTERNS[pattern](make([[2, 3, 1] * 6, [4, 2] * 3])).to(DEVICE)
    tensors = inputs(ranges, (2, 1, 16), torch.float32)
    first, second = (run(ours(ranges), tensors, torch.float32) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
