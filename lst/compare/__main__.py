"""``python -m lst.compare --preset tiny``: the paper's models side by side, on one machine.

A study that was stopped, by Ctrl-C, a signal or ``--minutes``, goes on by the same command: what is
finished is kept, a run under way goes on from its newest checkpoint, and the report is written over
what there is.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from lst.compare.arms import ARMS, Arm
from lst.compare.presets import STUDIES
from lst.compare.report import write_report
from lst.compare.study import (
    BUDGETS,
    REFERENCE,
    Budget,
    Result,
    Study,
    plan,
    read_result,
    run_folder,
    steps_of,
)
from lst.errors import UserError, expect_positive, run_command
from lst.machine import describe_machine, find_device
from lst.prepare.demo import prepare_demo
from lst.prepare.speech_bpe import SpeechBPEConfig, prepare_speech_bpe
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.run_folder import CONFIG


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train the paper's models under the same compute and the same data, and write a report."""

    preset: Literal["tiny", "small"] = "tiny"  # tiny: a check of the machinery, in minutes
    out: Path | None = None  # the study's folder; None: runs/compare-PRESET
    corpus: Path | None = None  # made where it is not there; None: data/compare-PRESET
    arms: tuple[str, ...] = tuple(ARMS)  # which models; "static" says how much data is the same
    minutes: float | None = None  # after which no run starts; None: all runs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 2  # processes that make the corpus's speech

    def __post_init__(self) -> None:
        for name in self.arms:
            if name not in ARMS:
                raise UserError(f"--arms: expected some of {', '.join(ARMS)}, got {name!r}")
        if REFERENCE not in self.arms:
            raise UserError(f"--arms: expected {REFERENCE!r} among them, got {self.arms}")
        expect_positive(self, "minutes", "workers")


def compare(options: CompareConfig) -> Path:
    """Do what is not done yet of a study, and write its report. Returns the report's path."""
    started = time.monotonic()
    if options.device != "auto":
        find_device(options.device)  # before a corpus is made
    study = STUDIES[options.preset]
    out = options.out or Path("runs") / f"compare-{study.name}"
    arms = tuple(arm for name, arm in ARMS.items() if name in options.arms)
    base = replace(study.base, device=options.device)
    base = replace(base, data=replace(base.data, corpus=str(_corpus(study, arms, options))))
    runs: dict[Budget, dict[str, list[Result]]] = {budget: {} for budget in BUDGETS}
    missing: list[str] = []
    planned = list(plan(study, arms))
    stopped = False
    for number, each in enumerate(planned, start=1):
        late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        steps = steps_of(each, study, out)
        result = None if steps is None else read_result(out, each.arm, steps, each.seed)
        if result is None and steps is not None and not stopped and not late:
            print(f"\n[{number}/{len(planned)}] {each}, {steps} steps", flush=True)
            _train(
                each.arm.configure(base),
                steps,
                each.seed,
                run_folder(out, each.arm, steps, each.seed),
            )
            result = read_result(out, each.arm, steps, each.seed)
            stopped = result is None  # by a signal
        if result is None:
            missing.append(str(each))
        else:
            runs[each.budget].setdefault(each.arm.name, []).append(result)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    about = describe_machine(torch.device("cuda") if on_gpu else None)
    return write_report(study, runs, missing, out, about)


def _corpus(study: Study, arms: tuple[Arm, ...], options: CompareConfig) -> Path:
    """The folder of the study's corpus, made where it is not there."""
    folder = options.corpus or Path("data") / f"compare-{study.name}"
    prepare_demo(replace(study.corpus, out=folder, workers=options.workers))
    if any(arm.patching == "speech-bpe" for arm in arms):
        prepare_speech_bpe(SpeechBPEConfig(corpus=folder, pieces=study.speech_pieces))
    return folder


def _train(config: TrainConfig, steps: int, seed: int, folder: Path) -> None:
    """One run, from where it was."""
    config = replace(config, steps=steps, seed=seed, out=folder)
    train(config, resume=(folder / CONFIG).exists())


def main() -> None:
    options = tyro.cli(CompareConfig, prog="python -m lst.compare")
    try:
        report = compare(options)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here")
        raise SystemExit(130) from None
    print(f"\n{report.read_text()}\nwritten to {report}")


if __name__ == "__main__":
    run_command(main)
