"""Every launch of every op goes through Triton's own launching code, up to the driver.

What an op passes at run time (tensors, strides, None, constants) is bound, specialised and compiled
for Hopper as on a GPU; `lst_kernels.aot` describes the same to the compiler by itself. Only the
driver is missing, so nothing runs.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lst_kernels import PatchLayout
from lst_kernels import triton as kernels
from lst_kernels.triton import launch

LAYOUT = PatchLayout.from_lengths([1, 4, 4, 3, 1, 4, 4], [4, 3])
BF16 = torch.bfloat16


class Driver:
    """Of a Hopper GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were bound and compiled, in their order."""
    names = []

    def bind(self):
        compiled = self.kernel.warmup(
            grid=(self.programs,), **self.arguments,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
        assert compiled.asm["cubin"]
        names.append(self.kernel.fn.__name__)

    monkeypatch.setattr(launch.Launch, "__call__", bind)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(driver, "_active", Driver())
    return names


def rows(number, *shape):
    return torch.zeros(number, *shape, dtype=BF16)


def attend(ranges):
    q, k = rows(ranges.num_queries, 16, 64), rows(ranges.num_keys, 16, 64)
    out, lse = kernels.range_attention(q, k, k, ranges, 0.125)
    kernels.range_attention_backward(out, q, k, k, out, lse, ranges, 0.125)


def pool(reduce):
    out, index = kernels.patch_pool(rows(LAYOUT.num_tokens, 64), LAYOUT.cu_patches, reduce)
    kernels.patch_pool_backward(out, LAYOUT.cu_patches, reduce, index, LAYOUT.num_tokens)


def expand(residual):
    z, x = rows(LAYOUT.num_patches, 64), rows(LAYOUT.num_tokens, 64)
    kernels.patch_expand(z, LAYOUT.readable_ids, x if residual else None)
    kernels.patch_expand_backward(x, LAYOUT.readable_ids, LAYOUT.readable_from, LAYOUT.replaced_at)


def scan():
    x, decay = rows(200, 64), torch.zeros(200)  # of several chunks
    cu = torch.tensor([0, 50, 200], dtype=torch.int32)
    y = kernels.segment_scan(x, decay, cu)
    kernels.segment_scan_backward(x, decay, cu, y)


OPS = {
    "encoder": (
        lambda: attend(LAYOUT.patches_read_tokens(slots=2)),
        ["patch_forward", "patch_backward"],
    ),
    "decoder": (
        lambda: attend(LAYOUT.tokens_read_patches(2, slots=2)),
        ["tiled_forward", "tiled_backward_q", "tiled_backward_kv"],
    ),
    "max": (lambda: pool("max"), ["pool_extreme", "pool_share"]),
    "mean": (lambda: pool("mean"), ["pool_sum", "pool_share"]),
    "last": (lambda: pool("last"), ["gather_rows", "pool_share"]),
    "expand": (lambda: expand(False), ["gather_rows", "pool_sum"]),
    "expand-residual": (lambda: expand(True), ["gather_rows", "pool_sum"]),
    "scan": (scan, ["scan_ends", "scan_carries", "scan_rows"] * 2),
}


@pytest.mark.parametrize("op", OPS)
def test_what_an_op_launches_is_bound_and_compiled_as_on_a_gpu(op, launched):
    call, kernels_of = OPS[op]
    call()
    assert launched == kernels_of
