"""Attention over ranges is dense attention under the ranges' mask, on every backend.

The oracle is dense and float64. A backend's error may be twice that of dense eager PyTorch in the
same dtype, plus four roundings of the largest value (of the largest gradient for the gradients).
Results and gradients are written into poisoned memory.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lst_kernels import (
    KeyRanges,
    PatchLayout,
    block_causal_attention,
    range_attention,
    reference,
    sliding_window_attention,
)
from lst_kernels.backends import BACKENDS, Call

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RUNNABLE = [
    pytest.param(b.name, dtype, id=f"{b.name}-{dtype}".replace("torch.", ""))
    for b in BACKENDS
    for dtype in DTYPES
    if not (b.refuses(Call("range_attention", "cpu", dtype, head_dim=16)) or b.unavailable())
]

streams = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 6]), max_size=6), max_size=4)
heads = st.sampled_from([(1, 1, 16), (4, 2, 24), (3, 1, 16), (2, 2, 32)])
PATTERNS = {
    "encoder": lambda layout: layout.patches_read_tokens(),
    "encoder-slots": lambda layout: layout.patches_read_tokens(2, slots=2),
    "decoder": lambda layout: layout.tokens_read_patches(),
    "decoder-window": lambda layout: layout.tokens_read_patches(2, slots=2),
    "sliding": lambda layout: layout.sliding_window(3),
    "causal": lambda layout: layout.block_causal(),
}
EDGES = {
    "nothing": [],
    "no-tokens": [[0, 0], [0]],
    "one-token": [[1]],
    "one-document": [[2, 3, 0, 1, 4]],
    "one-long-patch": [[1] * 30 + [300] + [1] * 30],
    "hundred-documents": [[1, 2]] * 100,
}


def make(stream, late=True):
    lengths = [length for document in stream for length in document]
    return PatchLayout.from_lengths(
        lengths,
        [len(document) for document in stream],
        closed_late=[late and i % 3 == 0 for i in range(len(lengths))],
    )


def inputs(ranges, dtype, shape, seed=0):
    """q, k, v and the gradient of out, float64 values that ``dtype`` can hold."""
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, num, head_dim, generator=generator).to(dtype).double()
        for rows, num in (
            (ranges.num_queries, num_heads),
            (ranges.num_keys, num_kv_heads),
            (ranges.num_keys, num_kv_heads),
            (ranges.num_queries, num_heads),
        )
    ]


def dense(q, k, v, ranges, *, scale=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->qhk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~ranges.dense_mask()[:, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill((ranges.start == ranges.stop)[:, None, None], 0)
    return torch.einsum("qhk,khd->qhd", weights, v), scores.logsumexp(-1)


def run(attend, tensors, dtype):
    """out, lse and the gradients of q, k, v."""
    *qkv, grad = (x.to(dtype) for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    out, lse = attend(*qkv)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, grad)]


def check(ranges, backend, dtype, shape, scale=None):
    tensors = inputs(ranges, dtype, shape)
    oracle = run(lambda q, k, v: dense(q, k, v, ranges, scale=scale), tensors, torch.float64)
    eager = run(lambda q, k, v: dense(q, k, v, ranges, scale=scale), tensors, dtype)
    ours = run(
        lambda q, k, v: range_attention(
            q, k, v, ranges, scale=scale, return_lse=True, backend=backend
        ),
        tensors,
        dtype,
    )
    # Where dq and dk are differences that cancel (one key: exactly 0), the rounding of what cancels
    # remains; that is as large as dv. So the three gradients share one scale.
    scales = [largest(oracle[0]), largest(oracle[1]), *[max(map(largest, oracle[2:]))] * 3]
    roundings = 4 if dtype != torch.float64 else 16  # the oracle rounds like that too
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, y, z, size in zip(names, ours, eager, oracle, scales, strict=True):
        assert x.shape == z.shape, name
        assert x.dtype == (torch.float32 if name == "lse" and dtype.itemsize < 4 else dtype), name
        finite = z.isfinite()
        assert torch.equal(x[~finite].double(), z[~finite]), name
        assert x[finite].isfinite().all(), f"{name} has elements that nothing wrote"
        error, eager_error = (largest((a.double() - z)[finite]) for a in (x, y))
        budget = 2 * eager_error + roundings * torch.finfo(dtype).eps * size
        assert error <= budget, f"{name}: {error:.3g} > {budget:.3g}"


def largest(x):
    return max(x[x.isfinite()].abs().flatten().tolist(), default=0.0)


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(stream=streams, shape=heads)
def test_attention_is_dense_attention_under_the_mask(pattern, backend, dtype, stream, shape):
    check(PATTERNS[pattern](make(stream)), backend, dtype, shape)


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
@pytest.mark.parametrize("stream", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder", "sliding"])
def test_attention_is_dense_attention_at_the_edges(pattern, stream, backend, dtype):
    check(PATTERNS[pattern](make(stream)), backend, dtype, (2, 1, 16), scale=0.5)


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_attention_is_dense_attention_over_many_blocks(backend, dtype):
    layout = PatchLayout.from_lengths([3] * 100, [60, 40])
    check(layout.sliding_window(70), backend, dtype, (4, 2, 16))


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_an_empty_range_gives_zero_and_minus_infinity_without_gradient(backend, dtype):
    ranges = KeyRanges(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 2]), 4)
    q, k, v, _ = (x.to(dtype).requires_grad_() for x in inputs(ranges, dtype, (2, 1, 16)))
    out, lse = range_attention(q, k, v, ranges, return_lse=True, backend=backend)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert not lse.requires_grad
    out.sum().backward()
    for x in (q.grad[1], k.grad[2:], v.grad[2:]):  # nobody reads keys 2 and 3
        assert (x == 0).all()
    assert torch.equal(v.grad[:2], torch.full_like(v.grad[:2], 2))  # one reader, two heads


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_strided_inputs_and_expanded_gradients_change_nothing(backend, dtype):
    ranges = make([[2, 3, 1], [4, 2]]).tokens_read_patches(slots=2)
    q, k, v, _ = (x.to(dtype) for x in inputs(ranges, dtype, (4, 2, 16)))

    def gradients(q, k, v):
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        range_attention(*tensors, ranges, backend=backend).sum().backward()
        return [x.grad for x in tensors]

    strided = [
        q.transpose(0, 2).contiguous().transpose(0, 2),
        torch.stack((k, v), dim=1)[:, 0],
        torch.stack((k, v), dim=-1)[..., 1],
    ]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(gradients(*strided), gradients(q, k, v), strict=True):
        assert torch.equal(x, y)
    ours = range_attention(*strided, ranges, backend=backend)
    assert torch.equal(ours, range_attention(q, k, v, ranges, backend=backend))


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_results_are_the_same_bits_from_run_to_run(backend, dtype):
    ranges = make([[2, 3, 1] * 9, [4, 2] * 5]).tokens_read_patches(3, slots=2)
    tensors = inputs(ranges, dtype, (4, 2, 16))

    def attend(q, k, v):
        return range_attention(q, k, v, ranges, return_lse=True, backend=backend)

    for x, y in zip(run(attend, tensors, dtype), run(attend, tensors, dtype), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", [p.values[0] for p in RUNNABLE if p.values[1] == torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_those_of_finite_differences(pattern, backend):
    ranges = PATTERNS[pattern](make([[1, 0, 2], [2]]))
    q, k, v, _ = (x.requires_grad_() for x in inputs(ranges, torch.float64, (2, 1, 3)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: range_attention(q, k, v, ranges, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("backend", sorted({p.values[0] for p in RUNNABLE}))
def test_the_wrappers_are_their_ranges(backend):
    layout = make([[2, 3, 1], [], [4, 0, 2]])
    q, k, v, _ = (x.float() for x in inputs(layout.sliding_window(4), torch.float32, (2, 1, 16)))
    expected = range_attention(q, k, v, layout.sliding_window(4), backend=backend)
    for ranges in (None, layout.sliding_window(4)):
        ours = sliding_window_attention(
            *(q, k, v, layout.cu_tokens),
            window=4,
            max_length=layout.max_document_tokens,
            ranges=ranges,
            backend=backend,
        )
        assert torch.equal(ours, expected)
    q, k, v = (x[: layout.num_patches] for x in (q, k, v))
    expected = range_attention(q, k, v, layout.block_causal(), backend=backend)
    for ranges in (None, layout.block_causal()):
        ours = block_causal_attention(
            *(q, k, v, layout.cu_documents),
            max_length=layout.max_document_patches,
            ranges=ranges,
            backend=backend,
        )
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", sorted({p.values[0] for p in RUNNABLE}))
@pytest.mark.parametrize("documents", [[], [[]], [[0, 0], []]], ids=["none", "empty", "patches"])
def test_no_tokens_are_an_empty_result_of_the_wrappers_too(documents, backend):
    layout = make(documents)
    x = torch.zeros(0, 2, 16, requires_grad=True)
    for ranges in (None, layout.sliding_window(4)):
        windowed = sliding_window_attention(
            *(x, x, x, layout.cu_tokens), window=4, max_length=0, ranges=ranges, backend=backend
        )
        causal = block_causal_attention(
            *(x, x, x, layout.cu_tokens), max_length=0, ranges=ranges, backend=backend
        )
        for out in (windowed, causal):
            assert out.shape == (0, 2, 16)
            assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_one_query_over_two_keys_by_hand():
    ranges = KeyRanges(torch.tensor([1]), torch.tensor([3]), 3)
    q = torch.ones(1, 1, 1)
    k = torch.tensor([9.0, 0.0, 2.0]).log().clamp(min=0).view(3, 1, 1)  # scores log 1 and log 2
    v = torch.tensor([100.0, 3.0, 6.0]).view(3, 1, 1)
    out, lse = range_attention(q, k, v, ranges, scale=1.0, return_lse=True)
    torch.testing.assert_close(out.item(), (1 * 3.0 + 2 * 6.0) / 3)
    torch.testing.assert_close(lse.item(), torch.tensor(3.0).log().item())


def test_scores_of_the_reference_are_split_where_they_would_not_fit(monkeypatch):
    ranges = PatchLayout.from_lengths([1] * 90, [90]).sliding_window(80)
    tensors = inputs(ranges, torch.float32, (2, 1, 16))

    def attend(q, k, v):
        return range_attention(q, k, v, ranges, return_lse=True, backend="reference")

    whole = run(attend, tensors, torch.float32)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 500)
    for x, y in zip(run(attend, tensors, torch.float32), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_the_reference_needs_memory_linear_in_the_tokens():
    num_tokens, head_dim = 65_536, 8
    ranges = PatchLayout.from_lengths([1] * num_tokens, [num_tokens]).sliding_window(512)
    q, k, v, grad = (torch.randn(num_tokens, 1, head_dim) for _ in range(4))
    with LargestTensor() as made:
        out, lse = reference.range_attention(q, k, v, ranges, 1.0)
        reference.range_attention_backward(grad, q, k, v, out, lse, ranges, 1.0)
    assert made.largest <= 4 * num_tokens * head_dim  # a copy of q; dense scores take 16 GB


LAYOUT = PatchLayout.from_lengths([2, 3], [2])
RANGES = LAYOUT.tokens_read_patches()  # 5 queries, 2 keys


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


SQUARE = LAYOUT.sliding_window(5)  # 5 queries, 5 keys, for each op
OPS = {
    "range": lambda q, k, v, ranges=SQUARE: range_attention(q, k, v, ranges),
    "sliding-window": lambda q, k, v, ranges=SQUARE: sliding_window_attention(
        q, k, v, LAYOUT.cu_tokens, window=5, max_length=5, ranges=ranges
    ),
    "block-causal": lambda q, k, v, ranges=SQUARE: block_causal_attention(
        q, k, v, LAYOUT.cu_tokens, max_length=5, ranges=ranges
    ),
}
X = ones(5, 2, 16)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((ones(5, 16), X, X), ValueError, "q must be (Q, Hq, D); got shape (5, 16)"),
        ((X, X, X[0]), ValueError, "v must be (K, Hkv, D); got shape (2, 16)"),
        ((X, X, ones(5, 2, 8)), ValueError, "v has shape (5, 2, 8), but k has (5, 2, 16)"),
        ((X, *[ones(5, 2, 8)] * 2), ValueError, "k has head size 8, but q has 16"),
        ([ones(5, 2, 257)] * 3, ValueError, "q has head size 257; expected 1 to 256"),
        ([ones(5, 2, 0)] * 3, ValueError, "q has head size 0; expected 1 to 256"),
        (
            (ones(5, 8, 16), *[ones(5, 3, 16)] * 2),
            ValueError,
            "k has 3 heads, which does not divide q's 8",
        ),
        ((X, *[ones(5, 0, 16)] * 2), ValueError, "k has 0 heads, which does not divide q's 2"),
        ((ones(5, 0, 16), X, X), ValueError, "q must have heads; got shape (5, 0, 16)"),
        (
            [X.int()] * 3,
            TypeError,
            "q must be float32, bfloat16, float16 or float64; got torch.int32",
        ),
        ((X, X.half(), X), TypeError, "k is torch.float16, but q is torch.float32"),
        ((X, X, X.double()), TypeError, "v is torch.float64, but q is torch.float32"),
        ((X, X.to("meta"), X), ValueError, "k is on meta, but q is on cpu"),
        ((X, X, X.to("meta")), ValueError, "v is on meta, but q is on cpu"),
        ([X, X, X, SQUARE.to("meta")], ValueError, "ranges is on meta, but q is on cpu"),
        (
            (X, X, X, LAYOUT.patches_read_tokens()),
            ValueError,
            "q has 5 rows, but ranges has 2 queries",
        ),
        ((X, X, X, RANGES), ValueError, "k has 5 rows, but ranges is over 2 keys"),
    ],
)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_wrong_tensors_are_told_in_the_callers_words_by_each_op(op, inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        op(*inputs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_largest_head_size_runs(op):
    x = torch.randn(5, 1, 256)
    torch.testing.assert_close(
        op(x, x, x), range_attention(x, x, x, SQUARE, backend="reference"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: range_attention(ones(4, 2, 16), ones(2, 2, 16), ones(2, 2, 16), RANGES),
            ValueError,
            "q has 4 rows, but ranges has 5 queries",
        ),
        (
            lambda: range_attention(ones(5, 2, 16), ones(3, 2, 16), ones(3, 2, 16), RANGES),
            ValueError,
            "k has 3 rows, but ranges is over 2 keys",
        ),
        (
            lambda: range_attention(*[ones(5, 2, 16)] * 3, SQUARE.dense_mask()),
            TypeError,
            "ranges must be KeyRanges, as the methods of a PatchLayout make; got Tensor",
        ),
        (
            lambda: range_attention(*[ones(5, 2, 16).numpy()] * 3, SQUARE),
            TypeError,
            "q must be a tensor; got ndarray",
        ),
        (
            lambda: sliding_window_attention(*[ones(5, 2, 16)] * 3, [0, 5], window=2, max_length=5),
            TypeError,
            "cu_tokens must be (N+1,) int32 offsets; got list",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(5, 2, 16)] * 3,
                LAYOUT.cu_tokens,
                window=2,
                max_length=5,
                ranges=LAYOUT.sliding_window(3),
            ),
            ValueError,
            "window is 2, but a query of ranges reads 3 keys",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(5, 2, 16)] * 3, LAYOUT.cu_tokens.to("meta"), window=2, max_length=5
            ),
            ValueError,
            "cu_tokens is on meta, but q is on cpu",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(5, 2, 16)] * 3, LAYOUT.cu_tokens[:, None], window=2, max_length=5
            ),
            TypeError,
            "cu_tokens must be (N+1,) int32 offsets; got torch.int32 of shape (2, 1)",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(5, 2, 16)] * 3, LAYOUT.cu_tokens, window=0, max_length=5
            ),
            ValueError,
            "window counts the token itself, so it is at least 1; got 0",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(6, 2, 16)] * 3, LAYOUT.cu_tokens, window=2, max_length=5
            ),
            ValueError,
            "cu_tokens ends at 5, but q has 6 rows",
        ),
        (
            lambda: sliding_window_attention(
                *[ones(5, 2, 16)] * 3, LAYOUT.cu_tokens, window=2, max_length=4
            ),
            ValueError,
            "max_length is 4, but a document of 5 rows is longer",
        ),
        (
            lambda: block_causal_attention(
                *[ones(5, 2, 16)] * 3, torch.tensor([0, 3, 2, 5]).int(), max_length=5
            ),
            ValueError,
            "cu_units must not decrease; at offset 2 it falls from 3 to 2",
        ),
        (
            lambda: block_causal_attention(
                *[ones(5, 2, 16)] * 3, torch.tensor([1, 5]).int(), max_length=5
            ),
            ValueError,
            "cu_units must start at 0; got 1",
        ),
        (
            lambda: block_causal_attention(
                *[ones(5, 2, 16)] * 3, torch.tensor([0, 5]), max_length=5
            ),
            TypeError,
            "cu_units must be (N+1,) int32 offsets; got torch.int64",
        ),
        (
            lambda: block_causal_attention(
                ones(5, 2, 16), ones(2, 2, 16), ones(2, 2, 16), LAYOUT.cu_tokens, max_length=5
            ),
            ValueError,
            "k has 2 rows, but q has 5",
        ),
    ],
)
def test_wrong_input_is_told_in_the_callers_words(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
