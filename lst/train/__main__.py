"""``python -m lst.train [PRESET] [--options]``, or the same under ``torchrun``.

What the options show as their values, and keep where they are not given, is first

    the preset
    → with --init-from and no preset, the configuration that the checkpoint was trained with
    → with --task, that of fine-tuning: documents of the task, static patches, no stories
    → with --resume and no preset, the configuration of the run
"""

from lst.train import monitor

if __name__ == "__main__":
    monitor.begin()  # all that follows takes seconds, or for ever

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from lst.data.interleave import TASKS, Task
from lst.errors import UserError, run_command
from lst.model.llama import from_llama
from lst.presets import DESCRIPTIONS, PRESETS, fine_tuning
from lst.train.config import TrainConfig, read_config
from lst.train.distributed import SharedError, launched_rank
from lst.train.dry_run import dry_run
from lst.train.loop import train
from lst.train.run_folder import CONFIG, holds_run, read_run_config

DEFAULT_PRESET = "demo"
SILENCE = 5.0  # seconds that the other ranks leave rank 0 to speak of a mistake


@dataclass(frozen=True, kw_only=True)
class Command:
    """What stands after the preset."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    # Fine-tune to transcribe speech (asr) or to speak text (tts): the loss is of the answers alone,
    # in documents DATASET:asr or DATASET:tts.
    task: Task | None = None
    resume: str | None = None  # resume the run in this folder; auto: that in --out, if any
    dry_run: bool = False  # print memory, FLOPs and batches of the run, and train nothing
    gpus: int | None = None  # for --dry-run; None: the number of processes

    def __post_init__(self) -> None:
        if self.gpus is not None and (not self.dry_run or self.gpus < 1):
            asked = f"{self.gpus}{'' if self.dry_run else ' without --dry-run'}"
            raise UserError(f"--gpus: expected 1 or more, of a --dry-run, got {asked}")
        if self.task is not None and self.config.data.task != self.task:
            raise UserError(
                f"--task {self.task}: expected a mixture with documents of that task and of no "
                f"other, DATASET:{self.task}, got {', '.join(self.config.data.mixture)}"
            )


def parse(arguments: list[str]) -> Command:
    """What a command line asks for; its ``resume`` is None where it starts a run.

    Raises:
        UserError: no such preset; no run to resume.
        SystemExit: 0 after ``--help``, 2 after an option that does not parse.
    """
    preset, options = None, arguments
    if arguments and not arguments[0].startswith("-"):
        preset, *options = arguments
        if preset not in PRESETS:
            raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    base = _first_values(preset, options)
    resumed = _resumed_folder(options, base.out)
    started = None if resumed is None else replace(read_run_config(resumed), out=resumed)
    if started is not None:
        base = started if preset is None else replace(base, out=started.out)
    command = tyro.cli(
        Command,
        args=options,
        default=Command(config=base),
        prog="python -m lst.train [PRESET]",
        description=_description(),
        console_outputs=launched_rank() == 0,
        registry=OPTIONS,
    )
    if started is not None and command.config.out != started.out:
        raise UserError(
            f"--out: a run goes on in its own folder, {started.out}; got {command.config.out}"
        )
    config = command.config
    if config.warm_start is not None and (started is None or preset is not None):
        config = replace(config, model=from_llama(config.model, config.warm_start))
    return replace(command, config=config, resume=None if resumed is None else str(resumed))


def _first_values(preset: str | None, options: list[str]) -> TrainConfig:
    """The configuration that the options of a run that is not resumed are changes of."""
    base = PRESETS[preset or DEFAULT_PRESET]
    init, task = _value("--init-from", options), _value("--task", options)
    if init is not None and preset is None:
        base = replace(read_config(Path(init) / CONFIG), warm_start=None)
    return fine_tuning(base, task) if task in TASKS else base


OPTIONS = tyro.constructors.ConstructorRegistry()


@OPTIONS.primitive_rule
def _shares(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, float]] | None:
    """``--data.mixture text 2 speech 1``: names that the preset does not know, too."""
    if info.type != dict[str, float]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME SHARE ...",
        instance_from_str=_read_shares,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda shares: [
            word for name, share in shares.items() for word in (name, f"{share:g}")
        ],
    )


def _read_shares(words: list[str]) -> dict[str, float]:
    shares = {name: float(share) for name, share in zip(words[::2], words[1::2], strict=True)}
    if len(words) > 2 * len(shares):
        raise ValueError(f"expected each name once, got {' '.join(words)}")
    return shares


def _resumed_folder(options: list[str], out: Path) -> Path | None:
    """The run to go on with: read first, as it gives the other options' defaults.

    Args:
        out: the folder of the preset's runs.
    """
    resume = _value("--resume", options)
    if resume != "auto":
        return None if resume is None else Path(resume)
    folder = Path(_value("--out", options) or out)
    return folder if holds_run(folder) else None


def _value(option: str, options: list[str]) -> str | None:
    """What is given for an option, by its last mention."""
    value = None
    for place, word in enumerate(options):
        name, given, text = word.partition("=")
        if name.replace("_", "-") != option:  # tyro takes either
            continue
        if given:
            value = text
        elif place + 1 < len(options):
            value = options[place + 1]
    return value


def _description() -> str:
    width = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:<{width}}  {DESCRIPTIONS[name]}" for name in PRESETS)
    return (
        f"Train a model. Presets (default: {DEFAULT_PRESET}):\n\n{presets}\n\n"
        "The options show the preset's values. --resume FOLDER alone resumes a stopped run; "
        "with --resume auto, the same command starts the run in --out or, if it is there, "
        "resumes it."
    )


def main() -> None:
    try:
        try:
            command = parse(sys.argv[1:])
            plan = dry_run(command.config, command.gpus) if command.dry_run else None
        except UserError as error:  # every rank parses the same command line
            raise SharedError(str(error)) from None
        if plan is None:
            train(command.config, resume=command.resume is not None)
        elif launched_rank() == 0:
            print(plan, flush=True)
    except (SharedError, SystemExit) as error:
        if launched_rank() == 0 or (isinstance(error, SystemExit) and not error.code):
            raise
        # Rank 0 speaks for all; torchrun would end it in mid-sentence if another rank left first.
        until = time.monotonic() + SILENCE
        while time.monotonic() < until and not monitor.asked:
            time.sleep(0.05)
        raise SystemExit(2) from None


def _end_well() -> None:
    """What comes as Python ends does not change the exit code of a run that ended well: a signal,
    or a disk that still refuses what is left of the log."""
    for number in monitor.SIGNALS:  # handlers of ours are taken away first
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    run_command(main)
    _end_well()
