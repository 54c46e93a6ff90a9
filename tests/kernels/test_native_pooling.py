"""The native pooling, expansion and scan give the reference's results at every instruction set."""

import pytest
import torch
from torch import Tensor

from lst_kernels import native, reference

pytestmark = [
    pytest.mark.skipif(
        native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
    ),
    pytest.mark.usefixtures("poison"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "max", "min", "first", "last")
LENGTHS = (1, 0, 4, 30, 1, 1, 0, 300, 2)
# Below, on and past a vector and a run of vectors of each instruction set, and past a tile.
WIDTHS = (0, 1, 7, 16, 67, 256, 300)


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest):
    """One of the instruction sets, where the machine has it."""
    running = native.set_level(request.param)
    yield running
    native.set_level(native.LEVELS[-1])
    if running != request.param:
        pytest.skip(f"this machine has no {request.param}")


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def rows(num: int, width: int, dtype: torch.dtype) -> Tensor:
    """Few values, so that extremes are tied, some of them NaN or infinite."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-8, 9, (num, width), generator=generator).to(dtype) / 4
    x[5::37] = torch.inf
    x[8::41] = torch.nan
    return x


def assert_same(ours: Tensor, expected: Tensor, exactly: bool):
    assert ours.dtype == expected.dtype
    tolerance = 0.0 if exactly else 4 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_equals_the_reference(level, dtype: torch.dtype, reduce: native.Reduce):
    cu_patches = offsets()
    for width in WIDTHS:
        x = rows(sum(LENGTHS), width, dtype)
        grad = rows(len(LENGTHS), width, dtype)
        out, index = native.patch_pool(x, cu_patches, reduce)
        expected, expected_index = reference.patch_pool(x, cu_patches, reduce)
        assert_same(out, expected, exactly=reduce not in ("mean", "sum"))
        assert (index is None) == (expected_index is None)
        if index is not None:
            assert torch.equal(index, expected_index)
        args = (grad, cu_patches, reduce, index, len(x))
        shares = native.patch_pool_backward(*args), reference.patch_pool_backward(*args)
        assert_same(*shares, exactly=reduce != "mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_expansion_equals_the_reference(level, dtype: torch.dtype):
    # As with shift=1: some tokens have no patch, and some patches have no token.
    ids = torch.tensor([-1, -1, 0, 0, 2, 2, 2, 5, 5]).int()
    start = torch.tensor([2, 4, 4, 7, 7, 7]).int()
    stop = torch.tensor([4, 4, 7, 7, 7, 9]).int()
    for width in WIDTHS:
        z, grad = rows(len(start), width, dtype), rows(len(ids), width, dtype)
        assert_same(native.patch_expand(z, ids), reference.patch_expand(z, ids), exactly=True)
        both = native.patch_expand(z, ids, grad), reference.patch_expand(z, ids, grad)
        assert_same(*both, exactly=True)
        args = (grad, ids, start, stop)
        sums = native.patch_expand_backward(*args), reference.patch_expand_backward(*args)
        assert_same(*sums, exactly=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scan_equals_the_reference(level, dtype: torch.dtype):
    cu_segments, num_rows = offsets(), sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(num_rows, generator=generator)
    decay[3::7], decay[5::11] = 0, 1
    decay = decay.double() if dtype == torch.float64 else decay
    for width in WIDTHS:
        x, grad = (torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(2))
        y = native.segment_scan(x, decay, cu_segments)
        assert_near(y, reference.segment_scan(x, decay, cu_segments), dtype)
        args = (grad, decay, cu_segments, y)
        results = native.segment_scan_backward(*args), reference.segment_scan_backward(*args)
        for ours, expected in zip(*results, strict=True):
            assert_near(ours, expected, dtype)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype):
    """Within some roundings of the largest value: sums cancel."""
    assert ours.dtype == expected.dtype
    size = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = 8 * torch.finfo(dtype).eps * size
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("decay", "cu_segments", "y", "message"),
    [
        (torch.ones(3).double(), [0, 3], torch.ones(3, 2), "decay: expected .*float32"),
        (torch.ones(4), [0, 3], torch.ones(3, 2), "decay: expected 3 of them, got 4"),
        (torch.ones(3), [0, 4], torch.ones(3, 2), "cu_segments must start at 0, never fall"),
        (torch.ones(3), [0, 2, 1, 3], torch.ones(3, 2), "cu_segments must start at 0, never fall"),
        (torch.ones(3), [], torch.ones(3, 2), "cu_segments: expected at least the offset 0"),
        (torch.ones(3), [0, 3], torch.ones(2, 2), r"y: expected \(3, 2\) .* got \(2, 2\)"),
    ],
)
def test_a_wrong_scan_is_refused(decay: Tensor, cu_segments: list[int], y: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        native.segment_scan_backward(
            torch.zeros(3, 2), decay, torch.tensor(cu_segments, dtype=torch.int32), y
        )


@pytest.mark.parametrize(("ids", "message"), [([0, 2], "ids must lie"), ([-2, 0], "ids must lie")])
def test_ids_outside_the_patches_are_refused(ids: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        native.patch_expand(torch.zeros(2, 3), torch.tensor(ids, dtype=torch.int32))


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(3, 3), r"residual: expected \(2, 3\) of torch.float32, got \(3, 3\)"),
        (torch.zeros(2, 3).double(), "residual: expected .* got .* of torch.float64"),
        (torch.zeros(3, 2).T, "residual: expected contiguous"),
    ],
)
def test_a_wrong_residual_is_refused(residual: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        native.patch_expand(torch.zeros(2, 3), torch.tensor([0, 1]).int(), residual)


def test_the_scan_has_the_same_bits_for_every_number_of_threads():
    cu_segments = torch.tensor([0, 700, 700, 1100]).int()
    x, grad, decay = torch.randn(1100, 600), torch.randn(1100, 600), torch.rand(1100)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = native.segment_scan(x, decay, cu_segments)
            runs.append((y, *native.segment_scan_backward(grad, decay, cu_segments, y)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for ours, expected in zip(run, runs[0], strict=True):
            assert torch.equal(ours, expected)


def test_readers_outside_the_tokens_are_refused():
    start, stop = torch.tensor([0, 1]).int(), torch.tensor([1, 3]).int()
    with pytest.raises(ValueError, match="start and stop must be ranges of the tokens"):
        native.patch_expand_backward(torch.zeros(2, 3), torch.zeros(2).int(), start, stop)
