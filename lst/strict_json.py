"""JSON as typed values, read strictly: whatever a file should not hold is an error that names it.

    values = read_json(path)
    for number, where, values in read_json_lines(path): ...     3, "metrics.jsonl, line 3", …
    config = read_strictly(TrainConfig, values, where)  no key more or less, each of its type

A key that is unknown, missing, twice there or of another type is named, never a default taken in
silence. A field that is younger than files still read (``YOUNGER``) has its default for what they
were made by.
"""

import dataclasses
import json
import types
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from lst.errors import UserError
from lst.files import reason

__all__ = [
    "YOUNGER",
    "expect_unicode",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_strictly",
    "seal",
    "unseal",
]

T = TypeVar("T")
YOUNGER = {"younger": True}  # metadata of a field
LONGEST = 200  # characters of a value that a message repeats


def read_json(path: Path) -> Any:
    """The values in a file. Raises UserError where there is none or it is no JSON."""
    return parse_json(_read(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number, file and number, values) of each line that is not blank; the same errors."""
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, where, parse_json(line, where)


def parse_json(content: bytes | str, where: str) -> Any:
    """The values of a text, which ``where`` names in the message of a UserError."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        why = f"bytes that are not UTF-8 from byte {error.start + 1} on"
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
    except ValueError as error:
        why = str(error)
    except RecursionError:
        why = "lists or objects within each other, too many of them"
    raise UserError(f"{where}: expected JSON, got {why}")


def expect_unicode(text: str, where: str) -> None:
    """Raise UserError of half a surrogate pair, which JSON can write and is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: expected text, got half a surrogate pair at character {error.start + 1}"
        ) from None


def seal(content: str) -> str:
    """JSON with its checksum, for files that a command goes on with: damage to it is seen."""
    return f'{{"crc32": {zlib.crc32(content.encode())}, "of": {content}}}'


def unseal(values: Any, where: str) -> Any:
    """What the JSON of :func:`seal` holds. Raises UserError where it is not what was written."""
    content = values.get("of") if isinstance(values, dict) else None
    if values != {"crc32": zlib.crc32(json.dumps(content).encode()), "of": content}:
        raise UserError(f"{where}: damaged: expected the content of its checksum, got another")
    return content


def read_strictly(kind: type[T], values: Any, where: str) -> T:
    """Read a dataclass from JSON values, with no key more or less than it has fields.

    ``where``, the file and what else there is to say, opens the message of a UserError.
    """
    config: T = _read_value(kind, values, "", where)
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return values


def _read_value(kind: Any, value: Any, key: str, where: str) -> Any:
    """``value`` as a ``kind``: a dataclass, a builtin, a Path, or a Literal, union, tuple, list,
    dict."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_dataclass(kind, value, key, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        kinds = [part for part in parts if part is not type(None)]
        of_its_type = [part for part in kinds if (typing.get_origin(part) or part) is type(value)]
        if of_its_type or len(kinds) == 1:
            return _read_value((of_its_type or kinds)[0], value, key, where)
    elif origin is Literal and value in parts:
        return value
    elif origin is tuple and isinstance(value, list):
        inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(inner) == len(value):
            each = enumerate(zip(inner, value, strict=True))
            return tuple(_read_value(k, v, f"{key}[{n}]", where) for n, (k, v) in each)
    elif origin is list and isinstance(value, list):
        return [_read_value(parts[0], v, f"{key}[{n}]", where) for n, v in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {name: _read_value(parts[1], v, f"{key}.{name}", where) for name, v in value.items()}
    elif kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            pass
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is kind and kind in (int, bool, str):
        return value
    name = getattr(kind, "__name__", kind) if origin is None else kind
    got = json.dumps(value)
    got = got if len(got) <= LONGEST else f"{got[:LONGEST]} …"
    raise UserError(f"{where}: expected {f'{key} to be ' if key else ''}{name}, got {got}")


def _read_dataclass(kind: Any, values: dict[str, Any], key: str, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    younger = {
        field.name: field.default for field in dataclasses.fields(kind) if field.metadata == YOUNGER
    }
    values = younger | values
    names = [field.name for field in dataclasses.fields(kind)]
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in names:
            raise UserError(f"{where}: unknown key {prefix}{name}")
    for name in names:
        if name not in values:
            raise UserError(f"{where}: missing key {prefix}{name}")
    fields = {
        name: _read_value(hints[name], values[name], f"{prefix}{name}", where) for name in names
    }
    try:
        return kind(**fields)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
