"""Pooling and expansion are what a loop over patches and tokens makes of their definition.

The oracle is that loop in float64, its gradients written out by hand. A backend's error may be
twice that of the loop in the same dtype, plus four roundings of the largest value. Results and
gradients are written into poisoned memory.
"""

import os
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lst_kernels import PatchLayout, patch_expand, patch_pool
from lst_kernels.backends import BACKENDS, Call

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCES = ("mean", "sum", "max", "min", "first", "last")


def runnable(op, reduces):
    return [
        pytest.param(b.name, dtype, reduce, id=f"{b.name}-{dtype}-{reduce}".replace("torch.", ""))
        for b in BACKENDS
        for dtype in DTYPES
        for reduce in reduces
        if not (b.refuses(Call(op, "cpu", dtype, reduce=reduce)) or b.unavailable())
    ]


POOLS = runnable("patch_pool", REDUCES)
EXPANDS = [
    pytest.param(*p.values[:2], id=p.id.removesuffix("-None"))
    for p in runnable("patch_expand", [None])
]

streams = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 6]), max_size=6), max_size=4)
# Triton's interpreter takes milliseconds for every patch: it gets fewer streams and documents.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
QUICK = settings(deadline=None, derandomize=True, max_examples=1 if INTERPRETED else 8)


def with_edges(test):
    for stream in (
        [],
        [[0, 0], [0]],
        [[1]],
        [[1] * 20 + [300] + [1] * 20],
        [[1, 2]] * (20 if INTERPRETED else 100),
    ):
        test = example(stream=stream)(test)
    return QUICK(test)


def make(stream):
    lengths = [length for document in stream for length in document]
    return PatchLayout.from_lengths(
        lengths,
        [len(document) for document in stream],
        closed_late=[i % 3 == 0 for i in range(len(lengths))],
    )


def values(dtype, *shape, levels=None, seed=0):
    """float64 values that ``dtype`` can hold; few levels make ties."""
    generator = torch.Generator().manual_seed(seed + len(shape) + shape[0])
    if levels:
        return torch.randint(levels, shape, generator=generator).double()
    return torch.randn(shape, generator=generator).to(dtype).double()


def pool_loop(x, layout, reduce):
    """(P, F), and who wins: for max and min the index (P, F) of a token, else None."""
    out = x.new_zeros(layout.num_patches, x.shape[1])
    winners = torch.full(out.shape, -1)
    for p in range(layout.num_patches):
        a, b = int(layout.cu_patches[p]), int(layout.cu_patches[p + 1])
        if a == b:
            continue
        tokens = x[a:b]
        if reduce in ("mean", "sum"):
            out[p] = getattr(tokens, reduce)(0)
        elif reduce in ("max", "min"):
            for f in range(x.shape[1]):
                column = tokens[:, f].tolist()
                winners[p, f] = a + column.index({"max": max, "min": min}[reduce](column))
                out[p, f] = x[winners[p, f], f]
        else:
            winners[p] = a if reduce == "first" else b - 1
            out[p] = x[winners[p, 0]]
    return out, winners


def pool_gradient_loop(grad, layout, reduce, winners):
    out = grad.new_zeros(layout.num_tokens, grad.shape[1])
    for p in range(layout.num_patches):
        a, b = int(layout.cu_patches[p]), int(layout.cu_patches[p + 1])
        if reduce in ("mean", "sum"):
            out[a:b] = grad[p] / (b - a if reduce == "mean" else 1)
        else:
            for f in range(grad.shape[1]):
                if b > a:
                    out[winners[p, f], f] = grad[p, f]
    return out


def expand_loop(z, layout, shift):
    out = z.new_zeros(layout.num_tokens, z.shape[1]) + 0 * z.sum()  # 0, with a gradient of 0
    for t in range(layout.num_tokens):
        p = int((layout.patch_ids if shift == 0 else layout.readable_ids)[t])
        if p >= 0:
            out[t] = z[p]
    return out


def largest(x):
    return max(x.abs().flatten().tolist(), default=0.0)


def within_budget(ours, eager, oracle, dtype):
    assert ours.dtype == dtype
    assert ours.shape == oracle.shape
    assert ours.isfinite().all(), "has elements that nothing wrote"
    allowed = 2 * largest(eager - oracle) + 4 * torch.finfo(dtype).eps * largest(oracle)
    assert largest(ours - oracle) <= allowed


