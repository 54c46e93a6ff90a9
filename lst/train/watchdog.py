"""A thread beside each rank's training that ends the job, with a reason, when it cannot go on.

::

    a rank dies                     its connection closes                         at once
    a rank is stopped or cut off    its beats stay away                           after 20 s
    a rank raises what others       it says so before it leaves                   at once
      do not
    no rank makes progress          nobody gives a sign of it                     after 45 s

The numbers are for ``hang_timeout = 45`` and go with it. Signs of progress are

- always: the main thread's stack is another than a moment ago, or it has come to its next phase. So
  a long validation, whose stack changes all the time, is progress, while a wait in a collective,
  for data or for the device is not.
- until the first step is done, and in phases declared slow (opening, loading, checkpoints), where
  single calls may be long by their nature: any thread's stack, CPU time of the children (compilers,
  data workers), bytes read or written; and CPU time of this process (:mod:`lst.train.work`): in the
  phases declared slow where it comes by memory or bytes with it, as a call does that gets on; in
  the first step on a CPU always, as a large matrix product comes by none; but never in that on a
  GPU, as a thread that waits for one spins. These count for ten minutes in which the main thread
  stands still, and where the system does not tell of them a standstill may last as long.

It takes all ranks to make a hang: those that wait for one that is busy are excused. In any phase a
standstill may last three times the longest that the run has come out of since its first step began.
Until the ranks are connected each watches itself, by the same times; only its wait for ranks that
have not come may last as long as they may take. One that imports, which has no watchdog yet, or
hangs with Python's lock, which its watchdog waits for, or is stopped, is ended by a process beside
it (:mod:`lst.train.monitor`).

A thread that writes a checkpoint is watched by the same signs, its own alone. Where those of all
ranks stand still for the timeout, that is told of (:attr:`Watchdog.stalled`) and training goes on:
it may never have to wait for them. Where it does, what they have stood still counts.

Time in which the whole machine, or the job, is suspended does not count: a thread that wakes late
counts no more than two of its ticks.

Before the first step is done nothing can be lost, so there a signal (:mod:`lst.train.interrupt`) is
obeyed even where the main thread cannot hear it, in a compiler or in a collective: the watchdog
ends the process, with exit code 0.
"""

import faulthandler
import multiprocessing
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from lst.data.workers import STACKS
from lst.errors import tell
from lst.train import monitor
from lst.train.distributed import MEETING, World, launched_processes, launched_rank
from lst.train.interrupt import Interrupt
from lst.train.links import Link, Message, open_links
from lst.train.status import Status
from lst.train.work import SLOW, USUAL, Work, did_work, state_of, work_of_thread, work_so_far

SILENCE = 20 / 45  # of hang_timeout, without a beat
# Parts of it where it is shorter than USUAL, else of that: more patience makes none of them longer.
TICK = 1 / 45  # between two looks at the main thread, and two beats
GRACE = 5 / 45  # for a main thread that was asked to stop before its first step
SETTLE = 1 / 45  # after a first sign of trouble, for signs that tell more

MEET = MEETING.total_seconds() + 60  # that ranks may wait for those to come; they give up before
FACTOR = 3  # on the longest standstill so far
DISK_SECONDS = 5.0  # for the last words
STACKS_SECONDS = 0.5  # for those of data workers
MAX_PLACES = 4  # named in a reason
WRITER = "checkpoint writer"  # the name of a thread
STATES = {"T": "stopped", "t": "traced", "Z": "dead", "D": "waiting for a disk", "X": "dead"}


class Phase(NamedTuple):
    """What the main thread has come to; see :meth:`Watchdog.now`."""

    number: int
    doing: str
    slow: bool = True
    saves: bool = False
    awaited: Callable[[], int | None] | None = None


@dataclass
class Beat:
    """How a rank's main thread stands."""

    doing: str = "starting"
    at: str = "?"
    still: float = 0.0  # seconds since it moved
    idle: float = 0.0  # seconds without any sign of progress that counts where it is
    limit: float = SLOW  # seconds that it may be so
    others: str = ""  # threads and processes that it may be waiting for
    writer: str = ""  # where a thread is that writes a checkpoint
    writer_idle: float = 0.0  # seconds that it has made no progress

    def describe(self) -> str:
        return f"{self.doing}, at {self.at}{self.others}"


@dataclass
class Writer:
    """How the thread stands that writes a checkpoint."""

    thread: threading.Thread
    trace: tuple[int, ...] = ()
    at: str = "?"
    still: float = 0.0
    idle: float = 0.0
    work: Work | None = None  # done when it came to stand, or since


