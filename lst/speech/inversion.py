"""Speech units made audible, to hear what a model says: robotic, without a voice of its own.

    units (F,) → mean log-mels of their codes (2F, 40), 20 ms apart
               → power spectra (4F, 257), 10 ms apart, interpolated in time and in frequency
               → waveform (640 F,) at 16 kHz by Griffin-Lim

Griffin-Lim (D. W. Griffin and J. S. Lim, Signal estimation from modified short-time Fourier
transform, IEEE TASSP 32, 1984) looks for a waveform with the given magnitudes. It starts from the
phases of a pulse train, so that no random number is drawn and vowels get a pitch.
"""

import numpy as np

from lst.errors import UserError
from lst.speech.audio import SAMPLE_RATE
from lst.speech.units import FRAME_SAMPLES, WINDOW_SAMPLES, LogMelKMeans, mel_bands

__all__ = ["invert_units"]

HOP = SAMPLE_RATE // 100
PULSE_RATE = 100  # Hz, the pitch


def invert_units(units: np.ndarray, codebook: LogMelKMeans, *, iterations: int = 30) -> np.ndarray:
    """Units to a waveform.

    Args:
        units: (F,) integers in [0, codebook.num_units).
        codebook: the one that made the units.
        iterations: of Griffin-Lim.

    Returns:
        (640 F,) float32 in [−1, 1], 16 kHz.

    Raises:
        UserError: a unit that the codebook does not have.
    """
    units = np.asarray(units)
    if not len(units):
        return np.zeros(0, np.float32)
    if units.min() < 0 or units.max() >= codebook.num_units:
        raise UserError(
            f"expected units in [0, {codebook.num_units}), got {units.min()} to {units.max()}"
        )
    num_samples = len(units) * FRAME_SAMPLES
    magnitudes = _magnitudes(codebook.log_mels[units].reshape(-1, codebook.log_mels.shape[-1]))
    pulses = np.zeros(num_samples)
    pulses[:: SAMPLE_RATE // PULSE_RATE] = 1.0
    spectra = _stft(pulses)
    for _ in range(iterations):
        phases = spectra / np.maximum(np.abs(spectra), 1e-12)
        waveform = _inverse_stft(magnitudes * phases, num_samples)
        spectra = _stft(waveform)
    return (waveform / max(1.0, np.abs(waveform).max())).astype(np.float32)


def _magnitudes(mels: np.ndarray) -> np.ndarray:
    """(2F, 40) log-mels 20 ms apart → (4F, 257) magnitudes 10 ms apart."""
    # Windows of log-mels are centred at 10, 30, … ms, ours at 5, 15, …: a quarter and three
    # quarters of the way from one to the next.
    before = np.concatenate([mels[:1], mels[:-1]])
    after = np.concatenate([mels[1:], mels[-1:]])
    mels = np.stack([0.25 * before + 0.75 * mels, 0.75 * mels + 0.25 * after], axis=1)
    # A mel value is the mean power of its band, so it is the spectrum at the band's centre.
    centres = [start + weights @ np.arange(len(weights)) for start, _, weights in mel_bands()]
    bins = np.arange(WINDOW_SAMPLES // 2 + 1)
    rows = mels.reshape(-1, mels.shape[-1])
    return np.exp(0.5 * np.stack([np.interp(bins, centres, row) for row in rows]))


def _window() -> np.ndarray:
    return np.hanning(WINDOW_SAMPLES + 1)[:-1]


def _stft(waveform: np.ndarray) -> np.ndarray:
    """(n,) → (n / 160, 257); window i is centred at sample 160 (i + 1/2)."""
    before = (WINDOW_SAMPLES - HOP) // 2
    padded = np.pad(waveform, (before, WINDOW_SAMPLES - HOP - before))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::HOP]
    return np.fft.rfft(windows * _window(), axis=1)


def _inverse_stft(spectra: np.ndarray, num_samples: int) -> np.ndarray:
    """The least-squares inverse of :func:`_stft`: overlapped, added, divided by squared windows."""
    window = _window()
    before = (WINDOW_SAMPLES - HOP) // 2
    total = np.zeros(num_samples + WINDOW_SAMPLES - HOP)
    weight = np.zeros_like(total)
    for index, piece in enumerate(np.fft.irfft(spectra, WINDOW_SAMPLES, axis=1)):
        here = slice(index * HOP, index * HOP + WINDOW_SAMPLES)
        total[here] += piece * window
        weight[here] += np.square(window)
    return (total / np.maximum(weight, 1e-8))[before : before + num_samples]
