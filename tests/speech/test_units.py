"""Units of speech: the same on every run, aligned with the words, phones rather than voices."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.errors import UserError
from lst.prepare.stories import generate_stories
from lst.speech.audio import Timed
from lst.speech.inversion import invert_units
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, Speech, synthesize
from lst.speech.units import FRAME_SAMPLES, LogMelKMeans, log_mels, word_frames
from lst.vocabulary import fingerprint

threadpool_limits = pytest.importorskip("threadpoolctl").threadpool_limits

NUM_UNITS = 120


@pytest.fixture(scope="module")
def spoken() -> list[tuple[str, Speech]]:
    """Three stories by each training voice: six minutes."""
    voices = TRAINING_VOICES * 3
    stories = generate_stories(5, len(voices))
    return [
        (voice.name, synthesize(story.text, voice))
        for story, voice in zip(stories, voices, strict=True)
    ]


@pytest.fixture(scope="module")
def codebook(spoken: list[tuple[str, Speech]]) -> LogMelKMeans:
    waveforms = [speech.waveform for _, speech in spoken]
    return LogMelKMeans.fit(waveforms, num_units=NUM_UNITS, max_passes=5)


@pytest.fixture(scope="module")
def unheard() -> Speech:
    """A story that no code was fitted to, in a voice that none was."""
    return synthesize(next(generate_stories(6, 1)).text, HELD_OUT_VOICE)


def phones_of_frames(speech: Speech, num_frames: int) -> list[str]:
    """The phone, without its stress, at each frame's centre; "" where it is silent."""
    labels = [""] * num_frames
    for phone in speech.phones:
        for frame in range(num_frames):
            if phone.start <= (frame + 0.5) * 0.04 < phone.stop:
                labels[frame] = phone.label.strip("',=:;%")
    return labels


def mutual_information(pairs: list[tuple[int, str]]) -> float:
    """Bits that one side of a pair tells of the other."""
    joint = Counter(pairs)
    left, right = (Counter(side) for side in zip(*pairs, strict=True))
    total = len(pairs)
    return sum(
        count / total * np.log2(count * total / (left[one] * right[other]))
        for (one, other), count in joint.items()
    )


def test_fit_is_the_same_for_every_number_of_threads(
    spoken: list[tuple[str, Speech]], codebook: LogMelKMeans
) -> None:
    waveforms = [speech.waveform for _, speech in spoken]
    with threadpool_limits(2):
        again = LogMelKMeans.fit(waveforms, num_units=NUM_UNITS, max_passes=5)
    assert again.fingerprint == codebook.fingerprint


def test_units_are_the_same_for_every_number_of_threads(
    codebook: LogMelKMeans, unheard: Speech
) -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with threadpool_limits(count):
                found.append(codebook.encode(unheard.waveform))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)


def test_units_do_not_depend_on_the_order_of_the_sum(
    codebook: LogMelKMeans, unheard: Speech
) -> None:
    order = np.random.default_rng(0).permutation(codebook.centroids.shape[1])
    shuffled = LogMelKMeans(codebook.centroids[:, order], codebook.log_mels)
    features = np.random.default_rng(1).integers(-3000, 3000, (500, len(order)), dtype=np.int16)
    np.testing.assert_array_equal(
        codebook._nearest(features), shuffled._nearest(features[:, order])
    )


