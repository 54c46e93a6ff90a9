"""Streams of items, run in this process or ahead of it in worker processes.

    step          0   1   2   3 …
    stream 0      a   a   a   a        worker a of two
    stream 1      b   b   b   b        worker b
    stream 2      a   a   a   a

Each worker runs whole streams, so the items are the same for any number of workers. It stays two
steps ahead of what is asked for.
"""

import faulthandler
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lst.errors import UserError

__all__ = ["STACKS", "in_step"]

T = TypeVar("T")

STEPS_AHEAD = 2
DEATH_SECONDS = 1.0  # after its connection, that a process may take to be gone
STACKS = signal.SIGUSR2  # asks a worker to print its stacks


def in_step(
    streams: Sequence[Iterable[T]],
    *,
    num_workers: int,
    pin: bool = False,
    await_worker: Callable[[int | None], None] = lambda pid: None,
) -> Iterator[list[T]]:
    """Step by step, the next item of every stream. Workers end when the iterator does.

    Args:
        streams: endless; sent to the workers by pickle.
        num_workers: processes; more than there are streams would be idle and are not started.
            0: none, an item is made when it is asked for.
        pin: bring items into pinned memory, by the ``pin_memory`` that they define: in a thread of
            this process where there are workers.
        await_worker: told the process from which an item is awaited, and None once it has come.

    Raises:
        UserError: whatever a stream raises, in whichever process.
    """
    source = _Streams(streams)
    num_workers = min(num_workers, len(streams))
    if num_workers == 0:
        for step in source:
            yield [each.pin_memory() for each in step] if pin else list(step)
        return
    received: Any = iter(
        DataLoader(
            source,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=STEPS_AHEAD,
            pin_memory=pin,
            # Forking a process that has a GPU, a communicator or threads can hang its children.
            multiprocessing_context="spawn",
            # DataLoader draws a number at its start: not from the generator of the weights.
            generator=torch.Generator(),
            worker_init_fn=_prepare_worker,
        )
    )
    try:
        while True:
            items: list[Any] = [None] * len(streams)
            for worker in range(num_workers):  # received takes from each worker in turn
                await_worker(received._workers[worker].pid)
                try:
                    part = next(received)
                except (OSError, EOFError) as error:  # its end may be met in the middle of an item
                    raise _lost_worker(received._workers) or error from None
                if isinstance(part, UserError):
                    raise part
                items[worker::num_workers] = part
            await_worker(None)
            yield items
    finally:
        del received  # ends the workers now, though a traceback may hold on to this frame


def _lost_worker(workers: Sequence[Any]) -> RuntimeError | None:
    """What DataLoader raises where a worker has died, if one has."""
    until = time.monotonic() + DEATH_SECONDS
    while time.monotonic() < until:
        for worker in workers:
            if not worker.is_alive():
                return RuntimeError(f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly")
        time.sleep(0.01)
    return None


class _Streams(IterableDataset[Any], Generic[T]):
    """Step by step the items of some streams; in worker w of W, of every W-th stream from w on."""

    def __init__(self, streams: Sequence[Iterable[T]]) -> None:
        self._streams = streams

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            yield from zip(*self._streams, strict=True)
            return
        try:
            mine = self._streams[worker.id :: worker.num_workers]
            yield from map(list, zip(*mine, strict=True))
        except UserError as error:
            # As an item: DataLoader would wrap an exception into the text of a traceback.
            yield error


def _prepare_worker(worker: int) -> None:
    """Interrupts are the parent's: Ctrl-C reaches every process of a terminal, scancel every
    process of a job, and a run that finishes its step needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(STACKS)
