"""What the kernels are raced against on a GPU: torch's own ways to the same result.

Every peer gets its inputs in the layout that it likes best, outside of what is timed, and says how
its result becomes ours, so that `benchmarks.gpu` can see that they agree. A peer is made only when
it is raced: one that cannot be made is a reason in the report.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.gpu_checks import BACKEND, Function
from benchmarks.gpu_measure import Run
from lst_kernels import PatchLayout, range_attention


@dataclass(frozen=True)
class Peer:
    """``as_ours`` puts its first result into the form of ours, to see that it is the same."""

    run: Run
    as_ours: Callable[[Tensor], Tensor] = lambda x: x


class Sets:
    """Two sets of inputs that take turns, each with its outputs to go back from."""

    def __init__(self, function: Function, sets: list[tuple[list[Tensor], Tensor]]) -> None:
        self.function, self.sets = function, sets

    def forward(self, number: int) -> Tensor:
        inputs, _ = self.sets[number % len(self.sets)]
        return self.function(*inputs)

    def both(self, number: int) -> list[Tensor]:
        inputs, grad = self.sets[number % len(self.sets)]
        out = self.function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    def backward(self) -> Run:
        """Goes back from outputs that are there since the first call."""
        outs: list[Tensor] = []

        def run(number: int) -> list[Tensor]:
            if not outs:
                outs.extend(self.function(*inputs) for inputs, _ in self.sets)
            inputs, grad = self.sets[number % len(self.sets)]
            out = outs[number % len(self.sets)]
            return list(torch.autograd.grad(out, inputs, grad, retain_graph=True))

        return run

    def map(self, function: Function, change: Callable[[Tensor], Tensor]) -> "Sets":
        """The same values in another form, for a peer."""
        return Sets(
            function,
            [
                ([change(x.detach()).requires_grad_() for x in inputs], change(grad))
                for inputs, grad in self.sets
            ],
        )


def attention_sets(case: shapes.Case, call: Function | None = None) -> Sets:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return range_attention(q, k, v, case.ranges, backend=BACKEND)

    sets = [
        shapes.attention_inputs(case.ranges, case.heads, torch.bfloat16, seed) for seed in range(2)
    ]
    return Sets(call or ours, sets)


def heads_first(x: Tensor) -> Tensor:
    """(rows, H, D) → (1, H, rows, D), as flex_attention and SDPA like it."""
    return x.transpose(0, 1).contiguous()[None]


def rows_first(x: Tensor) -> Tensor:
    """The way back."""
    return x[0].transpose(0, 1)


def varlen_call(case: shapes.Case) -> Function:
    """torch's varlen_attn, called as its documentation says. (-1, 0) is causal; (W-1, 0) a window
    of W; the encoder is a cross-attention of short sequences, each its patch."""
    from torch.nn.attention.varlen import varlen_attn

    if case.cu is not None:
        left = -1 if case.window is None else case.window - 1
        rest: tuple[Any, ...] = (case.cu, case.cu, case.max_length, case.max_length)
        sides = (left, 0)
    else:
        layout = case.layout
        slots = case.ranges.num_queries // layout.num_patches
        cu_slots = slots * torch.arange(layout.num_patches + 1, device=layout.device)
        rest = (cu_slots.int(), layout.cu_patches, slots, layout.max_patch_length)
        sides = (-1, -1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, *rest, scale=q.shape[2] ** -0.5, window_size=sides)

    return call


def flex_peers(case: shapes.Case, sets: Sets, what: str) -> dict[str, Callable[[], Peer]]:
    """Compiled flex_attention under the ranges' mask; without and with the (compiled) building of
    the mask. Both share what is compiled."""
    made: dict[str, Any] = {}
    start, stop = case.ranges.start, case.ranges.stop

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[query]) & (key < stop[query])

    def compiled() -> tuple[Any, Callable[[], Any]]:
        if not made:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            torch.compiler.reset()
            attend = torch.compile(flex_attention, dynamic=False)
            create = torch.compile(create_block_mask, dynamic=False)
            sizes = (case.ranges.num_queries, case.ranges.num_keys)
            made["all"] = attend, lambda: create(reads, None, None, *sizes, device=start.device)
        return made["all"]

    def without() -> Peer:
        attend, build = compiled()
        mask = build()
        theirs = sets.map(lambda q, k, v: attend(q, k, v, block_mask=mask), heads_first)
        return Peer(getattr(theirs, what), rows_first)

    def counted() -> Peer:
        attend, build = compiled()
        theirs = sets.map(lambda q, k, v: attend(q, k, v, block_mask=build()), heads_first)
        return Peer(getattr(theirs, what), rows_first)

    return {"flex_attention, compiled": without, "flex_attention and its mask, compiled": counted}


def sdpa_peer(case: shapes.Case, sets: Sets, what: str) -> Callable[[], Peer]:
    def make() -> Peer:
        mask = case.ranges.dense_mask()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return Peer(getattr(sets.map(attend, heads_first), what), rows_first)

    return make


def varlen_peer(case: shapes.Case, what: str) -> Peer:
    return Peer(getattr(attention_sets(case, varlen_call(case)), what))


def pooling_peers(sets: Sets, layout: PatchLayout, reduce: str) -> dict[str, Callable[[], Peer]]:
    ids = layout.patch_ids.long()
    lengths = torch.diff(layout.cu_patches).long()
    token = torch.arange(layout.num_tokens, device=layout.device)
    shape = (layout.num_patches, shapes.FEATURES)

    def scatter(x: Tensor) -> Tensor:
        how = "amax" if reduce == "max" else reduce
        return x.new_zeros(shape).scatter_reduce(
            0, ids[:, None].expand_as(x), x, how, include_self=False
        )

    def segment(x: Tensor) -> Tensor:
        # unsafe: without looking whether the lengths sum up, for which it would wait for the device
        return torch.segment_reduce(x, reduce, lengths=lengths, axis=0, unsafe=True)

    def bag(x: Tensor) -> Tensor:
        starts = layout.cu_patches[:-1].long()
        return torch.nn.functional.embedding_bag(token, x, starts, mode=reduce)

    def added(x: Tensor) -> Tensor:
        return x.new_zeros(shape).index_add(0, ids, x) / lengths.clamp(min=1)[:, None]

    ways = {"scatter_reduce": scatter, "segment_reduce": segment, "embedding_bag": bag}
    if reduce == "mean":
        ways["index_add"] = added
    return {
        name: lambda way=way: Peer(Sets(way, sets.sets).both)  # type: ignore[misc]
        for name, way in ways.items()
    }


def expanding_peers(sets: Sets, ids: Tensor) -> dict[str, Callable[[], Peer]]:
    """Both say the same and differ in how they go back."""
    whole = ids.long()
    ways: dict[str, Function] = {
        "indexing": lambda z: z[whole],
        "index_select": lambda z: z.index_select(0, whole),
    }
    return {
        name: lambda way=way: Peer(Sets(way, sets.sets).both)  # type: ignore[misc]
        for name, way in ways.items()
    }


def scan_peer(cu: Tensor) -> Function:
    """torch's own scan, by halves: the one way of torch that takes no step for every row."""
    from torch._higher_order_ops import associative_scan

    def join(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return [left[0] * right[0], right[0] * left[1] + right[1]]

    def call(x: Tensor, decay: Tensor) -> Tensor:
        gates = decay.index_fill(0, cu[:-1].long(), 0)[:, None].expand(x.shape).contiguous()
        return associative_scan(join, [gates, x.float()], 0, combine_mode="generic")[1].to(x.dtype)

    return call
