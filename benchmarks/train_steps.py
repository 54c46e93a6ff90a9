"""How fast does a model train on this machine? Correctness first, then steps of the 1B models.

::

    python -m benchmarks.train_steps --out DIR [--corpus data/demo]

1. A small model's losses and gradients on the device, in bfloat16, against float64 on the CPU
   through the reference backend. Where they differ, nothing is measured.
2. With ``--corpus``: the ``demo`` preset on the device in bfloat16, as ``lst.train`` runs it.
3. Forward, backward and AdamW of ``lst-1b`` and ``baseline-1b`` on streams of 4 × 4,096 units made
   of random tokens in the paper's mix (`benchmarks.mix`; static patches of 4); fewer rows where
   memory forbids.

Each part adds to ``DIR/train-steps-<device>-<date>.json`` as soon as it is done: median step time,
units/s, tokens/s, peak memory, with machine, versions and commit.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lst_kernels
from benchmarks.mix import MIX, PAPER, documents, random_batch
from lst.data.batch import pack_documents
from lst.data.patching import NoPatching, Static, Strategy
from lst.machine import describe_machine, file_stem
from lst.model import ModelConfig, StackConfig, build_model, count_parameters
from lst.presets import PRESETS
from lst.train.loop import train
from lst.train.optimizer import build_optimizer

ROWS, UNITS_PER_ROW = 4, 4096
WARM_UP, STEPS = 3, 10


# --- correctness ----------------------------------------------------------------------------------


def check(device: torch.device) -> dict[str, float]:
    """Relative errors of losses and gradients on ``device`` in bfloat16.

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
    for architecture in ("lst", "token"):
        chosen = replace(config, architecture=architecture)
        strategy: Strategy = Static(size=4) if architecture == "lst" else NoPatching()
        batch = pack_documents(content, PAPER.vocabulary, strategy, chosen.plan())
        torch.manual_seed(0)
        model = build_model(chosen, PAPER.vocabulary).double()
        with lst_kernels.backend("reference"):
            expected = model(batch)
            expected.sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        model = model.float().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(batch.to(device))
        losses.sum().backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()
        errors[f"{architecture} losses"] = _error(losses.detach().double().cpu(), expected.detach())
        errors[f"{architecture} gradients"] = _error(got, gradients)
    for name, error in errors.items():
        print(f"check: {name} differ by {error:.1e} of their norm", flush=True)
        if not error < (1e-2 if "losses" in name else 5e-2):
            raise SystemExit(f"error: {name} on {device} are wrong; nothing was measured")
    return errors


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- measuring ------------------------------------------------------------------------------------


def measure_steps(name: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Time training steps of a preset's model on random batches, halving rows until they fit."""
    rows = ROWS
    while True:
        try:
            return _steps(name, device, rows, steps)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        torch.cuda.empty_cache()
        rows //= 2


def _steps(name: str, device: torch.device, rows: int, steps: int) -> dict[str, Any]:
    preset = PRESETS[name]
    torch.manual_seed(0)
    with device:
        model = build_model(preset.model, PAPER.vocabulary)
    optimizer = build_optimizer(model, preset.optimizer)
    batches = [random_batch(preset.model, rows, UNITS_PER_ROW, seed) for seed in range(4)]
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for step in range(WARM_UP + steps):
        batch = batches[step % len(batches)].to(device)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(batch)
        (losses.sum() / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), preset.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_UP:])
    tokens = statistics.mean(batch.num_tokens for batch in batches)
    result = {
        "preset": name,
        "rows": rows,
        "units_per_row": UNITS_PER_ROW,
        "parameters": count_parameters(model),
        "dtype": "bfloat16 autocast, float32 weights",
        "seconds_per_step": {"median": median, "all": seconds[WARM_UP:]},
        "units_per_second": rows * UNITS_PER_ROW / median,
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "last_loss": float(losses.sum() / batch.num_targets),
    }
    print(
        f"{name}: {rows} × {UNITS_PER_ROW} units, {median * 1e3:.0f} ms a step, "
        f"{result['units_per_second']:,.0f} units/s, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['peak_memory_bytes'] / 2**30:.1f} GiB",
        flush=True,
    )
    return result


def run_demo(corpus: Path, out: Path) -> dict[str, Any]:
    """The demo preset on the device in bfloat16; its last metrics and its stories."""
    demo = PRESETS["demo"]
    config = replace(
        demo,
        data=replace(demo.data, corpus=corpus),
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
    parser.add_argument("--presets", nargs="+", default=["lst-1b", "baseline-1b"])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU, and torch sees none")
    device = torch.device("cuda")
    about = describe_machine(device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"train-steps-{file_stem(about)}.json"
    result: dict[str, Any] = {"machine": about, "check": check(device), "steps": []}
    path.write_text(json.dumps(result, indent=2) + "\n")
    for preset in options.presets:
        result["steps"].append(measure_steps(preset, device, options.steps))
        path.write_text(json.dumps(result, indent=2) + "\n")
    if options.corpus is not None:
        result["demo"] = run_demo(options.corpus, options.out)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
