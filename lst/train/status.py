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

import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lst.errors import UserError, tell
from lst.files import write_atomically
from lst.strict_json import read_json
from lst.train import monitor
from lst.train.config import TrainConfig
from lst.train.distributed import launched_rank
from lst.train.interrupt import Interrupt
from lst.train.run_folder import STATUS, RunLock, create_run

EVERY = 10.0  # seconds between two words of a run that is running
LOCK_SECONDS = 5.0
LOST_WORKER = "data worker"  # how the reason begins where one died


class Status:
    """Writes ``status.json``; leaving the block, how the run ended.

    It speaks from :meth:`begin` on: a folder that turns out to be another's is left alone. Rank
    0 writes, or of a failure whoever finds that it is no more. What ends a run is written once: the
    first reason counts. Safe to call from the watchdog's thread.
    """

    def __init__(self, config: TrainConfig, interrupt: Interrupt, *, resume: bool) -> None:
        self._config, self._out, self._resume = config, config.out, resume
        self._interrupt, self._run_lock, self._begun = interrupt, RunLock(), False
        self._rank, self._lock = launched_rank(), threading.Lock()
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
        """From here on the folder is this command's: locked, and new where the run is.

        Every rank calls it; once is enough.

        Raises:
            UserError: it is another's, or cannot be written. Nothing is changed then.
        """
        if self._begun:
            return
        if self._rank == 0:
            if self._resume:
                self._run_lock.take(self._out)
                before = self._read()  # until it is known where the run goes on
                self._values |= {k: before[k] for k in ("step", "checkpoint") if k in before}
            else:
                create_run(self._config, self._run_lock)
        self._begun = True
        if self._rank == 0:
            self._write(state="running")
        monitor.all_is_well(status=str((self._out / STATUS).absolute()))

    def running(self, step: int, checkpoint: Path | None) -> None:
        """Take note of a step; written at once where there is a new checkpoint."""
        name = None if checkpoint is None else str(checkpoint.relative_to(self._out))
        due = name != self._values["checkpoint"] or time.monotonic() - self._written > EVERY
        self._values |= {"step": step, "checkpoint": name}
        if due and self._rank == 0:
            self._write(state="running")

    def failed(self, reason: str) -> None:
        """The run ends for ``reason``, or for what has been written of another process's end."""
        if self._failed_elsewhere():
            self._values["state"] = "failed"
        else:
            self._write(state="failed", reason=reason)

    def stopped(self, reason: str | None = None) -> None:
        """The run ends as it was asked to; where its launcher asks as another rank has failed,
        that is why."""
        name = self._interrupt.signal
        if self._rank == 0 and self._failed_elsewhere():
            self._values["state"] = "failed"
        elif self._rank == 0:
            self._write(state="stopped", reason=reason or name, signal=name)

    def __enter__(self) -> Self:
        if self._resume:  # even while ranks wait for each other, its state can be seen
            with suppress(UserError):  # that is raised again in prepare(), on all ranks together
                self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rank:
            return
        if error is None:
            self._write(state="finished")
        elif isinstance(error, KeyboardInterrupt):
            self.stopped("interrupted while it was stopping")
        else:
            self.failed(describe_error(error))
        self._run_lock.release()

    def _failed_elsewhere(self) -> bool:
        """Whether another process has, and has written so: rank 0 began by "running"."""
        if not self._begun:
            return False
        return self._read().get("state") == "failed"

    def _read(self) -> dict[str, Any]:
        """The file; empty where there is none that can be read."""
        try:
            return dict(read_json(self._out / STATUS))
        except (UserError, ValueError, TypeError):
            return {}

    def _write(self, *, state: str, **values: Any) -> None:
        if not self._lock.acquire(timeout=LOCK_SECONDS):  # held by a thread whose disk hangs
            return
        try:
            if not self._begun or self._values["state"] != "running":
                return
            self._values |= {"state": state, **values}
            self._written = time.monotonic()
            text = json.dumps(self._values | {"time": _now()}, indent=1) + "\n"
            write_atomically(self._out / STATUS, text)
        except UserError as error:  # a disk that is full does not end the run
            tell(error)
        finally:
            self._lock.release()


def describe_error(error: BaseException) -> str:
    """In one line."""
    lost = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    if lost is not None:  # what PyTorch raises, wherever the main thread is when one dies
        return f"{LOST_WORKER} (pid {lost[1]}) died; has the machine run out of memory?"
    if isinstance(error, UserError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
