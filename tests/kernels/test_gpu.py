"""On a GPU the ops are what they are on the CPU, at the sizes of a model, and never wait.

The oracles are those of `test_attention.py`, `test_pooling.py` and `test_scan.py`: dense float64,
and loops over patches and rows. Triton's kernels have more tests of their own, which
`test_triton_interpreter.py` runs.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lst_kernels import (
    PatchLayout,
    block_causal_attention,
    explain,
    flash,
    patch_expand,
    patch_pool,
    range_attention,
    segment_scan,
    sliding_window_attention,
)

DEVICE, BACKEND = "cuda", "triton"
pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
OPS = torch.ops.lst_kernels


def suite(name):
    """Another test file of this folder, for its oracle."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ATTENTION, POOLING = suite("test_attention"), suite("test_pooling")
SCAN = suite("test_scan")


def words(num_patches, seed=0):
    """Three documents of patches as long as words are, one of 300 tokens, some empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (num_patches,), generator=generator)
    lengths[num_patches // 2] = 300
    late = torch.rand(num_patches, generator=generator) < 0.2
    first = num_patches // 3
    return PatchLayout.from_lengths(lengths, [first, 1, num_patches - first - 1], closed_late=late)


PATTERNS = {
    "encoder": lambda layout: layout.patches_read_tokens(),
    "encoder-slots": lambda layout: layout.patches_read_tokens(slots=2),
    "encoder-window": lambda layout: layout.patches_read_tokens(3, slots=2),
    "decoder": lambda layout: layout.tokens_read_patches(slots=2),
    "decoder-window": lambda layout: layout.tokens_read_patches(70, slots=2),
    "decoder-blt": lambda layout: layout.tokens_read_patches(1, slots=2),
    "sliding": lambda layout: layout.sliding_window(100),
    "causal": lambda layout: layout.block_causal(),
}


def check(attend, ranges, dtype, shape):
    """``attend(q, k, v)`` on the GPU against the suite's dense oracle, within its budget."""
    tensors = [x.to(DEVICE) for x in ATTENTION.inputs(ranges, dtype, shape)]
    ranges = ranges.to(DEVICE)

    def dense(q, k, v):
        return ATTENTION.dense(q, k, v, ranges)[0], q.new_zeros(())

    def ours(q, k, v):
        return attend(q, k, v), q.new_zeros(())

    oracle = ATTENTION.run(dense, tensors, torch.float64)
    eager = ATTENTION.run(dense, tensors, dtype)
    found = ATTENTION.run(ours, tensors, dtype)
    largest = ATTENTION.largest
    sizes = [largest(oracle[0]), 0.0, *[max(map(largest, oracle[2:]))] * 3]
    names = ("out", "", "dq", "dk", "dv")
    for name, x, y, z, size in zip(names, found, eager, oracle, sizes, strict=True):
        assert x.isfinite().all(), name
        error, eager_error = (largest(a.double() - z) for a in (x, y))
        budget = 2 * eager_error + 4 * torch.finfo(dtype).eps * size
        assert error <= budget, f"{name}: {error:.3g} > {budget:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 64), (16, 4, 128)], ids=["local", "gqa"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_is_dense_attention_at_a_models_sizes(pattern, shape, dtype):
    ranges = PATTERNS[pattern](words(150))
    on_device = ranges.to(DEVICE)
    check(
        lambda q, k, v: range_attention(q, k, v, on_device, backend=BACKEND), ranges, dtype, shape
    )


CAUSAL = {"sliding-1": 1, "sliding-2": 2, "sliding-100": 100, "sliding-512": 512, "causal": None}


def causal(layout, window, backend):
    """The wrapper as a function of q, k and v, and the ranges that it means, on the CPU."""
    moved = layout.to(DEVICE)
    if window is None:
        ranges, cu, longest = (
            layout.block_causal(), moved.cu_documents, layout.max_document_patches,
        )  # fmt: skip
        plan = ranges.to(DEVICE)
        return ranges, lambda q, k, v: block_causal_attention(
            q, k, v, cu, max_length=longest, ranges=plan, backend=backend
        )
    ranges, cu, longest = (
        layout.sliding_window(window), moved.cu_tokens, layout.max_document_tokens,
    )  # fmt: skip
    plan = ranges.to(DEVICE)
    return ranges, lambda q, k, v: sliding_window_attention(
        q, k, v, cu, window=window, max_length=longest, ranges=plan, backend=backend
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(16, 16, 64), (8, 2, 128)], ids=["local", "gqa"])
@pytest.mark.parametrize("pattern", CAUSAL)
@pytest.mark.parametrize("provider", flash.CANDIDATES)
def test_every_flash_provider_reads_the_same_keys(provider, pattern, shape, dtype, monkeypatch):
    try:
        made = flash.CANDIDATES[provider]()
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {error}")
    if flash.unavailable_reason() is not None:
        pytest.skip(flash.unavailable_reason())
    monkeypatch.setattr(flash, "PROVIDER", made)
    ranges, attend = causal(words(200), CAUSAL[pattern], "flash")
    check(attend, ranges, dtype, shape)


