"""Ranks of this machine that do not come to the meeting of all, as Linux tells of them in /proc.

A rank that is stopped, or sleeps while it imports, has no watchdog of its own yet. Those that the
same launcher started beside it see that its process does nothing.
"""

import os
import time
from contextlib import suppress

from lst.train.work import PROC, Work, descendants, did_work, state_of, work_of

STOPPED = 20 / 45  # of the patience that a process gets which is stopped


class Siblings:
    """Watches them while this rank waits.

    Args:
        patience: seconds that one may do nothing; 0: for ever.
    """

    def __init__(self, patience: float) -> None:
        self._patience, self._looked = patience, time.monotonic()
        self._processes = processes_of_ranks()
        self._idle = dict.fromkeys(self._processes, 0.0)
        self._works: dict[int, Work] = {}

    @property
    def ranks(self) -> list[int]:
        return sorted(self._processes)

    def look(self, late: list[int], *, every: float) -> str | None:
        """What is wrong with one that is late; None: nothing is known.

        Args:
            every: seconds between two calls; longer ones, as this process was stopped too, do not
                count.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * every), now
        for rank in late:
            pid = self._processes[rank]
            work, before = work_of(pid), self._works.get(rank)
            if work is None:
                continue
            idle = before is not None and not did_work(before, work, self._patience)
            self._idle[rank] = self._idle[rank] + passed if idle else 0.0
            if not idle:
                self._works[rank] = work
            stopped = state_of(pid) == "T"
            if self._idle[rank] > self._patience * (STOPPED if stopped else 1) > 0:
                what = f"rank {rank} (pid {pid}) has not come, and done nothing for"
                return f"{what} {self._idle[rank]:.0f} s{': it is stopped' if stopped else ''}"
        return None


def processes_of_ranks() -> dict[int, int]:
    """By rank, the processes of the same job and command that this one's launcher has started."""
    found: dict[int, int] = {}
    for pid in descendants(os.getppid()):
        with suppress(OSError, ValueError, KeyError):
            job = _job(pid)
            if pid != os.getpid() and job == _job(os.getpid()):
                found.setdefault(int(_environment(pid)["RANK"]), pid)
    return found


def _job(pid: int) -> tuple[object, ...]:
    environment = _environment(pid)
    return (PROC / str(pid) / "cmdline").read_bytes(), *(
        environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    )


def _environment(pid: int) -> dict[str, str]:
    """That a process was started with."""
    text = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    return {name: value for name, _, value in (line.partition("=") for line in text.split("\0"))}
