"""The folder of a run: what is in it, who may start one there, and writing that is all or nothing.

::

    config.json                     what was run
    status.json                     how it stands (status.py)
    metrics.jsonl  events.jsonl  tensorboard/  loss.png
    checkpoints/step-00000100/      see checkpoint.py
    story_completion.json  .md      at the end
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lst.errors import UserError
from lst.train.config import TrainConfig, read_config, to_json

CONFIG = "config.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
WANDB_ID = "wandb-id"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
STORIES = "story_completion"
CONTENTS = (
    CONFIG,
    STATUS,
    METRICS,
    EVENTS,
    WANDB_ID,
    TENSORBOARD,
    CHECKPOINTS,
    LOSS_PLOT,
    f"{STORIES}.json",
    f"{STORIES}.md",
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A system error met in writing ``path`` becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_atomically(path: Path, text: str, *, writer: int = 0) -> None:
    """Write a file that is either the old one or the whole new one, whenever the power fails.

    Args:
        writer: tells processes apart that may write the same file at the same time.
    """
    temporary = path.with_name(f".{path.name}{writer or ''}.tmp")
    with writing(path):
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Push a file, or a folder's list of names, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: object) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def create_run(config: TrainConfig) -> None:
    """Make ``config.out`` the folder of a new run.

    Raises:
        UserError: it holds a run already, or cannot be written. Nothing is changed then.
    """
    out = config.out
    with writing(out):
        held = [name for name in CONTENTS if (out / name).exists()]
        if held:
            raise UserError(
                f"{out}: holds a run already ({', '.join(held)}); "
                f"go on with it by --resume {out}, or choose another folder by --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise UserError(f"{out}: cannot be written (Permission denied)")
    write_json(out / CONFIG, to_json(config))


def holds_run(out: Path) -> bool:
    return (out / CONFIG).exists()


def read_run_config(out: Path) -> TrainConfig:
    """The configuration of the run in ``out``. Raises UserError where there is none."""
    if not out.is_dir():
        raise UserError(f"{out}: expected a run folder to resume, got no folder")
    if not holds_run(out):
        raise UserError(f"{out}: expected a run folder to resume, got one without {CONFIG}")
    return read_config(out / CONFIG)