@pytest.mark.parametrize(("backend", "dtype", "reduce"), POOLS)
@pytest.mark.parametrize("levels", [None, 3], ids=["values", "ties"])
@with_edges
@given(stream=streams)
def test_a_patch_is_the_reduction_of_its_tokens(levels, backend, dtype, reduce, stream):
    layout = make(stream)
    x = values(dtype, layout.num_tokens, 5, levels=levels)
    grad = values(dtype, layout.num_patches, 5)
    oracle, winners = pool_loop(x, layout, reduce)
    eager, _ = pool_loop(x.to(dtype), layout, reduce)
    ours = x.to(dtype).requires_grad_()
    out = patch_pool(ours, layout, reduce, backend=backend)
    within_budget(out.detach(), eager, oracle, dtype)
    out.backward(grad.to(dtype))
    within_budget(
        ours.grad,
        pool_gradient_loop(grad.to(dtype), layout, reduce, winners),
        pool_gradient_loop(grad, layout, reduce, winners),
        dtype,
    )


@pytest.mark.parametrize(("backend", "dtype"), EXPANDS)
@pytest.mark.parametrize("shift", [0, 1])
@with_edges
@given(stream=streams)
def test_a_token_gets_the_row_of_its_patch(shift, backend, dtype, stream):
    layout = make(stream)
    results = []
    for kind, expand in (
        (torch.float64, expand_loop),
        (dtype, expand_loop),
        (dtype, lambda z, layout, shift: patch_expand(z, layout, shift, backend=backend)),
    ):
        z = values(dtype, layout.num_patches, 5).to(kind).requires_grad_()
        out = expand(z, layout, shift)
        out.backward(values(dtype, layout.num_tokens, 5).to(kind))
        results.append((out.detach(), z.grad))
    for oracle, eager, ours in zip(*results, strict=True):
        within_budget(ours, eager, oracle, dtype)


@pytest.mark.parametrize(("backend", "dtype"), EXPANDS)
@pytest.mark.parametrize("shift", [0, 1])
@with_edges
@given(stream=streams)
def test_a_residual_gets_the_row_of_its_tokens_patch_added(shift, backend, dtype, stream):
    layout = make(stream)

    def added(z, residual):
        return residual + expand_loop(z, layout, shift)

    def fused(z, residual):
        return patch_expand(z, layout, shift, residual, backend=backend)

    results = []
    for kind, expand in ((torch.float64, added), (dtype, added), (dtype, fused)):
        z = values(dtype, layout.num_patches, 5).to(kind).requires_grad_()
        residual = values(dtype, layout.num_tokens, 5, seed=1).to(kind).requires_grad_()
        out = expand(z, residual)
        out.backward(values(dtype, layout.num_tokens, 5).to(kind))
        results.append((out.detach(), z.grad, residual.grad))
    for oracle, eager, ours in zip(*results, strict=True):
        within_budget(ours, eager, oracle, dtype)
    assert torch.equal(results[2][2], values(dtype, layout.num_tokens, 5).to(dtype))


@pytest.mark.parametrize("backend", sorted({p.values[0] for p in EXPANDS}))
def test_expansion_leaves_its_inputs_alone_and_may_train_the_residual_alone(backend):
    layout = make([[2, 3, 0], [4, 1]])
    z, residual = torch.randn(5, 2, 3), torch.randn(10, 2, 3)
    before = z.clone(), residual.clone()
    out = patch_expand(z, layout, 1, residual.requires_grad_(), backend=backend)
    grad = torch.randn(10, 2, 3)
    out.backward(grad)
    assert torch.equal(residual.grad, grad)
    assert torch.equal(z, before[0])
    assert torch.equal(residual, before[1])
    assert out.data_ptr() not in (z.data_ptr(), residual.data_ptr())


@pytest.mark.parametrize(("backend", "dtype"), EXPANDS)
def test_a_strided_residual_changes_nothing(backend, dtype):
    layout = make([[2, 3, 0], [4, 1]])
    z, residual = values(dtype, 5, 6).to(dtype), values(dtype, 10, 6).to(dtype)
    expected = patch_expand(z, layout, 1, residual, backend=backend)
    for strided in (residual.T.contiguous().T, torch.stack((residual, residual), 1)[:, 1]):
        assert torch.equal(patch_expand(z, layout, 1, strided, backend=backend), expected)


