"""Passages as speech units: from recordings, or spoken by espeak."""

from dataclasses import replace
from pathlib import Path

from lst.data.records import Record
from lst.errors import UserError
from lst.evaluate.questions import Passage
from lst.generate.prompt import audio_units
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, Voice, synthesize
from lst.speech.units import UnitEncoder, word_frames

__all__ = ["Speaker", "find_voice"]


class Speaker:
    """Gives a passage its units.

    Args:
        encoder: makes units of a waveform.
        voice: speaks what is written, and recordings are not looked at; None: recordings are read.
    """

    def __init__(self, encoder: UnitEncoder, voice: Voice | None = None) -> None:
        self._encoder, self._voice = encoder, voice
        self._spoken: dict[tuple[object, ...], Record] = {}  # once for all modes

    def record(self, passage: Passage, spoken: bool) -> Record:
        """The passage's record, with units where it is to be spoken and has none. Words that espeak
        has spoken are aligned; nothing is in a recording.

        Raises:
            UserError: a recording that is missing, damaged, empty or silent; a text that the voice
                cannot speak.
        """
        record = passage.record
        if not spoken or (record.units is not None and self._voice is None):
            return record
        key = (record.id, record.text, passage.audio)
        if key not in self._spoken:
            self._spoken[key] = self._hear(passage) if self._voice is None else self._speak(record)
        return self._spoken[key]

    def _hear(self, passage: Passage) -> Record:
        assert passage.audio is not None
        return replace(passage.record, units=audio_units(passage.audio, self._encoder))

    def _speak(self, record: Record) -> Record:
        voice = self._voice
        assert voice is not None
        assert record.text is not None
        # A dash or dots between blanks: nothing to pronounce.
        words = [word for word in record.text.split() if any(c.isalnum() for c in word)]
        try:
            speech = synthesize(" ".join(words), voice)
        except UserError as error:
            raise UserError(f"{record.id}: {error}") from None
        units = self._encoder.encode(speech.waveform)
        return replace(
            record, units=units, words=word_frames(speech.words, len(units)), speaker=voice.name
        )


def find_voice(name: str) -> Voice:
    """One of our voices by its name (``us-f4``), or any of espeak's (``en-us+f4``)."""
    ours = {voice.name: voice for voice in (*TRAINING_VOICES, HELD_OUT_VOICE)}
    return ours.get(name, Voice(name=name, espeak=name))


def check_recordings(passages: list[Passage]) -> None:
    """Raise UserError where a recording is missing, before any work is done."""
    missing: list[Path] = [
        each.audio for each in passages if each.audio is not None and not each.audio.is_file()
    ]
    if missing:
        more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: expected a recording, got no file{more}")
