"""Where a corpus comes from: every way in becomes a list of inputs.

    lhotse manifests, a folder of audio, a CSV or JSONL manifest  → Utterance, one record each
    text files, the JSONL of the paper's code                     → Part, one record a line

Listing reads manifests and folders, never audio: an input says where its audio and text are, and
what is wrong with them is found when it is prepared. A manifest that is itself malformed is an
error here, before any work is done.
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lst.errors import UserError
from lst.speech.audio import AUDIO_SUFFIXES
from lst.strict_json import parse_json, read_strictly

__all__ = [
    "Part",
    "Sources",
    "Utterance",
    "from_json",
    "json_reason",
    "list_inputs",
    "source_kind",
]

PART_BYTES = 32 << 20  # of a text file that is prepared at once
TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
PAUSES = ("", "<eps>", "<sil>", "[SIL]")  # what aligners write for a silence between words
MANIFEST_COLUMNS = (
    "audio", "id", "text", "speaker", "start", "duration", "channel", "words"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a corpus comes from; exactly one kind of source, of any number of files."""

    cuts: tuple[Path, ...] = ()  # lhotse cut manifests; each cut is a record
    recordings: tuple[Path, ...] = ()  # lhotse recording manifests; each recording is a record
    supervisions: tuple[Path, ...] = ()  # with --recordings: each supervision is a record
    folder: Path | None = None  # audio files, each with its transcript in a .txt of the same name
    manifest: tuple[Path, ...] = ()  # .csv or .jsonl with audio, text, speaker, … (docs/data.md)
    text: tuple[Path, ...] = ()  # .txt (a record a line), .jsonl, .parquet, or folders of them
    authors: tuple[Path, ...] = ()  # the JSONL of the paper's public code, which has units
    allow_commands: bool = False  # run the shell commands that lhotse manifests name as audio