@dataclass
class Peer:
    """Another rank, as far as it is known here."""

    link: Link | None = None
    beat: Beat = field(default_factory=Beat)
    silent: float = 0.0  # seconds
    left: bool = False  # in order
    failed: str | None = None  # what it raised


class Watchdog:
    """Watches this rank and, where there are others, rank 0 all of them and they rank 0.

    Args:
        timeout: seconds without progress that make a hang (see above); 0: never.
    """

    def __init__(self, timeout: float, status: Status, interrupt: Interrupt) -> None:
        self._timeout, self._status, self._interrupt = timeout, status, interrupt
        self._unit = min(timeout or USUAL, USUAL)
        self._rank, self._peers = launched_rank(), dict[int, Peer]()
        self._main = threading.get_ident()
        self._phase = Phase(0, "starting")
        self._meeting = False  # the main thread waits for ranks to come
        self._connected = launched_processes() == 1
        self._started = False  # has a step behind it
        self._spins = False  # where it waits for its device
        self._beat, self._trace = Beat(), tuple[int, ...]()
        self._others: list[tuple[int, ...]] = []  # the traces of the other threads
        self._work: Work | None = None  # done when the main thread came to stand, or since
        self._writer: Writer | None = None
        self.stalled: tuple[threading.Thread, str] | None = None  # a writer of rank 0, and where
        self._quiet = 0.0  # for which all ranks stand still
        self._stepping = False  # the first step has begun
        self._longest = 0.0  # standstill that has ended since
        self._listener: socket.socket | None = None
        self._token = ""
        self._asked = self._trouble = 0.0  # seconds since a signal, since a first sign of trouble
        self._failing = threading.Event()  # the main thread is leaving by an exception
        self._selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        self._watch(woken, None)
        if interrupt.noticed is not None:
            self._watch(interrupt.noticed, None)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # What the main thread calls -------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._timeout == 0:
            monitor.end()
        monitor.all_is_well(patience=self._timeout)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving.set()
        self._wake.send(b"\0")
        self._thread.join()
        self._send({"bye": True})
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._interrupt.noticed:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._wake.close()
        monitor.end()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """The main thread waits for ranks that have not come."""
        self.now("waiting for other ranks to start", slow=True)
        self._meeting = True
        yield
        self._meeting = False
        self.now("connecting to the other ranks", slow=True)

    def join(self, world: World) -> None:
        """Connect to the other ranks, which have come; every rank calls it."""
        self._spins = world.device.type != "cpu"
        if world.size == 1:
            return
        self._listener, self._token, link = open_links(world)
        if link is not None:
            self._peers = {0: Peer(link=link)}
            self._watch(link.socket, link)
        elif self._listener is not None:
            self._peers = {rank: Peer() for rank in range(1, world.size)}
            self._watch(self._listener, None)
        self._connected = True
        self._wake.send(b"\0")

    def now(
        self,
        doing: str,
        *,
        slow: bool = False,
        saves: bool = False,
        awaited: Callable[[], int | None] | None = None,
    ) -> None:
        """The main thread comes to a phase.

        Args:
            slow: single calls may keep it there.
            saves: it waits for the thread that writes a checkpoint, where there is one.
            awaited: gives the process that it waits for, where it does.
        """
        self._phase = Phase(self._phase.number + 1, doing, slow, saves, awaited)

    def stepped(self) -> None:
        """A step is done: what can be lost from here on is waited for."""
        if not self._started:
            monitor.all_is_well(stepped=True)
        self._started = True

    def failed(self, reason: str) -> None:
        """The main thread leaves by an exception that other ranks may not share.

        Where that is but what another's end looks like from here, the process ends in this call.
        """
        if self._peers:
            time.sleep(3 * SETTLE * self._unit)
        if self._interrupt and not self._started:
            self._stop()
        self._failing.set()
        self._send({"end": f"rank 0: {reason}"} if self._rank == 0 else {"failed": reason})

    # What the thread does -------------------------------------------------------------------------

    def _run(self) -> None:
        tick = TICK * self._unit
        last = looked = time.monotonic()
        while not self._leaving.is_set():
            for key, _ in self._selector.select(timeout=tick):
                self._read(key)
            now = time.monotonic()
            passed, last = min(now - last, 2 * tick), now
            if now - looked >= tick:
                self._look(min(now - looked, 2 * tick))
                looked = now
            self._judge(passed)

    def _watch(self, source: socket.socket, link: Link | None) -> None:
        source.setblocking(False)
        self._selector.register(source, selectors.EVENT_READ, link)

    def _read(self, key: selectors.SelectorKey) -> None:
        source: Any = key.fileobj
        if self._listener is not None and source is self._listener:
            with suppress(OSError):
                link = Link(self._listener.accept()[0])
                self._watch(link.socket, link)
        elif isinstance(key.data, Link):
            for message in key.data.receive():
                self._hear(key.data, message)
            if key.data.closed:
                self._selector.unregister(source)
        else:  # a wake-up, or the numbers of signals that have come
            self._interrupt.notice(source.recv(4096))

    def _hear(self, link: Link, message: Message) -> None:
        if message.get("token") == self._token and message.get("rank") in self._peers:
            self._peers[message["rank"]].link = link
        peer = next((peer for peer in self._peers.values() if peer.link is link), None)
        if peer is None:
            link.closed = True
            return
        peer.silent = 0.0
        if "beat" in message:
            peer.beat = Beat(**message["beat"])
        if "signal" in message:
            self._interrupt.ask(message["signal"])
        if "failed" in message:
            peer.failed = message["failed"]
        if "bye" in message:
            peer.left = True
        if "end" in message and not self._failing.is_set():
            self._end(message["end"], stacks=message.get("stacks", False), told=True)

    def _look(self, passed: float) -> None:
        """At this process; then tell the others."""
        frames = sys._current_frames()
        frame = frames.pop(self._main, None)
        frames.pop(threading.get_ident())
        number, doing, slow, saves, awaited = self._phase
        trace, others = (number, *_trace(frame)), [tuple(_trace(each)) for each in frames.values()]
        moved, others_moved = trace != self._trace, others != self._others
        self._trace, self._others = trace, others
        still = 0.0 if moved else self._beat.still + passed
        idle, limit = still, self._timeout
        if moved:
            self._work = None
        if slow or not self._started:
            worked = not moved and self._worked(slow)
            idle = 0.0 if moved or others_moved or worked else self._beat.idle + passed
            if self._meeting:
                limit = MEET
            elif self._work is None:
                limit = SLOW
            elif still > SLOW:
                idle = still
        self._look_at_writer(frames, passed)
        if self._writer is not None and saves and still:
            idle = max(idle, self._writer.idle)
        self._beat = Beat(doing, _place(frame), still, idle, limit)
        if self._writer is not None:
            self._beat.writer, self._beat.writer_idle = self._writer.at, self._writer.idle
        if idle > self._timeout / 2:
            self._beat.others = self._waited_for(awaited and awaited())
        for peer in self._peers.values():
            peer.silent += passed
        monitor.all_is_well()
        told = {} if self._interrupt.signal is None else {"signal": self._interrupt.signal}
        self._send({"beat": vars(self._beat), **told})

    def _worked(self, slow: bool) -> bool:
        """Whether work was done since the last that counted, while the main thread stood still."""
        now, timeout = work_so_far(but=monitor.pid()), self._timeout or USUAL
        worked = did_work(self._work, now, timeout, own=slow or not self._spins, touching=slow)
        self._work = now if worked else self._work or now
        return worked

    def _look_at_writer(self, frames: dict[int, FrameType], passed: float) -> None:
        thread = next((each for each in threading.enumerate() if each.name == WRITER), None)
        frame = None if thread is None else frames.get(thread.ident or 0)
        if thread is None or frame is None:
            self._writer = None
            return
        if self._writer is None or self._writer.thread is not thread:
            self._writer = Writer(thread)
        writer, trace = self._writer, tuple(_trace(frame))
        if trace != writer.trace:
            self._writer = writer = Writer(thread, trace)
        else:
            now = work_of_thread(thread.native_id)
            worked = did_work(writer.work, now, self._timeout or USUAL)
            writer.work = now if worked else writer.work or now
            writer.still += passed
            writer.idle = 0.0 if worked or now is None else writer.idle + passed
            if writer.still > SLOW:
                writer.idle = writer.still
        writer.at = _place(frame)

    def _waited_for(self, awaited: int | None) -> str:
        """Threads and processes that the main thread may be waiting for."""
        writer = f", whose {WRITER} is at {self._beat.writer}" if self._beat.writer else ""
        return writer + _workers(awaited)

    def _judge(self, passed: float) -> None:
        if self._failing.is_set():
            return
        self.stalled = self._stall()
        reason, stacks = self._verdict()
        self._trouble = 0.0 if reason is None else self._trouble + passed
        if reason is not None and (stacks or self._trouble > SETTLE * self._unit):
            self._end(reason, stacks=stacks)
        if self._interrupt and not self._started:
            self._asked += passed
            if self._asked > GRACE * self._unit:
                self._stop()

    def _verdict(self) -> tuple[str | None, bool]:
        """Why the job cannot go on, None where it can; whether stacks would tell more."""
        peers = {rank: peer for rank, peer in self._peers.items() if not peer.left}
        for rank, peer in peers.items():
            if peer.link is not None and peer.link.closed and peer.failed is None:
                return f"rank {rank} died (last: {peer.beat.describe()})", False
        for rank, peer in self._peers.items():
            if peer.failed is not None:
                return f"rank {rank}: {peer.failed}", False
        if self._timeout == 0:
            return None, False
        for rank, peer in peers.items():
            if peer.silent > SILENCE * self._timeout:
                where = f"last: {peer.beat.describe()}"
                return (
                    f"rank {rank} has not been heard of for {peer.silent:.0f} s: "
                    f"it is stopped or cut off ({where})"
                ), False
        return (self._hang(), True) if self._rank == 0 or not self._connected else (None, False)

    def _beats(self) -> dict[int, Beat]:
        """Of this rank and those connected to it."""
        others = {rank: peer.beat for rank, peer in self._peers.items() if not peer.left}
        return {self._rank: self._beat} | others

    def _stall(self) -> tuple[threading.Thread, str] | None:
        """The writer of rank 0, where those of all ranks stand still, and where they do."""
        beats = {rank: beat for rank, beat in self._beats().items() if beat.writer}
        idle = min((beat.writer_idle for beat in beats.values()), default=0.0)
        if self._timeout == 0 or self._writer is None or idle <= self._timeout:
            return None
        places = _places({rank: f"at {beat.writer}" for rank, beat in beats.items()})
        return self._writer.thread, f"no progress for {idle:.0f} s: {places}"

    def _hang(self) -> str | None:
        beats = self._beats()
        quiet = min(beat.still for beat in beats.values())
        if self._stepping and quiet < self._quiet:
            self._longest = max(self._longest, self._quiet)
        self._quiet = quiet
        # Only now: what ends as the first step begins, the start of data workers, came before it.
        self._stepping = self._stepping or self._beat.doing.startswith("step")
        if all(b.idle > max(b.limit, FACTOR * self._longest) for b in beats.values()):
            idle = min(beat.idle for beat in beats.values())
            places = _places({rank: beat.describe() for rank, beat in beats.items()})
            return f"no progress for {idle:.0f} s: {places}"
        return None

    # How it ends ----------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        for peer in self._peers.values():
            if peer.link is not None and not peer.link.closed:
                peer.link.send(message)

    def _end(self, reason: str, *, stacks: bool, told: bool = False) -> NoReturn:
        """End this process, and as rank 0 the job; ``told``: by rank 0, which speaks for all."""
        if not told:
            self._send({"end": reason, "stacks": stacks})
            # A disk that hangs does not hold up the end.
            saying = threading.Thread(target=self._status.failed, args=(reason,), daemon=True)
            saying.start()
            saying.join(DISK_SECONDS)
        if stacks:
            tell(f"rank {self._rank} was here:", sys.stderr)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            _ask_workers()
        if not told:
            tell(f"error: {reason}", sys.stderr)
        _leave(1)

    def _stop(self) -> NoReturn:
        """Obey a signal for a main thread that does not."""
        self._send({"signal": self._interrupt.signal, "bye": True})
        self._status.stopped()
        if self._rank == 0:
            tell(f"{self._interrupt.signal}: stopped before its first step")
        _leave(0)


