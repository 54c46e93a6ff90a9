"""Writing that is all or nothing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lst.errors import UserError

__all__ = ["write_atomically", "write_json", "writing"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A system error met in writing ``path`` becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either the old one or the whole new one, whenever the power fails.

    Processes may write the same file at once; one of them wins.
    """
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
