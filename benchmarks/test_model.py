"""What do patches save a whole model, beside the token-level one: FLOPs, time and memory?

    per three tokens of the paper's mix      units    tokens through local modules    FLOPs
    token-level                              3.00     0                               1
    static 4, text local                     2.42     3.00                            about 0.92
    static 4, text global                    2.42     0.77                            about 0.84

The models are those of ``lst-1b`` at an eighth of its width (`benchmarks.reduced`), float32, or
with ``-m gpu`` the model itself in bfloat16. All read the same documents (*the same content*), or
streams of the same number of units; a forward pass is without gradients, a training pass forward +
backward with fresh gradients, and what the optimizer takes stands in test_gap.py. FLOPs are exact
(`lst.flops`). Before anything is timed, losses and gradients of every model are held against the
reference backend's in float64. All models run in turn, in one process; a figure is the least of its
rounds. Memory is what a training pass adds to the weights, in a process of its own.

    pytest benchmarks/test_model.py --benchmark-only
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import lst_kernels
from benchmarks.mix import MIX, SPEECH_ONLY, TEXT_ONLY, documents, fill
from benchmarks.reduced import ARMS, LST_1B, REDUCED, Arm, Size, make_batch, make_model
from lst.data.batch import Batch, plan_batch
from lst.data.interleave import Document
from lst.data.packing import concatenate
from lst.data.patching import Static
from lst.flops import TOKENS_PER_HOUR, batch_counts, training_flops
from lst.model import LanguageModel
from lst_kernels import native

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and native.unavailable_reason() is not None,
    reason=str(native.unavailable_reason()),
)

BASELINE = "token-level"
CONTENT = {"the paper's mix": MIX, "speech only": SPEECH_ONLY, "text only": TEXT_ONLY}
# The most that static patches with text="global" may cost beside the baseline: FLOPs, time.
CEILINGS = {"the paper's mix": (0.87, 0.95), "speech only": (0.45, 0.55)}
JUDGED = "static 4, text global"
ROUNDS, JUDGED_ROUNDS = 2, 3
SWEEP_ROUNDS = 4  # of passes so short that two of the same work differ by a twentieth

SHARES_OF_SPEECH = (0.0, 1 / 3, 2 / 3, 1.0)
PATCH_SIZES = (2, 4, 8)

SIZES = [
    pytest.param(REDUCED, id="reduced"),
    pytest.param(LST_1B, id="lst-1b", marks=pytest.mark.gpu),
]


def device_of(size: Size) -> torch.device:
    return torch.device("cuda" if size is LST_1B else "cpu")


def content_of(size: Size, content: str) -> list[Document]:
    """A stream; one of a single kind of document has its shares at half the length, too."""
    num_tokens = size.num_tokens // (1 if len(CONTENT[content]) > 1 else 2)
    return documents(CONTENT[content], size.shape, num_tokens, seed=0)


def arms_for(content: str) -> list[Arm]:
    """Without speech, words are patched like anything else."""
    return [arm for arm in ARMS.values() if content != "text only" or "words" not in arm.name]


class Passes:
    """A model and a batch on their device."""

    def __init__(self, arm: Arm, size: Size, batch: Batch) -> None:
        self.device = device_of(size)
        self.model = make_model(arm, size, self.device)
        self.parameters = list(self.model.parameters())
        self.counted = batch
        self.batch = batch.to(self.device)
        flops = training_flops(arm.config(size), size.shape.vocabulary, batch_counts(batch))
        self.flops = sum(flops.values())

    def train(self) -> list[torch.Tensor | None]:
        with self._precision():
            loss = self.model(self.batch).sum()
        # without speech, or without text, the other's weights have no gradient
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self._finish()
        return list(gradients)

    def forward(self) -> torch.Tensor:
        with torch.no_grad(), self._precision():
            losses = self.model(self.batch)
        self._finish()
        return losses

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def facts(self, seconds: float, **more: Any) -> dict[str, Any]:
        """``hours_per_second`` are of speech heard."""
        batch = self.counted
        return {
            "seconds": seconds,
            "tokens_per_second": batch.num_tokens / seconds,
            "units_per_second": batch.num_units / seconds,
            "hours_per_second": batch.num_speech_tokens / TOKENS_PER_HOUR / seconds,
            "tokens": batch.num_tokens,
            "units": batch.num_units,
            **({"device": torch.cuda.get_device_name()} if self.device.type == "cuda" else {}),
            **more,
        }


@cache
def assert_right(arm: Arm, size: Size) -> None:
    """Losses and the gradient of all weights, on few documents, against float64."""
    device = device_of(size)
    small = replace(size, config=_shallow(size)) if size is LST_1B else size
    batch = make_batch(arm, small, documents(MIX, small.shape, 300, seed=1))
    model = make_model(arm, small).double()
    with lst_kernels.backend("reference"):
        expected = _losses_and_gradient(model, batch)
    model = model.float().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        got = _losses_and_gradient(model, batch.to(device))
    tolerance = 5e-2 if device.type == "cuda" else 1e-4
    for ours, theirs in zip(got, expected, strict=True):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error < tolerance, f"{arm.name}: wrong by {error:.1e} of the norm"


def _shallow(size: Size) -> Any:
    """Two layers a stack: float64 on a processor is slow."""
    stacks = ("global_transformer", "decoder")
    return replace(
        size.config, **{name: replace(getattr(size.config, name), layers=2) for name in stacks}
    )


def _losses_and_gradient(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    losses = model(batch)
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ARMS.values(), ids=list(ARMS))
def test_models_are_right(benchmark, arm: Arm, size: Size):
    benchmark.pedantic(lambda: assert_right(arm, size), rounds=1)


def compare(
    add_row: Callable[..., Any],
    take_turns: Callable[..., dict[str, list[float]]],
    case: str,
    passes: Mapping[str, Passes],
    what: str,
    *,
    ceilings: Mapping[str, float] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = ROUNDS,
) -> None:
    """A row of every model beside the first. At different content, rates are what to compare."""
    calls = {name: getattr(each, what) for name, each in passes.items()}
    rounds = JUDGED_ROUNDS if ceilings else rounds
    times = take_turns(calls, rounds, slow_rounds=rounds)
    (first, base), *_ = passes.items()
    if not times[first]:
        return
    base_seconds = min(times[first])
    too_slow = []
    for name, each in passes.items():
        seconds = min(times[name])
        # the same work of the baseline: as many tokens
        theirs = base_seconds * each.counted.num_tokens / base.counted.num_tokens
        cost = each.flops / base.flops * base.counted.num_tokens / each.counted.num_tokens
        ceiling = (ceilings or {}).get(name)
        row = add_row(
            case=f"{case}: {name}",
            peer=first,
            ours=f"{seconds * 1e3:.0f} ms",
            theirs=f"{theirs * 1e3:.0f} ms",
            ratio=theirs / seconds,
            floor=None if ceiling is None else 1 / ceiling,
            note=f"FLOPs x {cost:.3f}, time x {seconds / theirs:.3f}",
            facts=each.facts(
                seconds,
                model=name,
                what=what,
                flops=each.flops / (1 if what == "train" else 3),
                flops_ratio=cost,
                time_ratio=seconds / theirs,
                **(facts or {}).get(name, {}),
            ),
        )
        if not row.passed:
            too_slow.append(f"{name}: {seconds / theirs:.3f} > {ceiling:g} of the time")
    assert not too_slow, f"{case}: {'; '.join(too_slow)}"


def passes_over(size: Size, content: Sequence[Document], arms: Sequence[Arm]) -> dict[str, Passes]:
    for arm in arms:
        assert_right(arm, size)
    return {arm.name: Passes(arm, size, make_batch(arm, size, content)) for arm in arms}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("content", CONTENT)
def test_training_at_the_same_content(add_row, take_turns, size: Size, content: str):
    passes = passes_over(size, content_of(size, content), arms_for(content))
    most_flops, most_time = CEILINGS.get(content, (None, None))
    if most_flops is not None and most_time is not None:
        assert passes[JUDGED].flops <= most_flops * passes[BASELINE].flops
    compare(
        add_row,
        take_turns,
        f"{size.name}, {content}, same content: forward + backward",
        passes,
        "train",
        ceilings={JUDGED: most_time} if most_time is not None and size is REDUCED else {},
        facts={name: {"content": content, "same": "content"} for name in passes},
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("content", CONTENT)
def test_forward_at_the_same_content(add_row, take_turns, size: Size, content: str):
    compare(
        add_row,
        take_turns,
        f"{size.name}, {content}, same content: forward",
        passes_over(size, content_of(size, content), arms_for(content)),
        "forward",
        facts={arm: {"content": content, "same": "content"} for arm in ARMS},
    )


@pytest.mark.parametrize("size", SIZES)
def test_training_at_the_same_units(add_row, take_turns, size: Size):
    """The paper's mix, as many units as the baseline has tokens; costs are per token."""
    content, passes = "the paper's mix", {}
    for arm in arms_for(content):
        assert_right(arm, size)
        rows = fill(CONTENT[content], size.shape, arm.strategy, [size.num_tokens // 2], seed=0)
        vocabulary, plan = size.shape.vocabulary, arm.config(size).plan()
        passes[arm.name] = Passes(arm, size, plan_batch(concatenate(rows), vocabulary, plan))
    compare(
        add_row,
        take_turns,
        f"{size.name}, {content}, same units: forward + backward",
        passes,
        "train",
        facts={name: {"content": content, "same": "units"} for name in passes},
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", SHARES_OF_SPEECH, ids=lambda share: f"{share:.0%}")
def test_throughput_against_share_of_speech_and_patch_size(
    add_row, take_turns, size: Size, share: float
):
    """``share`` of the tokens in documents of speech alone, the others in texts."""
    shares = {"text": 1 - share, "speech": share}
    shares = {kind: each for kind, each in shares.items() if each}
    drawn = documents(shares, size.shape, size.num_tokens // 4, seed=0)
    arms = {BASELINE: ARMS[BASELINE]}
    facts: dict[str, dict[str, Any]] = {BASELINE: {"patch_size": 1}}
    for patch_size in PATCH_SIZES:
        name = f"static {patch_size}, text global"
        arms[name] = replace(ARMS[JUDGED], name=name, strategy=Static(size=patch_size))
        facts[name] = {"patch_size": patch_size}
    compare(
        add_row,
        take_turns,
        f"{size.name}, {share:.0%} speech: forward + backward",
        passes_over(size, drawn, list(arms.values())),
        "train",
        facts={name: {"sweep": True, "speech_share": share, **own} for name, own in facts.items()},
        rounds=SWEEP_ROUNDS,
    )


# --- memory ---------------------------------------------------------------------------------------


def peak_of_training(size: Size, arm: Arm, content: str) -> int:
    """Bytes that a training pass adds at its peak: gradients, and all that is kept for them."""
    drawn = documents(CONTENT[content], size.shape, size.num_tokens // 2, seed=0)
    passes = Passes(arm, size, make_batch(arm, size, drawn))
    passes.train()
    if passes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes.train()
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _resident("VmRSS")
    passes.train()
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    with open("/proc/self/status") as file:
        lines = file.read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


PEAKS = """
import json, sys
from benchmarks.test_model import ARMS, LST_1B, REDUCED, peak_of_training
size = REDUCED if sys.argv[1] == REDUCED.name else LST_1B
arms = [ARMS[name] for name in sys.argv[3:]]
print(json.dumps([peak_of_training(size, arm, sys.argv[2]) for arm in arms]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("content", ["the paper's mix", "speech only"])
def test_memory_of_training(benchmark, compare_memory, size: Size, content: str):
    """The allocator is told to give back at once what is freed, so that the peak is what lived."""
    names = [arm.name for arm in arms_for(content) if "words" not in arm.name]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", PEAKS, size.name, content, *names]

    def measure() -> list[int]:
        run = subprocess.run(
            command, env={**os.environ, **at_once}, capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout.splitlines()[-1])

    peaks = dict(zip(names, benchmark.pedantic(measure, rounds=1), strict=True))
    for name, peak in peaks.items():
        compare_memory(
            f"{size.name}, {content}: {name}",
            peak,
            BASELINE,
            peaks[BASELINE],
            content=content,
            model=name,
        )
