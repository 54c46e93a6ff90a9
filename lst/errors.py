"""What a user can mend, told in one line.

A command of this package ends in one of three ways: it succeeds (exit code 0), the user can mend
something (one line on stderr, exit code 2), or the program is at fault (a traceback, exit code 1).
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where, expected, got."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a :class:`UserError` into one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