def _ask_workers() -> None:
    """Data workers print where they are, those that are not stopped."""
    workers = multiprocessing.active_children()
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.pid or 0, STACKS)
    if workers:
        time.sleep(STACKS_SECONDS)


def _leave(code: int) -> NoReturn:
    for child in multiprocessing.active_children():  # a stopped one would outlive us
        child.kill()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _trace(frame: FrameType | None) -> Iterable[int]:
    """Where each function of a stack is at."""
    while frame is not None:
        yield id(frame.f_code)
        yield frame.f_lasti
        frame = frame.f_back


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "?"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _workers(awaited: int | None) -> str:
    """The processes of this rank that are not well, where the system tells, and the awaited one."""
    found = []
    for child in multiprocessing.active_children():
        state = state_of(child.pid)
        if state in STATES or child.pid == awaited:
            found.append(f"{child.name} (pid {child.pid}) is {STATES.get(state, 'silent')}")
    return f", whose data worker {', '.join(found)}" if found else ""


def _places(wheres: dict[int, str]) -> str:
    """Where which ranks are, the smallest groups first: who is alone holds up the others."""
    groups: dict[str, list[int]] = {}
    for rank, where in wheres.items():
        groups.setdefault(where, []).append(rank)
    told = sorted(groups.items(), key=lambda group: len(group[1]))[:MAX_PLACES]
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
        f"{' …' if len(ranks) > 8 else ''}: {where}"
        for where, ranks in told
    )