KINDS = ("cuts", "recordings", "supervisions", "folder", "manifest", "text", "authors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """A stretch of audio that becomes a record.

    Attributes:
        where: the manifest or folder and the record in it, for messages.
        audio: a file, or a lhotse recording as a dictionary.
        start, duration: seconds; a duration of None is the rest.
        channels: whose mean is taken; None for all.
        text_file: where the transcript is, unless ``text`` is it.
        words: (word, start, stop) in seconds from the start of the stretch.
        chars: (start, stop) of each character of ``text``, likewise.
    """

    id: str
    where: str
    audio: str | dict[str, Any]
    start: float = 0.0
    duration: float | None = None
    channels: list[int] | None = None
    text: str | None = None
    text_file: str | None = None
    words: list[tuple[str, float, float]] | None = None
    chars: list[tuple[float, float]] | None = None
    speaker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Lines of a text file: those that begin in bytes [start, stop), or the rows of the row groups
    [start, stop) of a Parquet file. A stop of None is the end of the file."""

    name: str  # of the file in its source, the beginning of its records' ids
    path: str
    start: int = 0
    stop: int | None = None


Input = Utterance | Part


def source_kind(sources: Sources) -> str:
    """The one kind that is given, a field of :class:`Sources`. Raises UserError for none or two."""
    given = [name for name in KINDS if getattr(sources, name)]
    if given == ["recordings", "supervisions"]:
        return "recordings"
    if len(given) != 1 or given == ["supervisions"]:
        named = ", ".join(f"--{name}" for name in given) or "none"
        raise UserError(
            "expected one source: --cuts, --recordings (with or without --supervisions), --folder, "
            f"--manifest, --text or --authors; got {named}"
        )
    return given[0]


def list_inputs(sources: Sources) -> Iterator[Input]:
    """Every input, in an order that depends on the source alone.

    Raises:
        UserError: a manifest that cannot be read or understood, naming file and record; a folder
            with nothing to prepare; lhotse manifests without lhotse.
    """
    kind = source_kind(sources)
    if kind in ("cuts", "recordings"):
        listed = _list_lhotse(sources)
        return listed if sources.allow_commands else map(_expect_no_command, listed)
    if kind == "folder":
        assert sources.folder is not None
        return _list_folder(sources.folder)
    if kind == "manifest":
        return _list_manifests(sources.manifest)
    paths = sources.text if kind == "text" else sources.authors
    return _list_parts(paths, TEXT_SUFFIXES if kind == "text" else None)


def _list_lhotse(sources: Sources) -> Iterator[Utterance]:
    from lst.prepare.manifests import list_cuts, list_recordings, list_supervisions

    if sources.cuts:
        return list_cuts(sources.cuts)
    if sources.supervisions:
        return list_supervisions(sources.recordings, sources.supervisions)
    return list_recordings(sources.recordings)


def _expect_no_command(each: Utterance) -> Utterance:
    assert isinstance(each.audio, dict)
    for source in each.audio["sources"]:
        if source["type"] == "command":
            raise UserError(
                f"{each.where}: its audio is what a shell command prints; to run those of a "
                f"manifest that you trust, give --allow-commands"
            )
    return each


def fingerprint(sources: Sources) -> dict[str, dict[str, str]]:
    """What the inputs are, by kind and path: a file's SHA-256; of a folder that of the names and
    sizes of its files.

    Raises:
        UserError: one of them cannot be read.
    """
    kind = source_kind(sources)
    found: dict[str, dict[str, str]] = {}
    for name in (kind, *(["supervisions"] if sources.supervisions else [])):
        given = getattr(sources, name)
        paths = [given] if isinstance(given, Path) else given
        # Text files are as large as the corpus: their names and sizes must do.
        by_content = kind not in ("folder", "text", "authors")
        found[name] = {str(path): _digest(path, by_content) for path in paths}
    return found


def from_json(kind: str, values: Any, where: str) -> Input:
    """An input from the values of :func:`to_json`. Raises UserError where they are none."""
    if kind in ("text", "authors"):
        return read_strictly(Part, values, where)
    return read_strictly(Utterance, values, where)


def to_json(each: Input) -> str:
    # In ASCII: a text may hold ends of lines of Unicode's own, and a file's name no Unicode.
    return json.dumps(asdict(each))


def written(value: Any) -> str:
    """A text of a manifest, or a number as it is written. Raises ValueError for anything else: a
    NaN is what is missing from a table."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(value, str) or (is_number and math.isfinite(value))):
        raise ValueError(f"{value!r} is no text")
    return str(value)


def whole(value: Any) -> int:
    """A whole number of a manifest, whatever it is written as. Raises ValueError or TypeError."""
    if not float(value).is_integer():
        raise ValueError(f"{value!r} is no whole number")
    return int(float(value))


def spoken_words(
    words: Iterable[tuple[str, float, float]],
) -> list[tuple[str, float, float]] | None:
    """Without the silences among them; None where nothing is left."""
    return [word for word in words if word[0].strip() not in PAUSES] or None


def _digest(path: Path, by_content: bool) -> str:
    try:
        if path.is_file() and by_content:
            with path.open("rb") as opened:
                return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
        digest = hashlib.sha256()
        for name, file in _files(path):
            size = None if _leads_nowhere(file) else file.stat().st_size
            digest.update(os.fsencode(f"{name}\0{size}\n"))
        return f"names and sizes sha256:{digest.hexdigest()}"
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to ``path``, file) of a file or of every file in a folder, sorted."""
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise UserError(f"{path}: expected a file or a folder, got neither")

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        folders.sort()
        for each in (Path(folder) / name for name in folders):
            if each.is_symlink() and Path(folder).resolve().is_relative_to(each.resolve()):
                raise UserError(f"{each}: is a link to a folder that it is in, so has no end")
        for name in sorted(names):
            file = Path(folder) / name
            yield file.relative_to(path).as_posix(), file


def _leads_nowhere(path: Path) -> bool:
    """Whether a file of a folder is a link to what is not there: it is one that cannot be read."""
    return path.is_symlink() and not path.exists()


def _list_folder(folder: Path) -> Iterator[Utterance]:
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: expected a folder, got none")
    found = False
    for _, files in groupby(_files(folder), key=lambda file: file[1].parent):
        here = dict(files)
        audio = {Path(name).with_suffix("") for name in here if _is_audio(name)}
        for name, path in here.items():
            stem = Path(name).with_suffix("")
            # A transcript without audio is an input too: nothing is left out without a word.
            if _is_audio(name) or (path.suffix == ".txt" and stem not in audio):
                found |= _is_audio(name)
                yield Utterance(
                    id=str(stem),
                    where=str(path),
                    audio=str(path if _is_audio(name) else path.with_suffix(".*")),
                    text_file=str(path.with_suffix(".txt")),
                )
    if not found:
        raise UserError(f"--folder {folder}: expected files {', '.join(AUDIO_SUFFIXES)}, got none")


def _is_audio(name: str) -> bool:
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


# CSV and JSONL manifests --------------------------------------------------------------------------


def _list_manifests(paths: Iterable[Path]) -> Iterator[Utterance]:
    for path in paths:
        rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
        for where, row in rows:
            yield _manifest_utterance(row, where, path.parent)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)  # hours of speech have a longer text than is usual in a field
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            columns: list[str] | None = None
            while True:
                where = f"{path}, line {rows.line_num + 1}"
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    raise UserError(f"{where}: not CSV ({error})") from None
                if columns is None:
                    columns = row or []
                    _check_columns(columns, where)
                elif row is None:
                    return
                elif row:  # a blank line is none
                    if len(row) != len(columns):
                        raise UserError(f"{where}: expected {len(columns)} columns, got {len(row)}")
                    fields = zip(columns, row, strict=True)
                    yield where, {name: value for name, value in fields if value != ""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".jsonl":
        raise UserError(f"--manifest {path}: expected a .csv or .jsonl file, got {path.suffix!r}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                row = parse_json(line, where)
                if not isinstance(row, dict):
                    raise UserError(f"{where}: expected an object, got {type(row).__name__}")
                _check_columns(list(row), where)
                yield where, {name: value for name, value in row.items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _check_columns(columns: Sequence[str], where: str) -> None:
    names = set(columns)
    if "audio" not in names or not names <= set(MANIFEST_COLUMNS) or len(names) < len(columns):
        raise UserError(
            f"{where}: expected audio and, of {', '.join(MANIFEST_COLUMNS[1:])}, what is known, "
            f"each once; got {', '.join(map(str, columns)) or 'nothing'}"
        )


def json_reason(error: Exception) -> str:
    """What is wrong with a line that is not JSON. It is one line: a number of it would mislead."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.pos + 1}"
    return str(error)


def _manifest_utterance(row: dict[str, Any], where: str, folder: Path) -> Utterance:
    if "audio" not in row:
        raise UserError(f"{where}: expected audio, got none")
    audio = row["audio"]
    if not isinstance(audio, str) or not Path(audio).name:
        raise UserError(f"{where}: expected the name of a file for audio, got {audio!r}")
    try:
        words = row.get("words")
        return Utterance(
            id=written(row.get("id", str(Path(audio).with_suffix("")))),
            where=where,
            audio=str(folder / audio),
            start=float(row.get("start", 0.0)),
            duration=float(row["duration"]) if "duration" in row else None,
            channels=[whole(row["channel"])] if "channel" in row else None,
            text=written(row["text"]) if "text" in row else None,
            words=None
            if words is None
            else spoken_words(
                (written(w["word"]), float(w["start"]), float(w["stop"])) for w in words
            ),
            speaker=written(row["speaker"]) if "speaker" in row else None,
        )
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError(
            f"{where}: expected numbers for start, duration and channel, texts for id, text and "
            'speaker, and for words a list of {"word", "start", "stop"} in seconds; '
            f"got {error!r}"
        ) from None


# Text ---------------------------------------------------------------------------------------------


def _list_parts(paths: Iterable[Path], suffixes: tuple[str, ...] | None) -> Iterator[Part]:
    for given in paths:
        found = False
        for name, path in _files(given):
            if suffixes is not None and not name.endswith(suffixes):
                if path == given:
                    raise UserError(f"{path}: expected a file {', '.join(suffixes)}")
                continue
            found = True
            yield from _parts(name, path)
        if not found:
            raise UserError(f"{given}: expected text files {', '.join(suffixes or ())}, got none")


def _parts(name: str, path: Path) -> Iterator[Part]:
    if name.endswith(".parquet"):
        try:
            num_groups = pq.ParquetFile(path).metadata.num_row_groups
        except (OSError, ValueError, pa.ArrowException):
            num_groups = 1  # preparing it finds the same, and lists it
        for group in range(num_groups):
            yield Part(name=name, path=str(path), start=group, stop=group + 1)
        return
    if name.endswith(".gz") or _leads_nowhere(path):
        yield Part(name=name, path=str(path))
        return
    for start in range(0, path.stat().st_size, PART_BYTES):
        yield Part(name=name, path=str(path), start=start, stop=start + PART_BYTES)
