"""From an utterance to a record: waveform → units, and words in frames.

    audio → 16 kHz → units                     25 a second
    words of the manifest, or of the aligner → frames, each end to the nearest, disjoint

Longer audio is read and encoded in stretches (:func:`lst.speech.units.in_stretches`), so that hours
of it are never in memory. The aligner takes up to an hour at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lst.data.records import FRAMES_PER_SECOND, Record, Span, Word
from lst.errors import UserError
from lst.prepare.outcomes import Outcome, Skipped
from lst.prepare.sources import Utterance
from lst.speech.audio import SAMPLE_RATE, AudioError, AudioReader, sample_range
from lst.speech.units import UnitEncoder, in_stretches

if TYPE_CHECKING:
    from lst.speech.alignment import CTCAligner

__all__ = ["Studio", "encode_audio", "frame_spans", "open_audio", "written_words"]

ALIGNED = 3600 * SAMPLE_RATE
OUTSIDE = 0.1  # seconds by which a word may leave its utterance; more is another utterance's time


@dataclass(frozen=True)
class Studio:
    """What utterances are prepared with."""

    encoder: UnitEncoder
    aligner: "CTCAligner | None"  # for words that the manifest has no times of
    untranscribed: bool  # whether audio without a transcript becomes a record of units alone
    source: str

    def prepare(self, utterance: Utterance) -> Outcome:
        """A record, or why there is none."""
        try:
            text = _transcript(utterance)
            if text is None and not self.untranscribed:
                raise AudioError("no transcript; --untranscribed keeps such audio")
            audio = open_audio(utterance)
            start, stop = sample_range(audio, utterance.start, utterance.duration)
            units = encode_audio(self.encoder, audio, start, stop)
            words, chars = _given_alignment(utterance, text, len(units))
            if words is None and text is not None and stop - start <= ALIGNED:
                words, chars = self._align(audio, start, stop, text, len(units))
        except AudioError as error:
            return Skipped(utterance.where, str(error).removeprefix(f"{utterance.where}: "))
        return Record(
            id=utterance.id,
            text=text,
            units=units,
            words=words,
            chars=chars,
            speaker=utterance.speaker,
            source=self.source,
        )

    def _align(
        self, audio: AudioReader, start: int, stop: int, text: str, num_frames: int
    ) -> tuple[tuple[Word, ...] | None, tuple[Span, ...] | None]:
        if self.aligner is None or self.aligner.reason_against(stop - start, text) is not None:
            return None, None
        waveform = audio.read(start, stop)
        try:
            (alignment,) = self.aligner.align([waveform], [text])
        except UserError:  # a text that is far from what is said
            return None, None
        return alignment.frames(num_frames)


def open_audio(utterance: Utterance) -> AudioReader:
    """Raises AudioError where there is none to be read."""
    if isinstance(utterance.audio, str):
        return AudioReader.open(utterance.audio, utterance.channels)
    from lhotse import Recording

    try:
        recording = Recording.from_dict(dict(utterance.audio))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AudioError(f"{utterance.where}: not a recording of lhotse ({error!r})") from None
    return AudioReader.of_recording(recording, utterance.channels)


def encode_audio(encoder: UnitEncoder, audio: AudioReader, start: int, stop: int) -> np.ndarray:
    """Samples [start, stop) at 16 kHz → (⌈(stop − start) / 640⌉,) int16 units."""
    return in_stretches(
        encoder.encode, lambda first, last: audio.read(start + first, start + last), stop - start
    )


def frame_spans(times: Sequence[tuple[float, float]], num_frames: int) -> list[tuple[int, int]]:
    """Seconds to frames, each end to the nearest (at most 20 ms away), in order and disjoint: where
    two overlap, the later one starts where the earlier one stops.

    Raises:
        AudioError: times that are not of these frames, or run backwards.
    """
    spans = []
    end = 0
    seconds = num_frames / FRAMES_PER_SECOND
    for start, stop in times:
        if not -OUTSIDE <= start <= stop <= seconds + OUTSIDE:
            raise AudioError(
                f"alignment [{start:.2f}, {stop:.2f}) s is not in its utterance [0, {seconds:.2f})"
            )
        first, last = (
            min(max(round(time * FRAMES_PER_SECOND), end), num_frames) for time in (start, stop)
        )
        spans.append((first, last))
        end = last
    return spans


def written_words(text: str | None, labels: Sequence[str]) -> list[str]:
    """The aligned words as the text writes them, with case and punctuation, where the text has the
    same words; else the labels as they are."""
    written = (text or "").split()
    if len(written) == len(labels) and all(
        _letters(one) == _letters(other) for one, other in zip(written, labels, strict=True)
    ):
        return written
    return list(labels)


def _letters(word: str) -> str:
    return "".join(filter(str.isalnum, word.casefold()))


def _transcript(utterance: Utterance) -> str | None:
    """The text on one line; as it is where its characters are aligned."""
    text = utterance.text
    if text is None and utterance.text_file is not None:
        path = Path(utterance.text_file)
        try:
            text = path.read_text(encoding="utf-8-sig") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise AudioError(f"{utterance.text_file}: not readable as text ({error})") from None
    if text is None or not text.strip():
        return None
    return text if utterance.chars is not None else " ".join(text.split())


def _given_alignment(
    utterance: Utterance, text: str | None, num_frames: int
) -> tuple[tuple[Word, ...] | None, tuple[Span, ...] | None]:
    words = chars = None
    if utterance.words is not None:
        ordered = sorted(utterance.words, key=lambda word: word[1:])
        labels = written_words(text, [label for label, _, _ in ordered])
        spans = frame_spans([(start, stop) for _, start, stop in ordered], num_frames)
        words = tuple(
            Word(label, start, stop) for label, (start, stop) in zip(labels, spans, strict=True)
        )
    if utterance.chars is not None:
        chars = tuple(Span(*span) for span in frame_spans(utterance.chars, num_frames))
    return words, chars
