"""Records on disk: Parquet shards in a folder, described by ``dataset.json``.

    [records] -> interleave -> patching -> packing -> batch

    data/demo/train/speech/
        shard-00000.parquet ...     one row a record
        dataset.json                counts, fingerprints, shards; written last

A truncated, exchanged or damaged shard is an error that names the file, never a silent loss of data
(lst.data.shards).

    with RecordWriter(folder, codebook=None, tokenizer=None, num_units=501) as writer:
        writer.write(record)
    dataset = Dataset.open(folder)
    len(dataset), dataset[3]
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lst.data.shards import (
    FRAMES_PER_SECOND,
    DatasetInfo,
    ShardInfo,
    WrittenShard,
    check_size,
    clear_folder,
    read_info,
    read_table,
    shard_name,
    write_info,
    write_table,
)
from lst.errors import UserError
from lst.files import Location

__all__ = [
    "FRAMES_PER_SECOND",
    "Dataset",
    "Record",
    "RecordWriter",
    "Span",
    "StoryItem",
    "Word",
    "join_shards",
    "read_items",
    "validate_record",
    "write_items",
    "write_shard",
]

TASKS = ("storycloze", "topicstorycloze", "hellaswag")


@dataclass(frozen=True, slots=True)
class Word:
    """A word as it is written, with its punctuation, and the frames in which it is spoken."""

    word: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of frames."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Record:
    """One utterance or text.

    Attributes:
        units: (F,) int16, speech units at 25 Hz, or None.
        words: in order, disjoint, inside [0, F); a word too short for the frame rate is empty
            (start == stop). The frames of no word are silence. None where nothing is aligned.
        chars: the frames of each character of ``text``, in order, or None.
        source: the corpus that the record comes from, for people.
    """

    id: str
    text: str | None
    units: np.ndarray | None
    words: tuple[Word, ...] | None
    chars: tuple[Span, ...] | None
    speaker: str | None
    source: str


@dataclass(frozen=True, slots=True)
class StoryItem:
    """A story and the endings to choose from; ``endings[answer]`` is the true one."""

    id: str
    task: str
    prompt: Record
    endings: tuple[Record, ...]
    answer: int


# Validation ---------------------------------------------------------------------------------------


def validate_record(record: Record, num_units: int, where: str) -> None:
    """Check one record; ``where`` (file and row) opens the message.

    Raises:
        UserError: neither text nor units; units out of range; words or characters that overlap,
            run backwards or pass the units; characters that are not the text's.
    """

    def fail(problem: str) -> None:
        raise UserError(f"{where}, record {record.id!r}: {problem}")

    if not record.id:
        fail("expected an id, got an empty string")
    if record.text is None and record.units is None:
        fail("expected text or units, got neither")
    num_frames = 0
    if record.units is not None:
        units = record.units
        if units.ndim != 1 or units.dtype != np.int16:
            fail(f"expected units of shape (F,) int16, got {units.shape} {units.dtype}")
        num_frames = len(units)
        bad = np.flatnonzero((units < 0) | (units >= num_units))
        if len(bad):
            fail(f"expected units in [0, {num_units}), got {units[bad[0]]} at frame {bad[0]}")
    if not all(isinstance(word.word, str) for word in record.words or ()):
        fail("expected words that are written, got one that is null")
    aligned: dict[str, Sequence[Word | Span] | None]
    aligned = {"word": record.words, "character": record.chars}
    for kind, spans in aligned.items():
        if spans is None:
            continue
        if record.units is None:
            fail(f"expected units beside its {kind}s, got none")
        end = 0
        for index, span in enumerate(spans):
            name = f"{kind} {index} [{span.start}, {span.stop})"
            if span.start > span.stop:
                fail(f"{name} runs backwards")
            if span.start < end:
                fail(f"{name} overlaps the {kind} before it, which stops at frame {end}")
            if span.stop > num_frames:
                fail(f"{name} passes the units: expected at most {num_frames} frames")
            end = span.stop
    if (
        record.chars is not None
        and record.text is not None
        and len(record.chars) != len(record.text)
    ):
        fail(f"expected {len(record.text)} characters aligned, got {len(record.chars)}")


# Writing ------------------------------------------------------------------------------------------

_SPAN = [("start", pa.int32()), ("stop", pa.int32())]
_RECORD_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("units", pa.list_(pa.int16())),
    pa.field("words", pa.list_(pa.struct([("word", pa.string()), *_SPAN]))),
    pa.field("chars", pa.list_(pa.struct(_SPAN))),
    pa.field("speaker", pa.string()),
    pa.field("source", pa.string(), nullable=False),
]
_RECORD_SCHEMA = pa.schema(_RECORD_FIELDS)
_ITEM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("prompt", pa.struct(_RECORD_FIELDS), nullable=False),
        pa.field("endings", pa.list_(pa.struct(_RECORD_FIELDS)), nullable=False),
        pa.field("answer", pa.int32(), nullable=False),
    ]
)


class RecordWriter:
    """Writes a dataset folder; a context manager.

    A folder is written afresh: shards and ``dataset.json`` of an earlier writer are removed first.
    A shard is written under a temporary name and renamed; ``dataset.json`` comes last, and only
    where the ``with`` block ended without an exception.

    Args:
        codebook, tokenizer: fingerprints to keep, or None where the records depend on neither.
        num_units: size of the codebook.
        rows_per_shard: records in a shard.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        codebook: str | None,
        tokenizer: str | None,
        num_units: int,
        rows_per_shard: int = 8192,
    ) -> None:
        self.folder = Path(folder)
        self._fingerprints = {"codebook": codebook, "tokenizer": tokenizer}
        self._num_units = num_units
        self._rows_per_shard = rows_per_shard
        self._rows: list[dict[str, Any]] = []
        self._shards: list[ShardInfo] = []
        self._num_records = self._num_frames = self._num_characters = 0

    def __enter__(self) -> Self:
        clear_folder(self.folder)
        return self

    def write(self, record: Record) -> None:
        """Add one record. Raises UserError where it is not a valid one."""
        where = f"{self.folder / shard_name(len(self._shards))}, row {len(self._rows)}"
        validate_record(record, self._num_units, where)
        self._rows.append(_record_row(record))
        self._num_records += 1
        self._num_frames += 0 if record.units is None else len(record.units)
        self._num_characters += len(record.text or "")
        if len(self._rows) == self._rows_per_shard:
            self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        if self._rows:
            self._flush()
        if not self._shards:
            raise UserError(f"{self.folder}: expected records to write, got none")
        counts = {
            "num_records": self._num_records,
            "num_frames": self._num_frames,
            "num_characters": self._num_characters,
            "num_units": self._num_units,
        }
        write_info(self.folder, "records", {**counts, **self._fingerprints}, self._shards)

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=_RECORD_SCHEMA)
        self._shards.append(write_table(self.folder, shard_name(len(self._shards)), table))
        self._rows = []


