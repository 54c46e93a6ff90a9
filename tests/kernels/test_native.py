"""The native patch_pool equals a float64 oracle, has one result for every number of threads, and
says why when its library cannot be used."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lst_kernels import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

REDUCTIONS = ("mean", "sum", "max")
EPS = torch.finfo(torch.float32).eps
shapes = settings(max_examples=30, deadline=None, derandomize=True)
# 256 features are one tile of work: on either side of it, and well past it.
lengths_of_patches = st.lists(st.sampled_from([0, 0, 1, 1, 2, 4, 7, 300]), max_size=12)
numbers_of_features = st.sampled_from([0, 1, 3, 64, 255, 256, 257, 600])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def values(num_tokens: int, num_features: int) -> Tensor:
    """Small whole numbers and halves, so that most maxima are tied."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_features)
    return torch.randint(-6, 7, (num_tokens, num_features), generator=generator) / 2


def normals(num_tokens: int, num_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_features)
    return torch.randn(num_tokens, num_features, generator=generator)


def oracle(x: Tensor, lengths: list[int], reduce: str) -> Tensor:
    """Patch by patch in float64; empty patches give 0."""
    rows = [torch.zeros(0, x.shape[1], dtype=torch.float64)]
    for patch in x.double().split(lengths) if lengths else ():
        if len(patch) == 0:
            row = torch.zeros(x.shape[1], dtype=torch.float64)
        else:
            row = {"mean": patch.mean, "sum": patch.sum, "max": patch.amax}[reduce](0)
        rows.append(row[None])
    return torch.cat(rows)


@pytest.fixture(params=["torch's threads", "own threads"])
def two_threads(request):
    library, team = native._load(native.LIBRARY), native._torch_team()
    if request.param == "torch's threads" and team is None:
        pytest.skip("torch's threads cannot be had here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    library.lst_use_team(team if request.param == "torch's threads" else None)
    yield
    library.lst_use_team(team)
    torch.set_num_threads(before)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@shapes
@example(lengths=[], num_features=4)
@example(lengths=[0, 0], num_features=4)
@given(lengths=lengths_of_patches, num_features=numbers_of_features)
def test_forward_equals_the_oracle(reduce: str, lengths: list[int], num_features: int):
    x = normals(sum(lengths), num_features)
    out, index = native.patch_pool(x, offsets(lengths), reduce)
    expected = oracle(x, lengths, reduce)
    # Sums are carried in double: what is left is one rounding, and the double's own where the
    # terms cancel.
    tolerance = EPS * expected.abs() + 1e-13 * max(lengths, default=0)
    assert out.shape == (len(lengths), num_features)
    assert ((out.double() - expected).abs() <= tolerance).all()
    assert (index is None) == (reduce != "max")


@shapes
@given(lengths=lengths_of_patches, num_features=numbers_of_features)
def test_first_of_equal_maxima_wins(lengths: list[int], num_features: int):
    x, cu_patches = values(sum(lengths), num_features), offsets(lengths)
    _, index = native.patch_pool(x, cu_patches, "max")
    assert index is not None
    for patch, length in enumerate(lengths):
        start = int(cu_patches[patch])
        if length == 0:
            assert (index[patch] == -1).all()
            continue
        tokens = x[start : start + length]
        first = (tokens == tokens.amax(0)).int().argmax(0) + start
        assert torch.equal(index[patch], first.int())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@shapes
@example(lengths=[], num_features=4)
@example(lengths=[0, 0], num_features=4)
@given(lengths=lengths_of_patches, num_features=numbers_of_features)
def test_backward_equals_autograd_of_the_oracle(reduce: str, lengths: list[int], num_features: int):
    num_tokens = sum(lengths)
    # No ties here: where there are, autograd's amax shares the gradient and ours does not.
    x = normals(num_tokens, num_features)
    grad = normals(len(lengths), num_features)
    cu_patches = offsets(lengths)
    _, index = native.patch_pool(x, cu_patches, reduce)
    grad_x = native.patch_pool_backward(grad, cu_patches, reduce, index, num_tokens)
    leaf = x.double().requires_grad_()
    out = oracle(leaf, lengths, reduce)
    expected = torch.zeros_like(leaf)
    if out.requires_grad:
        (expected,) = torch.autograd.grad(out, leaf, grad.double())
    assert grad_x.shape == (num_tokens, num_features)
    assert ((grad_x.double() - expected).abs() <= EPS * expected.abs()).all()


def test_the_winner_of_a_tie_takes_the_whole_gradient():
    x = torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    cu_patches = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    out, index = native.patch_pool(x, cu_patches, "max")
    assert out.tolist() == [[3.0], [0.0], [2.0]]
    assert index is not None
    assert index.tolist() == [[1], [-1], [3]]
    grad = torch.tensor([[10.0], [20.0], [30.0]])
    grad_x = native.patch_pool_backward(grad, cu_patches, "max", index, 4)
    assert grad_x.tolist() == [[0.0], [10.0], [0.0], [30.0]]


def test_the_first_nan_wins_the_maximum():
    nan, inf = float("nan"), float("inf")
    columns = [[1, nan, inf, nan], [nan, 5, 6, 7], [-inf, -inf, -inf, -inf], [-inf, 1, nan, 2]]
    # 20 copies of the four columns, so that the vector loops meet them and not only their tails.
    x = torch.tensor(columns).T.repeat(1, 20).contiguous()
    cu_patches = torch.tensor([0, 4], dtype=torch.int32)
    out, index = native.patch_pool(x, cu_patches, "max")
    assert index is not None
    torch.testing.assert_close(out, x.amax(0, keepdim=True), equal_nan=True, rtol=0, atol=0)
    assert index.tolist() == [[1, 0, 0, 2] * 20]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_long_patch_is_summed_exactly(reduce: str):
    x = torch.full((100_000, 3), 0.1)
    cu_patches = torch.tensor([0, 100_000], dtype=torch.int32)
    out, _ = native.patch_pool(x, cu_patches, reduce)
    # Carried in float32, token after token, the sum is off by 1e-2 of itself.
    torch.testing.assert_close(out.double(), oracle(x, [100_000], reduce), rtol=EPS, atol=0)


@pytest.fixture(scope="module")
def large_case() -> tuple[Tensor, Tensor, Tensor]:
    """Enough work for several chunks, with one patch much longer than the others."""
    lengths = [*([3, 0, 5, 1] * 100), 700]
    return normals(sum(lengths), 600), offsets(lengths), normals(len(lengths), 600)


def pool_and_back(case: tuple[Tensor, Tensor, Tensor], reduce: str) -> tuple[Tensor, Tensor]:
    x, cu_patches, grad = case
    out, index = native.patch_pool(x, cu_patches, reduce)
    return out, native.patch_pool_backward(grad, cu_patches, reduce, index, len(x))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_every_number_of_threads_gives_the_same_bits(large_case, reduce: str):
    results = []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        results.append(pool_and_back(large_case, reduce))
    for out, grad_x in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_x, results[0][1])


