"""Units → waveform, by whatever there is to make it: a codebook's centroids or a vocoder.

voice = load_voice("data/demo/codebook.safetensors")    # or the folder of a vocoder
waveform = sound_of(units, voice)                       # 16 kHz
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from lst.errors import UserError
from lst.speech.inversion import invert_units
from lst.speech.units import FRAME_SAMPLES, LogMelKMeans

__all__ = ["UnitVoice", "load_voice", "sound_of"]


class UnitVoice(Protocol):
    """What speaks units: a vocoder."""

    @property
    def num_units(self) -> int: ...

    @property
    def codebook(self) -> str | None:
        """The fingerprint of the codebook whose units it speaks; None where it is not known."""

    @property
    def samples_per_unit(self) -> int: ...

    def speak(self, units: np.ndarray, *, speaker: str | None = None) -> np.ndarray:
        """(F,) integers in [0, num_units) → (n,) float32 in [−1, 1] at 16 kHz."""


def load_voice(path: Path | str) -> LogMelKMeans | UnitVoice:
    """Open what speaks units: a vocoder's folder, or the file of a log-mel codebook, whose
    centroids are inverted.

    Raises:
        UserError: nothing of the kind is there.
    """
    if Path(path).is_dir():
        from lst.vocoder import load_vocoder

        return load_vocoder(path)
    return LogMelKMeans.load(path)


def sound_of(
    units: np.ndarray,
    voice: LogMelKMeans | UnitVoice,
    *,
    codebook: str | None = None,
    speaker: str | None = None,
) -> np.ndarray:
    """Speech units to a waveform, the same one each time.

    Args:
        units: (F,) integers in [0, voice.num_units), 25 a second; F may be 0.
        voice: of :func:`load_voice`.
        codebook: the fingerprint of the codebook that the units are of, to be compared with the
            voice's; None where it is not known.
        speaker: one of those that a vocoder of several was trained on; None for its first.

    Returns:
        (640 F,) float32 in [−1, 1] at 16 kHz.

    Raises:
        UserError: units that the voice does not have, or of another codebook; a speaker that it
            does not know; a vocoder for another number of units a second.
    """
    units = np.asarray(units)
    if units.ndim != 1 or (len(units) and not np.issubdtype(units.dtype, np.integer)):
        raise UserError(f"expected units (F,) as integers, got {units.dtype} {units.shape}")
    own = voice.fingerprint if isinstance(voice, LogMelKMeans) else voice.codebook
    if None not in (codebook, own) and codebook != own:
        raise UserError(f"expected a voice for units of codebook {codebook}, got one of {own}")
    if len(units) and not 0 <= units.min() <= units.max() < voice.num_units:
        raise UserError(
            f"expected units in [0, {voice.num_units}), got {units.min()} to {units.max()}"
        )
    if not isinstance(voice, LogMelKMeans):
        if voice.samples_per_unit != FRAME_SAMPLES:
            raise UserError(
                f"expected a vocoder of {FRAME_SAMPLES} samples a unit, "
                f"got one of {voice.samples_per_unit}"
            )
        return voice.speak(units, speaker=speaker)
    if speaker is not None:
        raise UserError(f"expected no speaker, as a codebook has no voices, got {speaker!r}")
    return invert_units(units, voice)
