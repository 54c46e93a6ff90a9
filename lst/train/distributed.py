"""The processes of a run: who they are, what they add up, and how they start and end together.

A command started by ``torchrun`` is one of several ranks; started plainly it is the only one, and
then no process group exists and every collective below is the identity.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lst.errors import UserError

# The longest that ranks wait for each other at the start, as they are launched together.
MEETING = timedelta(minutes=5)
ASK = 0.1  # seconds between two questions whether all have come
# The longest that one waits for another later. Long, as rank 0 alone scores the stories at the end;
# a rank that dies or hangs is noticed by the watchdog.
TIMEOUT = timedelta(hours=2)
PATIENCE = timedelta(seconds=10)  # the same after an error, which the other ranks may not share


class SharedError(UserError):
    """A UserError that every rank raises alike, so that rank 0 can speak for all."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # that carries what they exchange; None: the default

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def aside(self) -> "World":
        """The same ranks on a line of their own, for a thread; every rank calls it.

        What a thread of every rank exchanges there, on the CPU, does not mix with what the ranks
        exchange here at the same time.
        """
        if self.size == 1:
            return replace(self, device=torch.device("cpu"))
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return replace(self, device=torch.device("cpu"), group=group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` up over the ranks, in place. On the CPU this asks no GPU to wait."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever UserError a rank meets in the block, every rank raises after it.

        Every rank must enter; the block itself must hold no collective.

        Raises:
            SharedError: the message of the lowest rank that met one.
        """
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        if self.sum(torch.tensor(int(message is not None))):
            raise SharedError(next(m for m in self.gather(message) if m is not None))


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 for one started plainly."""
    return int(os.environ.get("RANK", "0"))


def launched_processes() -> int:
    """How many processes torchrun started in all; 1 for one started plainly."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_of_a_machine() -> int:
    """How many processes torchrun started on this machine; 1 for one started plainly."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def start_world(
    device: str,
    meeting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[World]:
    """Join the other ranks, and leave them together, after an error too.

    Args:
        device: "cpu", "cuda" or "auto" (cuda where there is one).
        meeting: its block is this rank's wait for ranks that have not come yet.
    """
    size = launched_processes()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world = World(launched_rank(), size, _device(device, local_rank))
    with ExitStack() as stack:
        stack.enter_context(_settings(world.device))
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            with meeting():
                store = _meet(world)
            dist.init_process_group(
                backend, store=store, rank=world.rank, world_size=size, timeout=TIMEOUT
            )
            # A group of its own: after an error on one rank, its farewell must not be taken for
            # its part in whatever the other ranks are still adding up.
            stack.push(partial(_leave, dist.new_group(backend="gloo")))
        yield world


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device cuda: expected a GPU for every process of this machine, "
            f"got {torch.cuda.device_count()} for at least {local_rank + 1}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _meet(world: World) -> dist.Store:
    """Wait until every rank is there; the store over which they make their groups.

    Raises:
        UserError: some do not come.
    """
    until = time.monotonic() + MEETING.total_seconds()
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    expected = f"{where}: expected {world.size} processes to meet within {MEETING.seconds} s"
    try:
        store, *_ = next(dist.rendezvous("env://", world.rank, world.size, timeout=MEETING))
        store.set(f"here/{world.rank}", "")
        if store.add("here", 1) == world.size:
            store.set("met", "")
        while not store.check(["met"]):  # a wait of the store that ends in vain fills the console
            if time.monotonic() > until:
                ranks = [r for r in range(world.size) if not store.check([f"here/{r}"])]
                raise UserError(f"{expected}, got none of rank {', '.join(map(str, ranks))}")
            time.sleep(ASK)
    except (dist.DistError, ValueError) as error:  # ValueError: a variable is not set
        raise UserError(f"{expected}, got {str(error).splitlines()[0]}") from None
    store.set_timeout(TIMEOUT)
    return store


def _leave(farewell: dist.ProcessGroup, kind: type[BaseException] | None, *_: object) -> None:
    """Wait for each other, then close: a rank of gloo that just exits can abort the others."""
    try:
        dist.monitored_barrier(farewell, timeout=TIMEOUT if kind is None else PATIENCE)
    except RuntimeError:
        if kind is None:
            raise
    finally:
        dist.destroy_process_group()


@contextmanager
def _settings(device: torch.device) -> Iterator[None]:
    """Threads and determinism for the length of a run; afterwards as they were."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    wanted = num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    if device.type == "cpu":  # where it costs nothing
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def num_threads() -> int | None:
    """Threads of this process: its share of the machine's cores; None: OMP_NUM_THREADS rules.

    ``torchrun`` itself sets OMP_NUM_THREADS=1 for several processes where it is unset, so there a 1
    says nothing about what the user wants.
    """
    local_size = processes_of_a_machine()
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is not None and not (local_size > 1 and asked == "1"):
        return None
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    return max(1, cores // local_size)
