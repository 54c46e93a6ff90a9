"""Records as numbers alone, made once and mapped into memory from then on.

    records -> [encode] -> interleave -> patching -> packing -> batch

Training reads records in random order, epoch after epoch, in many processes. So what a record says
is put down once for each shard and tokenizer, in a file that all processes share through the page
cache: no text is tokenized and no Parquet is read while a model trains, and a remote corpus is
fetched once. The files are in the folder that the environment variable LST_CACHE names, or else in
``~/.cache/lst``. They may be removed whenever nothing trains.

    text    once upon a time there …          its pieces
    units   17 17 203 …                       as they are
    words   [0, 4) [4, 11) …                  and the pieces of the words, joined by blanks,
            ▁once | ▁upon | ▁a | ▁t ime | …   word by word

A file is named by the SHA-256 of its shard and by what else it depends on, so another corpus or
tokenizer makes another file. Every record has a checksum, looked at whenever it is read.
"""

import fcntl
import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lst.data.alignment import Alignment, aligned_spans
from lst.data.records import Dataset, Record
from lst.errors import UserError
from lst.files import reason
from lst.vocabulary import Tokenizer

__all__ = ["EncodedDataset", "EncodedRecord", "encode_record", "word_pieces"]

FORMAT = 1  # of the files; raised when their content changes
AlignedBy = Literal["words", "pieces"]


class EncodedRecord(NamedTuple):
    """What documents are made of.

    Attributes:
        text: (n,) pieces of the text, or None where there is none.
        units: (F,) int16 speech units, or None.
        words: (W, 2) int32 frames of each aligned word, or None where none is aligned.
        aligned: (A, 2) int32, as of ``aligned_spans``.
        pieces: (m,) pieces of the words, joined by blanks.
        cuts: (W+1,) int32, word i has pieces cuts[i] … cuts[i+1] - 1: those that end in it.
    """

    id: str
    text: np.ndarray | None
    units: np.ndarray | None
    words: np.ndarray | None
    aligned: np.ndarray
    pieces: np.ndarray
    cuts: np.ndarray


def encode_record(record: Record, tokenizer: Tokenizer, by: AlignedBy = "words") -> EncodedRecord:
    """A record as numbers; ``by``: what its aligned spans follow.

    Raises:
        UserError: the tokenizer changes the text, so that its pieces cannot be told apart by words.
    """
    words = None
    pieces, cuts = np.zeros(0, np.int32), np.zeros(1, np.int32)
    if record.words:
        words = np.array([(word.start, word.stop) for word in record.words], np.int32)
        pieces, cuts = word_pieces([word.word for word in record.words], tokenizer)
    return EncodedRecord(
        id=record.id,
        text=None if record.text is None else np.array(tokenizer.encode(record.text), np.int32),
        units=record.units,
        words=words,
        aligned=aligned_spans(record, tokenizer, Alignment(by=by)),
        pieces=pieces,
        cuts=cuts,
    )


