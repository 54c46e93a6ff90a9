"""The native range_attention equals dense attention under the mask, in both families, at every
instruction set, with the same bits from run to run and for every number of threads.

The oracle is dense and float64. The error may be twice that of dense eager PyTorch in the same
dtype, plus four roundings of the largest value (of the largest gradient for the gradients: where dq
and dk are differences that cancel, the rounding of what cancels remains, and is as large as dv).
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lst_kernels import native
from lst_kernels.ranges import KeyRanges

pytestmark = [
    pytest.mark.skipif(
        native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
    ),
    pytest.mark.usefixtures("poison"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FAMILIES = ("patch-owned", "tiled")
LEVELS = native.LEVELS
shapes = settings(max_examples=20, deadline=None, derandomize=True)
# Query heads, key heads, head size: around the widths of vectors, and the largest.
heads = st.sampled_from([(1, 1, 16), (2, 2, 64), (4, 2, 24), (3, 1, 40), (2, 1, 256), (1, 1, 1)])


def make(lengths: list[int], queries: list[int]) -> KeyRanges:
    """Disjoint ranges: the i-th run of ``lengths[i]`` keys is read by ``queries[i]`` queries."""
    stop = torch.tensor([0, *lengths]).cumsum(0)
    index = torch.repeat_interleave(torch.tensor(queries, dtype=torch.int64))
    return KeyRanges(stop[:-1][index], stop[1:][index], int(stop[-1]))


def windows(documents: list[int], window: int) -> KeyRanges:
    """Each row reads the last ``window`` rows of its document."""
    start, stop, first = [], [], 0
    for length in documents:
        start += [max(first, first + i + 1 - window) for i in range(length)]
        stop += [first + i + 1 for i in range(length)]
        first += length
    return KeyRanges(torch.tensor(start).int(), torch.tensor(stop).int(), first)


disjoint = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 2, 4, 30, 300]), st.sampled_from([0, 1, 1, 2, 3])),
    max_size=12,
).map(lambda runs: make([length for length, _ in runs], [queries for _, queries in runs]))
staircases = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=150).map(
    lambda steps: climb([a for a, _ in steps], [b for _, b in steps])
)
document_windows = st.builds(
    windows,
    st.lists(st.sampled_from([1, 2, 3, 40, 150]), max_size=4),
    st.sampled_from([1, 3, 64, 500]),
)
CASES = {
    "short documents": windows([60, 1, 20, 60, 37, 60], 60),
    "nothing": make([], []),
    "no-keys": KeyRanges(torch.zeros(3).int(), torch.zeros(3).int(), 0),
    "no-queries": make([5, 2], [0, 0]),
    "one-key": make([1], [1]),
    "empty-ranges-among-unread-keys": make([3, 0, 2, 0, 4], [0, 2, 1, 1, 0]),
    "one-long-range": make([1] * 20 + [300] + [1] * 20, [1] * 41),
    "hundred-documents": windows([3] * 100, 2),
    "causal-over-several-tiles": windows([333], 1000),
}


def climb(starts: list[int], stops: list[int]) -> KeyRanges:
    """Ranges whose ends rise by the given steps; a start that would pass its stop waits there."""
    start = torch.tensor(starts).cumsum(0)
    stop = torch.maximum(torch.tensor(stops).cumsum(0), start.cummax(0)[0] if starts else start)
    num_keys = int(stop[-1]) + 3 if starts else 3
    return KeyRanges(start.int(), stop.int(), num_keys)


def inputs(ranges: KeyRanges, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, head_dim = shape
    queries, keys = (ranges.num_queries, num_heads), (ranges.num_keys, num_kv_heads)
    return [
        torch.randn(*rows, head_dim, generator=generator).to(dtype)
        for rows in (queries, keys, keys, queries)
    ]


def dense(tensors: list[Tensor], ranges: KeyRanges, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv of attention under the dense mask, computed in ``dtype``; and lse."""
    q, k, v, grad = (x.to(dtype) for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~ranges.dense_mask(), -torch.inf)
    empty = (ranges.start == ranges.stop)[:, None]
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    out = torch.einsum("hqk,khd->qhd", weights, values)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return [x.detach() for x in (out, *grads, scores.logsumexp(-1).T)]


