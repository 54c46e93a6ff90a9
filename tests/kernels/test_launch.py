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
from lst_kernels.triton import launch, tiled_attention

# Of other numbers of tokens, patches and documents; 32 tokens and 16 patches are multiples of 16.
LAYOUT = PatchLayout.from_lengths([1, 4, 4, 3, 1, 4, 4], [4, 3])
OTHER = PatchLayout.from_lengths([2] * 16, [4, 5, 7])
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
    """The kernels that were bound and compiled, in their order: name, and hash of what it is."""
    kernels = []

    def bind(self):
        compiled = self.kernel.warmup(
            grid=(self.programs,), **self.arguments,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
        assert compiled.asm["cubin"]
        kernels.append((self.kernel.fn.__name__, compiled.hash))

    monkeypatch.setattr(launch.Launch, "__call__", bind)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(driver, "_active", Driver())
    return kernels


def rows(number, *shape):
    return torch.zeros(number, *shape, dtype=BF16)


def attend(ranges):
    q, k = rows(ranges.num_queries, 16, 64), rows(ranges.num_keys, 16, 64)
    out, lse = kernels.range_attention(q, k, k, ranges, 0.125)
    kernels.range_attention_backward(out, q, k, k, out, lse, ranges, 0.125)


def pool(layout, reduce):
    out, index = kernels.patch_pool(rows(layout.num_tokens, 64), layout.cu_patches, reduce)
    kernels.patch_pool_backward(out, layout.cu_patches, reduce, index, layout.num_tokens)


def expand(layout, residual):
    z, x = rows(layout.num_patches, 64), rows(layout.num_tokens, 64)
    kernels.patch_expand(z, layout.readable_ids, x if residual else None)
    kernels.patch_expand_backward(x, layout.readable_ids, layout.readable_from, layout.replaced_at)


def scan(layout):
    x, decay = rows(5 * layout.num_tokens, 64), torch.zeros(5 * layout.num_tokens)  # some chunks
    cu = 5 * layout.cu_tokens
    y = kernels.segment_scan(x, decay, cu)
    kernels.segment_scan_backward(x, decay, cu, y)


OPS = {
    "encoder": (
        lambda layout: attend(layout.patches_read_tokens(slots=2)),
        ["patch_forward", "patch_backward"],
    ),
    "decoder": (
        lambda layout: attend(layout.tokens_read_patches(2, slots=2)),
        ["tiled_forward", "tiled_backward_q", "tiled_backward_kv"],
    ),
    "max": (lambda layout: pool(layout, "max"), ["pool_extreme", "pool_share"]),
    "mean": (lambda layout: pool(layout, "mean"), ["pool_sum", "pool_share"]),
    "last": (lambda layout: pool(layout, "last"), ["gather_rows", "pool_share"]),
    "expand": (lambda layout: expand(layout, False), ["gather_rows", "pool_sum"]),
    "expand-residual": (lambda layout: expand(layout, True), ["gather_rows", "pool_sum"]),
    "scan": (scan, ["scan_ends", "scan_carries", "scan_rows"] * 2),
}


@pytest.mark.parametrize("op", OPS)
def test_what_an_op_launches_is_compiled_as_on_a_gpu_once_for_batches_of_any_size(op, launched):
    call, kernels_of = OPS[op]
    call(LAYOUT)
    assert [name for name, _ in launched] == kernels_of
    call(OTHER)
    assert launched[len(kernels_of) :] == launched[: len(kernels_of)]


@pytest.mark.parametrize(
    ("rows", "heads", "together"),
    [(1000, 16, 16), (32_768, 16, 2), (32_768, 12, 3), (32_768, 7, 1), (10**7, 16, 1), (0, 4, 4)],
)
def test_as_many_heads_take_their_turn_together_as_the_cache_holds(rows, heads, together):
    """Of 32,768 keys of 64 in bfloat16, k and v of a head are 8 MB."""
    k = torch.empty(rows, heads, 64, dtype=BF16, device="meta")
    assert tiled_attention.heads_together(heads, k, k) == together