def word_pieces(words: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """:attr:`EncodedRecord.pieces` and ``cuts`` of words, or of longer parts of a text.

    Raises:
        UserError: the tokenizer changes the text, so that its pieces cannot be told apart.
    """
    text = " ".join(words)
    pieces = np.array(tokenizer.encode(text), np.int32)
    parts = [tokenizer.encode(word) for word in words]
    if [piece for part in parts for piece in part] == pieces.tolist():
        lengths = [len(part) for part in parts]
        return pieces, np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    # The first word is cut in another way than the rest, or a piece goes beyond a word.
    blanks = np.cumsum([len(word) + 1 for word in words])[:-1] - 1
    cuts = np.searchsorted(tokenizer.piece_ends(text), blanks, side="right")
    return pieces, np.concatenate(([0], cuts, [len(pieces)])).astype(np.int32)


# Files --------------------------------------------------------------------------------------------


class EncodedDataset:
    """Random access to the encoded records of a dataset.

    Opening it makes the files that are not there yet; processes that open it at the same time share
    that work. Sent to another process it is the names of its files.

    Raises:
        UserError: a shard is damaged, or the files cannot be written.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, by: AlignedBy = "words") -> None:
        self._num_pieces = tokenizer.num_pieces
        key = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {by}".encode()).hexdigest()
        shards = dataset.info.shards
        folder = _cache_folder()
        self._paths = [folder / f"{shard.sha256[:20]}-{key[:20]}.arrow" for shard in shards]
        self._names = [f"{dataset.folder / shard.name}" for shard in shards]
        self._first_rows = [0, *accumulate(shard.rows for shard in shards)]
        self._shards: list[_Shard | None] = [None] * len(shards)

        def encoded(shard: int) -> Iterator[EncodedRecord]:
            for row, record in enumerate(dataset.read_shard(shard)):
                try:
                    yield encode_record(record, tokenizer, by)
                except UserError as error:
                    where = f"{self._names[shard]}, row {row}, record {record.id!r}"
                    raise UserError(f"{where}: {error}") from None

        def make(shard: int) -> None:
            _write(self._paths[shard], encoded(shard), tokenizer.num_pieces)

        _make_missing(self._paths, make, f"{dataset.folder}")

    def __len__(self) -> int:
        return self._first_rows[-1]

    def __getitem__(self, index: int) -> EncodedRecord:
        """Raises UserError where the record's checksum is wrong."""
        shard, row = self._place(index)
        return self._opened(shard).record(row)

    def first_without(self, column: Literal["text", "units", "words"]) -> int | None:
        """The first record that has no such thing; None where all have it."""
        for shard, first in enumerate(self._first_rows[:-1]):
            row = self._opened(shard).first_null(column)
            if row is not None:
                return first + row
        return None

    def where(self, index: int) -> str:
        """The file and row that a record came from."""
        shard, row = self._place(index)
        return f"{self._names[shard]}, row {row}"

    def _opened(self, shard: int) -> "_Shard":
        opened = self._shards[shard]
        if opened is None:
            rows = self._first_rows[shard + 1] - self._first_rows[shard]
            opened = self._shards[shard] = _Shard(self._paths[shard], rows, self._num_pieces)
        return opened

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a dataset of {len(self)}")
        shard = bisect_right(self._first_rows, index) - 1
        return shard, index - self._first_rows[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": [None] * len(self._shards)}


class _Shard:
    """A file mapped into memory: offsets and values of each column as NumPy views."""

    def __init__(self, path: Path, rows: int, num_pieces: int) -> None:
        self._path = path
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            if table.schema != _schema(num_pieces):
                raise ValueError("other columns")
            (batch,) = table.to_batches()
            batch.validate(full=True)  # checksums are of content: offsets are followed to it
            columns = {name: batch.column(name) for name in _LISTS}
            self._checksums = memoryview(batch.column("checksum").to_numpy())
            ids = batch.column("id").cast(pa.binary())
            _, offsets, values = ids.buffers()
            self._ids = memoryview(offsets).cast("i")[ids.offset :], memoryview(values or b"")
        except FileNotFoundError:
            raise UserError(f"{path}: was removed while a run reads it; start it again") from None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(f"{path}", str(error)) from None
        if len(ids) != rows:
            raise _damaged(f"{path}", f"{len(ids)} records for {rows}")
        # Read one number at a time a memoryview is far quicker than an array.
        self._lists = [
            (
                None if not each.null_count else each.is_null().to_numpy(zero_copy_only=False),
                memoryview(each.offsets.to_numpy()),
                each.values.to_numpy(),
            )
            for each in columns.values()
        ]

    def first_null(self, column: str) -> int | None:
        null = self._lists[_LISTS.index(column)][0]
        return None if null is None else int(np.argmax(null))

    def record(self, row: int) -> EncodedRecord:
        parts: list[Any] = []
        checksum = 0
        for null, offsets, values in self._lists:
            if null is not None and null[row]:
                parts.append(None)
                continue
            start, stop = offsets[row], offsets[row + 1]
            parts.append(part := values[start:stop])
            if start < stop:
                checksum = zlib.crc32(part, checksum)
        offsets, values = self._ids
        name = bytes(values[offsets[row] : offsets[row + 1]])
        if zlib.crc32(name, checksum) != self._checksums[row]:
            where = f"{self._path}, row {row}, record {name.decode(errors='replace')!r}"
            raise _damaged(where, "another checksum")
        text, units, words, aligned, pieces, cuts = parts
        return EncodedRecord(
            name.decode(),
            text,
            units,
            None if words is None else words.reshape(-1, 2),
            aligned.reshape(-1, 2),
            pieces,
            cuts,
        )


def _damaged(where: str, got: str) -> UserError:
    return UserError(
        f"{where}: expected the content that was written, got a damaged file ({got}); "
        "remove it, and it is made anew"
    )


_LISTS = ("text", "units", "words", "aligned", "pieces", "cuts")


def _schema(num_pieces: int) -> pa.Schema:
    piece = pa.uint16() if num_pieces <= 1 << 16 else pa.int32()
    types = dict.fromkeys(_LISTS, pa.int32()) | {
        "text": piece,
        "pieces": piece,
        "units": pa.int16(),
    }
    lists = {name: pa.list_(kind) for name, kind in types.items()}
    return pa.schema({"id": pa.string(), "checksum": pa.uint32(), **lists})


def _write(path: Path, records: Iterator[EncodedRecord], num_pieces: int) -> None:
    schema = _schema(num_pieces)
    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
    for record in records:
        checksum = 0
        for name in _LISTS:
            part = getattr(record, name)
            if part is not None:
                kind = schema.field(name).type.value_type
                part = part.astype(kind.to_pandas_dtype()).ravel()
                checksum = zlib.crc32(part.data, checksum)
            rows[name].append(part)
        rows["id"].append(record.id)
        rows["checksum"].append(zlib.crc32(record.id.encode(), checksum))
    table = pa.table(rows, schema=schema)
    # In containers that share a cache processes have the same numbers.
    temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=max(1, table.num_rows))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _cache_folder() -> Path:
    folder = Path(os.environ.get("LST_CACHE") or Path.home() / ".cache" / "lst")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: could not be written ({reason(error)}); LST_CACHE may name another folder"
    )


def _make_missing(paths: Sequence[Path], make: Callable[[int], None], title: str) -> None:
    """Call ``make`` for each path that is not there: what another process is at is left to it, and
    made here where it failed."""
    try:
        for wait in (False, True):
            missing = [number for number, path in enumerate(paths) if not path.exists()]
            if not missing:
                return
            for number in tqdm(missing, desc=f"cache of {title}", unit="shard", disable=None):
                with _claim(paths[number], wait=wait) as is_mine:
                    if is_mine and not paths[number].exists():
                        make(number)
    except OSError as error:
        raise _unwritable(paths[0].parent, error) from None


@contextmanager
def _claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone may make ``path``, until the end of the block."""
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)  # who waits for it finds the path made
