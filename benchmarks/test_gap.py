"""Where does the time of a training step of ``lst-1b`` go, and how near is each part to its floor?

    floor of an operation = max(FLOPs / rate of a product, bytes / copy bandwidth)

Bytes are an operation's inputs and outputs, each once; FLOPs those of PyTorch's counter. A step is
forward, backward, clipping and AdamW at the paper's mix (static 4, text global), at an eighth of
the width and in float32 (`benchmarks.reduced`). Every operation is timed as PyTorch runs it, and
belongs to the part of the model whose forward or backward pass it is in; what is left of the step's
time is Python and autograd between the operations. So the table adds up to the step. An operation
can beat its floor where its bytes are still in the caches, which are faster than a large copy.

The optimizer's share is that of a step of this one small stream. In the paper a step has
128 × 4,096 units, and the optimizer's time is spread over all of them.

    pytest benchmarks/test_gap.py --benchmark-only
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.limits import Limits
from benchmarks.mix import MIX, documents
from benchmarks.reduced import ARMS, REDUCED, make_batch, make_model
from lst.data.batch import Batch
from lst.flops import batch_counts, training_flops
from lst.model import LanguageModel
from lst.presets import PRESETS
from lst.train.optimizer import build_optimizer
from lst_kernels import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=str(native.unavailable_reason()),
)

ARM = ARMS["static 4, text global"]
ROUNDS = 3

PARTS = ("embedding", "speech_embedding", "encoder", "global_transformer", "decoder")
HEADS = "heads and losses"
OUTSIDE = {"clipping", "optimizer"}  # of the model

# What would bring a kind of work nearer to its floor, or the floor down.
REMEDIES = {
    "products": "larger streams; bfloat16 or float8 where the hardware multiplies them faster",
    "attention": "tiles that lose less on short ranges; bfloat16",
    "other": "fusing what lies between products: torch.compile of each block, Liger's kernels",
    "optimizer": "more micro-batches to a step; lower precision of its moments",
    "clipping": "one pass over the gradients together with the optimizer",
    "between": "torch.compile, which runs fewer and larger operations; larger streams",
}


@dataclass
class Work:
    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0
    floor: float = 0.0
    calls: int = 0


class Clock(TorchDispatchMode):
    """Times every operation, and books it under the part that runs."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.part = "heads and losses"
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        begun = perf_counter()
        out = func(*args, **kwargs)
        seconds = perf_counter() - begun
        packet = func._overloadpacket
        nbytes = _bytes(func, (args, kwargs), out)
        flops = 0.0
        if packet in flop_registry:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
        work = self.work[self.part, self._kind(packet, flops)]
        work.seconds += seconds
        work.flops += flops
        work.nbytes += nbytes
        work.floor += self.limits.floor(flops, nbytes)
        work.calls += 1
        return out

    def _kind(self, packet: Any, flops: float) -> str:
        if self.part in OUTSIDE:
            return self.part
        if "attention" in str(packet):
            return "attention"
        return "products" if flops else "other"

    @contextmanager
    def booking(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        yield
        self.part = before


def _bytes(func: Any, inputs: Any, out: Any) -> int:
    """Read and written, each tensor once; nothing for an operation that only makes a view."""
    if any(result.alias_info is not None for result in func._schema.returns) and not any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    ):
        return 0
    tensors = [leaf for leaf in tree_leaves((inputs, out)) if isinstance(leaf, Tensor)]
    sizes = {each.data_ptr(): each.numel() * each.element_size() for each in tensors}
    return sum(sizes.values())


