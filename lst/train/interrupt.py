"""Ctrl-C and SIGTERM ask a run to stop after its step; they do not tear it down."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 2.0  # seconds; torchrun passes on a Ctrl-C that the terminal has already delivered


class Interrupt:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def receive(self, number: int, _: FrameType | None) -> None:
        """The first asks; a second Ctrl-C, a while after the first, means now."""
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Receive SIGINT and SIGTERM in the block; afterwards their handlers are as before."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield interrupt
        return
    before = {n: signal.signal(n, interrupt.receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
