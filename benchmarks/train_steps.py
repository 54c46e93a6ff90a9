"""How fast does a model train on this machine? Correctness first, then steps of the 1B models.

::

    python -m benchmarks.train_steps --out DIR [--corpus data/demo]

1. Losses and gradients of small models on the device, compiled, in bfloat16, against float64 on the
   CPU through the reference backend. Where they differ, nothing is measured.
2. Forward, backward and AdamW of ``lst-1b``, with either text path, and of ``baseline-1b`` on
   streams of 4 × 4,096 units of random tokens: in the paper's mix (`benchmarks.mix`; static patches
   of 4), then of speech alone; fewer rows where memory forbids. Compiled as ``lst.train`` compiles
   them, unless ``--eager``.
3. With ``--corpus``: the ``demo`` preset on the device in bfloat16, as ``lst.train`` runs it.

Each part adds to ``DIR/train-steps-<device>-<date>.json`` as soon as it is done: median step time,
units/s, tokens/s, hours of speech/s, MFU, peak memory and the longest kernels of a step, with
machine, versions and commit. The most wanted come first, so that a run that is cut has them. A
model that fails is named with its reason, and the others are measured; the exit status is 1 then.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

import lst_kernels
from benchmarks.gpu_measure import one_line
from benchmarks.mix import MIX, PAPER, SPEECH_ONLY, documents, random_batch
from lst.data.batch import Batch, pack_documents
from lst.data.patching import NoPatching, Static, Strategy
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError, expect_positive, run_command
from lst.files import make_folder, write_json
from lst.flops import batch_counts, training_flops
from lst.machine import describe_machine, file_stem
from lst.model import LanguageModel, ModelConfig, StackConfig, build_model, count_parameters
from lst.presets import PRESETS
from lst.train.blocks import compile_blocks, prepare_blocks
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.mfu import describe, find_peak
from lst.train.optimizer import build_optimizer
from lst.train.profile import summarise

ROWS, UNITS_PER_ROW = 4, 4096
WARM_UP, STEPS = 3, 10


# --- correctness ----------------------------------------------------------------------------------


def check(device: torch.device, *, eager: bool) -> dict[str, float]:
    """Relative errors of losses and gradients on ``device`` in bfloat16, compiled unless ``eager``.

    Raises:
        SystemExit: one is larger than bfloat16 explains.
    """
    config = ModelConfig(
        encoder=StackConfig(layers=1, dim=128, heads=2),
        global_transformer=StackConfig(layers=2, dim=256, heads=2),
        decoder=StackConfig(layers=2, dim=128, heads=2),
        local_window=64,
    )
    errors: dict[str, float] = {}
    content = documents(MIX, PAPER, 2000, seed=0)
    kinds = {
        "lst": config,
        "lst-global": replace(config, text_path="global"),
        "token": replace(config, architecture="token"),
    }
    for name, chosen in kinds.items():
        strategy: Strategy = NoPatching() if name == "token" else Static(size=4)
        batch = pack_documents(content, PAPER.vocabulary, strategy, chosen.plan())
        torch.manual_seed(0)
        model = build_model(chosen, PAPER.vocabulary).double()
        with lst_kernels.backend("reference"):
            expected = model(batch)
            expected.sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        model = model.float().to(device)
        if not eager:
            compile_blocks(model)
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(batch.to(device))
        losses.sum().backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()
        errors[f"{name} losses"] = _error(losses.detach().double().cpu(), expected.detach())
        errors[f"{name} gradients"] = _error(got, gradients)
    for name, error in errors.items():
        print(f"check: {name} differ by {error:.1e} of their norm", flush=True)
        if not error < (1e-2 if "losses" in name else 5e-2):
            raise SystemExit(f"error: {name} on {device} are wrong; nothing was measured")
    return errors


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one kind of content."""

    name: str
    preset: str
    text_path: Literal["local", "global"] = "local"
    content: Literal["mix", "speech"] = "mix"  # the paper's Table 13, or speech alone

    def config(self) -> TrainConfig:
        preset = PRESETS[self.preset]
        return replace(preset, model=replace(preset.model, text_path=self.text_path))


CASES = {
    case.name: case
    for case in (
        Case(name="lst", preset="lst-1b"),
        Case(name="baseline", preset="baseline-1b"),
        Case(name="lst-global", preset="lst-1b", text_path="global"),
        Case(name="lst-speech", preset="lst-1b", content="speech"),
        Case(name="lst-global-speech", preset="lst-1b", text_path="global", content="speech"),
        Case(name="baseline-speech", preset="baseline-1b", content="speech"),
    )
}


def measure(case: Case, device: torch.device, *, rows: int, steps: int, eager: bool) -> Any:
    """Time training steps of ``case`` on random batches, halving rows until they fit."""
    config = replace(case.config(), compile=not eager)
    while True:
        # A compiled block and its code hold each other: the last model is still there.
        gc.collect()
        try:
            return measure_steps(case, config, device, rows=rows, units=UNITS_PER_ROW, steps=steps)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        torch.cuda.empty_cache()
        rows //= 2


