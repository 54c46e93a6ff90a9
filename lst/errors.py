"""What a user can mend, told in one line.

A command of this package ends in one of four ways: it succeeds (exit code 0), the user can mend
something (one line on stderr, exit code 2) or interrupts it (exit code 130), or the program is at
fault (a traceback, exit code 1).
"""

import errno
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TextIO

LONGEST = 200  # characters of a message of another library


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where, expected, got."""


def brief(error: BaseException) -> str:
    """What another library says is wrong, in a line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def expect_option(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise UserError of an option, named by its field, unless what is expected of it holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")


def expect_positive(options: object, *names: str, within: str = "") -> None:
    """Raise UserError unless each of these fields is a finite number above 0, and a whole one of 64
    bits. None passes; of several numbers each is looked at.

    Args:
        within: what the options' names begin with, such as ``"optimizer."``.
    """
    for name, value in _numbers(options, names):
        expected = "1 or more" if isinstance(value, int) else "more than 0"
        _expect_number(value > 0, within + name, expected, value)


def expect_not_negative(options: object, *names: str, within: str = "") -> None:
    """The same of 0 and more."""
    for name, value in _numbers(options, names):
        _expect_number(value >= 0, within + name, "0 or more", value)


def expect_text(options: object, *names: str) -> None:
    """Raise UserError unless what these fields hold is text, as Parquet, torch and safetensors must
    have it; the name of a file on disk may be none."""
    for name in names:
        value = str(getattr(options, name))
        is_text = value.encode(errors="replace") == value.encode(errors="surrogatepass")
        expect_option(is_text, name, "a name in UTF-8", ascii(value))


def _numbers(options: object, names: tuple[str, ...]) -> Iterator[tuple[str, int | float]]:
    for name in names:
        value = getattr(options, name)
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None:
                yield name, each


def _expect_number(holds: bool, name: str, expected: str, value: int | float) -> None:
    expect_option(holds and value < math.inf, name, expected, value)
    if isinstance(value, int):
        expect_option(value < 2**63, name, f"{expected}, below 2^63", value)


def tell(message: object, stream: TextIO | None = None) -> None:
    """Print a line at once, on stdout where no other stream is given.

    Where it cannot be printed, as the disk of a log is full or its reader gone, it is let go: what
    is told of must not end for it.
    """
    with suppress(OSError):
        print(message, file=stream, flush=True)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a :class:`UserError` into one line and exit code 2.

    Names may be told that hold no text, or an end of a line: both are written as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        tell("interrupted", sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which even asking whether a file is there raises
            raise
        message = f"{error.filename}: {error.strerror}"
    except MemoryError as error:
        message = f"there is not the memory for this ({error})"
    else:
        return
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    tell(f"error: {line}", sys.stderr)
    raise SystemExit(2)
