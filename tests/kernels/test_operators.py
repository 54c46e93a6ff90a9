"""Every op is a torch operator: traced whole, checked by opcheck, counted, at home in autocast."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from lst_kernels import (
    PatchLayout,
    backend,
    block_causal_attention,
    patch_expand,
    patch_pool,
    range_attention,
    segment_scan,
    sliding_window_attention,
)
from lst_kernels.backends import BACKENDS, Call

OPS = torch.ops.lst_kernels
LAYOUT = PatchLayout.from_lengths([1, 4, 0, 2, 1, 3], [4, 2], closed_late=[False, True] * 3)
RANGES = LAYOUT.tokens_read_patches(2, slots=2)


def plan(ranges, name):
    return (
        *(ranges.start, ranges.stop, ranges.query_start, ranges.query_stop),
        *(ranges.query_order, ranges.key_order),
        0.3,
        *(ranges.num_pairs, ranges.max_keys, ranges.max_queries, ranges.disjoint, ranges.slots),
        name,
    )


def can_run(op, reduce=None, head_dim=None):
    call = Call(op, "cpu", torch.float32, reduce=reduce, head_dim=head_dim)
    return [b.name for b in BACKENDS if not (b.refuses(call) or b.unavailable())]


def rows(num_rows, *shape):
    return torch.randn(num_rows, *shape, requires_grad=True)


@pytest.mark.parametrize("name", can_run("range_attention", head_dim=16))
def test_range_attention_passes_opcheck(name):
    q, k, v = rows(11, 4, 16), rows(12, 2, 16), rows(12, 2, 16)
    torch.library.opcheck(OPS.range_attention.default, (q, k, v, *plan(RANGES, name)))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = range_attention(q, k, v, RANGES, scale=0.3, return_lse=True, backend=name)
    torch.library.opcheck(
        OPS.range_attention_backward.default, (q, q, k, v, out, lse, *plan(RANGES, name))
    )


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        (name, reduce)
        for reduce in ("mean", "sum", "max", "min", "first", "last")
        for name in can_run("patch_pool", reduce)
    ],
)
def test_patch_pool_passes_opcheck(name, reduce):
    x, grad = rows(11, 3), rows(6, 3).detach()
    torch.library.opcheck(OPS.patch_pool.default, (x, LAYOUT.cu_patches, reduce, name))
    _, index = OPS.patch_pool(x.detach(), LAYOUT.cu_patches, reduce, name)
    torch.library.opcheck(
        OPS.patch_pool_backward.default, (grad, LAYOUT.cu_patches, index, reduce, 11, name)
    )


@pytest.mark.parametrize("name", can_run("patch_expand"))
def test_patch_expand_passes_opcheck(name):
    readers = (LAYOUT.readable_ids, LAYOUT.readable_from, LAYOUT.replaced_at)
    for residual in (None, rows(11, 3)):
        torch.library.opcheck(OPS.patch_expand.default, (rows(6, 3), *readers, residual, name))
    torch.library.opcheck(OPS.patch_expand_backward.default, (rows(11, 3).detach(), *readers, name))


@pytest.mark.parametrize("name", can_run("segment_scan"))
def test_segment_scan_passes_opcheck(name):
    x, decay, cu = rows(11, 3), torch.rand(11, requires_grad=True), LAYOUT.cu_patches
    torch.library.opcheck(OPS.segment_scan.default, (x, decay, cu, name))
    args = (x.detach(), decay.detach(), cu, x.detach(), name)
    torch.library.opcheck(OPS.segment_scan_backward.default, args)


def model(q, k, v, x, layout, encoder, decoder, window, causal):
    slots = patch_pool(x, layout, "max").view(-1, 2, 16)
    slots = range_attention(slots, k, v, encoder)
    slots = block_causal_attention(
        *(slots, slots, slots, layout.cu_documents),
        max_length=layout.max_document_patches,
        ranges=causal,
    )
    read = range_attention(q, slots, slots, decoder)
    h = sliding_window_attention(
        *(read, k, v, layout.cu_tokens),
        window=4,
        max_length=layout.max_document_tokens,
        ranges=window,
    )
    context = patch_expand(slots.flatten(1), layout, 1, read.flatten(1))
    return h.square().sum() + patch_expand(slots, layout).square().sum() + context.square().sum()


def model_inputs(lengths, patches_per_document):
    layout = PatchLayout.from_lengths(lengths, patches_per_document)
    num_tokens = layout.num_tokens
    tensors = [rows(num_tokens, 2, 16) for _ in range(3)] + [rows(num_tokens, 32)]
    ranges = (
        layout.patches_read_tokens(),
        layout.tokens_read_patches(2),
        layout.sliding_window(4),
        layout.block_causal(),
    )
    return tensors, (layout, *ranges)


# Ten batches of different numbers of tokens, patches and documents, some patches empty.
STREAMS = [
    ([3, 2, 5, 1], [2, 2]),
    ([3, 2, 2, 5, 1], [2, 2, 1]),
    ([4] * 9, [5, 4]),
    ([7, 0, 3, 4], [2, 2]),
    *[([1, 2, 0, 5, 3] * n, [2] * n + [3] * n) for n in (2, 3, 4, 5, 6, 7)],
]


def check_compiled(function, batches, backend="aot_eager", tolerance=0.0):
    """``batches``: (leaves, plans) of each call, ``function(*leaves, *plans)`` a tensor."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for leaves, plans in batches:
        ours, eager = (f(*leaves, *plans) for f in (compiled, function))
        grad = torch.randn_like(eager)
        results = [[out.detach(), *torch.autograd.grad(out, leaves, grad)] for out in (ours, eager)]
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 1


