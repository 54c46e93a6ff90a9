"""Recordings as mono waveforms at 16 kHz, read as a whole or a part at a time.

    file or lhotse recording, any rate and channel count → mean of the channels → 16 kHz

A part is what the same part of the whole would be: resampling by up / down (a polyphase filter of
20 · max(up, down) taps) needs the source's samples around the part and no others, so an hour of
sound never has to be in memory.

    audio = AudioReader.open("story.flac")
    audio.num_samples                 # at 16 kHz
    audio.read(16_000, 32_000)        # (16000,) float32, the second second
"""

import io
import os
import re
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Self

import numpy as np

from lst.errors import UserError
from lst.files import write_atomically

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE",
    "AudioError",
    "AudioReader",
    "Timed",
    "read_audio",
    "resample",
    "write_wav",
]

#: Samples a second of every waveform here; what is read at another rate is resampled.
SAMPLE_RATE = 16_000
#: What libsndfile reads.
AUDIO_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav")
MAX_RATE = 768_000  # a header that says more is damaged
MAX_SAMPLES = 1 << 48  # libsndfile says 2^63 - 1 where it does not know
MAX_PAGE = 27 + 255 + 255 * 255  # bytes of Ogg
MAX_SECONDS = 1e9  # in which a manifest may place a stretch of audio


@dataclass(frozen=True, slots=True)
class Timed:
    """A word or a phone, and the seconds in which it is spoken."""

    label: str
    start: float
    stop: float


class AudioError(Exception):
    """Audio that cannot be used; the message says which and why, in one line."""


