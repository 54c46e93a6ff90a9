"""A rank's lanes, run in its own process or in worker processes of its own.

Each worker owns whole lanes and makes a row of each for every step, so the rows are the same for
any number of workers. This module, and all that it imports, stays clear of models and kernels:
every worker imports it.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lst.data.lanes import Lane, LaneState
from lst.data.packing import Packed
from lst.errors import UserError

__all__ = ["Item", "lane_items"]

#: What a lane gives for one step: its number, its row, its state after it as JSON.
Item = tuple[int, Packed, dict[str, Any]]


def lane_items(
    lanes: Sequence[Lane], states: Sequence[LaneState], *, num_workers: int
) -> Iterator[list[Item]]:
    """Step by step, the items of all lanes in order. Workers end when the iterator does.

    Raises:
        UserError: whatever a lane raises, in whichever process.
    """
    source = _Lanes(lanes, states)
    num_workers = min(num_workers, len(lanes))
    if num_workers == 0:
        yield from source
        return
    received = iter(
        DataLoader(
            source,
            batch_size=None,
            num_workers=num_workers,
            # Forking a process that has a GPU, a communicator or threads can hang its children.
            multiprocessing_context="spawn",
            # DataLoader draws a number at its start: not from the generator of the weights.
            generator=torch.Generator(),
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
    )
    try:
        while True:
            items: list[Item] = []
            for _ in range(num_workers):  # received takes from each worker in turn
                part = next(received)
                if isinstance(part, UserError):
                    raise part
                items += part
            yield sorted(items, key=lambda item: item[0])
    finally:
        del received  # ends the workers now, though a traceback may hold on to this frame


class _Lanes(IterableDataset[Any]):
    """Step by step the items of some lanes; in worker w of W, of every W-th lane from w on."""

    def __init__(self, lanes: Sequence[Lane], states: Sequence[LaneState]) -> None:
        self._lanes = lanes
        self._states = states

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            yield from self._items(0, 1)
            return
        try:
            yield from self._items(worker.id, worker.num_workers)
        except UserError as error:
            # As an item: DataLoader would wrap an exception into the text of a traceback.
            yield error

    def _items(self, first: int, step: int) -> Iterator[list[Item]]:
        lanes, states = self._lanes[first::step], self._states[first::step]
        streams = [lane.rows(state) for lane, state in zip(lanes, states, strict=True)]
        while True:
            rows = [next(stream) for stream in streams]
            yield [
                (lane.number, row, state.to_json())
                for lane, (row, state) in zip(lanes, rows, strict=True)
            ]


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, scancel every process of a job; a run that
    finishes its step needs its rows."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
