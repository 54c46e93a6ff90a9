"""The data format of the paper's public code, read into records.

A line is a JSON object ``{"file_id": …, "interleaved": …}``. Its string is a row of pairs, a word
or ``[SIL]`` and the units that are heard in it, which may be none:

    <LST MODE SEP>TEXT [SIL] <LST MODE SEP>HUBERT 99 99 7 <LST MODE SEP>TEXT in <LST MODE SEP>HUBERT
    117 313 …

Units of ``[SIL]`` are the frames of no word. The units are codes of 25 Hz HuBERT, 0 to 501.
"""

import json

import numpy as np

from lst.data.records import Record, Word
from lst.prepare.outcomes import Outcomes, Skipped
from lst.prepare.sources import Part, json_reason
from lst.prepare.text import lines_of, where_of

__all__ = ["AUTHORS_CODEBOOK", "AUTHORS_UNITS", "authors_records", "parse_line"]

AUTHORS_UNITS = 502
AUTHORS_CODEBOOK = "name:hubert-25hz-502"  # there is no file of it to take the SHA-256 of
SEPARATOR = "<LST MODE SEP>"
SILENCE = "[SIL]"


def authors_records(part: Part, source: str) -> Outcomes:
    """The records of the lines of a part; a line in another format is skipped."""
    for line in lines_of(part):
        if isinstance(line, Skipped):
            yield line
            continue
        try:
            yield parse_line(line.content.decode("utf-8-sig"), source)
        except (ValueError, RecursionError) as error:
            yield Skipped(where_of(part, line), json_reason(error))


def parse_line(line: str, source: str) -> Record:
    """One line → a record with text, units and aligned words.

    Raises:
        ValueError: another format; the message says where in the line.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not all(
        isinstance(fields.get(name), str) and fields[name] for name in ("file_id", "interleaved")
    ):
        raise ValueError('expected an object with strings "file_id" and "interleaved"')
    before, *spans = fields["interleaved"].split(SEPARATOR)
    if before.strip() or not spans or len(spans) % 2:
        raise ValueError(
            f"record {fields['file_id']!r}: expected pairs of {SEPARATOR}TEXT and "
            f"{SEPARATOR}HUBERT, got {len(spans)} spans after {before[:20]!r}"
        )
    words: list[Word] = []
    units: list[int] = []
    for index in range(0, len(spans), 2):
        where = f"record {fields['file_id']!r}, pair {index // 2}"
        text = _content(spans[index], "TEXT", where)
        heard = _units(_content(spans[index + 1], "HUBERT", where), where)
        if not text:
            raise ValueError(f"{where}: expected a word or {SILENCE}, got neither")
        if text != SILENCE:
            words.append(Word(text, len(units), len(units) + len(heard)))
        units += heard
    return Record(
        id=fields["file_id"],
        text=" ".join(word.word for word in words) or None,
        units=np.array(units, np.int16),
        words=tuple(words),
        chars=None,
        speaker=None,
        source=source,
    )


def _content(span: str, mode: str, where: str) -> str:
    if span.split(maxsplit=1)[:1] != [mode]:
        raise ValueError(f"{where}: expected a span of {mode}, got {span[:20]!r}")
    return span.removeprefix(mode).strip()


def _units(text: str, where: str) -> list[int]:
    for unit in text.split():
        if not (unit.isascii() and unit.isdigit() and int(unit) < AUTHORS_UNITS):
            raise ValueError(f"{where}: expected units in [0, {AUTHORS_UNITS}), got {unit!r}")
    return [int(unit) for unit in text.split()]
