"""No op reads a value from the device, shown where there is none.

Every public op runs forward and backward down to its kernels' launches on meta tensors, which hold
nothing: whatever would make the host wait for a value (`.item()`, `nonzero`, a condition on a
tensor) raises there. The launches alone are left out; a launch does not wait. On a
GPU, `test_gpu.py` asks CUDA itself.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lst_kernels import (
    PatchLayout,
    attention,
    backends,
    block_causal_attention,
    patch_expand,
    patch_pool,
    pooling,
    range_attention,
    scan,
    segment_scan,
    sliding_window_attention,
)

pytest.importorskip("triton")
from lst_kernels.triton import launch

OPS = torch.ops.lst_kernels
KERNELS = {
    OPS.range_attention.default: attention._forward,
    OPS.range_attention_backward.default: attention._backward,
    OPS.patch_pool.default: pooling._pool,
    OPS.patch_pool_backward.default: pooling._pool_backward,
    OPS.patch_expand.default: pooling._expand,
    OPS.patch_expand_backward.default: pooling._expand_backward,
    OPS.segment_scan.default: scan._scan,
    OPS.segment_scan_backward.default: scan._scan_backward,
}
PATTERNS = {
    "encoder": lambda layout: layout.patches_read_tokens(slots=2),
    "encoder-window": lambda layout: layout.patches_read_tokens(window=3),
    "decoder": lambda layout: layout.tokens_read_patches(slots=2),
    "decoder-window": lambda layout: layout.tokens_read_patches(window=2, slots=2),
    "sliding": lambda layout: layout.sliding_window(5),
    "causal": lambda layout: layout.block_causal(),
}


class RealOperators(TorchDispatchMode):
    """Runs what an operator runs on a GPU, where meta tensors would ask its fake alone."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in KERNELS:
            self.ran.append(func)
            return KERNELS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU that holds nothing and counts launches."""
    launches = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: launches.append(self))
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "choose", lambda call, asked: asked)
    # There is no autocast of meta tensors to switch off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with RealOperators() as operators:
        yield operators, launches


# Plans are made on the CPU, of real values, and moved.
LAYOUT = PatchLayout.from_lengths([4, 4, 1, 30, 0, 4, 2, 1], [5, 3])
RANGES = {name: pattern(LAYOUT) for name, pattern in PATTERNS.items()}


def differentiate(out, *inputs):
    return torch.autograd.grad(out.sum(), inputs)


def ran(gpu, *ops):
    operators, launches = gpu
    return operators.ran == [getattr(OPS, op).default for op in ops] and len(launches) >= len(ops)


def test_reading_a_value_would_be_found(gpu):
    x = torch.ones(3, device="meta")
    for read in (x.sum().item, x.nonzero, lambda: bool((x > 0).any()), x.tolist):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_range_attention_reads_nothing(pattern, gpu):
    ranges = RANGES[pattern].to("meta")
    q = torch.empty(ranges.num_queries, 4, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(ranges.num_keys, 2, 64, device="meta", dtype=torch.bfloat16)
    q, k, v = q.requires_grad_(), k.requires_grad_(), k.clone().requires_grad_()
    differentiate(range_attention(q, k, v, ranges, backend="triton"), q, k, v)
    assert ran(gpu, "range_attention", "range_attention_backward")


@pytest.mark.parametrize("given", [True, False], ids=["planned", "from offsets"])
def test_causal_attention_reads_nothing(given, gpu):
    layout = LAYOUT.to("meta")
    q = torch.empty(layout.num_tokens, 4, 64, device="meta", requires_grad=True)
    u = torch.empty(layout.num_patches, 4, 64, device="meta", requires_grad=True)
    window = sliding_window_attention(
        q, q, q, layout.cu_tokens, window=5, max_length=39, backend="triton",
        ranges=RANGES["sliding"].to("meta") if given else None,
    )  # fmt: skip
    differentiate(window, q)
    causal = block_causal_attention(
        u, u, u, layout.cu_documents, max_length=5, backend="triton",
        ranges=RANGES["causal"].to("meta") if given else None,
    )  # fmt: skip
    differentiate(causal, u)
    assert ran(gpu, *["range_attention", "range_attention_backward"] * 2)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min", "first", "last"])
def test_patch_pool_reads_nothing(reduce, gpu):
    layout = LAYOUT.to("meta")
    x = torch.empty(layout.num_tokens, 96, device="meta", requires_grad=True)
    differentiate(patch_pool(x, layout, reduce, backend="triton"), x)
    assert ran(gpu, "patch_pool", "patch_pool_backward")


@pytest.mark.parametrize("shift", [0, 1])
def test_patch_expand_reads_nothing(shift, gpu):
    layout = LAYOUT.to("meta")
    z = torch.empty(layout.num_patches, 96, device="meta", requires_grad=True)
    residual = torch.empty(layout.num_tokens, 96, device="meta", requires_grad=True)
    out = patch_expand(z, layout, shift, residual=residual, backend="triton")
    differentiate(out, z, residual)
    assert ran(gpu, "patch_expand", "patch_expand_backward")


def test_segment_scan_reads_nothing(gpu):
    layout = PatchLayout.static([300, 200], 2).to("meta")
    x = torch.empty(layout.num_patches, 96, device="meta", requires_grad=True)
    decay = torch.empty(layout.num_patches, device="meta", requires_grad=True)
    differentiate(segment_scan(x, decay, layout.cu_documents, backend="triton"), x, decay)
    assert ran(gpu, "segment_scan", "segment_scan_backward")
    assert len(gpu[1]) == 6  # three kernels each way


def test_a_layout_made_on_the_device_neither_reads_nor_copies_from_the_host(gpu, monkeypatch):
    def copied(*args, **kwargs):
        raise AssertionError("a copy from the host, which waits for the device")

    monkeypatch.setattr(torch, "tensor", copied)
    lengths = torch.empty(8, dtype=torch.int32, device="meta")
    documents = torch.empty(2, dtype=torch.int32, device="meta")
    starts = torch.empty(46, dtype=torch.bool, device="meta")
    cu_tokens = torch.empty(3, dtype=torch.int32, device="meta")
    for layout in (
        PatchLayout.from_lengths(lengths, documents, num_tokens=46),
        PatchLayout.from_boundaries(starts, max_patches=20, cu_tokens=cu_tokens),
        PatchLayout.from_boundaries(starts, max_patches=20),
    ):
        for pattern in PATTERNS.values():
            assert pattern(layout).start.device.type == "meta"
