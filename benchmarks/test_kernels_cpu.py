"""How much faster are the CPU kernels than what a user would pick today?

    attention, per pair of query and key that is read, a head:  4 D FLOP forward, 10 D backward
    patch_pool, patch_expand, segment_scan:  every element of their inputs and outputs read or
                                             written once

The shapes are those of the local side of the paper's 1B model: 16 heads of 64, 1 slot, d = 1024
features, patches of 4 tokens, packed streams of 4k to 16k tokens, float32. Before anything is
timed, results and gradients are held against the peer's. Ours and the peers run in turn, in one
process; a figure is the least of its rounds. Peers that take seconds run for a round or two. The
peer that comes from transformers is left out, and said to be, where that is not installed.

    pytest benchmarks/test_kernels_cpu.py --benchmark-only
"""

import subprocess
import sys
from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from lst_kernels import (
    KeyRanges,
    PatchLayout,
    native,
    patch_expand,
    patch_pool,
    range_attention,
    segment_scan,
)

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

HEADS, HEAD_DIM, FEATURES = 16, 64, 1024


def layout(num_tokens: int) -> PatchLayout:
    """Static patches of 4 tokens after the <bos>, so that every token has a patch to read."""
    whole, rest = divmod(num_tokens - 1, 4)
    return PatchLayout.from_lengths([1, *[4] * whole, rest], [whole + 2])


PATTERNS: dict[str, Callable[[], KeyRanges]] = {
    "encoder, T=4096": lambda: layout(4096).patches_read_tokens(),
    "sliding window 512, T=8192": lambda: layout(8192).sliding_window(512),
    "decoder window 512, T=16384": lambda: layout(16384).tokens_read_patches(512),
    "decoder window all, T=4096": lambda: layout(4096).tokens_read_patches(),
}


def inputs(ranges: KeyRanges) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = ranges.num_queries, ranges.num_keys
    q, k, v, grad = (
        torch.randn(rows, HEADS, HEAD_DIM, generator=generator)
        for rows in (queries, keys, keys, queries)
    )
    return [q, k, v], grad


def forward_bytes(ranges: KeyRanges) -> int:
    """q, k, v, the ends of the ranges, out and its log-sum-exp, each once; a backward pass reads
    all of them again, reads the gradient of out and writes those of q, k and v."""
    rows = 2 * (ranges.num_queries + ranges.num_keys) * HEAD_DIM + ranges.num_queries
    return 4 * HEADS * rows + 4 * 2 * ranges.num_queries


