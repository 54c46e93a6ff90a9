"""A process beside a rank that ends it where it hangs before its first step is done.

The rank's own watchdog (:mod:`lst.train.watchdog`) is a thread. It is not there yet while the rank
imports, and cannot run while a library is loaded, which holds Python's lock. So the command forks
before it imports anything large, and its child sees, from what Linux counts in /proc, whether the
rank does anything at all: a byte read or written, a page of memory not touched before, half a
second of CPU time. The watchdog's looks do. Of nothing at all is enough

    after 20 s      where it is stopped
    after 5 min     where it waits for a disk: a file system that fails over comes back
    after 45 s      else

(for ``--hang-timeout 45``, the usual; the first and the last go with it). However slow files come,
something comes of them in that time. Nothing here imports more than the standard library.

A signal that asks to stop, while there is no run yet that could (or any more), is kept for it.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from lst.errors import tell
from lst.train.work import PROC, USUAL, did_work, state_of, work_of

STOPPED = 20 / 45  # of the patience that a rank gets which does nothing
DISK = 300.0  # seconds
TICK = 1 / 45  # of it, between two looks
STACKS = signal.SIGUSR2  # asks the rank where it is
STACKS_SECONDS = 0.5

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
asked = bytearray()  # the numbers of those that have come

_child: tuple[int, int] | None = None  # its number, and where it is written to


def begin() -> None:
    """Keep signals for the run, and watch this process, which has not started any thread; where
    /proc does not tell of it, or not of the bytes that it reads, do not."""
    global _child
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    patience = _patience(sys.argv[1:])
    if patience == 0 or not os.access(PROC / "self" / "io", os.R_OK):
        return
    faulthandler.register(STACKS, sys.__stderr__ or 2)
    rank = os.getpid()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writes)
            _watch(rank, reads, patience)
        finally:
            os._exit(0)
    os.close(reads)
    _child = child, writes


def beside() -> int | None:
    """The process that watches this one, where there is one."""
    return None if _child is None else _child[0]


def allow(patience: float) -> None:
    """From now on this process may do nothing for so many seconds; 0: for ever."""
    if patience == 0:
        end()
    elif _child is not None:
        with suppress(BrokenPipeError):  # somebody has ended it
            os.write(_child[1], f"{patience}\n".encode())


def end() -> None:
    """From now on nothing is beside this process."""
    global _child
    if _child is None:
        return
    (child, writes), _child = _child, None
    os.close(writes)
    with suppress(ProcessLookupError, ChildProcessError):  # somebody else has waited for it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    faulthandler.unregister(STACKS)


def _patience(arguments: list[str]) -> float:
    """Of ``--hang-timeout``, before there is a parser that knows it."""
    patience = USUAL
    for place, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--hang-timeout":
            with suppress(ValueError):  # told of once it is parsed
                patience = float(value or " ".join(arguments[place + 1 : place + 2]))
    return patience


def _watch(rank: int, reads: int, patience: float) -> None:
    """Until the rank ends; what it writes is its patience."""
    for number in (signal.SIGINT, *SIGNALS):  # of a terminal or a whole job: it ends with the rank
        signal.signal(number, signal.SIG_IGN)
    idle, last = 0.0, time.monotonic()
    before = work_of(rank, but=os.getpid())
    while before is not None:
        tick = TICK * patience
        if select.select([reads], [], [], tick)[0]:
            told = os.read(reads, 1 << 10).split()
            if not told:
                return
            patience = float(told[-1])
        now = time.monotonic()
        passed, last = min(now - last, 2 * tick), now  # all may have been suspended
        work, state = work_of(rank, but=os.getpid()), state_of(rank)
        if work is None:
            return
        work = replace(work, flushed=before.flushed)  # others may write to disks that are well
        anything = (before.moved, before.touched) != (work.moved, work.touched)
        if anything or did_work(before, work, patience):
            before, idle = work, 0.0
        else:
            idle += passed
        if idle > {"T": STOPPED * patience, "D": DISK}.get(state, patience):
            _end(rank, idle, state)


def _end(rank: int, idle: float, state: str) -> NoReturn:
    if state != "T":
        os.kill(rank, STACKS)
        time.sleep(STACKS_SECONDS)
    why = {"T": ", as it is stopped", "D": ", as it waits for a disk"}.get(state, "")
    who = f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()}, pid {rank})"
    reason = f"{who} hangs as it starts: nothing done for {idle:.0f} s{why}"
    tell(f"error: {reason}", sys.stderr)
    os.kill(rank, signal.SIGKILL)
    os._exit(1)