@pytest.mark.parametrize("backend", ["flash", BACKEND])
def test_a_window_of_w_gives_w_keys_their_gradients(backend):
    if backend == "flash" and flash.unavailable_reason() is not None:
        pytest.skip(flash.unavailable_reason())
    _, attend = causal(PatchLayout.from_lengths([64], [1]), 7, backend)
    q, k, v = (torch.randn(64, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    v.requires_grad_()
    attend(q, k, v)[40].sum().backward()
    read = v.grad.float().abs().sum((1, 2)).nonzero().flatten()
    assert read.tolist() == list(range(34, 41))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", POOLING.REDUCES)
@pytest.mark.parametrize("levels", [None, 3], ids=["values", "ties"])
def test_patch_pool_is_the_loop(levels, reduce, dtype):
    layout = words(60)
    x = POOLING.values(dtype, layout.num_tokens, 72, levels=levels)
    grad = POOLING.values(dtype, layout.num_patches, 72)
    oracle, winners = POOLING.pool_loop(x, layout, reduce)
    eager, _ = POOLING.pool_loop(x.to(dtype), layout, reduce)
    leaf = x.to(DEVICE, dtype).requires_grad_()
    out = patch_pool(leaf, layout.to(DEVICE), reduce, backend=BACKEND)
    out.backward(grad.to(DEVICE, dtype))
    POOLING.within_budget(out.detach().cpu(), eager, oracle, dtype)
    back = [POOLING.pool_gradient_loop(g, layout, reduce, winners) for g in (grad.to(dtype), grad)]
    POOLING.within_budget(leaf.grad.cpu(), *back, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_patch_expand_is_the_loop(shift, dtype):
    layout = words(60)
    z = POOLING.values(dtype, layout.num_patches, 72)
    grad = POOLING.values(dtype, layout.num_tokens, 72)
    results = []
    for kind in (dtype, torch.float64):
        leaf = z.to(kind, copy=True).requires_grad_()
        out = POOLING.expand_loop(leaf, layout, shift)
        out.backward(grad.to(kind))
        results.append((out.detach(), leaf.grad))
    leaf = z.to(DEVICE, dtype, copy=True).requires_grad_()
    out = patch_expand(leaf, layout.to(DEVICE), shift, backend=BACKEND)
    out.backward(grad.to(DEVICE, dtype))
    for ours, eager, oracle in zip((out.detach(), leaf.grad), *results, strict=True):
        POOLING.within_budget(ours.cpu(), eager, oracle, dtype)
    residual = POOLING.values(dtype, layout.num_tokens, 72, seed=1)
    added = patch_expand(
        leaf, layout.to(DEVICE), shift, residual.to(DEVICE, dtype), backend=BACKEND
    )
    eager, oracle = (residual.to(rows.dtype) + rows for rows, _ in results)
    POOLING.within_budget(added.detach().cpu(), eager, oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[3, 0, 700, 1, 64, 65], [5000]], ids=["short", "long"])
def test_segment_scan_is_the_loop(lengths, dtype):
    cu = SCAN.offsets(lengths)
    x, decay, grad = SCAN.inputs(dtype, sum(lengths), 72)
    decay = decay.float()

    def run(scan, kind, device="cpu"):
        leaves = x.to(device, kind), decay.to(device, SCAN.precise(kind)), grad.to(device, kind)
        return [z.cpu() for z in SCAN.differentiate(scan, *leaves)]

    oracle, eager = (run(lambda x, d: SCAN.loop(x, d, cu), kind) for kind in (torch.float64, dtype))
    there = cu.to(DEVICE)
    ours = run(lambda x, d: segment_scan(x, d, there, backend=BACKEND), dtype, DEVICE)
    for got, same, wanted in zip(ours, eager, oracle, strict=True):
        assert got.isfinite().all()
        budget = 2 * SCAN.largest(same - wanted)
        budget += 4 * torch.finfo(dtype).eps * SCAN.largest(wanted)
        assert SCAN.largest(got - wanted) <= budget


def every_op(backend, dtype=torch.bfloat16):
    """Each op of the library as a call that goes forward and backward, on inputs already there."""
    layout = words(200)
    moved = layout.to(DEVICE)

    def rows(number, *shape):
        return torch.randn(number, *shape, device=DEVICE, dtype=dtype, requires_grad=True)

    def trained(function, *leaves):
        def call():
            out = function(*leaves)
            return [out, *torch.autograd.grad(out.sum(), leaves)]

        return call

    calls = {}
    for name, pattern in PATTERNS.items():
        ranges = pattern(layout).to(DEVICE)
        tensors = [rows(n, 4, 64) for n in (ranges.num_queries, ranges.num_keys, ranges.num_keys)]
        calls[name] = trained(
            lambda q, k, v, ranges=ranges: range_attention(q, k, v, ranges, backend=backend),
            *tensors,
        )
    for name in ("sliding-100", "causal"):
        ranges, attend = causal(layout, CAUSAL[name], "auto")
        calls[f"auto-{name}"] = trained(attend, *[rows(ranges.num_keys, 4, 64) for _ in range(3)])
    for reduce in POOLING.REDUCES:
        calls[f"patch_pool-{reduce}"] = trained(
            lambda x, how=reduce: patch_pool(x, moved, how, backend=backend),
            rows(layout.num_tokens, 64),
        )
    for shift in (0, 1):
        calls[f"patch_expand-{shift}"] = trained(
            lambda z, by=shift: patch_expand(z, moved, by, backend=backend),
            rows(layout.num_patches, 64),
        )
    calls["patch_expand-residual"] = trained(
        lambda z, x: patch_expand(z, moved, 1, x, backend=backend),
        rows(layout.num_patches, 64),
        rows(layout.num_tokens, 64),
    )
    decay = torch.rand(layout.num_tokens, device=DEVICE, requires_grad=True)
    calls["segment_scan"] = trained(
        lambda x, decay: segment_scan(x, decay, moved.cu_tokens, backend=backend),
        rows(layout.num_tokens, 64),
        decay,
    )
    return calls


@pytest.fixture(scope="module")
def calls():
    return every_op(BACKEND)


OPS_BY_NAME = [
    *PATTERNS, "auto-sliding-100", "auto-causal",
    *[f"patch_pool-{reduce}" for reduce in POOLING.REDUCES],
    "patch_expand-0", "patch_expand-1", "patch_expand-residual", "segment_scan",
]  # fmt: skip


@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_no_op_waits_for_the_device(name, calls):
    calls[name]()  # compiles, and finds its provider
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls[name]()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", [name for name in OPS_BY_NAME if "auto" not in name])
def test_results_are_the_same_bits_from_run_to_run(name, calls):
    first = [x.clone() for x in calls[name]()]
    for _ in range(3):
        for x, y in zip(first, calls[name](), strict=True):
            assert torch.equal(x, y)


def test_layouts_made_on_the_device_do_not_wait_and_are_those_of_the_cpu():
    layout = words(80)
    lengths = torch.diff(layout.cu_patches).clamp(min=1)
    documents = torch.diff(layout.cu_documents)
    num_tokens = int(lengths.sum())
    expected = PatchLayout.from_lengths(lengths, documents)
    starts = torch.zeros(num_tokens, dtype=torch.bool)
    starts[expected.cu_patches[:-1].long()] = True
    there = [x.to(DEVICE) for x in (lengths, documents, starts, expected.cu_tokens)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = PatchLayout.from_lengths(*there[:2], num_tokens=num_tokens)
        cut = PatchLayout.from_boundaries(there[2], max_patches=90, cu_tokens=there[3])
        PatchLayout.from_boundaries(there[2], max_patches=90)  # a single document
        ranges = [made.tokens_read_patches(slots=2), cut.patches_read_tokens(slots=2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made.patch_ids.cpu(), expected.patch_ids)
    assert torch.equal(cut.patch_ids.cpu(), expected.patch_ids)
    assert torch.equal(ranges[0].stop.cpu(), expected.tokens_read_patches(slots=2).stop)
    q = torch.randn(90 * 2, 2, 64, device=DEVICE)
    k = torch.randn(num_tokens, 2, 64, device=DEVICE)
    ours = range_attention(q, k, k, ranges[1], backend=BACKEND)[: 80 * 2]
    exact = expected.patches_read_tokens(slots=2).to(DEVICE)
    torch.testing.assert_close(
        ours, range_attention(q[: 80 * 2], k, k, exact, backend="reference"), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("pattern", ["encoder-slots", "decoder-window"])
def test_range_attention_passes_opcheck(pattern):
    q, k, v, *plan = captured(pattern)
    torch.library.opcheck(OPS.range_attention.default, (q, k, v, *plan))


def captured(pattern):
    """The operator's arguments, as the public function passes them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.range_attention.default:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    ranges = PATTERNS[pattern](words(20)).to(DEVICE)
    q, k, v = (
        torch.randn(n, 4, 32, device=DEVICE)
        for n in (ranges.num_queries, ranges.num_keys, ranges.num_keys)
    )
    with Capture(), torch.no_grad():
        range_attention(q, k, v, ranges, scale=0.3, backend=BACKEND)
    (args,) = seen
    return [x.requires_grad_() for x in (q, k, v)] + list(args[3:])


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_patch_pool_and_patch_expand_pass_opcheck(reduce):
    layout = words(20).to(DEVICE)
    x = torch.randn(layout.num_tokens, 8, device=DEVICE, requires_grad=True)
    z = torch.randn(layout.num_patches, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(OPS.patch_pool.default, (x, layout.cu_patches, reduce, BACKEND))
    readers = (layout.readable_ids, layout.readable_from, layout.replaced_at)
    for residual in (None, x):
        torch.library.opcheck(OPS.patch_expand.default, (z, *readers, residual, BACKEND))


def test_segment_scan_passes_opcheck():
    layout = words(20).to(DEVICE)
    x = torch.randn(layout.num_tokens, 8, device=DEVICE, requires_grad=True)
    decay = torch.rand(layout.num_tokens, device=DEVICE, requires_grad=True)
    torch.library.opcheck(OPS.segment_scan.default, (x, decay, layout.cu_tokens, BACKEND))


def test_compiled_code_is_one_graph_for_ten_batches_with_the_gradients_of_eager_code():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def model(q, k, x, layout, encoder, decoder):
        slots = patch_pool(x, layout, "max", backend=BACKEND).view(-1, 2, 32)
        slots = range_attention(slots, k, k, encoder, backend=BACKEND)
        read = range_attention(q, slots, slots, decoder, backend=BACKEND)
        z = slots.flatten(1)
        context = patch_expand(z, layout, 1, x, backend=BACKEND)
        return read.square().sum() + context.square().sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(10):
        layout = words(40 + 7 * seed, seed)
        plan = [
            each.to(DEVICE)
            for each in (layout, layout.patches_read_tokens(), layout.tokens_read_patches(9))
        ]
        leaves = [
            torch.randn(layout.num_tokens, *shape, device=DEVICE, requires_grad=True)
            for shape in ((2, 32), (2, 32), (64,))
        ]
        ours, eager = (function(*leaves, *plan) for function in (compiled, model))
        assert torch.equal(ours, eager)
        for x, y in zip(*(torch.autograd.grad(out, leaves) for out in (ours, eager)), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_auto_takes_flash_for_half_precision_and_triton_for_the_rest():
    layout = words(20).to(DEVICE)
    cu, longest = layout.cu_tokens, layout.max_document_tokens
    x = torch.ones(layout.num_tokens, 2, 64, device=DEVICE)
    ranges = layout.sliding_window(4)
    assert explain(range_attention, x, x, x, ranges)[BACKEND].startswith("chosen")
    assert explain(patch_pool, x, layout)[BACKEND].startswith("chosen")
    for dtype, name in ((torch.float32, BACKEND), (torch.bfloat16, "flash")):
        if name == "flash" and flash.unavailable_reason() is not None:
            pytest.skip(flash.unavailable_reason())
        q = x.to(dtype)
        told = explain(sliding_window_attention, q, q, q, cu, window=4, max_length=longest)
        assert told[name].startswith("chosen"), told


@pytest.mark.parametrize("op", ["encoder", "patch_pool", "patch_expand", "segment_scan"])
def test_more_than_two_to_the_31_elements_are_all_reached(op):
    """The last document gives what it gives alone; 135 documents of 16,384 tokens."""
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of free memory")
    whole = PatchLayout.static([16_384] * 135, 4)
    alone = PatchLayout.static([16_384], 4)
    x = torch.randn(whole.num_tokens, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    z = torch.randn(whole.num_patches, 16, 64, device=DEVICE, dtype=torch.bfloat16)

    def results(layout, x, z):
        x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
        if op == "encoder":
            ranges = layout.patches_read_tokens().to(DEVICE)
            out, leaves = range_attention(z, x, x, ranges, backend=BACKEND), (z, x)
        elif op == "patch_pool":
            out, leaves = patch_pool(x, layout.to(DEVICE), "max", backend=BACKEND), (x,)
        elif op == "segment_scan":
            decay = torch.full((layout.num_tokens,), 0.5, device=DEVICE, requires_grad=True)
            cu = layout.cu_tokens.to(DEVICE)
            out, leaves = segment_scan(x, decay, cu, backend=BACKEND), (x, decay)
        else:
            out, leaves = patch_expand(z, layout.to(DEVICE), backend=BACKEND), (z,)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    own = results(alone, x[-alone.num_tokens :], z[-alone.num_patches :])
    for ours, expected in zip(results(whole, x, z), own, strict=True):
        torch.testing.assert_close(ours[-len(expected) :], expected, rtol=2e-2, atol=2e-2)