@pytest.mark.parametrize(("backend", "dtype", "reduce"), POOLS)
def test_pooling_gives_the_same_bits_from_run_to_run(backend, dtype, reduce):
    layout = make([[2, 30, 1] * 9, [4, 2] * 5])
    x = values(dtype, layout.num_tokens, 40).to(dtype).requires_grad_()
    grad = values(dtype, layout.num_patches, 40).to(dtype)
    runs = []
    for _ in range(2):
        out = patch_pool(x, layout, reduce, backend=backend)
        runs.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "dtype"), EXPANDS)
@pytest.mark.parametrize("shift", [0, 1])
def test_expansion_gives_the_same_bits_from_run_to_run(shift, backend, dtype):
    layout = make([[2, 30, 1] * 9, [4, 2] * 5])
    z = values(dtype, layout.num_patches, 40).to(dtype).requires_grad_()
    residual = values(dtype, layout.num_tokens, 40).to(dtype).requires_grad_()
    grad = values(dtype, layout.num_tokens, 40, seed=1).to(dtype)
    runs = []
    for _ in range(2):
        out = patch_expand(z, layout, shift, residual, backend=backend)
        runs.append((out.detach(), *torch.autograd.grad(out, (z, residual), grad)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "dtype", "reduce"), POOLS)
def test_an_empty_patch_is_zero_without_gradient(backend, dtype, reduce):
    layout = PatchLayout.from_lengths([0, 2, 0, 1, 0], [5])
    x = torch.ones(3, 4, dtype=dtype, requires_grad=True)
    out = patch_pool(x, layout, reduce, backend=backend)
    assert (out[[0, 2, 4]] == 0).all()
    (out[[0, 2, 4]] * 7).sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("backend", "dtype", "reduce"), [p for p in POOLS if p.values[2] in ("max", "min")]
)
def test_the_first_of_equals_wins_the_whole_gradient(backend, dtype, reduce):
    layout = PatchLayout.from_lengths([1, 4], [2])
    x = torch.tensor([[5.0], [1.0], [2.0], [2.0], [1.0]], dtype=dtype, requires_grad=True)
    patch_pool(x, layout, reduce, backend=backend).backward(
        torch.tensor([[1.0], [-3.0]], dtype=dtype)
    )
    expected = [1.0, 0.0, -3.0, 0.0, 0.0] if reduce == "max" else [1.0, -3.0, 0.0, 0.0, 0.0]
    assert x.grad.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("backend", "dtype", "reduce"), [p for p in POOLS if p.values[2] in ("max", "min")]
)
def test_nan_wins_over_any_number_and_infinities_are_numbers(backend, dtype, reduce):
    layout = PatchLayout.from_lengths([3, 2], [2])
    inf = -torch.inf if reduce == "max" else torch.inf
    x = torch.tensor([[1.0], [torch.nan], [2.0], [inf], [inf]], dtype=dtype, requires_grad=True)
    out = patch_pool(x, layout, reduce, backend=backend)
    assert out[0].isnan()
    assert out[1] == inf
    out.backward(torch.ones_like(out))
    assert x.grad.flatten().tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("backend", "dtype", "reduce"), POOLS)
def test_strided_inputs_and_expanded_gradients_change_nothing(backend, dtype, reduce):
    layout = make([[2, 3, 0], [4, 1]])
    x = values(dtype, 10, 6).to(dtype)
    strided = x.T.contiguous().T.requires_grad_()
    packed = x.clone().requires_grad_()
    assert not strided.is_contiguous()
    for tensor in (strided, packed):
        patch_pool(tensor, layout, reduce, backend=backend).sum().backward()
    assert torch.equal(strided.grad, packed.grad)
    ours = patch_pool(strided, layout, reduce, backend=backend)
    assert torch.equal(ours, patch_pool(packed, layout, reduce, backend=backend))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_rows_may_have_any_shape(shape):
    layout = make([[2, 3, 0], [4, 1]])
    x = torch.arange(10.0).view(10, *[1] * len(shape)).expand(10, *shape)
    pooled = patch_pool(x, layout, "last")
    assert pooled.shape == (5, *shape)
    assert torch.equal(
        pooled, torch.tensor([1.0, 4, 0, 8, 9]).view(5, *[1] * len(shape)) + 0 * pooled
    )
    assert patch_expand(pooled, layout).shape == (10, *shape)


