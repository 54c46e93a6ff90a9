"""Units to sound by one call, whatever makes it."""

import numpy as np
import pytest

from lst.errors import UserError
from lst.speech.inversion import invert_units
from lst.speech.sound import load_voice, sound_of
from lst.speech.units import LogMelKMeans

NUM_UNITS = 7


@pytest.fixture
def codebook() -> LogMelKMeans:
    rng = np.random.default_rng(0)
    centroids = rng.integers(-200, 200, (NUM_UNITS, 26)).astype(np.int16)
    return LogMelKMeans(centroids, rng.normal(-4, 2, (NUM_UNITS, 2, 40)).astype(np.float32))


class Tones:
    """A vocoder of two speakers: a unit is a constant."""

    num_units = NUM_UNITS
    codebook = "sha256:tones"
    samples_per_unit = 640

    def speak(self, units: np.ndarray, *, speaker: str | None = None) -> np.ndarray:
        return np.repeat(units / NUM_UNITS, 640).astype(np.float32) * (0.5 if speaker else 1.0)


def test_the_file_of_a_codebook_is_a_voice(codebook: LogMelKMeans, tmp_path) -> None:
    codebook.save(tmp_path / "codebook.safetensors")
    units = np.array([3, 0, 6, 6])
    found = sound_of(units, load_voice(tmp_path / "codebook.safetensors"))
    np.testing.assert_array_equal(found, invert_units(units, codebook))
    assert found.shape == (4 * 640,)


def test_a_vocoder_speaks_by_the_speaker_asked_for() -> None:
    units = np.array([7 - 1, 2])
    assert sound_of(units, Tones())[0] == pytest.approx(6 / 7)
    assert sound_of(units, Tones(), speaker="other")[0] == pytest.approx(3 / 7)


def test_units_are_of_the_voice_s_codebook(codebook: LogMelKMeans) -> None:
    units = np.array([1])
    sound_of(units, codebook, codebook=codebook.fingerprint)
    sound_of(units, Tones(), codebook="sha256:tones")
    for voice in (codebook, Tones()):
        with pytest.raises(UserError, match=r"units of codebook sha256:another, got one of sha256"):
            sound_of(units, voice, codebook="sha256:another")


def test_no_units_are_no_sound(codebook: LogMelKMeans) -> None:
    for units in (np.zeros(0, np.int16), np.array([])):
        for voice in (codebook, Tones()):
            assert sound_of(units, voice).shape == (0,)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (np.array([NUM_UNITS]), r"in \[0, 7\), got 7 to 7"),
        (np.array([2, -1]), r"in \[0, 7\), got -1 to 2"),
        (np.array([0.5]), r"integers, got float64 \(1,\)"),
        (np.array([[1, 2]]), r"integers, got int64 \(1, 2\)"),
    ],
)
def test_units_that_the_voice_has_not(codebook: LogMelKMeans, units, message) -> None:
    for voice in (codebook, Tones()):
        with pytest.raises(UserError, match=message):
            sound_of(units, voice)


def test_a_codebook_has_no_speakers(codebook: LogMelKMeans) -> None:
    with pytest.raises(UserError, match="no voices, got 'us-m1'"):
        sound_of(np.array([1]), codebook, speaker="us-m1")
