"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop after its step; they do not tear it down."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from lst.train import monitor
from lst.train.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 2.0  # seconds; torchrun passes on a Ctrl-C that the terminal has already delivered


class Stopped(Exception):
    """A run ends as it was asked to, with nothing left to save."""


class Interrupt:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        # Gives a byte, its number, for every signal at once, though the main thread be busy in C.
        self.noticed: socket.socket | None = None
        self._since: float | None = None  # the first time that the main thread heard of it

    def __bool__(self) -> bool:
        return self.signal is not None

    def poll(self, step: int, world: World) -> None:
        """Every rank calls it; where one was asked to stop, every rank raises Stopped."""
        if world.sum(torch.tensor(int(bool(self)))):
            self.stop(step, world)

    def stop(self, step: int, world: World) -> NoReturn:
        """Stop after ``step`` on every rank alike, one of which was asked to."""
        self.signal = next(name for name in world.gather(self.signal) if name is not None)
        raise Stopped(f"{self.signal}: stopped after step {step}")

    def ask(self, name: str) -> None:
        """Whoever asks; the first counts."""
        self.signal = self.signal or name

    def notice(self, numbers: bytes) -> None:
        """What came from ``noticed``."""
        for number in numbers:
            if number in SIGNALS:
                self.ask(signal.Signals(number).name)

    def receive(self, number: int, _: FrameType | None) -> None:
        """The first asks; a second Ctrl-C, a while after the first, means now."""
        self.ask(signal.Signals(number).name)
        if self._since is None:
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Receive SIGINT, SIGTERM and SIGUSR1 in the block; afterwards their handlers are as before."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield interrupt
        return
    interrupt.noticed, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    before = {n: signal.signal(n, interrupt.receive) for n in SIGNALS}
    descriptor = signal.set_wakeup_fd(wake_up.fileno(), warn_on_full_buffer=False)
    interrupt.notice(bytes(monitor.asked))
    try:
        yield interrupt
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        interrupt.noticed.close()
        wake_up.close()