def write_shard(
    folder: Path | str, index: int, records: Sequence[Record], *, num_units: int
) -> WrittenShard:
    """Write one shard of a dataset that several processes make; :func:`join_shards` ends it.

    The file is there as a whole or not at all. Writing it again replaces it.

    Raises:
        UserError: a record that is not valid. Nothing is written then.
    """
    folder = Path(folder)
    name = shard_name(index)
    for row, record in enumerate(records):
        validate_record(record, num_units, f"{folder / name}, row {row}")
    table = pa.Table.from_pylist([_record_row(each) for each in records], schema=_RECORD_SCHEMA)
    return WrittenShard(
        info=write_table(folder, name, table),
        num_frames=sum(0 if each.units is None else len(each.units) for each in records),
        num_characters=sum(len(each.text or "") for each in records),
    )


def join_shards(
    folder: Path | str,
    shards: Sequence[WrittenShard],
    *,
    codebook: str | None,
    tokenizer: str | None,
    num_units: int,
) -> None:
    """Make a dataset of shards that :func:`write_shard` wrote into ``folder``, in this order.

    Raises:
        UserError: no shard at all, or one that is not there in full length.
    """
    folder = Path(folder)
    if not shards:
        raise UserError(f"{folder}: expected records to write, got none")
    sizes = Location(folder).sizes() or {}
    for shard in shards:
        check_size(f"{folder / shard.info.name}", shard.info, sizes.get(shard.info.name))
    facts = {
        "num_records": sum(shard.info.rows for shard in shards),
        "num_frames": sum(shard.num_frames for shard in shards),
        "num_characters": sum(shard.num_characters for shard in shards),
        "num_units": num_units,
        "codebook": codebook,
        "tokenizer": tokenizer,
    }
    write_info(folder, "records", facts, [shard.info for shard in shards])


def write_items(
    folder: Path | str,
    items: Sequence[StoryItem],
    *,
    codebook: str | None,
    tokenizer: str | None,
    num_units: int,
) -> None:
    """Write story-completion items as a folder of one shard and its ``dataset.json``."""
    folder = Path(folder)
    clear_folder(folder)
    rows = []
    for index, item in enumerate(items):
        _validate_item(item, num_units, f"{folder / shard_name(0)}, row {index}")
        rows.append(
            {
                "id": item.id,
                "task": item.task,
                "prompt": _record_row(item.prompt),
                "endings": [_record_row(ending) for ending in item.endings],
                "answer": item.answer,
            }
        )
    if not rows:
        raise UserError(f"{folder}: expected items to write, got none")
    shard = write_table(folder, shard_name(0), pa.Table.from_pylist(rows, schema=_ITEM_SCHEMA))
    counts = {
        "num_records": len(rows),
        "num_frames": 0,
        "num_characters": 0,
        "num_units": num_units,
    }
    for item in items:
        for record in (item.prompt, *item.endings):
            counts["num_frames"] += 0 if record.units is None else len(record.units)
            counts["num_characters"] += len(record.text or "")
    facts = {**counts, "codebook": codebook, "tokenizer": tokenizer}
    write_info(folder, "items", facts, [shard])