def measure_steps(
    case: Case, config: TrainConfig, device: torch.device, *, rows: int, units: int, steps: int
) -> dict[str, Any]:
    """Forward, backward, clipping and AdamW of one model, compiled as ``lst.train`` compiles it.

    The batches are made beforehand and differ in their numbers of tokens and documents. One step
    more is profiled after the others.
    """
    torch.manual_seed(0)
    with device:
        model = build_model(config.model, PAPER.vocabulary)
    step = make_step(model, config, device)
    shares = MIX if case.content == "mix" else SPEECH_ONLY
    batches = [random_batch(config.model, rows, units, seed, PAPER, shares) for seed in range(4)]
    begun = time.perf_counter()
    for number in range(WARM_UP):
        step(batches[number % len(batches)])
    warm_up = time.perf_counter() - begun
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    used = [batches[number % len(batches)] for number in range(steps)]
    seconds = [step(batch) for batch in used]
    peak_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    median = statistics.median(seconds)
    tokens, speech, flops = (
        statistics.mean(values)
        for values in (
            [batch.num_tokens for batch in used],
            [batch.num_speech_tokens for batch in used],
            [
                sum(training_flops(config.model, PAPER.vocabulary, batch_counts(batch)).values())
                for batch in used
            ],
        )
    )
    peak = find_peak(device, None)
    result = {
        "case": case.name,
        "preset": case.preset,
        "text_path": case.text_path,
        "content": case.content,
        "compiled": config.compile,
        "rows": rows,
        "units_per_row": units,
        "parameters": count_parameters(model),
        "dtype": "bfloat16 autocast, float32 weights",
        "warm_up_seconds": warm_up,
        "seconds_per_step": {"median": median, "all": seconds},
        "units_per_second": rows * units / median,
        "tokens_per_second": tokens / median,
        "speech_hours_per_second": speech / FRAMES_PER_SECOND / 3600 / median,
        "flops_per_step": flops,
        "flops_per_second": flops / median,
        "mfu": None if peak is None else flops / median / (peak.tflops * 1e12),
        "mfu_is": describe(peak, device, 1),
        "peak_memory_bytes": peak_memory,
        "profile": _profile(lambda: step(batches[0]), device),
    }
    _tell(result)
    return result


def make_step(
    model: LanguageModel, config: TrainConfig, device: torch.device
) -> Callable[[Batch], float]:
    """A function that takes an optimizer step on a batch, and returns its seconds."""
    prepare_blocks(model, config, device)
    optimizer = build_optimizer(model, config.optimizer)

    def step(batch: Batch) -> float:
        begun = _now(device)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(batch)
        (losses.sum() / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _now(device) - begun

    return step


def _tell(result: dict[str, Any]) -> None:
    mfu = "" if result["mfu"] is None else f"MFU {result['mfu']:.1%}, "
    print(
        f"{result['case']}: {result['rows']} × {result['units_per_row']} units, "
        f"{result['seconds_per_step']['median'] * 1e3:.0f} ms a step, "
        f"{result['units_per_second']:,.0f} units/s, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{mfu}warm-up {result['warm_up_seconds']:.0f} s",
        flush=True,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _profile(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What one step spends its time on, the longest first."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
    return summarise(profiler, device, 1)


def run_demo(corpus: Path, out: Path) -> dict[str, Any]:
    """The demo preset on the device in bfloat16; its last metrics and its stories."""
    demo = PRESETS["demo"]
    config = replace(
        demo,
        data=replace(demo.data, corpus=str(corpus)),
        out=out / "demo-run",
        precision="bfloat16",
        device="cuda",
    )
    start = time.perf_counter()
    train(config)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return {
        "seconds": time.perf_counter() - start,
        "last_metrics": [json.loads(line) for line in lines[-2:]],
        "story_completion": json.loads((config.out / "story_completion.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--corpus", type=Path, help="a prepared demo corpus; also trains the demo")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    expect_positive(options, "steps")
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and torch sees none")
    device = torch.device("cuda")
    about = describe_machine(device)
    make_folder(options.out)
    path = options.out / f"train-steps-{file_stem(about)}.json"
    result: dict[str, Any] = {"machine": about, "steps": [], "failed": {}}
    result["check"] = check(device, eager=options.eager)
    write_json(path, result)
    for name in options.cases:
        try:
            measured = measure(
                CASES[name], device, rows=ROWS, steps=options.steps, eager=options.eager
            )
            result["steps"].append(measured)
        except Exception as error:
            result["failed"][name] = one_line(error)
            traceback.print_exc()
        write_json(path, result)
    if options.corpus is not None:
        result["demo"] = run_demo(options.corpus, options.out)
        write_json(path, result)
    print(f"written to {path}")
    if result["failed"]:
        sys.exit(f"error: not measured: {', '.join(result['failed'])}")


if __name__ == "__main__":
    run_command(main)
