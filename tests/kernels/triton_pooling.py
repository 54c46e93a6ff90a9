"""Triton's pooling and expansion are what a loop over patches says.

Not collected by itself: `test_triton_interpreter.py` runs this file in a process of its own, in
Triton's interpreter or on a GPU. Every `torch.empty` is poisoned.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lst_kernels import PatchLayout, patch_expand, patch_pool, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
REDUCES = ("mean", "sum", "max", "min", "first", "last")
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=4 if INTERPRETED else 30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
streams = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 9]), max_size=6), max_size=3)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory comes filled with what nothing computes."""
    make = torch.empty

    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", filled)


def make(stream):
    lengths = [length for document in stream for length in document]
    late = [i % 3 == 0 for i in range(len(lengths))]
    layout = PatchLayout.from_lengths(lengths, [len(d) for d in stream], closed_late=late)
    return layout.to(DEVICE)


def pooled(x, layout, reduce):
    """(P, F) float64, a patch at a time."""
    rows = []
    for start, stop in zip(layout.cu_patches[:-1], layout.cu_patches[1:], strict=True):
        tokens = x[start:stop]
        if len(tokens) == 0:
            row = tokens.sum(0)
        elif reduce in ("max", "min"):
            row = getattr(tokens, reduce)(0).values  # the first of equals, and NaN over all
        elif reduce in ("mean", "sum"):
            row = getattr(tokens, reduce)(0)
        else:
            row = tokens[0 if reduce == "first" else -1]
        rows.append(row)
    return torch.stack(rows) if rows else x[:0]


def differentiate(op, x, grad):
    x = x.detach().requires_grad_()
    out = op(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def check_pool(x, layout, reduce):
    grad = torch.randn(layout.num_patches, x.shape[1], device=DEVICE).to(x.dtype)
    out, share = differentiate(lambda x: patch_pool(x, layout, reduce, backend="triton"), x, grad)
    wanted, wanted_share = differentiate(
        lambda x: pooled(x, layout, reduce), x.double(), grad.double()
    )
    # One rounding of the result, and of 300 float32 terms of a sum.
    tolerance = {"rtol": 2 * torch.finfo(x.dtype).eps, "atol": 1e-4, "equal_nan": True}
    assert torch.allclose(out.double(), wanted, **tolerance)
    assert torch.allclose(share.double(), wanted_share, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCES)
@FEW
@given(stream=streams, num_features=st.sampled_from([1, 7, 64]))
def test_pooling_reduces_each_patch(reduce, dtype, stream, num_features):
    layout = make(stream)
    x = torch.randint(-3, 4, (layout.num_tokens, num_features), device=DEVICE)  # with many ties
    check_pool(x.to(dtype), layout, reduce)


@pytest.mark.parametrize("reduce", REDUCES)
def test_a_long_patch_and_more_features_than_a_program_holds_are_right(reduce):
    layout = make([[1, 300, 0, 2]])
    check_pool(torch.randn(303, 1100, device=DEVICE), layout, reduce)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_nan_and_infinities_win_as_in_torch(reduce):
    inf, nan = torch.inf, torch.nan
    columns = [[1, nan, 5, 2, nan], [inf, 1, inf, -inf, 2], [-inf] * 5, [inf] * 5, [nan] * 5]
    columns += [[2, 1, 2, 1, 2], [1, 2, 3, 4, inf], [-inf, -inf, 0, 1, nan]]
    x = torch.tensor(columns, device=DEVICE).T
    for lengths in ([5], [1, 4], [2, 0, 3]):
        check_pool(x, make([lengths]), reduce)


@pytest.mark.parametrize("reduce", REDUCES)
def test_strided_rows_and_expanded_gradients_change_nothing(reduce):
    layout = make([[2, 3, 1], [4, 2]])
    wide = torch.randn(12, 3, 8, device=DEVICE)
    strided, whole = wide[:, 1], wide[:, 1].contiguous()
    for x in (strided, whole, whole.T.contiguous().T):
        got = triton.patch_pool(x, layout.cu_patches, reduce)
        want = triton.patch_pool(whole, layout.cu_patches, reduce)
        assert torch.equal(got[0], want[0])
    one = torch.ones(1, 1, device=DEVICE).expand(5, 8)
    args = (layout.cu_patches, reduce, want[1], 12)
    assert torch.equal(
        triton.patch_pool_backward(one, *args), triton.patch_pool_backward(one.contiguous(), *args)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
@FEW
@given(stream=streams, num_features=st.sampled_from([1, 7, 64]))
def test_expansion_gathers_rows_and_sums_their_gradients(shift, dtype, stream, num_features):
    layout = make(stream)
    ids = (layout.readable_ids if shift else layout.patch_ids).long()
    z = torch.randn(layout.num_patches, num_features, device=DEVICE).to(dtype)
    grad = torch.randint(-3, 4, (layout.num_tokens, num_features), device=DEVICE).to(dtype)
    out, total = differentiate(lambda z: patch_expand(z, layout, shift, backend="triton"), z, grad)
    padded = torch.cat((z, z.new_zeros(1, num_features)))  # id -1 is the last row
    assert torch.equal(out, padded[ids])
    wanted = torch.zeros_like(padded).index_add_(
        0, ids % len(padded), grad
    )  # small integers: exact
    assert torch.equal(total, wanted[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_expansion_onto_a_residual_adds_in_one_pass(dtype):
    layout = make([[2, 3, 0], [4, 1100]])
    z = torch.randn(5, 9, device=DEVICE).to(dtype)
    residual = torch.randn(layout.num_tokens, 2, 9, device=DEVICE).to(dtype)[:, 0]
    rows = torch.cat((z, z.new_zeros(1, 9)))[layout.readable_ids.long()]
    wanted = (residual.float() + rows.float()).to(dtype)
    assert torch.equal(triton.patch_expand(z, layout.readable_ids, residual), wanted)
    leaves = [x.detach().requires_grad_() for x in (z, residual)]
    out = patch_expand(leaves[0], layout, 1, leaves[1], backend="triton")
    assert torch.equal(out, wanted)
    grad = torch.randint(-3, 4, out.shape, device=DEVICE).to(dtype)
    given, kept = torch.autograd.grad(out, leaves, grad)
    alone = patch_expand(leaves[0], layout, 1, backend="triton")
    assert torch.equal(given, torch.autograd.grad(alone, leaves[0], grad)[0])
    assert torch.equal(kept, grad)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_results_are_the_same_bits_from_run_to_run(reduce):
    layout = make([[2, 30, 1], [4, 2]])
    x = torch.randn(39, 16, device=DEVICE)
    grad = torch.randn(5, 16, device=DEVICE)

    def pool(x):
        return patch_pool(x, layout, reduce, backend="triton")

    def expand(z):
        return patch_expand(z, layout, 1, backend="triton")

    for op, value, way in ((pool, x, grad), (expand, grad, x)):
        runs = differentiate(op, value, way), differentiate(op, value, way)
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)
