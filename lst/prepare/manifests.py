"""Lhotse manifests as inputs: cuts, or recordings with their supervisions.

Times of a supervision count from the start of its cut, those of its alignment from the start of
the *recording* (lhotse's own convention); those of an input from the start of the input.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lst.errors import UserError
from lst.prepare.sources import Utterance, json_reason, spoken_words, whole, written

__all__ = ["list_cuts", "list_recordings", "list_supervisions"]


def list_cuts(paths: Iterable[Path]) -> Iterator[Utterance]:
    """Every cut of cut manifests, read one at a time."""
    for where, cut in _items(paths, ("MonoCut", "MultiCut")):
        if cut.recording is None:
            raise UserError(f"{where}, cut {cut.id!r}: expected a recording, got features alone")
        yield _utterance(
            cut.id, f"{where}, cut {cut.id!r}", cut.recording, cut.start, cut.duration, cut.channel,
            cut.supervisions,
        )  # fmt: skip


def list_recordings(paths: Iterable[Path]) -> Iterator[Utterance]:
    """Every recording as a whole, with no transcript."""
    for where, recording in _items(paths, ("Recording",)):
        where = f"{where}, recording {recording.id!r}"
        with _understanding(where):
            utterance = Utterance(id=written(recording.id), where=where, audio=_audio(recording))
        yield utterance


def list_supervisions(
    recordings: Iterable[Path], supervisions: Iterable[Path]
) -> Iterator[Utterance]:
    """Every supervision, a stretch of its recording. The recordings are held in memory."""
    by_id = {}
    for where, recording in _items(recordings, ("Recording",)):
        with _understanding(f"{where}, recording {recording.id!r}"):
            by_id[written(recording.id)] = recording
    for where, segment in _items(supervisions, ("SupervisionSegment",)):
        where = f"{where}, supervision {segment.id!r}"
        with _understanding(where):
            recording_id = written(segment.recording_id)
        if recording_id not in by_id:
            raise UserError(
                f"{where}: its recording {recording_id!r} is in no --recordings manifest"
            )
        yield _utterance(
            segment.id, where, by_id[recording_id], segment.start, segment.duration,
            segment.channel, [segment],
        )  # fmt: skip


def _items(paths: Iterable[Path], kinds: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(file and line, lhotse object) of each line of JSONL manifests, compressed or not."""
    try:
        from lhotse.serialization import deserialize_item, load_jsonl
    except ImportError as error:
        raise UserError(
            f"lhotse manifests need {error.name or 'lhotse'}, which is not installed: "
            "pip install 'lst[speech]'"
        ) from None
    for path in paths:
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"{path}: expected a lhotse manifest .jsonl or .jsonl.gz")
        number = 0
        lines = load_jsonl(path)
        while True:
            number += 1
            where = f"{path}, line {number}"
            try:
                fields = next(lines, None)
                if fields is None:
                    break
                item = deserialize_item(fields)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
                raise UserError(f"{where}: cannot be read ({_reason(error)})") from None
            # Whatever lhotse makes of a line that is none of its own.
            except Exception as error:
                raise UserError(f"{where}: not a lhotse manifest ({_reason(error)})") from None
            if type(item).__name__ not in kinds:
                raise UserError(f"{where}: expected {' or '.join(kinds)}, got {_name(item)}")
            yield where, item


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):  # its repr holds the whole file
        return "not UTF-8"
    return json_reason(error) if isinstance(error, json.JSONDecodeError) else repr(error)


def _name(item: Any) -> str:
    identity = getattr(item, "id", None)
    return type(item).__name__ + ("" if identity is None else f" {identity!r}")


def _utterance(
    identity: str,
    where: str,
    recording: Any,
    start: float,
    duration: float,
    channel: int | list[int],
    segments: list[Any],
) -> Utterance:
    channels = channel if isinstance(channel, list) else [channel]
    with _understanding(where):
        segments = sorted(segments, key=lambda segment: segment.start)
        speakers = {segment.speaker for segment in segments}
        speaker = speakers.pop() if len(speakers) == 1 else None
        texts = [written(segment.text) for segment in segments if segment.text]
        return Utterance(
            id=written(identity),
            where=where,
            audio=_audio(recording),
            start=float(start),
            duration=float(duration),
            channels=[whole(each) for each in channels],
            text=" ".join(texts) if texts else None,
            words=_words(segments, start),
            chars=_chars(segments, start),
            speaker=None if speaker is None else written(speaker),
        )


@contextmanager
def _understanding(where: str) -> Iterator[None]:
    """What lhotse reads may be of any type, as in JSON: raise UserError where it is of another."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: not as lhotse writes it ({_reason(error)})") from None


def _audio(recording: Any) -> dict[str, Any]:
    for count in (recording.sampling_rate, recording.num_samples):
        if not isinstance(count, int):
            raise TypeError(f"{count!r} is no whole number")
    if not isinstance(recording.duration, int | float):
        raise TypeError(f"{recording.duration!r} is no number of seconds")
    for each in recording.sources:
        if not isinstance(each.source, str | bytes):  # a number would be an open file's
            raise TypeError(f"{each.source!r} is no source of audio")
    values: dict[str, Any] = recording.to_dict()
    type(recording).from_dict(dict(values))  # as it is read again, for its audio
    return values


def _words(segments: list[Any], start: float) -> list[tuple[str, float, float]] | None:
    """Aligned words; None where a transcribed segment has none."""
    words = []
    for segment in segments:
        items = (segment.alignment or {}).get("word")
        if items:
            words += [(written(item.symbol), *_times(item, start)) for item in items]
        elif segment.text:
            return None
    return spoken_words(words)


def _chars(segments: list[Any], start: float) -> list[tuple[float, float]] | None:
    """Aligned characters, where they are exactly those of the text."""
    if len(segments) != 1:
        return None
    items = (segments[0].alignment or {}).get("char") or []
    if not items or "".join(item.symbol for item in items) != segments[0].text:
        return None
    return [_times(item, start) for item in items]


def _times(item: Any, start: float) -> tuple[float, float]:
    return float(item.start - start), float(item.end - start)
