"""Speech units: one of a few hundred codes for every 40 ms of sound.

:func:`load_units` opens what makes them: HuBERT with a k-means (:mod:`lst.speech.hubert`), or the
demo's log-mel codebook, which is here:

    waveform (n,) at 16 kHz → frames of 640 samples, F = ⌈n / 640⌉ → features (F, 26) → codes (F,)

A frame's features are two cepstra, of Hann windows of 512 samples at a quarter and at three
quarters of the frame: 40 mel bands, natural log, DCT-II, the first 13 coefficients, the first of
them (loudness) halved. What tells voices rather than sounds apart is taken out of the log-mels
before: everything 9 nats below the loud parts is raised to that level, and the utterance's mean is
subtracted (of more than ten minutes, each stretch's: :func:`in_stretches`). The codes are the
centroids of k-means.

Codes are the same on every run and for every number of threads. Features are rounded to
multiples of 1/64 and so are centroids, which makes a distance a sum of integers that float64 holds
exactly, whatever the order in which a matrix product adds them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from lst.data.records import FRAMES_PER_SECOND, Word
from lst.errors import UserError
from lst.speech.audio import SAMPLE_RATE, Timed
from lst.strict_json import parse_json

__all__ = [
    "FRAME_SAMPLES",
    "LogMelKMeans",
    "UnitEncoder",
    "UnitsConfig",
    "in_stretches",
    "load_units",
    "log_mels",
    "mel_bands",
    "word_frames",
]

FRAME_SAMPLES = SAMPLE_RATE // FRAMES_PER_SECOND
STRETCH = 600 * SAMPLE_RATE  # a whole number of frames, as is the context
CONTEXT = 10 * SAMPLE_RATE
WINDOWS_PER_FRAME = 2
WINDOW_SAMPLES = 512
WINDOWS_AT_ONCE = 4096  # 82 s, so that an hour needs no more memory for its spectra
NUM_MELS = 40
NUM_CEPSTRA = 13
LOUDNESS_WEIGHT = 0.5
DYNAMIC_RANGE = 9.0  # nats of power
GRID = 64  # features are multiples of 1 / GRID
_FORMAT = "lst log-mel k-means 1"


class UnitEncoder(Protocol):
    """What makes units of a waveform."""

    @property
    def num_units(self) -> int: ...

    @property
    def frame_rate(self) -> int:
        """Units a second: 25."""

    @property
    def fingerprint(self) -> str:
        """``sha256:<hex>`` of everything that the units depend on."""

    @property
    def centroids(self) -> Any:
        """(num_units, D) array or tensor: where units are near each other, they sound alike."""

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """(n,) float at 16 kHz → (F,) int16 in [0, num_units), F = ⌈n / 640⌉.

        Of more than ten minutes, the units of :func:`in_stretches`.
        """


@dataclass(frozen=True, kw_only=True)
class UnitsConfig:
    """Which units to make."""

    codebook: Path
    """A log-mel codebook of ours; with --hubert, its k-means as .safetensors or .npz."""
    hubert: str | None = None  # a local folder or a hub name
    layer: int | None = None  # of HuBERT, whose output the k-means is of; 0 is before the first
    allow_pickle: bool = False  # read a k-means of joblib, which runs the code in it
    device: str = "cpu"  # where HuBERT runs

    def __post_init__(self) -> None:
        if (self.hubert is None) != (self.layer is None):
            raise UserError(
                f"expected --hubert and --layer together, got {self.hubert} and {self.layer}"
            )


def load_units(config: UnitsConfig) -> UnitEncoder:
    """Open what makes the units. Raises UserError where a file or a model is not as described."""
    if config.hubert is None:
        return LogMelKMeans.load(config.codebook)
    from lst.speech.hubert import HubertKMeans

    assert config.layer is not None
    return HubertKMeans.load(
        config.hubert,
        config.codebook,
        layer=config.layer,
        allow_pickle=config.allow_pickle,
        device=config.device,
    )


def in_stretches(
    encode: Callable[[np.ndarray], np.ndarray],
    read: Callable[[int, int], np.ndarray],
    num_samples: int,
) -> np.ndarray:
    """Units of audio of any length, whether it is in memory or read bit by bit.

    Up to 620 s are one pass of the encoder. Longer audio is cut every ten minutes, and what is
    encoded at once are ten minutes and ten seconds more to either side, as far as there are any.
    So hours of it take the memory of ten minutes, and the time that is theirs.

    Args:
        encode: (n,) float at 16 kHz → (⌈n / 640⌉,) units, of up to 620 s.
        read: gives samples [start, stop).
        num_samples: of the audio.
    """
    if num_samples <= STRETCH + 2 * CONTEXT:
        return encode(read(0, num_samples))
    parts = []
    for begin in range(0, num_samples, STRETCH):
        end = min(begin + STRETCH, num_samples)
        first, last = max(0, begin - CONTEXT), min(num_samples, end + CONTEXT)
        before = (begin - first) // FRAME_SAMPLES
        units = encode(read(first, last))
        parts.append(units[before : before + -(-(end - begin) // FRAME_SAMPLES)])
    return np.concatenate(parts)


def word_frames(words: Sequence[Timed], num_frames: int) -> tuple[Word, ...]:
    """Seconds to frames, each end to the nearest: at most 20 ms away.

    Words stay in order and disjoint; one of less than a frame may become empty.
    """
    ends = [
        min(num_frames, round(time * FRAMES_PER_SECOND))
        for word in words
        for time in (word.start, word.stop)
    ]
    return tuple(
        Word(word.label, start, stop)
        for word, start, stop in zip(words, ends[::2], ends[1::2], strict=True)
    )


class LogMelKMeans:
    """A :class:`UnitEncoder` that k-means fits in seconds.

    Attributes:
        centroids: (num_units, 26) int16, in units of 1/64.
        log_mels: (num_units, 2, 40) float32, the mean log-mels of each code's frames, by which
            units can be made audible.
    """

    frame_rate = FRAMES_PER_SECOND

    def __init__(self, centroids: np.ndarray, log_mels: np.ndarray) -> None:
        self.centroids = centroids
        self.log_mels = log_mels
        # argmin |x − c|² = argmin |c|² − 2 x·c
        self._columns = -2.0 * centroids.T.astype(np.float64)
        self._squares = np.square(centroids.astype(np.float64)).sum(1)

    @property
    def num_units(self) -> int:
        return len(self.centroids)

    @property
    def fingerprint(self) -> str:
        return f"sha256:{hashlib.sha256(self._to_bytes()).hexdigest()}"

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """(n,) float at 16 kHz → (F,) int16 in [0, num_units), F = ⌈n / 640⌉."""
        return in_stretches(
            lambda part: self._nearest(_features(log_mels(part))),
            lambda start, stop: waveform[start:stop],
            len(waveform),
        )

    @classmethod
    def fit(
        cls,
        waveforms: Iterable[np.ndarray],
        *,
        num_units: int = 501,
        seed: int = 0,
        max_passes: int = 20,
    ) -> Self:
        """Fit the codes to utterances of several voices.

        Args:
            waveforms: (n,) each, 16 kHz.
            num_units: number of codes.
            seed: of the first centroids and the batches.
            max_passes: over the frames; it stops early where the centroids rest.

        Raises:
            UserError: fewer frames than codes, or no scikit-learn here.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
        except ImportError:
            raise UserError(
                "fitting speech units needs scikit-learn, which is not installed: "
                "pip install 'lst[speech]'"
            ) from None
        mels = [log_mels(waveform) for waveform in waveforms]
        features = np.concatenate([_features(each) for each in mels])
        frames = np.concatenate(mels)
        if len(features) < num_units:
            raise UserError(
                f"expected at least {num_units} frames to fit {num_units} speech units, "
                f"got {len(features)}"
            )
        kmeans = MiniBatchKMeans(
            num_units, random_state=seed, n_init=1, max_iter=max_passes, batch_size=4096
        )
        with threadpool_limits(1):  # the order of its sums depends on the number of threads
            kmeans.fit(features.astype(np.float64))
        centroids = np.rint(kmeans.cluster_centers_).astype(np.int16)
        units = cls(centroids, np.zeros((num_units, 0), np.float32))._nearest(features)
        return cls(centroids, _mean_by_code(frames, units, features, centroids))

    def save(self, path: Path | str) -> None:
        """Write a ``.safetensors`` file whose SHA-256 is the fingerprint."""
        Path(path).write_bytes(self._to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote. Raises UserError where it is missing or another file."""
        from safetensors import SafetensorError, safe_open

        if Path(path).is_dir():
            raise UserError(f"{path}: expected the file of a codebook, got a folder")
        try:
            with safe_open(path, framework="numpy") as file:
                about = parse_json((file.metadata() or {}).get("codebook", "{}"), str(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: no codebook could be read here ({error})") from None
        about = about if isinstance(about, dict) else {}
        if about.get("format") != _FORMAT or set(tensors) != {"centroids", "log_mels"}:
            raise UserError(
                f"{path}: expected a codebook of format {_FORMAT!r}, "
                f"got {about.get('format')!r} with {sorted(tensors)}"
            )
        digest, expected = _digest(tensors["centroids"], tensors["log_mels"]), about.get("sha256")
        if digest != expected:
            raise UserError(f"{path}: damaged codebook, expected content {expected}, got {digest}")
        return cls(tensors["centroids"], tensors["log_mels"])

    def _to_bytes(self) -> bytes:
        from safetensors.numpy import save

        about = {"format": _FORMAT, "sha256": _digest(self.centroids, self.log_mels)}
        # One key: the order of several in the file is not fixed.
        metadata = {"codebook": json.dumps(about)}
        tensors = {"centroids": self.centroids, "log_mels": self.log_mels}
        return save(tensors, metadata)

    def _nearest(self, features: np.ndarray) -> np.ndarray:
        """(F, 26) int16 → (F,) int16; of equally near codes the first."""
        distances = features.astype(np.float64) @ self._columns + self._squares
        return distances.argmin(1).astype(np.int16)


def _digest(*tensors: np.ndarray) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(f"{tensor.dtype} {tensor.shape} ".encode())
        content.update(tensor.tobytes())
    return content.hexdigest()


def _mean_by_code(
    frames: np.ndarray, units: np.ndarray, features: np.ndarray, centroids: np.ndarray
) -> np.ndarray:
    """(num_units, 2, 40) float32: the mean log-mels of a code's frames."""
    num_units = len(centroids)
    counts = np.bincount(units, minlength=num_units)
    sums = np.zeros((num_units, *frames.shape[1:]))
    np.add.at(sums, units, frames)
    means = sums / np.maximum(counts, 1)[:, None, None]
    for code in np.flatnonzero(counts == 0):  # no frame is nearest to it: take its nearest frame
        distances = np.square(features.astype(np.int64) - centroids[code]).sum(1)
        means[code] = frames[distances.argmin()]
    return means.astype(np.float32)


def log_mels(waveform: np.ndarray) -> np.ndarray:
    """(n,) float at 16 kHz → (F, 2, 40) float64, natural logs of mean power in mel bands."""
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"waveform has shape {waveform.shape}, expected (n,) with n > 0")
    num_windows = -(-len(waveform) // FRAME_SAMPLES) * WINDOWS_PER_FRAME
    hop = FRAME_SAMPLES // WINDOWS_PER_FRAME
    before = (WINDOW_SAMPLES - hop) // 2  # the first window is centred on the first hop
    padded = np.zeros(num_windows * hop + WINDOW_SAMPLES)
    padded[before : before + len(waveform)] = waveform
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::hop]
    mels = np.empty((num_windows, NUM_MELS))
    for begin in range(0, num_windows, WINDOWS_AT_ONCE):
        here = slice(begin, min(begin + WINDOWS_AT_ONCE, num_windows))
        spectra = np.fft.rfft(windows[here] * _hann(), axis=1)
        power = np.square(spectra.real) + np.square(spectra.imag)
        for band, (start, stop, weights) in enumerate(mel_bands()):
            # einsum adds in a fixed order, which a threaded matrix product need not.
            mels[here, band] = np.einsum("wb,b->w", power[:, start:stop], weights)
    return np.log(mels + 1e-6).reshape(-1, WINDOWS_PER_FRAME, NUM_MELS)


