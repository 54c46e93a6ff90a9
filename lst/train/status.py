"""``status.json``: how a run stands, for the script that starts it again.

::

    {
     "state": "stopped",           running, stopped (by a signal), finished or failed
     "reason": "SIGTERM",          why it stopped or failed; null
     "signal": "SIGTERM",          null where there was none
     "step": 1200,                 optimizer steps taken, of
     "steps": 10000,
     "checkpoint": "checkpoints/step-00001200",   the newest; null: none yet
     "processes": 8,
     "host": "node-3", "pid": 4711,               of rank 0
     "started": "2026-01-31T10:00:00Z",           this time; not when the run began
     "time": "2026-01-31T12:34:56Z"               of this file
    }

The file is replaced as a whole. A run that is killed outright leaves "running" behind, with the
time of its last word: of the last step, or ten seconds before where steps are shorter.
"""

import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lst.errors import UserError
from lst.train.config import TrainConfig
from lst.train.distributed import launched_rank
from lst.train.interrupt import Interrupt
from lst.train.run_folder import STATUS, write_json

EVERY = 10.0  # seconds between two words of a run that is running


class Status:
    """Writes ``status.json``, on rank 0; leaving the block, how the run ended.

    It speaks from :meth:`begin` on: a folder that turns out to hold another run is left alone.
    """

    def __init__(self, config: TrainConfig, interrupt: Interrupt) -> None:
        self._out, self._interrupt, self._active = config.out, interrupt, False
        self._written = 0.0
        self._values: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "signal": None,
            "step": 0,
            "steps": config.steps,
            "checkpoint": None,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _now(),
        }

    def begin(self) -> None:
        """From here on the folder is this run's."""
        self._active = launched_rank() == 0
        self._write()

    def running(self, step: int, checkpoint: Path | None) -> None:
        """Take note of a step; written at once where there is a new checkpoint."""
        name = None if checkpoint is None else str(checkpoint.relative_to(self._out))
        due = name != self._values["checkpoint"] or time.monotonic() - self._written > EVERY
        self._values |= {"step": step, "checkpoint": name}
        if due:
            self._write()

    def failed(self, reason: str) -> None:
        """The run ends for ``reason``."""
        self._values |= {"state": "failed", "reason": reason}
        self._write()

    def stopped(self) -> None:
        """The run ends as it was asked to."""
        name = self._interrupt.signal
        self._values |= {"state": "stopped", "reason": name, "signal": name}
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, UserError):
            self.failed(str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._values["reason"] = "interrupted while it was stopping"
            self._values["state"] = "stopped"
            self._write()
        elif error is not None:
            self.failed(" ".join(f"{type(error).__name__}: {error}".split()))
        elif self._values["state"] == "running":
            self._values["state"] = "finished"
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if not self._active:
            return
        try:
            write_json(self._out / STATUS, self._values | {"time": _now()})
        except UserError as error:  # a disk that is full does not end the run
            print(error, flush=True)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
