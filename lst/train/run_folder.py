"""The folder of a run: what is in it, who may start one there.

::

    config.json                     what was run
    .lock                           held by the command that trains here
    status.json                     how it stands (status.py)
    metrics.jsonl  events.jsonl  tensorboard/  loss.png
    checkpoints/step-00000100/      see checkpoint.py
    profile/                        with --profile (profile.py)
    story_completion.json  .md      at the end
"""

import errno
import fcntl
import os
from pathlib import Path

from lst.errors import UserError, tell
from lst.files import write_json, writing
from lst.strict_json import read_json
from lst.train.config import TrainConfig, read_config, to_json

CONFIG = "config.json"
LOCK = ".lock"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
WANDB_ID = "wandb-id"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
PROFILE = "profile"
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
    PROFILE,
    f"{STORIES}.json",
    f"{STORIES}.md",
)

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that knows none


class RunLock:
    """One command at a time in a run folder: two would write beside each other.

    Rank 0 takes it. The kernel lets it go when that process ends, however it does, and data
    workers, which are programs of their own, do not inherit it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, out: Path) -> None:
        """Take it, unless it is held already by this object.

        Raises:
            UserError: another command holds it; the folder cannot be written.
        """
        if self._descriptor is not None:
            return
        with writing(out / LOCK):
            descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(f"{out}: another command trains here{_holder(out)}") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                tell(f"{out}: no lock keeps other commands out ({error.strerror})")
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _holder(out: Path) -> str:
    """Where the command that trains in ``out`` runs, as far as its status.json tells."""
    try:
        status = read_json(out / STATUS)
        return f" (process {status['pid']} on {status['host']})"
    except (UserError, KeyError, TypeError):
        return ""


def create_run(config: TrainConfig, lock: RunLock) -> None:
    """Make ``config.out`` the folder of a new run, and take its lock.

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
    lock.take(out)
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