class AudioReader:
    """A recording of which any part can be read, as mono at 16 kHz.

    Args:
        name: of the recording, for messages.
        rate, num_source_samples: as it was recorded.
        read_source: ``(start, stop)`` in samples of the source → (stop − start,) or
            (stop − start, channels) float.

    Raises:
        AudioError: no samples, or a rate that is none.
    """

    def __init__(
        self,
        name: str,
        rate: int,
        num_source_samples: int,
        read_source: Callable[[int, int], np.ndarray],
    ) -> None:
        if not 0 < rate <= MAX_RATE:
            raise AudioError(f"{name}: expected a sample rate up to {MAX_RATE}, got {rate}")
        if num_source_samples <= 0:
            raise AudioError(f"{name}: expected audio, got {num_source_samples} samples")
        self.name = name
        self._rate = rate
        self._num_source_samples = num_source_samples
        self._read_source = read_source
        divisor = gcd(rate, SAMPLE_RATE)
        self._up, self._down = SAMPLE_RATE // divisor, rate // divisor

    @property
    def num_samples(self) -> int:
        """At 16 kHz: ⌈source samples · up / down⌉."""
        return -(-self._num_source_samples * self._up // self._down)

    @classmethod
    def open(cls, path: Path | str, channels: Sequence[int] | None = None) -> Self:
        """Open a file that libsndfile reads.

        Args:
            channels: those to take the mean of; None for all.

        Raises:
            AudioError: no such file, not audio, cut short, no samples or no such channel in it.
            UserError: soundfile is not installed.
        """
        try:
            import soundfile
        except ImportError:
            raise UserError(
                "reading audio needs soundfile, which is not installed: pip install 'lst[speech]'"
            ) from None
        path = Path(path)
        try:
            if not path.is_file():
                raise AudioError(f"{path}: expected an audio file, got none")
            file = soundfile.SoundFile(os.fsencode(path))  # of any bytes, Unicode or not
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError(f"{path}: not readable as audio ({_one_line(error)})") from None
        missing = _missing_end(path, file.extra_info)
        if missing:
            raise AudioError(f"{path}: cut short ({missing})")
        if file.frames > MAX_SAMPLES:
            raise AudioError(f"{path}: its header does not say how long it is, as one from a pipe")
        columns = list(range(file.channels) if channels is None else channels)
        if not columns or not set(columns) <= set(range(file.channels)):
            raise AudioError(f"{path}: expected channels {columns}, got {file.channels} channels")

        def read_source(start: int, stop: int) -> np.ndarray:
            try:
                file.seek(start)
                return file.read(stop - start, dtype="float32", always_2d=True)[:, columns]
            except (soundfile.SoundFileError, OSError) as error:
                raise AudioError(f"{path}: damaged ({_one_line(error)})") from None

        return cls(str(path), file.samplerate, file.frames, read_source)

    @classmethod
    def of_recording(cls, recording: Any, channels: int | Sequence[int] | None = None) -> Self:
        """Read a ``lhotse.Recording``: files, commands, URLs or bytes, with its transforms.

        Args:
            channels: those to take the mean of; None for all.
        """
        rate = recording.sampling_rate

        def read_source(start: int, stop: int) -> np.ndarray:
            try:
                samples = recording.load_audio(
                    channels=channels, offset=start / rate, duration=(stop - start) / rate
                )
            # Every backend of lhotse has exceptions of its own.
            except Exception as error:
                raise AudioError(
                    f"recording {recording.id!r}: not readable as audio ({_one_line(error)})"
                ) from None
            return np.atleast_2d(samples).T

        return cls(f"recording {recording.id!r}", rate, recording.num_samples, read_source)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Samples [start, stop) at 16 kHz → (stop − start,) float32.

        Raises:
            AudioError: damaged audio, fewer samples than its header says, or samples that are no
                numbers.
            ValueError: a range outside of the recording.
        """
        stop = self.num_samples if stop is None else stop
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(
                f"expected a range in [0, {self.num_samples}], got [{start}, {stop}) of {self.name}"
            )
        if self._up == self._down:
            return self._read_mono(start, stop)
        # Sample m at 16 kHz is the source at m · down / up; the filter reaches 10 · max(up, down)
        # steps of 1 / up to either side. Parts start at a multiple of down, where m is whole.
        reach = 10 * max(self._up, self._down) // self._up + 1
        first = max(0, start * self._down // self._up - reach) // self._down * self._down
        last = min(self._num_source_samples, -(-stop * self._down // self._up) + reach)
        samples = resample(self._read_mono(first, last), self._rate)
        offset = start - first // self._down * self._up
        return samples[offset : offset + stop - start]

    def _read_mono(self, start: int, stop: int) -> np.ndarray:
        samples = self._read_source(start, stop)
        if len(samples) != stop - start:
            raise AudioError(
                f"{self.name}: cut short (expected {stop - start} samples from sample {start}, "
                f"got {len(samples)})"
            )
        if samples.ndim == 2:
            samples = samples.mean(1)
        bad = np.flatnonzero(~np.isfinite(samples))
        if len(bad):
            seconds = (start + int(bad[0])) / self._rate
            raise AudioError(f"{self.name}: {samples[bad[0]]} for a sample at {seconds:.3f} s")
        return samples.astype(np.float32, copy=False)


def read_audio(
    path: Path | str, *, start: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """A file, or ``duration`` seconds of it from second ``start`` → (n,) float32, mono, 16 kHz.

    Raises:
        AudioError: no such file, not audio, cut short, damaged, or shorter than asked for.
    """
    audio = AudioReader.open(path)
    first, stop = sample_range(audio, start, duration)
    return audio.read(first, stop)


def write_wav(path: Path | str, waveform: np.ndarray) -> None:
    """Write a waveform (n,) at 16 kHz as WAV of 16 bits, whole or not at all; what is beyond ±1 is
    clipped.

    Raises:
        UserError: it cannot be written; a sample that is no number.
    """
    if not np.isfinite(waveform).all():
        raise UserError(f"{path}: expected samples that are numbers, got NaN or infinity")
    levels = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(levels.tobytes())
    write_atomically(Path(path), content.getvalue())


def sample_range(audio: AudioReader, start: float, duration: float | None) -> tuple[int, int]:
    """Seconds to samples [start, stop) at 16 kHz; an end up to 40 ms past the audio is its end.

    Raises:
        AudioError: the range is empty or outside of the audio.
    """
    if not (np.abs([start, duration or 0.0]) < MAX_SECONDS).all():  # nor is NaN
        raise AudioError(f"{audio.name}: expected seconds, got {start} and {duration}")
    first = round(start * SAMPLE_RATE)
    stop = audio.num_samples if duration is None else round((start + duration) * SAMPLE_RATE)
    if stop <= audio.num_samples + SAMPLE_RATE // 25:
        stop = min(stop, audio.num_samples)
    if not 0 <= first < stop <= audio.num_samples:
        raise AudioError(
            f"{audio.name}: expected {audio.num_samples / SAMPLE_RATE:.2f} s of audio to hold "
            f"[{first / SAMPLE_RATE:.2f}, {stop / SAMPLE_RATE:.2f}) s"
        )
    return first, stop


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at ``rate`` → (⌈n · 16000 / rate⌉,) at 16 kHz, of the same dtype."""
    if rate == SAMPLE_RATE:
        return waveform
    from scipy.signal import resample_poly

    divisor = gcd(rate, SAMPLE_RATE)
    return resample_poly(waveform, SAMPLE_RATE // divisor, rate // divisor)


def _missing_end(path: Path, log: str) -> str | None:
    """What libsndfile's log says of an end that is missing; it reads what is there all the same.

    A length of 2 GiB or more, or of 0, is a placeholder of a program that wrote to a pipe.
    """
    for found in re.finditer(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", log, re.M):
        said, there = int(found[1]), int(found[2])
        if there < said < 0x7FFF0000:
            return f"{said} bytes by its header, {there} in the file"
    counts = re.search(r"count (\d+) does not match value from 'ds64' chunk of (\d+)", log)
    if counts and int(counts[1]) < int(counts[2]):
        return f"{counts[2]} samples by its header, {counts[1]} in the file"
    if "lacks an end-of-stream bit" in log:
        return "its last Ogg page is missing"
    if "Junk after the last page" in log and _is_cut_page(path):
        return "its last Ogg page is not whole"
    return None


def _is_cut_page(path: Path) -> bool:
    """Whether what a file ends with is the beginning of an Ogg page: 27 bytes, the last of them the
    number of segments; a byte for the length of each; the segments."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_PAGE))
        end = file.read()
    if b"OggS" not in end:
        return False
    page = end[end.rindex(b"OggS") :]
    num_segments = page[26] if len(page) > 26 else 1
    return len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments])


def _one_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {' '.join(lines).strip()[:300]}"
