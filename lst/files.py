"""Files: in a folder of this machine, or behind any URL that fsspec reads.

    Location("data/demo") / "train" / "text" / "dataset.json"
    Location("s3://bucket/corpus") / "tokenizer.model"

    write_atomically(path, text)
    with replacing(path) as temporary: ...    for what another library saves
    with making_folder(path) as temporary: ...

What is written is written to this machine, as a whole or not at all.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from lst.errors import UserError

__all__ = [
    "Location",
    "expect_absent",
    "fsync",
    "make_folder",
    "making_folder",
    "reason",
    "replacing",
    "write_atomically",
    "write_json",
    "writing",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, init=False)
class Location:
    """A file or folder to read from.

    Args:
        url: a path, a URL (``s3://…``, ``gs://…``, ``https://…``, ``memory://…``), or a Location.

    Every method raises UserError where the place cannot be asked: its protocol is unknown or needs
    a package that is not installed, or there is no permission or no connection.
    """

    url: str

    def __init__(self, url: "str | os.PathLike[str] | Location") -> None:
        object.__setattr__(self, "url", url.url if isinstance(url, Location) else os.fspath(url))

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError where nothing is there."""
        return self._ask(lambda fs, path: bytes(fs.cat_file(path)))

    def exists(self) -> bool:
        return self._ask(lambda fs, path: bool(fs.exists(path)))

    def is_folder(self) -> bool:
        return self._ask(lambda fs, path: bool(fs.isdir(path)))

    def folders(self) -> list[str]:
        """The names of the folders in this one, sorted; none where it is not there."""
        return sorted(_name(each) for each in self._entries() if each["type"] == "directory")

    def sizes(self) -> dict[str, int] | None:
        """The bytes of each file in this folder by its name; None of a web server, which need not
        say."""
        if self.url.startswith(("http://", "https://")):
            return None
        return {_name(each): each["size"] for each in self._entries() if each["type"] == "file"}

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return self._ask(lambda fs, path: list(fs.ls(path, detail=True, refresh=True)))
        except FileNotFoundError:
            return []

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        try:
            return question(*fsspec.core.url_to_fs(self.url))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self.url}: could not be read ({reason(error)})") from None
        except Exception as error:  # what a protocol's package defines
            raise UserError(f"{self.url}: could not be read ({error})") from error


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in a few words."""
    return error.strerror or str(error) or type(error).__name__


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A system error met in writing ``path`` becomes a UserError that names it. A name that is too
    long may be of what is read meanwhile, and is told itself."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{error.filename}: {reason(error)}") from None
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are not there.

    Raises:
        UserError: a file is in the way, or it cannot be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, to write to. What is there at the end of the block takes
    ``path``'s place; ``path`` is the old file or the whole new one, whenever the power fails.

    Processes and threads may write the same file at once; one of them wins. A link stays, and the
    file that it leads to is replaced.

    Raises:
        UserError: it cannot be written, or is no file, but a folder, or a device such as /dev/null.
            The old file stays, here as after any other exception.
    """
    with writing(path):
        if path.exists() and not path.is_file():  # root may rename over a device
            got = "a folder" if path.is_dir() else "a device or a pipe"
            raise UserError(f"{path}: expected a file to write, got {got}")
        target = path.resolve()
    writer = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f"{target.name}.{writer}.tmp")
    with writing(path):
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(target)
            fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def expect_absent(path: Path) -> None:
    """Raise UserError where a folder cannot be made: something is there, or a file above it."""
    with writing(path):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: expected a folder to make, got one that is there")
        above = next(each for each in path.absolute().parents if each.exists())
        if not above.is_dir():
            raise UserError(f"{path}: expected a folder to make, got a file above it, {above}")


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, to fill. At the end of the block it becomes ``path``, and
    after an exception it is gone: ``path`` is never there in part.

    Raises:
        UserError: something is there already, or the folder cannot be written.
    """
    expect_absent(path)
    with writing(path):
        temporary = path.absolute()
        temporary = temporary.with_name(f".{temporary.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # safetensors lets the owner alone read a file
            for each in temporary.rglob("*"):
                if each.is_file():
                    each.chmod(mode)
                fsync(each)
            fsync(temporary)
            temporary.rename(path)
            fsync(temporary.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file by :func:`replacing` it, a text in UTF-8."""
    if isinstance(content, str):
        # Half a surrogate pair, as in the name of a file that is not UTF-8, becomes an escape.
        content = content.encode(errors="backslashreplace")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, values: object) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def fsync(path: Path) -> None:
    """Push a file, or a folder's list of names, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