def _record_row(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in ("id", "text", "units", "speaker", "source")}
    for name in ("words", "chars"):
        spans = getattr(record, name)
        row[name] = None if spans is None else [asdict(span) for span in spans]
    return row


# Reading ------------------------------------------------------------------------------------------


class Dataset(Sequence[Record]):
    """Random access to the records of a folder.

    A shard is read, checked and kept in memory (as Arrow columns) at the first record asked of it;
    a record becomes Python objects only when asked for. Sent to another process, a dataset is its
    folder, opened again; a forked process shares the shards read before.

    Attributes:
        info: what ``dataset.json`` says.
        fingerprint: ``sha256:<hex>`` of ``dataset.json``, and so of everything in the folder.
    """

    def __init__(self, folder: Location, info: DatasetInfo, fingerprint: str) -> None:
        self.folder = folder
        self.info = info
        self.fingerprint = fingerprint
        self._first_rows = np.cumsum([0, *(shard.rows for shard in info.shards)])
        self._columns: list[_Columns | None] = [None] * len(info.shards)

    @classmethod
    def open(
        cls,
        folder: Path | str | Location,
        *,
        codebook: str | None = None,
        tokenizer: str | None = None,
    ) -> "Dataset":
        """Open a folder, checking that its shards are there in full length.

        Args:
            codebook, tokenizer: fingerprints that the caller works with; None to skip the check.
                A dataset that depends on neither fits every caller.

        Raises:
            UserError: not a dataset folder, no records, a missing or truncated shard, or units and
                texts made with other files than the caller's.
        """
        folder = Location(folder)
        info, fingerprint = read_info(folder, "records", codebook, tokenizer)
        return cls(folder, info, fingerprint)

    @property
    def has_speech(self) -> bool:
        return self.info.num_frames > 0

    def __len__(self) -> int:
        return self.info.num_records

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a dataset of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        columns = self._columns[shard]
        if columns is None:
            columns = _read_columns(self.folder, self.info.shards[shard], self.info.num_units)
            self._columns[shard] = columns
        return columns.record(index - int(self._first_rows[shard]))

    def read_shard(self, shard: int) -> Iterator[Record]:
        """All records of a shard in order; what was read is not kept. The same errors."""
        columns = _read_columns(self.folder, self.info.shards[shard], self.info.num_units)
        return map(columns.record, range(self.info.shards[shard].rows))

    def read(self, rows: Sequence[int] | np.ndarray | None = None) -> Iterator[Record]:
        """The records of ``rows``, which ascend, or all of them, with one shard in memory at a
        time. The same errors."""
        if rows is None:
            for shard in range(len(self.info.shards)):
                yield from self.read_shard(shard)
            return
        bounds = np.searchsorted(rows, self._first_rows)
        for shard, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if start < stop:
                columns = _read_columns(self.folder, self.info.shards[shard], self.info.num_units)
                for row in rows[start:stop]:
                    yield columns.record(int(row) - int(self._first_rows[shard]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.folder, self.info, self.fingerprint)


def read_items(
    folder: Path | str | Location, *, codebook: str | None = None, tokenizer: str | None = None
) -> list[StoryItem]:
    """Read what :func:`write_items` wrote; the same checks and errors as :meth:`Dataset.open`."""
    folder = Location(folder)
    info, _ = read_info(folder, "items", codebook, tokenizer)
    items = []
    for shard in info.shards:
        for row, fields in enumerate(read_table(folder, shard, _ITEM_SCHEMA).to_pylist()):
            item = StoryItem(
                id=fields["id"],
                task=fields["task"],
                prompt=_row_record(fields["prompt"]),
                endings=tuple(_row_record(ending) for ending in fields["endings"]),
                answer=fields["answer"],
            )
            _validate_item(item, info.num_units, f"{folder / shard.name}, row {row}")
            items.append(item)
    return items


def _validate_item(item: StoryItem, num_units: int, where: str) -> None:
    if item.task not in TASKS:
        raise UserError(f"{where}, item {item.id!r}: expected a task of {TASKS}, got {item.task!r}")
    if not 0 <= item.answer < len(item.endings):
        raise UserError(
            f"{where}, item {item.id!r}: expected an answer in [0, {len(item.endings)}), "
            f"got {item.answer}"
        )
    for record in (item.prompt, *item.endings):
        validate_record(record, num_units, where)


def _row_record(fields: dict[str, Any]) -> Record:
    units, words, chars = fields["units"], fields["words"], fields["chars"]
    return Record(
        id=fields["id"],
        text=fields["text"],
        units=None if units is None else np.array(units, np.int16),
        words=None if words is None else tuple(Word(**word) for word in words),
        chars=None if chars is None else tuple(Span(**span) for span in chars),
        speaker=fields["speaker"],
        source=fields["source"],
    )


@dataclass(frozen=True, slots=True)
class _Lists:
    """A list column as NumPy: row r holds values[offsets[r] : offsets[r + 1]], or is null."""

    null: np.ndarray
    offsets: np.ndarray
    values: pa.Array

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Lists":
        array = column.chunk(0)
        return cls(
            null=array.is_null().to_numpy(zero_copy_only=False),
            offsets=array.offsets.to_numpy(),
            values=array.values,
        )


@dataclass(frozen=True, slots=True)
class _Columns:
    """A shard in memory: numbers as NumPy views of the Arrow columns, strings as Arrow."""

    table: pa.Table
    units: _Lists
    unit_values: np.ndarray
    words: _Lists
    word_strings: pa.Array
    word_spans: np.ndarray  # (W, 2)
    chars: _Lists
    char_spans: np.ndarray  # (C, 2)

    def record(self, row: int) -> Record:
        units = words = chars = None
        if not self.units.null[row]:
            units = self.unit_values[self.units.offsets[row] : self.units.offsets[row + 1]]
        if not self.words.null[row]:
            start, stop = int(self.words.offsets[row]), int(self.words.offsets[row + 1])
            strings = self.word_strings.slice(start, stop - start).to_pylist()
            spans = self.word_spans[start:stop]
            words = tuple(map(Word, strings, spans[:, 0].tolist(), spans[:, 1].tolist()))
        if not self.chars.null[row]:
            spans = self.char_spans[self.chars.offsets[row] : self.chars.offsets[row + 1]]
            chars = tuple(map(Span, spans[:, 0].tolist(), spans[:, 1].tolist()))
        names = ("id", "text", "speaker", "source")
        strings = {name: self.table.column(name)[row].as_py() for name in names}
        return Record(units=units, words=words, chars=chars, **strings)


def _read_columns(folder: Location, shard: ShardInfo, num_units: int) -> _Columns:
    table = read_table(folder, shard, _RECORD_SCHEMA)
    units, words, chars = (_Lists.of(table.column(name)) for name in ("units", "words", "chars"))
    columns = _Columns(
        table=table,
        units=units,
        unit_values=_numbers(units.values),
        words=words,
        word_strings=words.values.field("word"),
        word_spans=_spans(words.values),
        chars=chars,
        char_spans=_spans(chars.values),
    )
    if not _columns_are_valid(columns, num_units):
        for row in range(shard.rows):
            validate_record(columns.record(row), num_units, f"{folder / shard.name}, row {row}")
    return columns


def _numbers(values: pa.Array) -> np.ndarray:
    return pc.fill_null(values, -1).to_numpy()  # what is null is not valid either


def _spans(values: pa.StructArray) -> np.ndarray:
    ends = [_numbers(values.field(name)) for name in ("start", "stop")]
    return np.stack(ends, axis=1).astype(np.int32)


def _columns_are_valid(columns: _Columns, num_units: int) -> bool:
    """What validate_record checks, for a whole shard at once."""
    ids, texts = columns.table.column("id"), columns.table.column("text")
    if pc.min(pc.binary_length(ids)).as_py() == 0:
        return False
    if np.any(columns.units.null & texts.is_null().to_numpy()):
        return False
    if columns.word_strings.null_count:
        return False
    letters = pc.fill_null(pc.utf8_length(texts), -1).to_numpy()
    if np.any(~columns.chars.null & (letters >= 0) & (np.diff(columns.chars.offsets) != letters)):
        return False
    units = columns.unit_values
    if len(units) and (units.min() < 0 or units.max() >= num_units):
        return False
    num_frames = np.diff(columns.units.offsets)
    for lists, spans in ((columns.words, columns.word_spans), (columns.chars, columns.char_spans)):
        counts = np.diff(lists.offsets)
        rows = np.repeat(np.arange(len(counts)), counts)
        if np.any(spans[:, 0] > spans[:, 1]) or np.any(spans[:, 0] < 0):
            return False
        if np.any(spans[:, 1] > num_frames[rows]):
            return False
        if np.any((spans[1:, 0] < spans[:-1, 1]) & (rows[1:] == rows[:-1])):
            return False
    return True
