"""A segment scan is what a loop over rows makes of the recurrence, each segment on its own.

The oracle is that loop in float64, its gradients found by autograd. A backend's error may be twice
that of the loop in the same dtype, plus four roundings of the largest value. Results and gradients
are written into poisoned memory.
"""

import os
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lst_kernels import PatchLayout, explain, segment_scan
from lst_kernels.backends import BACKENDS, Call

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RUNNABLE = [
    pytest.param(b.name, dtype, id=f"{b.name}-{dtype}".replace("torch.", ""))
    for b in BACKENDS
    for dtype in DTYPES
    if not (b.refuses(Call("segment_scan", "cpu", dtype)) or b.unavailable())
]
NAMES = sorted({p.values[0] for p in RUNNABLE})
# Triton's interpreter takes milliseconds for every row: it gets fewer and shorter segments.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
QUICK = settings(deadline=None, derandomize=True, max_examples=1 if INTERPRETED else 10)

lengths_of_segments = st.lists(st.sampled_from([0, 1, 1, 2, 3, 9]), max_size=6)


def with_edges(test):
    for lengths in (
        [],
        [0, 0],
        [1],
        [0, 3, 0],
        [1, 80 if INTERPRETED else 200, 1],
        [2] * (5 if INTERPRETED else 100),
    ):
        test = example(lengths=lengths)(test)
    return QUICK(test)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def precise(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(dtype, num_rows, num_features):
    """x, decay and y's gradient, in float64, of values that the op's dtypes can hold. Some decays
    are 0 or 1, some negative."""
    generator = torch.Generator().manual_seed(num_rows + num_features)
    x, grad = (
        torch.randn(num_rows, num_features, generator=generator).to(dtype).double()
        for _ in range(2)
    )
    decay = torch.rand(num_rows, generator=generator).double()
    decay[3::7], decay[5::11], decay[1::13] = 0, 1, -0.5
    return x, decay, grad


def loop(x, decay, cu_segments):
    rows = []
    for start, stop in zip(cu_segments[:-1].tolist(), cu_segments[1:].tolist(), strict=True):
        for t in range(start, stop):
            rows.append(x[t] if t == start else decay[t] * rows[-1] + x[t])
    return torch.stack(rows) if rows else x * 1


def differentiate(scan, x, decay, grad):
    """y and the gradients of x and decay."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, decay)]
    y = scan(*leaves)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)),
    ]


def largest(x):
    return max(x.abs().flatten().tolist(), default=0.0)


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
@with_edges
@given(lengths=lengths_of_segments)
def test_a_row_is_its_own_value_and_what_is_left_of_the_row_before(backend, dtype, lengths):
    cu = offsets(lengths)
    x, decay, grad = inputs(dtype, sum(lengths), 5)
    oracle = differentiate(lambda x, d: loop(x, d, cu), x, decay.to(precise(dtype)).double(), grad)
    same = (x.to(dtype), decay.to(precise(dtype)), grad.to(dtype))
    eager = differentiate(lambda x, d: loop(x, d, cu), *same)
    ours = differentiate(lambda x, d: segment_scan(x, d, cu, backend=backend), *same)
    assert [z.dtype for z in ours] == [dtype, dtype, precise(dtype)]
    for name, z, eager_z, expected in zip(["y", "dx", "ddecay"], ours, eager, oracle, strict=True):
        assert z.shape == expected.shape
        assert z.isfinite().all(), f"{name} has elements that nothing wrote"
        allowed = 2 * largest(eager_z - expected) + 4 * torch.finfo(dtype).eps * largest(expected)
        assert largest(z - expected) <= allowed, name


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_decays_of_zero_and_one_are_exact(backend, dtype):
    x = torch.ones(300, 3, dtype=dtype)
    decay, cu = torch.ones(300, dtype=precise(dtype)), offsets([200, 100])
    decay[50] = 0
    y = segment_scan(x, decay, cu, backend=backend)
    counts = torch.cat([torch.arange(1, n + 1) for n in (50, 150, 100)])
    assert torch.equal(y, counts[:, None].expand(-1, 3).to(dtype))
    decay.zero_()
    assert torch.equal(segment_scan(x, decay, cu, backend=backend), x)


@pytest.mark.parametrize("backend", NAMES)
def test_nothing_crosses_into_another_segment_or_past_a_decay_of_zero(backend):
    """NaN and infinity neither, forward or backward; 0 · NaN would let them."""
    cu = offsets([3, 90, 0, 4])
    x, decay, grad = (tensor.float() for tensor in inputs(torch.float32, 97, 5))
    decay = decay * 0.9 + 0.05
    decay[70] = 0

    def scan(x, decay):
        return segment_scan(x, decay, cu, backend=backend)

    clean = differentiate(scan, x, decay, grad)
    for wrong in (torch.nan, torch.inf):
        spoilt_x, spoilt_decay, spoilt_grad = x.clone(), decay.clone(), grad.clone()
        spoilt_x[40], spoilt_grad[40], spoilt_decay[[0, 3, 93]] = wrong, wrong, wrong
        y, grad_x, grad_decay = differentiate(scan, spoilt_x, spoilt_decay, spoilt_grad)
        for ours, expected, reached in (
            (y, clean[0], slice(40, 70)),
            (grad_x, clean[1], slice(3, 41)),
            (grad_decay, clean[2], slice(4, 71)),  # decay 70 was multiplied with y 69
        ):
            assert not ours[reached].isfinite().all()
            untouched = torch.ones(97, dtype=torch.bool)
            untouched[reached] = False
            assert torch.equal(ours[untouched], expected[untouched])


@pytest.mark.parametrize("backend", NAMES)
def test_the_first_decay_of_a_segment_has_no_gradient(backend):
    cu = offsets([4, 0, 1, 80])
    x, decay, grad = (tensor.float() for tensor in inputs(torch.float32, 85, 5))
    _, _, grad_decay = differentiate(
        lambda x, d: segment_scan(x, d, cu, backend=backend), x, decay, grad
    )
    assert (grad_decay[[0, 4, 5]] == 0).all()
    assert (grad_decay[[1, 2, 3, 6, 84]] != 0).all()


@pytest.mark.parametrize("backend", NAMES)
def test_a_long_memory_stays_accurate_in_float32(backend):
    """Products over such a document underflow, and a cumulative sum of scaled rows overflows."""
    num_rows = 150 if INTERPRETED else 20_000
    cu = offsets([num_rows])
    x, _, grad = inputs(torch.float32, num_rows, 4)
    for least in (0.999_99, 0.0):
        decay = torch.linspace(least, 1, num_rows).float()
        state, expected = torch.zeros(4, dtype=torch.float64), []
        for row, kept in zip(x, decay.tolist(), strict=True):
            state = kept * state + row
            expected.append(state)
        expected = torch.stack(expected)
        y = segment_scan(x.float(), decay, cu, backend=backend)
        assert largest(y - expected) <= 1e-5 * largest(expected)
        state, shares = torch.zeros(4, dtype=torch.float64), []
        for row, kept in zip(grad.flip(0), [0, *decay.flip(0).tolist()[:-1]], strict=True):
            state = kept * state + row
            shares.append(state)
        shares = torch.stack(shares[::-1])
        _, grad_x, grad_decay = differentiate(
            lambda x, d: segment_scan(x, d, cu, backend=backend), x.float(), decay, grad.float()
        )
        assert largest(grad_x - shares) <= 1e-5 * largest(shares)
        dots = (shares[1:] * expected[:-1]).sum(1)
        assert largest(grad_decay[1:] - dots) <= 1e-5 * largest(dots)


@pytest.mark.parametrize(("backend", "dtype"), RUNNABLE)
def test_results_are_the_same_bits_from_run_to_run(backend, dtype):
    cu = offsets([30, 1, 100, 0, 7])
    x, decay, grad = inputs(dtype, 138, 4 if INTERPRETED else 40)
    same = (x.to(dtype), decay.to(precise(dtype)), grad.to(dtype))
    runs = [
        differentiate(lambda x, d: segment_scan(x, d, cu, backend=backend), *same) for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", NAMES)
def test_strided_inputs_and_expanded_gradients_change_nothing(backend):
    cu = offsets([2, 5])
    x, decay, _ = (tensor.float() for tensor in inputs(torch.float32, 7, 6))
    packed = differentiate(
        lambda x, d: segment_scan(x, d, cu, backend=backend), x, decay, torch.ones(7, 6)
    )
    wide_x, wide_decay = torch.stack((x, x), 1), torch.stack((decay, decay), 1)
    wide_cu = torch.stack((cu, cu), 1)[:, 1]
    for strided in (wide_x[:, 1], x.T.contiguous().T):
        leaves = strided.detach().requires_grad_(), wide_decay[:, 1].detach().requires_grad_()
        y = segment_scan(*leaves, wide_cu, backend=backend)
        ours = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones(1, 1).expand(7, 6))]
        for z, expected in zip(ours, packed, strict=True):
            assert torch.equal(z, expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_rows_may_have_any_shape(shape):
    x = torch.ones(5, *shape)
    y = segment_scan(x, torch.ones(5), offsets([2, 3]))
    assert torch.equal(y, torch.tensor([1.0, 2, 1, 2, 3]).view(5, *[1] * len(shape)) * x)


@pytest.mark.parametrize("backend", [p.values[0] for p in RUNNABLE if p.values[1] == torch.float64])
def test_gradients_are_those_of_finite_differences(backend):
    cu = offsets([3, 0, 1, 4])
    x, decay, _ = inputs(torch.float64, 8, 3)
    leaves = x.requires_grad_(), decay.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d: segment_scan(x, d, cu, backend=backend), leaves)


def test_states_of_half_precision_are_carried_in_float32():
    x = torch.full((4096, 1), 0.5, dtype=torch.bfloat16)
    y = segment_scan(x, torch.ones(4096), offsets([4096]))
    assert y[-1].item() == 2048  # 128 where bfloat16 carries it


def test_every_backend_explains_itself():
    told = explain(segment_scan, torch.ones(5, 2), torch.ones(5), offsets([5]))
    assert told["flash"] == "has no segment_scan"
    assert list(told.values()).count("chosen") == 1


X, DECAY, CU = torch.ones(5, 2), torch.ones(5), PatchLayout.from_lengths([2, 3], [2]).cu_patches


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: segment_scan(X.long(), DECAY, CU),
            TypeError,
            "x must be float32, bfloat16, float16 or float64; got torch.int64",
        ),
        (lambda: segment_scan(torch.tensor(1.0), DECAY, CU), ValueError, "x must have rows"),
        (
            lambda: segment_scan(X, DECAY, [0, 5]),
            TypeError,
            "cu_segments must be (N+1,) int32 offsets; got list",
        ),
        (
            lambda: segment_scan(X.bfloat16(), DECAY.bfloat16(), CU),
            TypeError,
            "decay must be torch.float32 for an x of torch.bfloat16; got torch.bfloat16",
        ),
        (
            lambda: segment_scan(X.double(), DECAY, CU),
            TypeError,
            "decay must be torch.float64 for an x of torch.float64; got torch.float32",
        ),
        (
            lambda: segment_scan(X, torch.ones(5, 2), CU),
            ValueError,
            "decay has shape (5, 2), but x has 5 rows",
        ),
        (
            lambda: segment_scan(X, DECAY, CU.long()),
            TypeError,
            "cu_segments must be (N+1,) int32 offsets; got torch.int64 of shape (3,)",
        ),
        (
            lambda: segment_scan(X, DECAY, CU[:0]),
            TypeError,
            "cu_segments must be (N+1,) int32 offsets; got torch.int32 of shape (0,)",
        ),
        (
            lambda: segment_scan(X, DECAY.to("meta"), CU),
            ValueError,
            "decay is on meta, but x is on cpu",
        ),
        (
            lambda: segment_scan(X, DECAY, CU.to("meta")),
            ValueError,
            "cu_segments is on meta, but x is on cpu",
        ),
        (
            lambda: segment_scan(X, DECAY, CU + 1),
            ValueError,
            "cu_segments must start at 0; got 1",
        ),
        (
            lambda: segment_scan(X, DECAY, torch.tensor([0, 4, 3, 5]).int()),
            ValueError,
            "cu_segments must not decrease; at offset 2 it falls from 4 to 3",
        ),
        (
            lambda: segment_scan(X, DECAY, CU[:2]),
            ValueError,
            "cu_segments ends at 2, but x has 5 rows",
        ),
    ],
)
def test_wrong_input_is_told_in_the_callers_words(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
