"""The files of a dataset: Parquet shards, and ``dataset.json``, which describes them.

A folder without ``dataset.json`` is not a dataset: a writer that died leaves none. Each shard's
length and SHA-256 stand in it, so a truncated, exchanged or damaged shard is an error that names
the file. What the rows mean is for lst.data.records to know.
"""

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lst.errors import UserError
from lst.files import Location, write_atomically, write_json
from lst.strict_json import parse_json, read_strictly

__all__ = [
    "FRAMES_PER_SECOND",
    "MAX_UNITS",
    "DatasetInfo",
    "ShardInfo",
    "WrittenShard",
    "check_size",
    "clear_folder",
    "read_info",
    "read_table",
    "shard_name",
    "write_info",
    "write_table",
]

FRAMES_PER_SECOND = 25  # a speech unit is one frame of 40 ms
FORMAT = 1  # of dataset.json; raised when an older reader would misread a newer folder
MAX_UNITS = 32_768  # they are kept as int16


@dataclass(frozen=True, slots=True)
class ShardInfo:
    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard that is on disk, and what ``dataset.json`` has to know of it."""

    info: ShardInfo
    num_frames: int
    num_characters: int


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What ``dataset.json`` says.

    Attributes:
        codebook, tokenizer: fingerprints of the files that made the units and that go with the
            texts, ``sha256:<hex>``; None where the folder depends on neither.
        num_units: size of the codebook; units are in [0, num_units).
    """

    num_records: int
    num_frames: int
    num_characters: int
    codebook: str | None
    tokenizer: str | None
    num_units: int
    shards: tuple[ShardInfo, ...]

    @property
    def hours(self) -> float:
        return self.num_frames / FRAMES_PER_SECOND / 3600


# Writing ------------------------------------------------------------------------------------------


def shard_name(index: int) -> str:
    """The file of a dataset's shard."""
    return f"shard-{index:05d}.parquet"


def clear_folder(folder: Path) -> None:
    """Make the folder, or remove the dataset that is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").unlink(missing_ok=True)  # first: without it nothing is a dataset
    for path in folder.glob("shard-*.parquet*"):
        path.unlink()


def write_table(folder: Path, name: str, table: pa.Table) -> ShardInfo:
    """Write a shard, as a whole or not at all."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    write_atomically(folder / name, content)
    return ShardInfo(name, table.num_rows, len(content), hashlib.sha256(content).hexdigest())


def write_info(folder: Path, kind: str, facts: dict[str, Any], shards: list[ShardInfo]) -> None:
    """Write ``dataset.json``, which makes a dataset of the folder."""
    hours = round(facts["num_frames"] / FRAMES_PER_SECOND / 3600, 4)  # for people; not read back
    info = {"format": FORMAT, "kind": kind, **facts, "hours": hours}
    info["shards"] = [asdict(shard) for shard in shards]
    write_json(folder / "dataset.json", info)


# Reading ------------------------------------------------------------------------------------------


def read_info(
    folder: Location, kind: str, codebook: str | None, tokenizer: str | None
) -> tuple[DatasetInfo, str]:
    """What ``dataset.json`` says, and its fingerprint.

    Args:
        kind: what the rows are, "records" or "items".
        codebook, tokenizer: fingerprints that the caller works with; None to skip the check.

    Raises:
        UserError: not a dataset folder, one of another kind or with other fingerprints, no rows, or
            a shard that is missing or truncated.
    """
    path = folder / "dataset.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder}: expected a dataset folder, got no dataset.json in it "
            "(its writer did not finish, or the path is another)"
        ) from None
    sizes = folder.sizes()
    try:
        facts = parse_json(content, str(path))
        if (facts["format"], facts["kind"]) != (FORMAT, kind):
            raise UserError(
                f"{path}: expected {kind} in format {FORMAT}, "
                f"got {facts['kind']} in format {facts['format']}"
            )
        known = {name: facts[name] for name in DatasetInfo.__dataclass_fields__}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a dataset's description, got {error!r}") from None
    info = read_strictly(DatasetInfo, known, str(path))
    shards = info.shards
    _check_counts(info, str(path))
    if info.num_records == 0 or sum(shard.rows for shard in shards) != info.num_records:
        raise UserError(
            f"{path}: expected records and shards that agree, got {info.num_records} records and "
            f"{sum(shard.rows for shard in shards)} rows in {len(shards)} shards"
        )
    wanted = {"codebook": codebook, "tokenizer": tokenizer}
    for name, expected in wanted.items():
        got = getattr(info, name)
        if None not in (expected, got) and expected != got:
            raise UserError(f"{path}: expected data made with {name} {expected}, got {got}")
    if sizes is not None:
        for shard in shards:
            check_size(f"{folder / shard.name}", shard, sizes.get(shard.name))
    return info, f"sha256:{hashlib.sha256(content).hexdigest()}"


def _check_counts(info: DatasetInfo, where: str) -> None:
    counts = [info.num_records, info.num_frames, info.num_characters, info.num_units]
    counts += [count for shard in info.shards for count in (shard.rows, shard.bytes)]
    for count in counts:
        if not 0 <= count < 2**63:
            raise UserError(f"{where}: expected counts, got {count}")
    if info.num_units > MAX_UNITS:
        raise UserError(f"{where}: expected at most {MAX_UNITS:,} units, got {info.num_units}")


def check_size(where: str, shard: ShardInfo, size: int | None) -> None:
    """Raise UserError where a shard is not there in full length."""
    if size is None:
        raise UserError(f"{where}: expected a shard of {shard.rows} records, got no file")
    if size != shard.bytes:
        raise UserError(f"{where}: expected {shard.bytes} bytes, got {size}")


def read_table(folder: Location, shard: ShardInfo, schema: pa.Schema) -> pa.Table:
    """The rows of a shard, one chunk a column.

    Raises:
        UserError: the file is missing, damaged, or of another schema.
    """
    path = folder / shard.name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected a shard of {shard.rows} records, got no file") from None
    check_size(f"{path}", shard, len(content))
    digest = hashlib.sha256(content).hexdigest()
    if digest != shard.sha256:
        raise UserError(f"{path}: expected content of SHA-256 {shard.sha256}, got {digest}")
    # One thread: loader workers already take a core each, and forked threads do not survive.
    # Nor pq.read_table: its pool of threads, where torch is loaded too, often aborts at exit.
    table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    if table.num_rows != shard.rows or not table.schema.equals(schema):
        raise UserError(
            f"{path}: expected {shard.rows} rows of {schema.names}, "
            f"got {table.num_rows} of {table.schema.names}"
        )
    return table.combine_chunks()