def heads_first(x: Tensor) -> Tensor:
    """(rows, H, D) → (1, H, rows, D), the layout that torch's attention is fastest in."""
    return x.transpose(0, 1).contiguous()[None]


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding: within 1e-4 of the largest value."""
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize(
    ("pattern", "floor"),
    [
        ("encoder, T=4096", 40.0),
        ("sliding window 512, T=8192", 6.0),
        ("decoder window 512, T=16384", 3.0),
        ("decoder window all, T=4096", 0.9),
    ],
)
def test_training_against_dense_mask_sdpa(race, pattern: str, floor: float):
    ranges = PATTERNS[pattern]()
    qkv, grad = inputs(ranges)
    mask = ranges.dense_mask()
    dense_qkv, dense_grad = [heads_first(x).requires_grad_() for x in qkv], heads_first(grad)
    qkv = [x.requires_grad_() for x in qkv]

    def ours() -> list[Tensor]:
        out = range_attention(*qkv, ranges, backend="native")
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)]

    def dense() -> list[Tensor]:
        out = scaled_dot_product_attention(*dense_qkv, attn_mask=mask)
        return [out.detach(), *torch.autograd.grad(out, dense_qkv, dense_grad)]

    for x, y in zip(ours(), dense(), strict=True):
        assert agree(x, y[0].transpose(0, 1))
    race(
        f"{pattern}: forward + backward",
        ours,
        {"dense-mask SDPA": dense},
        floors={"dense-mask SDPA": floor},
        slow_rounds=2 if ranges.num_queries < 8192 else 1,  # after the one that was checked
        flops=14 * ranges.num_pairs * HEADS * HEAD_DIM,
        nbytes=forward_bytes(ranges) * 2 + grad.nbytes + sum(x.nbytes for x in qkv),
    )


@pytest.mark.parametrize(
    ("pattern", "floor"),
    [
        ("encoder, T=4096", 5.0),
        ("sliding window 512, T=8192", 0.7),
        ("decoder window 512, T=16384", 0.7),
        ("decoder window all, T=4096", 0.7),
    ],
)
def test_forward_against_compiled_flex_attention(race, add_row, pattern: str, floor: float):
    """Compilation is not counted, nor is the building of its mask; a row beside counts the mask, as
    BLT builds it for every batch. It has no backward on the CPU."""
    ranges = PATTERNS[pattern]()
    qkv, _ = inputs(ranges)
    start, stop = ranges.start, ranges.stop

    def build() -> BlockMask:
        return create_block_mask(
            lambda _batch, _head, query, key: (key >= start[query]) & (key < stop[query]),
            *(None, None, ranges.num_queries, ranges.num_keys),
            device="cpu",
        )

    mask = build()
    torch.compiler.reset()
    compiled = torch.compile(flex_attention)
    flex_qkv = [heads_first(x) for x in qkv]

    def ours() -> Tensor:
        return range_attention(*qkv, ranges, backend="native")

    def flex() -> Tensor:
        return compiled(*flex_qkv, block_mask=mask)

    with torch.no_grad():
        assert agree(ours(), flex()[0].transpose(0, 1))
        times = race(
            f"{pattern}: forward",
            ours,
            {"compiled flex_attention": flex},
            floors={"compiled flex_attention": floor},
            flops=4 * ranges.num_pairs * HEADS * HEAD_DIM,
            nbytes=forward_bytes(ranges),
        )
    if times:
        begun = perf_counter()
        build()
        theirs = times["compiled flex_attention"] + perf_counter() - begun
        add_row(
            case=f"{pattern}: forward",
            peer="flex_attention and its mask",
            ours=f"{times['ours'] * 1e3:.2f} ms",
            theirs=f"{theirs * 1e3:.2f} ms",
            ratio=theirs / times["ours"],
            floor=None,
            facts={"seconds": times["ours"], "peer_seconds": theirs},
        )


@pytest.mark.parametrize("side", ["encoder", "decoder window 1"])
def test_training_against_the_cross_attention_of_blt_in_transformers(race, side: str):
    """From patch lengths to gradients, with 2 slots: masks are made for every batch, and so are our
    layout and ranges. Norms and projections, the same on both sides, are left out."""
    blt = pytest.importorskip(
        "transformers.models.blt.modeling_blt", reason="needs pip install 'lst[bench]'"
    )
    num_tokens, slots = 4096, 2
    patch_lengths = torch.tensor([[1, *[4] * (num_tokens // 4)]])  # BLT's cover one token more
    num_patches = patch_lengths.shape[1]
    config = blt.BltLocalEncoderConfig(hidden_size=FEATURES, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    attention = blt.BltCrossAttention(config, layer_idx=0)
    for name in ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, torch.nn.Identity())

    def ranges() -> KeyRanges:
        own = patch_lengths[0].clone()
        own[-1] -= 1
        late = torch.arange(num_patches) == num_patches - 1
        made = PatchLayout.from_lengths(own, [num_patches], closed_late=late)
        if side == "encoder":
            return made.patches_read_tokens(slots=slots)
        return made.tokens_read_patches(1, slots)

    def mask() -> Tensor:
        ends = patch_lengths if side == "encoder" else patch_lengths[:, 1:]
        return blt._prepare_patch_cross_attention_mask(
            patch_ids=blt.BltModel._patch_ids_from_lengths(None, ends, num_tokens),
            num_patches=num_patches,
            sequence_length=num_tokens,
            patches_as_queries=side == "encoder",
            cross_attn_k=slots,
        )

    generator = torch.Generator().manual_seed(0)
    sizes = (ranges().num_queries, ranges().num_keys, ranges().num_queries)
    q, x, grad = (torch.randn(1, rows, FEATURES, generator=generator) for rows in sizes)
    q, x = q.requires_grad_(), x.requires_grad_()

    def ours() -> list[Tensor]:
        queries, keys = (states[0].unflatten(1, (HEADS, HEAD_DIM)) for states in (q, x))
        read = range_attention(queries, keys, keys, ranges(), backend="native")
        out = q + read.flatten(1)[None]
        return [out.detach(), *torch.autograd.grad(out, (q, x), grad)]

    def theirs() -> list[Tensor]:
        out, _ = attention(q, x, attention_mask=mask())
        return [out.detach(), *torch.autograd.grad(out, (q, x), grad)]

    for a, b in zip(ours(), theirs(), strict=True):
        assert agree(a, b)
    race(
        f"{side}, T=4096, 2 slots: plan, forward + backward",
        ours,
        {"BltCrossAttention": theirs},
        floors={},
        slow_rounds=2,
    )


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pooling_against_torch(race, reduce: str):
    """Floors: embedding_bag for the mean; for the maximum each of torch's ways."""
    pooled = layout(4096)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(pooled.num_tokens, FEATURES, generator=generator).requires_grad_()
    grad = torch.randn(pooled.num_patches, FEATURES, generator=generator)
    token, offsets = torch.arange(pooled.num_tokens), pooled.cu_patches[:-1].long()
    owner = pooled.patch_ids.long()[:, None].expand(-1, FEATURES)
    lengths = torch.diff(pooled.cu_patches).long()
    name = {"mean": "mean", "max": "amax"}[reduce]
    counts = lengths[:, None]
    forwards: dict[str, Callable[[], Tensor]] = {
        "embedding_bag": lambda: embedding_bag(token, x, offsets, mode=reduce),
        "scatter_reduce": lambda: grad.new_zeros(grad.shape).scatter_reduce(
            0, owner, x, name, include_self=False
        ),
        "segment_reduce": lambda: torch.segment_reduce(x, reduce, lengths=lengths, axis=0),
    }
    if reduce == "mean":
        ids = pooled.patch_ids.long()
        sums = lambda: grad.new_zeros(grad.shape).index_add(0, ids, x)  # noqa: E731
        forwards["index_add"] = lambda: sums() / counts

    def train(forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            out = forward()
            return out.detach(), torch.autograd.grad(out, x, grad)[0]

        return both

    ours = train(lambda: patch_pool(x, pooled, reduce, backend="native"))
    peers = {name: train(forward) for name, forward in forwards.items()}
    for peer in peers.values():
        for a, b in zip(ours(), peer(), strict=True):
            assert agree(a, b)
    floors = {"embedding_bag": 1.0} if reduce == "mean" else dict.fromkeys(peers, 4.0)
    traffic = 2 * (x.nbytes + grad.nbytes)
    race(
        f"patch_pool {reduce}, T=4096, d=1024: forward + backward",
        ours,
        peers,
        floors=floors,
        rounds=60,  # the least of many: whether 16 MB are new to the process decides a round's time
        flops=2 * x.numel(),  # a comparison or an addition, and one of the gradient
        nbytes=traffic,
    )


def test_expanding_onto_a_residual_against_torch(race):
    """Indexing; and index_select, which says the same and goes back much faster."""
    expanded = layout(4096)
    ids = expanded.readable_ids.long()
    generator = torch.Generator().manual_seed(0)
    z, x, grad = (
        torch.randn(rows, FEATURES, generator=generator)
        for rows in (expanded.num_patches, expanded.num_tokens, expanded.num_tokens)
    )
    z, x = z.requires_grad_(), x.requires_grad_()

    def train(forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            out = forward()
            return [out.detach(), *torch.autograd.grad(out, (z, x), grad)]

        return both

    ours = train(lambda: patch_expand(z, expanded, 1, x, backend="native"))
    peers = {
        "x + z[ids]": train(lambda: x + z[ids]),
        "x + z.index_select": train(lambda: x + z.index_select(0, ids)),
    }
    for peer in peers.values():
        for a, b in zip(ours(), peer(), strict=True):
            assert agree(a, b)
    race(
        "patch_expand onto a residual, T=4096, d=1024: forward + backward",
        ours,
        peers,
        floors={},
        rounds=20,
        flops=2 * x.numel(),  # an addition onto the residual, one of gradients
        nbytes=2 * z.nbytes + 3 * x.nbytes,
    )


def test_scanning_against_torch(race):
    """Peers: the loop of the definition, and a product with the matrix of all decays from row to
    row, quadratic in the rows."""
    patches = layout(4096)
    segments = patches.cu_documents
    rows = patches.num_patches
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, FEATURES, generator=generator) for _ in range(2))
    decay = 0.5 + 0.5 * torch.rand(rows, generator=generator)
    inputs = [x.requires_grad_(), decay.requires_grad_()]
    first = torch.zeros(rows, dtype=torch.bool)
    first[segments[:-1].long()] = True
    document = first.cumsum(0)
    past = (document[:, None] == document) & torch.ones(rows, rows, dtype=torch.bool).tril()

    def loop() -> Tensor:
        y, out = x.new_zeros(FEATURES), []
        for row, step, begins in zip(x, decay, first.tolist(), strict=True):
            y = row if begins else step * y + row
            out.append(y)
        return torch.stack(out)

    def product() -> Tensor:
        summed = decay.log().cumsum(0)
        reached = (summed[:, None] - summed).masked_fill(~past, -torch.inf)
        return reached.exp() @ x

    def train(forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            out = forward()
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

        return both

    ours = train(lambda: segment_scan(x, decay, segments, backend="native"))
    peers = {"row by row": train(loop), "product with all decays": train(product)}
    for peer in peers.values():
        for a, b in zip(ours(), peer(), strict=True):
            assert agree(a, b)
    race(
        f"segment_scan, P={rows}, d=1024: forward + backward",
        ours,
        peers,
        floors={"row by row": 4.0, "product with all decays": 1.0},
        rounds=20,
        slow_rounds=5,
        flops=6 * x.numel(),  # a multiplication and an addition; two of them in the backward pass
        nbytes=5 * x.nbytes,
    )


PEAK = """
import torch
from pathlib import Path
from lst_kernels import PatchLayout, patch_expand, patch_pool, range_attention
T = 65536
layout = PatchLayout.from_lengths(torch.full((T // 4,), 4), torch.tensor([T // 4]))
def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
def grown(inputs, grad_of, call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the process it came from
    before = resident("VmRSS")
    out = call(*inputs)
    grads = torch.autograd.grad(out, inputs, grad_of)
    given = sum(x.nbytes for x in (*inputs, grad_of))
    fresh = [x for x in (out, *grads) if x.data_ptr() != grad_of.data_ptr()]
    made = sum(x.nbytes for x in fresh)  # a residual's gradient is the incoming one itself
    print((resident("VmHWM") - before + given) / (given + made))
def tensors(*rows):
    return [torch.randn(num, 1, 64, requires_grad=True) for num in rows]
warm, few = PatchLayout.from_lengths([2, 2], [2]), tensors(2, 4, 4)
out = range_attention(*few, warm.patches_read_tokens())
torch.autograd.grad(out, few, torch.ones_like(out))  # torch imports sympy with its first such call
"""
PEAK_CASES = {
    "encoder": "grown(tensors(T // 4, T, T), torch.randn(T // 4, 1, 64), lambda q, k, v: "
    "range_attention(q, k, v, layout.patches_read_tokens(), backend='native'))",
    "sliding window 512": "grown(tensors(T, T, T), torch.randn(T, 1, 64), lambda q, k, v: "
    "range_attention(q, k, v, layout.sliding_window(512), backend='native'))",
    "decoder window 512": "grown(tensors(T, T // 4, T // 4), torch.randn(T, 1, 64), "
    "lambda q, k, v: range_attention(q, k, v, layout.tokens_read_patches(512), backend='native'))",
    "patch_pool max": "grown(tensors(T), torch.randn(T // 4, 1, 64), "
    "lambda x: patch_pool(x, layout, 'max', backend='native'))",
    "patch_expand": "grown(tensors(T // 4), torch.randn(T, 1, 64), "
    "lambda z: patch_expand(z, layout, 1, backend='native'))",
    "patch_expand, residual": "grown(tensors(T // 4, T), torch.randn(T, 1, 64), "
    "lambda z, x: patch_expand(z, layout, 1, x, backend='native'))",
}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", PEAK_CASES)
def test_peak_memory_is_under_twice_inputs_and_outputs(benchmark, report_memory, case: str):
    """Forward and backward at T = 65,536 and one head of 64, in a process of its own."""
    command = [sys.executable, "-c", PEAK + PEAK_CASES[case]]

    def measure() -> float:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(run.stdout)

    share = benchmark.pedantic(measure, rounds=1)
    report_memory(f"{case}, T=65536, one head", share)
    assert share < 2
