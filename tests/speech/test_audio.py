"""Any recording becomes the same waveform at 16 kHz, whichever way it is read; damage is named."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.errors import UserError
from lst.speech.audio import AudioError, AudioReader, read_audio, resample, write_wav

soundfile = pytest.importorskip("soundfile")

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)


def tone(rate, hertz, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def noise(num_samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_keeps_its_pitch_phase_and_loudness_at_any_rate(tmp_path, rate):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(rate, 440), rate, subtype="FLOAT")
    got = read_audio(path)
    assert got.dtype == np.float32
    assert len(got) == 8000
    inner = slice(400, -400)  # the filter meets silence at both ends
    np.testing.assert_allclose(got[inner], tone(16_000, 440)[inner], atol=2e-3)


def test_what_16_khz_cannot_hold_is_filtered_out_and_not_folded():
    got = resample(tone(48_000, 10_000), 48_000)
    assert np.abs(got[400:-400]).max() < 2e-3  # unfiltered it would be a tone of 6 kHz


def test_channels_are_averaged(tmp_path):
    left, right = noise(4000, 1), noise(4000, 2)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "two.wav"), (left + right) / 2, atol=1e-7)
    np.testing.assert_array_equal(AudioReader.open(tmp_path / "two.wav", [1]).read(), right)
    with pytest.raises(AudioError, match=r"two\.wav: expected channels \[2\], got 2 channels"):
        AudioReader.open(tmp_path / "two.wav", [2])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from(RATES), st.integers(1, 3000), st.integers(1, 2), st.data())
def test_a_part_is_what_it_is_in_the_whole(rate, num_samples, channels, data):
    source = np.stack([noise(num_samples, seed) for seed in range(channels)], 1)
    audio = AudioReader("noise", rate, num_samples, lambda start, stop: source[start:stop])
    whole = resample(source.mean(1), rate)
    assert audio.num_samples == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    np.testing.assert_allclose(audio.read(start, stop), whole[start:stop], atol=1e-6)


def test_a_part_reads_no_more_of_the_source_than_it_needs():
    asked = []

    def read_source(start, stop):
        asked.append((start, stop))
        return np.zeros(stop - start, np.float32)

    an_hour = 3600 * 48_000
    AudioReader("long", 48_000, an_hour, read_source).read(16_000 * 1800, 16_000 * 1801)
    ((start, stop),) = asked
    assert stop - start < 48_000 + 200
    assert start <= 48_000 * 1800 < 48_000 * 1801 <= stop


def test_seconds_pick_samples(tmp_path):
    samples = noise(16_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(
        read_audio(tmp_path / "a.wav", start=0.25, duration=0.5), samples[4000:12000]
    )
    # manifests round; what passes the end by less than a frame ends with it
    assert len(read_audio(tmp_path / "a.wav", start=0.5, duration=0.53)) == 8000
    with pytest.raises(AudioError, match=r"a\.wav: expected 1\.00 s of audio to hold \[0\.50, 2"):
        read_audio(tmp_path / "a.wav", start=0.5, duration=1.5)


def cut(path: Path, to: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * to)])


@pytest.mark.parametrize("suffix", [".wav", ".aiff", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("to", [0.5, 0.9])
def test_a_file_cut_short_is_refused_and_never_read_as_a_shorter_one(tmp_path, suffix, to):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, noise(48_000), 16_000)
    assert len(read_audio(path)) == 48_000
    cut(path, to)
    with pytest.raises(AudioError, match=rf"a\{suffix}: (cut short|damaged|not readable)"):
        read_audio(path)


@pytest.mark.parametrize("missing", [1, 700])
def test_an_ogg_file_cut_in_its_last_page_is_refused(tmp_path, missing):
    path = tmp_path / "a.ogg"
    soundfile.write(path, noise(48_000), 16_000)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 100)  # padding is no page
    assert len(read_audio(path)) == 48_000
    path.write_bytes(content[:-missing])
    with pytest.raises(AudioError, match=r"a\.ogg: cut short \(its last Ogg page is not whole\)"):
        read_audio(path)


def test_a_large_wav_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(48_000), 16_000, format="RF64", subtype="PCM_16")
    assert len(read_audio(path)) == 48_000
    cut(path, 0.9)
    with pytest.raises(AudioError, match=r"a\.wav: cut short \(48000 samples by its header, 43"):
        read_audio(path)


def write_altered(path, alter):
    """A second of noise, whose file ``alter`` changes in place."""
    soundfile.write(path, noise(16_000), 16_000)
    content = bytearray(path.read_bytes())
    alter(content)
    path.write_bytes(content)


def test_a_flac_file_that_does_not_say_how_long_it_is_is_refused(tmp_path):
    def forget(content):
        content[21] &= 0xF0  # 36 bits of STREAMINFO
        content[22:26] = bytes(4)

    path = tmp_path / "a.flac"
    write_altered(path, forget)
    with pytest.raises(AudioError, match=r"a\.flac: its header does not say how long it is"):
        read_audio(path)


def test_a_file_written_to_a_pipe_has_no_length_in_its_header_and_is_read(tmp_path):
    def forget(content):
        at = content.index(b"data") + 4
        content[at : at + 4] = b"\xff\xff\xff\xff"

    path = tmp_path / "a.wav"
    write_altered(path, forget)
    assert len(read_audio(path)) == 16_000


def test_what_is_no_audio_is_named(tmp_path):
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a sound" * 20)
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16_000)
    samples = noise(16_000)
    samples[8000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16_000, subtype="FLOAT")
    problems = {
        "absent.wav": "expected an audio file, got none",
        "empty.flac": "not readable as audio",
        "text.wav": "not readable as audio",
        "silent.wav": "expected audio, got 0 samples",
        "nan.wav": r"nan for a sample at 0\.500 s",
    }
    for name, problem in problems.items():
        with pytest.raises(AudioError, match=f"{name}: {problem}"):
            read_audio(tmp_path / name)


# --- written --------------------------------------------------------------------------------------


def test_a_written_wav_is_read_back_within_16_bits(tmp_path) -> None:
    waveform = np.random.default_rng(0).uniform(-1, 1, 999).astype(np.float32)
    write_wav(tmp_path / "a.wav", waveform)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), waveform, atol=1.01 / 65536)
    write_wav(tmp_path / "a.wav", np.array([2.0, -2.0, 1.0, -1.0, 0.0]))
    expected = [32767 / 32768, -1, 32767 / 32768, -1, 0]
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), np.float32(expected))


def test_a_wav_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    with pytest.raises(UserError, match=r"absent/a.wav: cannot be written"):
        write_wav(tmp_path / "absent" / "a.wav", np.zeros(3))
    with pytest.raises(UserError, match=r"a.wav: expected samples that are numbers, got NaN"):
        write_wav(tmp_path / "a.wav", np.array([0.0, np.nan]))
    assert list(tmp_path.iterdir()) == []