def ours(tensors: list[Tensor], ranges: KeyRanges, family: native.Family) -> list[Tensor]:
    *qkv, grad = tensors
    scale = qkv[0].shape[2] ** -0.5
    out, lse = native.range_attention(*qkv, ranges, scale, family=family)
    grads = native.range_attention_backward(grad, *qkv, out, lse, ranges, scale, family=family)
    return [out, *grads, lse]


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(ranges: KeyRanges, shape: tuple[int, int, int], dtype: torch.dtype, family: str):
    tensors = inputs(ranges, shape, dtype)
    oracle, eager = dense(tensors, ranges, torch.float64), dense(tensors, ranges, dtype)
    results = ours(tensors, ranges, family)
    scales = [largest(oracle[0]), *[max(map(largest, oracle[1:4]))] * 3]
    roundings = 4 if dtype != torch.float64 else 32  # the oracle rounds like that too
    names = ("out", "dq", "dk", "dv")
    for name, x, y, z, scale in zip(names, results, eager, oracle, scales, strict=False):
        assert (x.shape, x.dtype) == (z.shape, dtype), name
        budget = 2 * largest(y.double() - z) + roundings * torch.finfo(dtype).eps * scale
        # Said so that a NaN, an element left unwritten say, fails.
        assert largest(x.double() - z) <= budget, name
    lse, expected = results[4].double(), oracle[4]
    finite = expected.isfinite()
    assert torch.equal(lse[~finite], expected[~finite])
    tolerance = 1e-12 if dtype == torch.float64 else 8e-6
    torch.testing.assert_close(lse[finite], expected[finite], rtol=0, atol=tolerance)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest):
    """One of the instruction sets, where the machine has it."""
    running = native.set_level(request.param)
    yield running
    native.set_level(LEVELS[-1])
    if running != request.param:
        pytest.skip(f"this machine has no {request.param}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@shapes
@given(ranges=disjoint, shape=heads)
def test_disjoint_ranges_equal_dense_attention(family, dtype, ranges, shape):
    check(ranges, shape, dtype, family)


@pytest.mark.parametrize("dtype", DTYPES)
@shapes
@given(ranges=staircases | document_windows, shape=heads)
def test_overlapping_ranges_equal_dense_attention(dtype, ranges, shape):
    check(ranges, shape, dtype, "tiled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_each_instruction_set_equals_dense_attention(level, case, dtype):
    ranges = CASES[case]
    for shape in ((2, 1, 64), (1, 1, 40)):
        for family in FAMILIES if ranges.disjoint else ("tiled",):
            check(ranges, shape, dtype, family)


def test_float16_is_computed_as_float32():
    ranges = CASES["causal-over-several-tiles"]
    tensors = inputs(ranges, (2, 1, 32), torch.float16)
    halves = ours(tensors, ranges, "auto")
    floats = ours([x.float() for x in tensors], ranges, "auto")
    assert halves[0].dtype == torch.float16
    assert torch.equal(halves[0], floats[0].half())
    assert torch.equal(halves[4], floats[4])


def test_three_keys_by_hand():
    ranges = KeyRanges(torch.tensor([0, 1, 3]), torch.tensor([2, 3, 3]), num_keys=3)
    k = torch.tensor([0.0, 1.0, 1.0])[:, None, None].expand(3, 1, 2) * torch.tensor([1.0, 0.0])
    v = torch.tensor([10.0, 20.0, 40.0])[:, None, None].expand(3, 1, 2).contiguous()
    q = torch.tensor([1.0, 5.0])[None, None].repeat(3, 1, 1) * torch.log(torch.tensor(3.0))
    out, lse = native.range_attention(q, k.contiguous(), v, ranges, 1.0)
    # Scores 0 and log 3, so weights 1/4 and 3/4; then two equal scores; then nothing.
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([17.5, 30.0, 0.0]))
    expected = torch.tensor([4.0, 6.0, 0.0]).log()
    torch.testing.assert_close(lse[:, 0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_differences(family: native.Family):
    ranges = make([2, 0, 3, 1, 70], [1, 1, 2, 1, 1])

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = native.range_attention(q, k, v, ranges, 0.3, family=family)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return native.range_attention_backward(
                grad, *ctx.saved_tensors, ranges, 0.3, family=family
            )

    q, k, v, _ = inputs(ranges, (2, 1, 5), torch.float64)
    assert torch.autograd.gradcheck(Attend.apply, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_only_score_of_a_query_has_no_gradient(family: native.Family):
    ranges = make([1] * 70, [1] * 70)
    _, grad_q, grad_k, _, _ = ours(inputs(ranges, (2, 2, 64), torch.float32), ranges, family)
    assert (grad_q == 0).all()
    assert (grad_k == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_the_bits(dtype: torch.dtype, family: native.Family):
    ranges = make([3, 1, 150], [1, 2, 1])
    q, k, v, _ = tensors = inputs(ranges, (4, 2, 24), dtype)
    grad = torch.ones((), dtype=dtype).expand(q.shape)  # as of out.sum(): every stride is 0
    strided = [
        q.transpose(0, 1).contiguous().transpose(0, 1),  # heads outermost
        torch.stack([k, v], 2)[:, :, 0],  # k and v side by side, as one projection makes them
        v.transpose(1, 2).contiguous().transpose(1, 2),  # head dimension not contiguous
        grad,
    ]
    expected = ours([*tensors[:3], grad.contiguous()], ranges, family)
    for x, y in zip(ours(strided, ranges, family), expected, strict=True):
        assert torch.equal(x, y)
    # One gradient row for all the queries, with a contiguous head dimension.
    row = tensors[3][:1]
    expected = ours([q, k, v, row.repeat(len(q), 1, 1)], ranges, family)
    for x, y in zip(ours([q, k, v, row.expand(q.shape)], ranges, family), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ranges",
    [
        pytest.param(windows([700, 3, 500], 200), id="windows"),
        pytest.param(windows([900], 900), id="causal"),
        pytest.param(make([4, 0, 7, 1] * 100, [1, 1, 2, 1] * 100), id="patches"),
    ],
)
def test_every_run_and_number_of_threads_gives_the_same_bits(ranges: KeyRanges, dtype):
    tensors = inputs(ranges, (2, 1, 48), dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 2, 5):
            torch.set_num_threads(number)
            results.append(ours(tensors, ranges, "auto"))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        for x, y in zip(again, results[0], strict=True):
            assert torch.equal(x, y)


def test_what_nobody_reads_may_be_anything():
    """Not-a-number in keys, values and gradients of dead rows stays where it is."""
    ranges = make([3, 4, 2], [1, 0, 1])
    tensors = inputs(ranges, (1, 1, 16), torch.float32)
    expected = ours(tensors, ranges, "patch-owned")
    for x in tensors[1:3]:
        x[3:7] = torch.nan
    for x, y in zip(ours(tensors, ranges, "patch-owned"), expected, strict=True):
        assert torch.equal(x, y)


def test_not_a_number_reaches_who_reads_it():
    ranges = windows([200], 200)
    q, k, v, _ = inputs(ranges, (1, 1, 16), torch.float32)
    k[150, 0, 3] = torch.nan
    out, lse = native.range_attention(q, k, v, ranges, 0.25)
    assert out[150:].isnan().all()
    assert lse[150:].isnan().all()
    assert not out[:150].isnan().any()


def test_large_scores_do_not_overflow():
    ranges = windows([300], 300)
    q, k, v, grad = inputs(ranges, (1, 1, 32), torch.float32)
    tensors = [q * 20, k * 20, v, grad]  # scores up to about 1500, and exp(89) is infinite
    for x, y in zip(
        ours(tensors, ranges, "tiled"), dense(tensors, ranges, torch.float64), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("start", "stop", "family", "message"),
    [
        ([0, 2], [3, 2], "auto", "never fall"),
        ([1, 0], [2, 2], "auto", "never fall"),
        ([0, 3], [2, 5], "auto", "within the keys"),
        ([-1, 0], [1, 1], "auto", "never fall"),
        ([0, 1], [2, 3], "patch-owned", "not for the patch-owned family"),
    ],
)
def test_wrong_ranges_are_refused_by_the_library_itself(start, stop, family, message):
    ranges = KeyRanges(torch.tensor([0, 0]), torch.tensor([1, 1]), num_keys=4)
    object.__setattr__(ranges, "start", torch.tensor(start, dtype=torch.int32))
    object.__setattr__(ranges, "stop", torch.tensor(stop, dtype=torch.int32))
    q, k, v, _ = inputs(ranges, (1, 1, 16), torch.float32)
    with pytest.raises(ValueError, match=message):
        native.range_attention(q, k, v, ranges, 1.0, family=family)


def test_buffers_that_do_not_fit_are_refused_by_the_library_itself():
    ranges = windows([5], 2)
    q, k, v, grad = inputs(ranges, (2, 1, 16), torch.float32)
    out, lse = native.range_attention(q, k, v, ranges, 1.0)
    for wrong in ((q[:4], k, v), (q, k[:4], v), (q, k, v.double()), (q[..., :8], k, v)):
        with pytest.raises(ValueError, match="do not fit each other"):
            native.range_attention(*wrong, ranges, 1.0)
    for wrong in ((grad[:4], out, lse), (grad, out[:4], lse), (grad.double(), out, lse)):
        with pytest.raises(ValueError, match="grad and out: expected"):
            native.range_attention_backward(wrong[0], q, k, v, *wrong[1:], ranges, 1.0)
    with pytest.raises(ValueError, match="lse: expected"):
        native.range_attention_backward(grad, q, k, v, out, lse[:4], ranges, 1.0)


# While the limit holds there is memory for small things, but not for scratch of 6 MB.
SCARCE = """
import resource
from pathlib import Path
import torch
from lst_kernels import native
from lst_kernels.ranges import KeyRanges
call, limits = native._call, resource.getrlimit(resource.RLIMIT_AS)
def without_memory(*arguments):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 20), limits[1]))
    try:
        call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
native._load(native.LIBRARY).lst_use_team({team})
torch.set_num_threads(2)
token = torch.arange(512, dtype=torch.int32)
ranges = KeyRanges((token - 99).clamp(min=0), token + 1, 512)
x = torch.randn(512, 1, 16)
for _ in range(50):  # both threads have run, with little scratch
    native.range_attention(x, x, x, ranges, 0.1)
q, k, v, grad = torch.randn(4, 512, 1, 256, dtype=torch.float64)
torch.set_num_threads(1)
out, lse = native.range_attention(q, k, v, ranges, 0.1)
torch.set_num_threads(2)
def backward():
    return native.range_attention_backward(grad, q, k, v, out, lse, ranges, 0.1)
native._call = without_memory
try:
    backward()  # not even the caller has memory
except MemoryError as error:
    print(error)
native._call = call
torch.set_num_threads(1)
expected = backward()
torch.set_num_threads(2)
native._call = without_memory
print(all(map(torch.equal, backward(), expected)))  # the caller has
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
@pytest.mark.parametrize("team", ["native._torch_team()", "None"], ids=["torch's", "own"])
def test_a_thread_without_memory_leaves_its_work_to_the_others(team: str):
    run = subprocess.run(
        [sys.executable, "-c", SCARCE.format(team=team)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert run.stderr == ""
    assert run.stdout == "lst_range_attention_backward: out of memory\nTrue\n"


def test_no_heads_are_refused_by_the_library_itself():
    """They once ended the process: the backward pass divides by their number."""
    ranges = windows([5], 2)
    q, k = torch.zeros(5, 0, 16), torch.ones(5, 2, 16)
    with pytest.raises(ValueError, match="multiple of the number of key heads"):
        native.range_attention(q, k, k, ranges, 1.0)
    with pytest.raises(ValueError, match="multiple of the number of key heads"):
        native.range_attention_backward(q, q, k, k, q, torch.zeros(5, 0), ranges, 1.0)


PEAK = """
from pathlib import Path
import torch
from lst_kernels import native
from lst_kernels.ranges import KeyRanges
def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
T = 65536
token = torch.arange(T, dtype=torch.int32)
ranges = {ranges}
q = torch.randn(ranges.num_queries, 1, 64)
k, v = torch.randn(2, ranges.num_keys, 1, 64)
grad = torch.randn(q.shape)
native.range_attention(q[:0], k[:0], v[:0], KeyRanges(token[:0], token[:0], 0), 0.125)
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the process it came from
before = resident("VmRSS")
out, lse = native.range_attention(q, k, v, ranges, 0.125)
grads = native.range_attention_backward(grad, q, k, v, out, lse, ranges, 0.125)
grown = resident("VmHWM") - before
print(grown, sum(x.nbytes for x in (q, k, v, grad)), sum(x.nbytes for x in (out, *grads)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "ranges",
    [
        "KeyRanges(token[: T // 4] * 4, token[: T // 4] * 4 + 4, T)",
        "KeyRanges((token - 99).clamp(min=0), token + 1, T)",
    ],
    ids=["encoder", "sliding-window"],
)
def test_memory_stays_under_twice_inputs_and_outputs(ranges: str):
    command = [sys.executable, "-c", PEAK.format(ranges=ranges)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, given, made = map(int, run.stdout.split())
    assert grown >= made / 2  # or nothing was measured
    assert given + grown < 2 * (given + made)
