"""What a user can mend, told in one line.

A command of this package ends in one of three ways: it succeeds (exit code 0), the user can mend
something (one line on stderr, exit code 2), or the program is at fault (a traceback, exit code 1).
"""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where, expected, got."""


def expect_option(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise UserError of an option, named by its field, unless what is expected of it holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")


def expect_positive(options: object, *names: str) -> None:
    """Raise UserError unless each of these fields is a finite number above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            expected = "1 or more" if isinstance(value, int) else "more than 0"
            expect_option(0 < value < math.inf, name, expected, value)


def tell(message: object, stream: TextIO | None = None) -> None:
    """Print a line at once, on stdout where no other stream is given.

    Where it cannot be printed, as the disk of a log is full or its reader gone, it is let go: what
    is told of must not end for it.
    """
    with suppress(OSError):
        print(message, file=stream, flush=True)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a :class:`UserError` into one line and exit code 2."""
    try:
        main()
    except UserError as error:
        tell(f"error: {error}", sys.stderr)
        raise SystemExit(2) from None