@given(num_samples=st.integers(1, 5 * FRAME_SAMPLES))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_every_begun_frame_has_a_unit(codebook: LogMelKMeans, num_samples: int) -> None:
    units = codebook.encode(np.zeros(num_samples, np.float32))
    assert units.shape == (-(-num_samples // FRAME_SAMPLES),)
    assert units.dtype == np.int16


def test_units_do_not_depend_on_loudness(codebook: LogMelKMeans, unheard: Speech) -> None:
    same = codebook.encode(unheard.waveform) == codebook.encode(0.5 * unheard.waveform)
    assert same.mean() > 0.98


def test_a_frame_covers_its_own_40_ms() -> None:
    waveform = np.zeros(20 * FRAME_SAMPLES)
    waveform[7 * FRAME_SAMPLES : 8 * FRAME_SAMPLES] = np.random.default_rng(0).normal(
        size=FRAME_SAMPLES
    )
    power = np.exp(log_mels(waveform)).sum((1, 2))
    assert power.argmax() == 7
    assert power[7] > 0.8 * power.sum()


def test_a_tone_falls_into_its_band() -> None:
    seconds = np.arange(FRAME_SAMPLES * 4) / 16_000
    bands = [log_mels(np.sin(2 * np.pi * f * seconds))[2, 0].argmax() for f in (200, 1000, 4000)]
    # 40 bands, evenly spaced in 2595 log10(1 + f / 700) from 60 Hz to 7.6 kHz.
    assert bands == [2, 13, 30]


def test_units_tell_phones_more_than_voices(
    spoken: list[tuple[str, Speech]], codebook: LogMelKMeans
) -> None:
    phones: list[tuple[int, str]] = []
    voices: list[tuple[int, str]] = []
    for voice, speech in spoken:
        units = codebook.encode(speech.waveform).tolist()
        phones += zip(units, phones_of_frames(speech, len(units)), strict=True)
        voices += zip(units, [voice] * len(units), strict=True)
    assert mutual_information(phones) > 2.5
    assert mutual_information(voices) < 0.5 * mutual_information(phones)


def test_word_frames_are_within_a_frame_of_the_words(
    spoken: list[tuple[str, Speech]], codebook: LogMelKMeans
) -> None:
    for _, speech in spoken:
        num_frames = len(codebook.encode(speech.waveform))
        frames = word_frames(speech.words, num_frames)
        assert [word.word for word in frames] == [word.label for word in speech.words]
        for word, timed in zip(frames, speech.words, strict=True):
            assert 0 <= word.start < word.stop <= num_frames
            assert abs(0.04 * word.start - timed.start) <= 0.04
            assert abs(0.04 * word.stop - timed.stop) <= 0.04


def test_silent_units_lie_outside_the_words(
    spoken: list[tuple[str, Speech]], codebook: LogMelKMeans
) -> None:
    """The units themselves agree with the word times: the codes of the last 120 ms of each
    utterance, where espeak is silent, are those between words and hardly any inside."""
    units = [codebook.encode(speech.waveform) for _, speech in spoken]
    silent = {int(unit) for each in units for unit in each[-3:]}
    inside: list[bool] = []
    outside: list[bool] = []
    for (_, speech), each in zip(spoken, units, strict=True):
        spoken_frames = np.zeros(len(each), bool)
        for word in word_frames(speech.words, len(each)):
            spoken_frames[word.start : word.stop] = True
        is_silent = np.isin(each, list(silent))
        inside += is_silent[spoken_frames].tolist()
        outside += is_silent[~spoken_frames].tolist()
    assert np.mean(inside) < 0.1
    assert np.mean(outside) > 0.6


@given(
    st.lists(st.floats(0, 3), min_size=2, max_size=12).map(sorted),
    st.integers(1, 80),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_word_frames_stay_in_order_inside_the_units(times: list[float], num_frames: int) -> None:
    words = [Timed("x", *pair) for pair in zip(times[::2], times[1::2], strict=False)]
    ends = [end for word in word_frames(words, num_frames) for end in (word.start, word.stop)]
    assert ends == sorted(ends)
    assert ends[0] >= 0
    assert ends[-1] <= num_frames


def test_saved_codebook_is_the_same(
    tmp_path: Path, codebook: LogMelKMeans, unheard: Speech
) -> None:
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    loaded = LogMelKMeans.load(path)
    assert loaded.fingerprint == codebook.fingerprint == fingerprint(path)
    assert (loaded.num_units, loaded.frame_rate) == (NUM_UNITS, 25)
    np.testing.assert_array_equal(
        loaded.encode(unheard.waveform), codebook.encode(unheard.waveform)
    )


def test_damaged_codebook_is_refused(tmp_path: Path, codebook: LogMelKMeans) -> None:
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged codebook, expected content"):
        LogMelKMeans.load(path)
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match="no codebook could be read here"):
        LogMelKMeans.load(path)
    path.write_bytes(content.replace(rb"\"sha256\":", rb"\"sha256\" "))
    with pytest.raises(UserError, match=r"codebook\.safetensors: expected JSON, got"):
        LogMelKMeans.load(path)
    with pytest.raises(UserError, match="expected the file of a codebook, got a folder"):
        LogMelKMeans.load(tmp_path)
    with pytest.raises(UserError, match=r"absent\.safetensors: no codebook could be read here"):
        LogMelKMeans.load(tmp_path / "absent.safetensors")


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(UserError, match="expected a codebook of format"):
        LogMelKMeans.load(path)


def test_too_little_speech_is_named(unheard: Speech) -> None:
    with pytest.raises(UserError, match="expected at least 100 frames to fit 100 speech units"):
        LogMelKMeans.fit([unheard.waveform[:16_000]], num_units=100)


def test_missing_sklearn_names_the_extra(monkeypatch: pytest.MonkeyPatch, unheard: Speech) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lst[speech]'")):
        LogMelKMeans.fit([unheard.waveform], num_units=2)


def test_inverted_units_are_heard_as_themselves(codebook: LogMelKMeans, unheard: Speech) -> None:
    units = codebook.encode(unheard.waveform)
    waveform = invert_units(units, codebook, iterations=10)
    assert waveform.shape == (len(units) * FRAME_SAMPLES,)
    assert waveform.dtype == np.float32
    assert np.abs(waveform).max() <= 1
    shuffled = np.random.default_rng(0).permutation(units)
    assert np.mean(codebook.encode(waveform) == units) > 0.6
    assert np.mean(codebook.encode(invert_units(shuffled, codebook, iterations=10)) == units) < 0.2

    def correlation(other: np.ndarray) -> float:
        mels = [log_mels(each).ravel() for each in (unheard.waveform, other)]
        return float(np.corrcoef(*mels)[0, 1])

    assert correlation(waveform) > 0.8
    assert correlation(invert_units(shuffled, codebook, iterations=10)) < 0.4


def test_no_units_are_no_sound_and_a_foreign_unit_is_named(codebook: LogMelKMeans) -> None:
    assert invert_units(np.zeros(0, np.int16), codebook).shape == (0,)
    with pytest.raises(UserError, match=re.escape(f"units in [0, {NUM_UNITS}), got 3 to 120")):
        invert_units(np.array([3, NUM_UNITS]), codebook)