class Mark(torch.autograd.Function):
    """Hands tensors on; on the way back, the clock books under ``part`` from here."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.clock.part = ctx.part
        return None, None, *gradients


def watch(model: nn.Module, clock: Clock) -> None:
    """Book what each part of the model does, forward and backward, under its name."""

    def mark(part: str, values: Any) -> Any:
        """Tensors that want gradients, marked; other values as they are."""
        many = isinstance(values, tuple)
        every = list(values) if many else [values]
        where = [
            at for at, each in enumerate(every) if isinstance(each, Tensor) and each.requires_grad
        ]
        for at, each in zip(
            where, Mark.apply(clock, part, *(every[at] for at in where)), strict=True
        ):
            every[at] = each
        return tuple(every) if many else every[0]

    def enter(part: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            clock.part = part
            return mark(HEADS, inputs)  # on the way back, here the part is left

        return hook

    def leave(part: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> Any:
            clock.part = HEADS
            return mark(part, out)  # on the way back, here it begins

        return hook

    for name, module in model.named_children():
        if name in PARTS:
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(leave(name))


class Step:
    """A training step as `lst.train` takes it."""

    def __init__(self, model: LanguageModel, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.settings = PRESETS["lst-1b"].optimizer
        self.optimizer = build_optimizer(model, self.settings)
        self.clock: Clock | None = None

    def __call__(self) -> None:
        loss = self.model(self.batch).sum() / self.batch.num_targets
        loss.backward()
        self._booked("clipping", self._clip)
        self._booked("optimizer", self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _booked(self, part: str, call: Any) -> None:
        if self.clock is None:
            call()
        else:
            with self.clock.booking(part):
                call()


def test_parts_of_a_training_step(benchmark, add_row, limits: Limits):
    content = documents(MIX, REDUCED.shape, REDUCED.num_tokens, seed=0)
    batch = make_batch(ARM, REDUCED, content)
    plain = Step(make_model(ARM, REDUCED), batch)
    watched = Step(make_model(ARM, REDUCED), batch)
    watched.clock = Clock(limits)
    watch(watched.model, watched.clock)
    for step in (plain, watched):  # the optimizer's state is made, and every page touched
        step()
    assert_unchanged(plain.model, watched.model)

    rounds: list[dict[tuple[str, str], Work]] = []
    timed: list[float] = []

    def take_apart() -> None:
        assert watched.clock is not None
        watched.clock.work = defaultdict(Work)
        begun = perf_counter()
        with watched.clock:
            watched()
        timed.append(perf_counter() - begun)
        rounds.append(watched.clock.work)

    benchmark.pedantic(plain, setup=take_apart, rounds=ROUNDS)
    expected = training_flops(ARM.config(REDUCED), REDUCED.shape.vocabulary, batch_counts(batch))
    assert_flops_are_booked(rounds[0], expected)
    if benchmark.stats is None:
        return
    step_seconds = benchmark.stats.stats.min
    best = min(rounds, key=lambda work: sum(each.seconds for each in work.values()))
    rows = [(part, kind, work) for (part, kind), work in best.items()]
    booked = sum(work.seconds for *_, work in rows)
    # Less than nothing where operations took longer while they were watched.
    rows.append(("between operations", "between", Work(seconds=step_seconds - booked)))
    for part, kind, work in sorted(rows, key=lambda row: -row[2].seconds):
        label = part if kind in OUTSIDE or kind == "between" else f"{part}: {kind}"
        add_row(
            case=f"{REDUCED.name}, training step: {label.replace('_', ' ')}",
            peer="floor",
            ours=f"{work.seconds * 1e3:.1f} ms",
            theirs=f"{work.floor * 1e3:.1f} ms",
            ratio=work.floor / work.seconds,
            floor=None,
            note=f"{work.seconds / step_seconds:.1%} of the step",
            facts={
                "part": part,
                "kind": kind,
                "seconds": work.seconds,
                "floor_seconds": work.floor,
                "flops": work.flops,
                "bytes": work.nbytes,
                "bound": limits.bound(work.flops, work.nbytes),
                "calls": work.calls,
                "step_seconds": step_seconds,
                "watched_step_seconds": statistics.median(timed),
                "tokens": batch.num_tokens,
                "remedy": REMEDIES[kind],
            },
        )


def assert_unchanged(plain: nn.Module, watched: nn.Module) -> None:
    """Watching changes no weight: both models took the same step."""
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def assert_flops_are_booked(work: dict[tuple[str, str], Work], expected: dict[str, float]) -> None:
    """Under each part, forward and backward, stands what `lst.flops` counts for it, and what is
    computed twice: the scores of attention once in five products, the logits once in three."""
    heads = expected["head"] + expected["speech_head"]
    parts = {name: expected[name] for name in ("encoder", "global_transformer", "decoder")}
    for part, flops in {**parts, HEADS: 4 / 3 * heads}.items():
        booked = sum(each.flops for (name, _), each in work.items() if name == part)
        assert flops <= booked * (1 + 1e-9), part
        assert booked == pytest.approx(flops, rel=0.1), part