@pytest.mark.usefixtures("two_threads")
def test_calls_from_several_threads_at_once_do_not_mix():
    # Many short jobs, of a few chunks each, so that they meet at every stage of one another. With
    # more threads than cores some wake late, into another caller's job.
    torch.set_num_threads(4)
    cu_patches = offsets([2, 0, 3] * 80)
    cases = [(normals(400, width), cu_patches, normals(240, width)) for width in (256, 300, 350)]
    expected = [pool_and_back(case, "max") for case in cases]
    mixed = []

    def call(number: int) -> None:
        for _ in range(200):
            results = pool_and_back(cases[number], "max")
            if any(map(differ, results, expected[number])):
                mixed.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert mixed == []


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ, found without torch's own threads, which a fork breaks."""
    return bool((a.numpy() != b.numpy()).any())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists a process's threads")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_has_threads_of_its_own(large_case):
    expected, _ = pool_and_back(large_case, "max")  # the parent's pool has threads now
    child = os.fork()
    if child == 0:
        out, _ = native.patch_pool(*large_case[:2], "max")
        num_threads = len(os.listdir("/proc/self/task"))
        os._exit(0 if num_threads == 2 and not differ(out, expected) else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    assert ended[1] == 0


ALONE = """
import os, torch
from lst_kernels import native
torch.set_num_threads(2)
x = torch.ones(4096, 512)
x.add_(1)  # now torch has its threads
before = len(os.listdir("/proc/self/task"))
native.patch_pool(x, torch.arange(0, 4097, 4, dtype=torch.int32), "mean")
assert len(os.listdir("/proc/self/task")) == before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists a process's threads")
def test_the_threads_are_torchs_own():
    """Beside others, which spin for a while after each loop of torch's, ours would share cores."""
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=60)


X, CU = torch.zeros(4, 2), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "cu_patches", "reduce", "message"),
    [
        (X.int(), CU, "sum", "x: expected float32, bfloat16, float16 or float64, got torch.int32"),
        (X[0], CU, "sum", "x: expected .* of 2 dimensions"),
        (torch.zeros(2, 4).T, CU, "sum", r"x: expected contiguous .* got strides \(1, 4\)"),
        (X, CU.long(), "sum", "cu_patches: expected contiguous torch.int32"),
        (X, CU[:0], "sum", "cu_patches: expected at least the offset 0"),
        (X, CU + 1, "sum", "cu_patches must start at 0"),
        (X, CU[:2], "max", "end at the number of tokens"),
        (X, torch.tensor([0, 9, 4], dtype=torch.int32), "mean", "never fall"),
        (X, CU, "median", "reduce: expected one of mean, sum, max, .* got 'median'"),
    ],
)
def test_a_wrong_argument_is_refused(x: Tensor, cu_patches: Tensor, reduce: str, message: str):
    with pytest.raises(ValueError, match=message):
        native.patch_pool(x, cu_patches, reduce)


@pytest.mark.parametrize(
    ("cu_patches", "index", "num_tokens", "message"),
    [
        (CU, None, 4, 'reduce="max" needs the index'),
        (CU, torch.zeros(1, 2, dtype=torch.int32), 4, r"index is \(1, 2\) where grad is \(2, 2\)"),
        (CU[:2], torch.zeros(2, 2, dtype=torch.int32), 4, "2 offsets for 2 patches"),
        (CU, torch.zeros(2, 2, dtype=torch.int32), 5, "end at the number of tokens"),
    ],
)
def test_a_wrong_argument_of_the_backward_is_refused(cu_patches, index, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        native.patch_pool_backward(torch.zeros(2, 2), cu_patches, "max", index, num_tokens)
