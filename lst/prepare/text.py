"""Text files as records: a line of .txt, an object of .jsonl with a ``text``, a row of Parquet.

A record's id is its file and place: ``books/a.txt:1024`` is the line that begins at byte 1024,
``web.parquet:3:17`` row 17 of row group 3. (Lines are counted only where one is bad.)
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lst.data.records import Record
from lst.prepare.outcomes import Outcomes, Skipped
from lst.prepare.sources import Part, json_reason

__all__ = ["Line", "lines_of", "text_records"]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a part that is not blank.

    Attributes:
        index: how many lines of the part are before it.
        offset: its first byte in the file.
        content: without its end.
    """

    index: int
    offset: int
    content: bytes


def text_records(part: Part, source: str) -> Outcomes:
    """The records of a part; what is not UTF-8, not JSON or has no text is skipped."""
    if part.name.endswith(".parquet"):
        yield from _parquet_records(part, source)
        return
    make = _txt_record if part.name.endswith((".txt", ".txt.gz")) else _jsonl_record
    for line in lines_of(part):
        if isinstance(line, Skipped):
            yield line
            continue
        try:
            yield make(line.content.decode("utf-8-sig"), f"{part.name}:{line.offset}", source)
        # UnicodeDecodeError and JSONDecodeError are ValueErrors.
        except (ValueError, RecursionError) as error:
            yield Skipped(where_of(part, line), json_reason(error))


def lines_of(part: Part) -> Iterator[Line | Skipped]:
    """The lines that begin in a part. A compressed file that is damaged ends in a Skipped."""
    compressed = part.name.endswith(".gz")
    file: BinaryIO
    try:
        if compressed and not Path(part.path).stat().st_size:  # which gzip takes for no lines
            raise EOFError("empty, so not compressed")
        with gzip.open(part.path) if compressed else Path(part.path).open("rb") as file:  # type: ignore[assignment]
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # the line that began before is of the part before
            offset = file.tell()
            for index in count():
                content = file.readline() if part.stop is None or offset < part.stop else b""
                if not content:
                    break
                if content.strip():
                    yield Line(index, offset, content.rstrip(b"\r\n"))
                offset += len(content)
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(part.path, f"cannot be read ({error})")


def where_of(part: Part, line: Line) -> str:
    """File and number of a line."""
    return f"{part.path}, line {_lines_before(part.path, part.start) + line.index + 1}"


@lru_cache(maxsize=1)
def _lines_before(path: str, start: int) -> int:
    """How many lines of a file begin before byte ``start``."""
    if not start:
        return 0
    with open(path, "rb") as file:
        pieces = iter(lambda: file.read(min(1 << 20, start - 1 - file.tell())), b"")
        return 1 + sum(piece.count(b"\n") for piece in pieces)


def _txt_record(content: str, identity: str, source: str) -> Record:
    return _record(identity, content, source)


def _jsonl_record(content: str, identity: str, source: str) -> Record:
    fields = json.loads(content)
    if not isinstance(fields, dict) or "text" not in fields:
        raise ValueError('expected an object with a "text"')
    return _record(identity, fields["text"], source)


def _parquet_records(part: Part, source: str) -> Outcomes:
    assert part.stop is not None
    try:
        file = pq.ParquetFile(part.path)
        if "text" not in file.schema_arrow.names:
            yield Skipped(part.path, f"expected a column text, got {file.schema_arrow.names}")
            return
        tables = [
            file.read_row_group(each, ["text"], use_threads=False)
            for each in range(part.start, part.stop)
        ]
    except (OSError, ValueError, pa.ArrowException) as error:
        yield Skipped(part.path, f"cannot be read as Parquet ({' '.join(str(error).split())})")
        return
    for group, table in enumerate(tables, part.start):
        for row, text in enumerate(table.column("text")):
            try:  # what is not UTF-8 shows as it is taken out
                yield _record(f"{part.name}:{group}:{row}", text.as_py(), source)
            except ValueError as error:
                yield Skipped(f"{part.path}, row group {group}, row {row}", str(error))


def _record(identity: str, text: object, source: str) -> Record:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a text, got {str(text)[:20]!r}")
    return Record(
        id=identity, text=text, units=None, words=None, chars=None, speaker=None, source=source
    )
