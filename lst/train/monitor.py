"""A process beside a rank that ends it where its own watchdog cannot.

The rank's watchdog (:mod:`lst.train.watchdog`) is a thread. It is not there yet while the rank
imports, and cannot run while a call holds Python's lock, as what loads a library does. So the
command forks before it imports anything large, and its child stays until the run is over. Whatever
the watchdog says to it at its looks means that all is well. Where it says nothing, the child sees,
from what Linux counts in /proc, whether the rank does anything:

    until the first step is done    anything at all: a byte read or written, a page of memory not
                                    touched before, half a second of its children's CPU time.
                                    However slow files come, something comes of them
    afterwards                      as much as there must be of it in what the watchdog takes for
                                    work where the main thread stands still; for ten minutes

Of none of it is enough, for ``--hang-timeout 45``, the usual: 20 s where the rank is stopped, else
45. Nothing here imports more than the standard library, but for the last words.

A signal that asks to stop, while there is no run yet that could (or any more), is kept for it.
"""

import faulthandler
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lst.errors import tell
from lst.train.work import PROC, SLOW, USUAL, Work, descendants, did_work, state_of, work_of

STOPPED = 20 / 45  # of the patience that a rank gets which does nothing
TICK = 1 / 45  # of it, between two looks
STACKS = signal.SIGUSR2  # asks the rank where it is
STACKS_SECONDS = 0.5
DISK_SECONDS = 5.0  # for the last words
WHY = {"T": ", as it is stopped", "D": ", as it waits for a disk"}

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
asked = bytearray()  # the numbers of those that have come

_child: tuple[int, int] | None = None  # its number, and where it is written to


def begin() -> None:
    """Watch this process, which has not started any thread, where /proc tells enough of it.

    Besides, keep the signals that a run obeys until there is one, let Ctrl-C end what comes before
    it without a traceback, and print stacks where STACKS asks for them.
    """
    global _child
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not that of a job of nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.register(STACKS, sys.__stderr__ or 2)
    patience = _patience(sys.argv[1:])
    if patience == 0 or not os.access(PROC / "self" / "io", os.R_OK):
        return
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
    os.set_blocking(writes, False)  # nobody reads where the child is stopped
    _child = child, writes


def pid() -> int | None:
    """The process that watches this one, where there is one."""
    return None if _child is None else _child[0]


def all_is_well(**told: object) -> None:
    """The watchdog looks at this process, so the one beside need not.

    Args:
        told: from now on,
            patience: this process may do nothing for so many seconds;
            status: its ``status.json`` is this one, a path;
            stepped: its first step is done.
    """
    if _child is not None:
        with suppress(BrokenPipeError, BlockingIOError):  # somebody has ended it, or stopped it
            os.write(_child[1], json.dumps(told).encode() + b"\n")


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
    """Until the rank ends; it writes what :func:`all_is_well` tells, a line each."""
    for number in (signal.SIGINT, *SIGNALS):  # of a terminal or a whole job: it ends with the rank
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        (PROC / "self" / "comm").write_text("lst-monitor")  # what top shows
    stepped, status = False, None
    idle, silent = 0.0, -math.inf  # imports may take for ever, as long as they get on
    before, last = None, time.monotonic()
    while os.getppid() == rank:
        tick = TICK * patience
        lines = os.read(reads, 1 << 16) if select.select([reads], [], [], tick)[0] else None
        now = time.monotonic()
        passed, last = min(now - last, 2 * tick), now  # all may have been suspended
        if lines is not None:
            for told in map(json.loads, lines.splitlines()):
                patience = told.get("patience", patience)
                status = told.get("status", status)
                stepped = told.get("stepped", stepped)
            before, idle, silent = None, 0.0, 0.0
            continue
        work, state = work_of(rank, but=os.getpid()), state_of(rank)
        if work is None:
            return
        work = replace(work, flushed=0)  # others may write to disks that are well
        silent += passed
        if before is None or _gets_on(before, work, patience, stepped):
            before, idle = work, 0.0
        else:
            idle += passed
        if idle > (STOPPED * patience if state == "T" else patience):
            _end(rank, f"nothing done for {idle:.0f} s{WHY.get(state, '')}", stepped, status)
        if silent > max(SLOW, patience):
            _end(rank, f"its watchdog has been silent for {silent:.0f} s", stepped, status)


def _gets_on(before: Work, work: Work, patience: float, stepped: bool) -> bool:
    anything = (before.moved, before.touched) != (work.moved, work.touched)
    return (anything and not stepped) or did_work(before, work, patience, touching=True)


def _end(rank: int, what: str, stepped: bool, status: str | None) -> NoReturn:
    if state_of(rank) != "T":
        os.kill(rank, STACKS)
        time.sleep(STACKS_SECONDS)
    who = f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()}, pid {rank})"
    reason = f"{who} hangs{'' if stepped else ' as it starts'}: {what}"
    # Disks that hang do not hold up the end.
    words = [threading.Thread(target=tell, args=(f"error: {reason}", sys.stderr), daemon=True)]
    if status is not None:
        words.append(threading.Thread(target=_write, args=(Path(status), reason), daemon=True))
    for word in words:
        word.start()
    for word in words:
        word.join(DISK_SECONDS)
    for process in (*descendants(rank), rank):  # one that is stopped would outlive it
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    os._exit(1)


def _write(status: Path, reason: str) -> None:
    """Why the run failed, in ``status.json``, where it does not tell of its end yet."""
    from lst.files import write_atomically

    with suppress(Exception):  # it is not there, not whole, or cannot be written
        values = json.loads(status.read_text())
        if values["state"] == "running":
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            values |= {"state": "failed", "reason": reason, "time": now}
            write_atomically(status, json.dumps(values, indent=1) + "\n")
