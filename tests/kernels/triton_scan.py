"""Triton's segment scan is what a loop over rows says, however its chunks fall.

Not collected by itself: `test_triton_interpreter.py` runs this file in a process of its own, in
Triton's interpreter or on a GPU. Every `torch.empty` is poisoned.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lst_kernels import segment_scan, triton
from lst_kernels.triton import scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=3 if INTERPRETED else 30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory comes filled with what nothing computes."""
    make = torch.empty

    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 4 rows, joined 4 at a time, 8 features to a program: few rows go through all."""
    monkeypatch.setattr(scan, "ROWS", 4)
    monkeypatch.setattr(scan, "JOINED", 4)
    monkeypatch.setattr(scan, "JOINED_F", 8)
    monkeypatch.setattr(scan, "ROW_BYTES", 32)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def loop(x, decay, cu_segments):
    rows, starts = [], set(cu_segments.tolist())
    for t in range(len(x)):
        rows.append(x[t] if t in starts else decay[t] * rows[-1] + x[t])
    return torch.stack(rows) if rows else x * 1


def differentiate(op, x, decay, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, decay)]
    y = op(*leaves)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    given = [torch.zeros_like(z) if g is None else g for g, z in zip(grads, leaves, strict=True)]
    return [y.detach(), *given]


def check(lengths, num_features, dtype):
    cu, num_rows = offsets(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(num_rows)
    x, grad = (
        torch.randn(num_rows, num_features, generator=generator).to(DEVICE, dtype) for _ in "xg"
    )
    decay = torch.rand(num_rows, generator=generator).to(DEVICE)
    decay[::5], decay[1::7] = 1, 0
    ours = differentiate(lambda x, d: segment_scan(x, d, cu, backend="triton"), x, decay, grad)
    oracle = differentiate(lambda x, d: loop(x, d, cu), x.double(), decay.double(), grad.double())
    for got, wanted in zip(ours, oracle, strict=True):
        # One rounding of the result; of decay's gradient one of each of y's features.
        size = max(wanted.abs().flatten().tolist(), default=0)
        tolerance = 4 * torch.finfo(dtype).eps * (size + num_features)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [1, 19])
@FEW
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9, 23]), max_size=6))
def test_segments_may_end_anywhere_in_a_chunk(num_features, dtype, lengths):
    check(lengths, num_features, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [[70], [16, 16, 4], [1, 40, 0, 29], [15, 17, 33]], ids=str)
def test_a_long_segment_is_joined_from_chunks_and_tiles_of_chunks(lengths):
    check(lengths, 11, torch.float32)


@pytest.mark.parametrize("num_features", [1, 130])
def test_the_shipped_tiles_are_right(num_features):
    check([1, 100, 0, 30], num_features, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_change_nothing(dtype):
    wide, decay = torch.randn(12, 3, 8, device=DEVICE).to(dtype), torch.rand(12, device=DEVICE)
    cu = offsets([5, 7])
    whole = wide[:, 1].contiguous()
    y = triton.segment_scan(whole, decay, cu)
    assert torch.equal(triton.segment_scan(wide[:, 1], decay, cu), y)
    expected = triton.segment_scan_backward(whole, decay, cu, y)
    ours = triton.segment_scan_backward(wide[:, 1], decay, cu, torch.stack((y, y), 1)[:, 0])
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
def test_one_document_of_many_thousand_rows_is_right():
    check([20_000], 200, torch.float32)