@pytest.mark.parametrize(
    ("backend", "reduce"),
    [pytest.param(p.values[0], p.values[2]) for p in POOLS if p.values[1] == torch.float64],
)
def test_gradients_are_those_of_finite_differences(backend, reduce):
    layout = make([[2, 0, 3], [1]])
    x = values(torch.float64, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_pool(x, layout, reduce, backend=backend), x)


@pytest.mark.parametrize("backend", [p.values[0] for p in EXPANDS if p.values[1] == torch.float64])
@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_of_expansion_are_those_of_finite_differences(shift, backend):
    layout = make([[2, 0, 3], [1]])
    z = values(torch.float64, 4, 3).requires_grad_()
    residual = values(torch.float64, 6, 3).requires_grad_()

    def expand(*tensors):
        z, residual = tensors if len(tensors) == 2 else (*tensors, None)
        return patch_expand(z, layout, shift, residual, backend=backend)

    assert torch.autograd.gradcheck(expand, (z,))
    assert torch.autograd.gradcheck(expand, (z, residual))


def test_sums_of_half_precision_accumulate_in_float32():
    layout = PatchLayout.from_lengths([4096], [1])
    x = torch.full((4096, 1), 0.5, dtype=torch.bfloat16)
    assert patch_pool(x, layout, "mean").item() == 0.5  # 0.0625 where bfloat16 accumulates
    z = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    patch_expand(z, layout).backward(x)
    assert z.grad.item() == 2048


LAYOUT = PatchLayout.from_lengths([2, 3], [2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patch_pool(torch.ones(4, 2), LAYOUT),
            ValueError,
            "x has shape (4, 2), but the layout has 5 tokens",
        ),
        (
            lambda: patch_expand(torch.ones(5, 2), LAYOUT),
            ValueError,
            "z has shape (5, 2), but the layout has 2 patches",
        ),
        (
            lambda: patch_pool(torch.tensor(1.0), LAYOUT),
            ValueError,
            "x has shape (), but the layout has 5 tokens",
        ),
        (
            lambda: patch_pool(torch.ones(5, 2), [2, 3]),
            TypeError,
            "layout must be a PatchLayout; got list",
        ),
        (
            lambda: patch_expand([1.0, 2.0], LAYOUT),
            TypeError,
            "z must be a tensor; got list",
        ),
        (
            lambda: patch_pool(torch.ones(5, 2).long(), LAYOUT),
            TypeError,
            "x must be float32, bfloat16, float16 or float64; got torch.int64",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2).to(torch.float8_e4m3fn), LAYOUT),
            TypeError,
            "z must be float32, bfloat16, float16 or float64; got torch.float8_e4m3fn",
        ),
        (
            lambda: patch_pool(torch.ones(5, 2), LAYOUT, "median"),
            ValueError,
            "reduce must be one of mean, sum, max, min, first, last; got 'median'",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT, shift=2),
            ValueError,
            "shift must be 0 or 1; got 2",
        ),
        (
            lambda: patch_pool(torch.ones(5, 2), LAYOUT.to("meta")),
            ValueError,
            "layout is on meta, but x is on cpu",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT.to("meta")),
            ValueError,
            "layout is on meta, but z is on cpu",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT, 0, torch.ones(4, 2)),
            ValueError,
            "residual has shape (4, 2), but the layout has 5 tokens",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT, 0, torch.ones(5, 1)),
            ValueError,
            "residual has rows of shape (1,), but z of (2,)",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT, 0, torch.ones(5, 2).half()),
            TypeError,
            "residual is torch.float16, but z is torch.float32",
        ),
        (
            lambda: patch_expand(torch.ones(2, 2), LAYOUT, 0, torch.ones(5, 2, device="meta")),
            ValueError,
            "layout is on cpu, but residual is on meta",
        ),
    ],
)
def test_wrong_input_is_told_in_the_callers_words(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