def _features(mels: np.ndarray) -> np.ndarray:
    """(F, 2, 40) log-mels of one utterance → (F, 26) int16, in units of 1/64."""
    from scipy.fft import dct

    loud = np.percentile(mels.mean(2), 95)
    mels = np.maximum(mels, loud - DYNAMIC_RANGE)
    mels = mels - mels.mean((0, 1))
    cepstra = dct(mels, norm="ortho", axis=2)[:, :, :NUM_CEPSTRA]
    cepstra[:, :, 0] *= LOUDNESS_WEIGHT
    return np.rint(cepstra * GRID).astype(np.int16).reshape(len(mels), -1)


@cache
def _hann() -> np.ndarray:
    return np.hanning(WINDOW_SAMPLES + 1)[:-1]


@cache
def mel_bands() -> tuple[tuple[int, int, np.ndarray], ...]:
    """Triangles on the mel scale m = 2595 log10(1 + f / 700), from 60 Hz to 7.6 kHz.

    Returns:
        For each band: the bins [start, stop) of a 512-point FFT and their weights, of sum 1.
    """
    edges = _to_hertz(np.linspace(_to_mel(60.0), _to_mel(7600.0), NUM_MELS + 2))
    bins = np.arange(WINDOW_SAMPLES // 2 + 1) * SAMPLE_RATE / WINDOW_SAMPLES
    bands = []
    for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
        inside = np.flatnonzero(weights > 0)
        start, stop = int(inside[0]), int(inside[-1]) + 1
        bands.append((start, stop, weights[start:stop] / weights[start:stop].sum()))
    return tuple(bands)


def _to_mel(hertz: np.ndarray | float) -> np.ndarray | float:
    return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