def test_compiled_ops_are_one_graph_that_other_sizes_run_again():
    check_compiled(model, [model_inputs(*stream) for stream in STREAMS])


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler"
)
def test_inductor_compiles_the_ops_once_too():
    batches = [model_inputs(*stream) for stream in STREAMS]
    check_compiled(model, batches, backend="inductor", tolerance=1e-5)


ONE_OP = {
    "encoder": lambda x, z, layout, encoder, *_: range_attention(z, x, x, encoder),
    "decoder": lambda x, z, layout, encoder, decoder, *_: range_attention(x, z, z, decoder),
    "sliding_window": lambda x, z, layout, encoder, decoder, window, causal: (
        sliding_window_attention(
            *(x, x, x, layout.cu_tokens),
            window=4,
            max_length=layout.max_document_tokens,
            ranges=window,
        )
        + 0 * z.sum()
    ),
    "block_causal": lambda x, z, layout, encoder, decoder, window, causal: (
        block_causal_attention(
            *(z, z, z, layout.cu_documents),
            max_length=layout.max_document_patches,
            ranges=causal,
        )
        + 0 * x.sum()
    ),
    **{
        f"patch_pool-{reduce}": lambda x, z, layout, *_, reduce=reduce: (
            patch_pool(x, layout, reduce) + z
        )
        for reduce in ("mean", "sum", "max", "min", "first", "last")
    },
    "patch_expand-own": lambda x, z, layout, *_: patch_expand(z, layout) * x,
    "patch_expand-shifted": lambda x, z, layout, *_: patch_expand(z, layout, shift=1) * x,
    "patch_expand-residual": lambda x, z, layout, *_: patch_expand(z, layout, 1, x),
    "segment_scan": lambda x, z, layout, *_: (
        segment_scan(z, z[:, 0, 0].sigmoid(), layout.cu_documents).sum() + x
    ),
}


@pytest.mark.parametrize("op", ONE_OP.values(), ids=ONE_OP)
def test_a_compiled_op_is_eager_and_never_compiled_again(op):
    batches = []
    for stream in STREAMS:
        layout = PatchLayout.from_lengths(*stream)
        ranges = (
            layout.patches_read_tokens(),
            layout.tokens_read_patches(2),
            layout.sliding_window(4),
            layout.block_causal(),
        )
        leaves = [rows(layout.num_tokens, 2, 16), rows(layout.num_patches, 2, 16)]
        batches.append((leaves, (layout, *ranges)))
    check_compiled(op, batches)


def test_the_backend_of_compiled_code_is_that_of_its_tracing():
    torch._dynamo.reset()
    names = []

    def remember(graph, example_inputs):
        names.extend(
            node.args[-1] for node in graph.graph.nodes if "lst_kernels" in str(node.target)
        )
        return graph.forward

    x, layout = torch.ones(5, 2), PatchLayout.from_lengths([2, 3], [2])
    with backend("reference"):
        torch.compile(lambda x: patch_pool(x, layout), fullgraph=True, backend=remember)(x)
    assert names == ["reference"]


def test_needed_scores_are_counted_twice_forward_and_four_times_backward():
    q, k = rows(11, 4, 16), rows(12, 2, 16)
    with FlopCounterMode(display=False) as counter:
        range_attention(q, k, k, RANGES).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    product = 2 * int(RANGES.dense_mask().sum()) * 4 * 16
    assert counted[OPS.range_attention] == 2 * product
    assert counted[OPS.range_attention_backward] == 4 * product


def test_autocast_does_not_reach_into_an_op():
    q, k = rows(11, 4, 16), rows(12, 2, 16)
    expected = range_attention(q, k, k, RANGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = range_attention(q, k, k, RANGES)
        gradients = torch.autograd.grad(ours.sum(), (q, k))
    assert torch.equal(ours, expected)
    for x, y in zip(gradients, torch.autograd.grad(expected.sum(), (q, k)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: range_attention(x, x, x, LAYOUT.sliding_window(2)),
        lambda x: patch_pool(x, LAYOUT).square(),
        lambda x: patch_expand(patch_pool(x, LAYOUT).square(), LAYOUT),
        lambda x: segment_scan(x.square(), x[:, 0, 0].sigmoid(), LAYOUT.cu_tokens),
    ],
)
def test_a_second_derivative_is_refused_rather_than_wrong(call):
    x = rows(11, 2, 16)
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
