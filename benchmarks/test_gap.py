"""Where does the time of a training step of ``lst-1b`` go, and how near is each part to its floor?

    floor of an operation = max(FLOPs / rate of a product, bytes / copy bandwidth)

Bytes are an operation's inputs and outputs, each once; FLOPs those of PyTorch's counter. A step is
forward, backward, clipping and AdamW at the paper's mix (static 4, text global), at an eighth of
the width and in float32 (`benchmarks.reduced`). Every operation is timed as PyTorch runs it, and
belongs to the part of the model whose forward or backward pass it is in; what is left of the step's
time is Python and autograd between the operations. So the table adds up to the step. An operation
can beat its floor where its bytes are still in the caches, which are faster than a large copy.

With ``-m gpu`` the model is ``lst-1b`` itself, in bfloat16. An operation's time is then that of its
kernels, as PyTorch's profiler has it, and what is left of the step is time in which the GPU waits.
Attention runs on our kernels there, the layers too that have FlashAttention's otherwise: what those
compute, nobody counts.

The optimizer's share is that of a step of this one small stream. In the paper a step has
128 × 4,096 units, and the optimizer's time is spread over all of them.

    pytest benchmarks/test_gap.py --benchmark-only
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import lst_kernels
from benchmarks.limits import Limits
from benchmarks.mix import MIX, documents
from benchmarks.reduced import ARMS, LST_1B, REDUCED, Size, make_batch, make_model
from lst.data.batch import Batch
from lst.flops import batch_counts, training_flops
from lst.presets import PRESETS
from lst.train.optimizer import build_optimizer
from lst_kernels import native

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and native.unavailable_reason() is not None,
    reason=str(native.unavailable_reason()),
)

ARM = ARMS["static 4, text global"]
ROUNDS = 3
SIZES = [
    pytest.param(REDUCED, id="reduced"),
    pytest.param(LST_1B, id="lst-1b", marks=pytest.mark.gpu),
]

PARTS = ("embedding", "speech_embedding", "encoder", "global_transformer", "decoder")
HEADS = "heads and losses"
OUTSIDE = {"clipping", "optimizer"}  # of the model
OPERATION = "operation "

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
    """Times every operation, and books it under the part that runs.

    Args:
        traced: the time is that of the kernels on a GPU, which `book_kernels` adds afterwards.
    """

    def __init__(self, limits: Limits, *, traced: bool) -> None:
        super().__init__()
        self.limits, self.traced = limits, traced
        self.part = HEADS
        self.start()

    def start(self) -> None:
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self.order: list[Work] = []  # what each operation is booked under

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        begun = perf_counter()
        with record_function(f"{OPERATION}{len(self.order)}") if self.traced else nullcontext():
            out = func(*args, **kwargs)
        seconds = 0.0 if self.traced else perf_counter() - begun
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
        self.order.append(work)
        return out

    def book_kernels(self, trace: profile) -> None:
        for event in trace.events():
            # The profiler tells of each operation twice, of which one has the kernels.
            if event.name.startswith(OPERATION) and event.device_type == DeviceType.CPU:
                number = int(event.name.removeprefix(OPERATION))
                self.order[number].seconds += event.device_time_total / 1e6

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

    def __init__(self, size: Size, batch: Batch, device: torch.device) -> None:
        self.model, self.batch = make_model(ARM, size, device), batch.to(device)
        self.device = device
        self.settings = PRESETS["lst-1b"].optimizer
        self.optimizer = build_optimizer(self.model, self.settings)
        self.clock: Clock | None = None

    def __call__(self) -> None:
        on_gpu = self.device.type == "cuda"
        ours = lst_kernels.backend("triton") if on_gpu else nullcontext()
        with ours, torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            loss = self.model(self.batch).sum() / self.batch.num_targets
        loss.backward()
        self._booked("clipping", self._clip)
        self._booked("optimizer", self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _booked(self, part: str, call: Any) -> None:
        if self.clock is None:
            call()
        else:
            with self.clock.booking(part):
                call()


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_a_training_step(benchmark, add_row, limits_of, size: Size):
    device = torch.device("cuda" if size is LST_1B else "cpu")
    limits = limits_of(device.type)
    content = documents(MIX, size.shape, size.num_tokens, seed=0)
    batch = make_batch(ARM, size, content)
    plain, watched = (Step(size, batch, device) for _ in range(2))
    clock = watched.clock = Clock(limits, traced=device.type == "cuda")
    watch(watched.model, clock)
    for step in (plain, watched):  # the optimizer's state is made, and every page touched
        step()
    assert_unchanged(plain, watched)

    rounds: list[dict[tuple[str, str], Work]] = []
    timed: list[float] = []

    def take_apart() -> None:
        clock.start()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        begun = perf_counter()
        with profile(activities=activities) if clock.traced else nullcontext() as trace, clock:
            watched()
        timed.append(perf_counter() - begun)
        if trace is not None:
            clock.book_kernels(trace)
        rounds.append(clock.work)

    benchmark.pedantic(plain, setup=take_apart, rounds=ROUNDS)
    expected = training_flops(ARM.config(size), size.shape.vocabulary, batch_counts(batch))
    assert_flops_are_booked(rounds[0], expected)
    if benchmark.stats is None:
        return
    step_seconds = benchmark.stats.stats.min
    best = min(rounds, key=lambda work: sum(each.seconds for each in work.values()))
    unseen = [name for name, work in best.items() if work.flops and not work.seconds]
    assert not unseen, f"no kernel was seen of {unseen}"
    # Views, of which alone a group may consist, launch no kernel on a GPU.
    rows = [(part, kind, work) for (part, kind), work in best.items() if work.seconds]
    booked = sum(work.seconds for *_, work in rows)
    # Less than nothing where operations took longer while they were watched.
    rows.append(("between operations", "between", Work(seconds=step_seconds - booked)))
    for part, kind, work in sorted(rows, key=lambda row: -row[2].seconds):
        label = part if kind in OUTSIDE or kind == "between" else f"{part}: {kind}"
        add_row(
            case=f"{size.name}, training step: {label.replace('_', ' ')}",
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
                **({"device": torch.cuda.get_device_name()} if clock.traced else {}),
            },
        )


def assert_unchanged(plain: Step, watched: Step) -> None:
    """Watching changes no weight: both models took the same step.

    A GPU adds gradients of embeddings up in no fixed order, and a first step of AdamW is the sign
    of the gradient, that of rounding errors too. It is a part of the learning rate in the mean."""
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        if plain.device.type == "cuda":
            assert float((ours - theirs).abs().mean()) < 0.02 * plain.settings.lr
        else:
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
