"""Signs that a process works while its main thread stands still: what Linux counts in /proc.

A compiler's processes use the CPU, a checkpoint moves bytes, a data worker starts and reads; a
sleep, a lock, an empty queue and a dead connection do none of it. A wait for a GPU does: the thread
that waits spins. So the time of this process and that of its children are told apart.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = [
    "SLOW",
    "USUAL",
    "Work",
    "descendants",
    "did_work",
    "state_of",
    "work_of",
    "work_of_thread",
    "work_so_far",
]


def _proc() -> Path:
    """Where Linux tells of processes by the numbers that they have here. One that was mounted
    outside a container tells of others by them: then a place where nothing is."""
    proc = Path("/proc")
    with suppress(OSError):
        if os.readlink(proc / "self") == str(os.getpid()):
            return proc
    return proc / "none"


PROC = _proc()
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

USUAL = 45.0  # seconds of hang_timeout, and those that other times go by where it is 0
SLOW = 600.0  # seconds that work excuses a standstill
# What is work, and not the little that threads do which wait: in all of a timeout, by its length
WORK_SECONDS = 0.5 / 45  # of CPU time, and
WORK_BYTES = (1 << 20) / 45
TOUCHED = 8 * PAGE  # in all of it, that go with CPU time; who asks for them touches one or two


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process has done since it began, or one thread of it."""

    seconds: float  # of CPU time, of the process or thread
    children: float  # of the process's children and theirs, those that have ended too
    moved: int  # bytes read and written, by all of them; files, maps and pipes, no sockets
    flushed: int  # bytes that the machine holds to be written, while a thread waits for a disk
    touched: int  # bytes of the pages that it came by itself: mapped ones read, or new ones used

    def differs(
        self, other: "Work", *, seconds: float, size: int, own: bool, touching: bool
    ) -> bool:
        """Whether more than a little was done between the two.

        Args:
            own: the process itself counts, not its children alone.
            touching: its CPU time counts only where some memory was touched or bytes moved with it.
        """
        if touching:
            touched, moved = abs(self.touched - other.touched), abs(self.moved - other.moved)
            own = own and max(touched, moved) > TOUCHED
        return (
            (own and abs(self.seconds - other.seconds) > seconds)
            or abs(self.children - other.children) > seconds
            or abs(self.moved - other.moved) > size
            or abs(self.flushed - other.flushed) > size
        )


def did_work(
    before: Work | None,
    now: Work | None,
    timeout: float,
    *,
    own: bool = True,
    touching: bool = False,
) -> bool:
    """Whether enough was done between the two to be no hang of ``timeout`` seconds."""
    if before is None or now is None:
        return False
    size = int(WORK_BYTES * timeout)
    seconds = WORK_SECONDS * timeout
    return now.differs(before, seconds=seconds, size=size, own=own, touching=touching)


def work_so_far(proc: Path = PROC, *, but: int | None = None) -> Work | None:
    """Of this process, but for the thread that asks; None where the system does not tell."""
    work = work_of(os.getpid(), proc, but=but)
    if work is None:
        return None
    thread = proc / str(os.getpid()) / "task" / str(threading.get_native_id())
    return replace(
        work,
        seconds=work.seconds - time.thread_time(),
        moved=work.moved - _bytes_moved(thread),
        touched=work.touched - _touched(_fields(thread)),
    )


def work_of(pid: int, proc: Path = PROC, *, but: int | None = None) -> Work | None:
    """None where the system does not tell, or it has ended; ``but``: a child that is left out."""
    try:
        fields = _fields(proc / str(pid))
    except OSError:
        return None
    children = _ended(fields)
    moved = _faulted(fields) + _bytes_moved(proc / str(pid))
    for child in descendants(pid, proc):
        with suppress(OSError):
            if child == but:
                continue
            their = _fields(proc / str(child))
            children += _own(their) + _ended(their)
            moved += _faulted(their) + _bytes_moved(proc / str(child))
    return Work(
        seconds=_own(fields),
        children=children,
        moved=moved,
        flushed=_to_be_written(proc) if _waits_for_a_disk(proc / str(pid)) else 0,
        touched=_touched(fields),
    )


def work_of_thread(native_id: int | None, proc: Path = PROC) -> Work | None:
    """Of one thread of this process; None where the system does not tell, or it has ended."""
    thread = proc / str(os.getpid()) / "task" / str(native_id)
    try:
        fields = _fields(thread)
    except OSError:
        return None
    return Work(
        seconds=_own(fields),
        children=0.0,
        moved=_faulted(fields) + _bytes_moved(thread),
        flushed=_to_be_written(proc) if fields[0] == "D" else 0,
        touched=_touched(fields),
    )


def state_of(pid: int | None) -> str:
    """Of a process: R, S, D, T, Z …; empty where the system does not tell."""
    with suppress(OSError):
        return _fields(PROC / str(pid))[0]
    return ""


def _fields(process: Path) -> list[str]:
    """Of a process or thread, from its state on: the third of proc_pid_stat(5)."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _own(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) / TICKS


def _ended(fields: list[str]) -> float:
    """CPU time of the children that have ended and been waited for."""
    return (int(fields[13]) + int(fields[14])) / TICKS


def _faulted(fields: list[str]) -> int:
    """A page for each that had to be fetched: what a map of a file reads, on any file system."""
    return (int(fields[9]) + int(fields[10])) * PAGE


def _touched(fields: list[str]) -> int:
    """Minor and major faults."""
    return (int(fields[7]) + int(fields[9])) * PAGE


def _bytes_moved(process: Path) -> int:
    """By system calls, and through the page cache from and to the disk; 0 where that is secret."""
    try:
        lines = (process / "io").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return sum(int(counts[key]) for key in ("rchar", "wchar", "read_bytes", "write_bytes"))


def descendants(pid: int, proc: Path = PROC) -> Iterator[int]:
    """A process's children and theirs, each before its own."""
    with suppress(OSError):
        for thread in (proc / str(pid) / "task").iterdir():
            with suppress(OSError):
                for child in (thread / "children").read_text().split():
                    yield int(child)
                    yield from descendants(int(child), proc)


def _waits_for_a_disk(process: Path) -> bool:
    with suppress(OSError):
        for thread in (process / "task").iterdir():
            with suppress(OSError):
                if _fields(thread)[0] == "D":
                    return True
    return False


def _to_be_written(proc: Path) -> int:
    """What an fsync waits for goes on in the kernel: no process is charged for it."""
    lines = (proc / "meminfo").read_text().splitlines()
    sizes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return sum(int(sizes.get(name, 0)) << 10 for name in ("Dirty", "Writeback", "WritebackTmp"))
