"""How far one waveform is from another, as far as timbre goes: mel cepstral distortion.

    waveform (n,) at 16 kHz → windows of 32 ms every 10 ms → 40 mel bands, L_b = ln of mean power
    c_d = 1/40 Σ_b L_b cos(π d (b + 1/2) / 40)                      L_b = c_0 + 2 Σ_d c_d cos(…)
    distortion = mean over windows of  10 / ln 10 · √(2 Σ_{d=1…13} (c_d − c'_d)²)   in dB

(R. Kubichek, Mel-cepstral distance measure for objective speech quality assessment, 1993; its
10 √2 / ln 10.) By the second line it is the root mean square distance of the two smoothed spectra
in dB, over the mel scale, where each is brought to the same level: c_0, the loudness, is left out.
Figures from other cepstra, such as SPTK's, are of the same formula and not to be compared.

The two waveforms are compared time by time, without warping: what is said from units has their
times.
"""

import numpy as np

from lst.errors import UserError
from lst.speech.units import NUM_MELS, WINDOW_SAMPLES, mel_bands

__all__ = ["mel_cepstra", "mel_cepstral_distances", "mel_cepstral_distortion"]

HOP = 160
NUM_CEPSTRA = 13
FLOOR = 1e-6  # of a band's mean power, as that of the units' log-mels


def mel_cepstra(waveform: np.ndarray) -> np.ndarray:
    """(n,) at 16 kHz → (⌈n / 160⌉, 14) float64, c_0 … c_13; window i is centred at sample 160 i."""
    num_windows = -(-len(waveform) // HOP)
    padded = np.zeros(num_windows * HOP + WINDOW_SAMPLES)
    padded[WINDOW_SAMPLES // 2 : WINDOW_SAMPLES // 2 + len(waveform)] = waveform
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::HOP][:num_windows]
    hann = np.hanning(WINDOW_SAMPLES + 1)[:-1]
    power = np.square(np.abs(np.fft.rfft(windows * hann, axis=1)))
    mels = np.stack([power[:, start:stop] @ weights for start, stop, weights in mel_bands()], 1)
    angles = np.pi * np.outer(np.arange(NUM_CEPSTRA + 1), np.arange(NUM_MELS) + 0.5) / NUM_MELS
    return np.log(mels + FLOOR) @ np.cos(angles).T / NUM_MELS


def mel_cepstral_distances(waveform: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Two waveforms (n,) at 16 kHz, n > 0 → (⌈n / 160⌉,) dB, of each window.

    Raises:
        UserError: of another length, empty, or with samples that are no numbers.
    """
    if waveform.shape != other.shape or waveform.ndim != 1 or not len(waveform):
        raise UserError(
            f"expected two waveforms of one length above 0, got {waveform.shape} and {other.shape}"
        )
    if not (np.isfinite(waveform).all() and np.isfinite(other).all()):
        raise UserError("expected waveforms of numbers, got NaN or infinity")
    squares = np.square(mel_cepstra(waveform)[:, 1:] - mel_cepstra(other)[:, 1:]).sum(1)
    return 10 / np.log(10) * np.sqrt(2 * squares)


def mel_cepstral_distortion(waveform: np.ndarray, other: np.ndarray) -> float:
    """Two waveforms (n,) at 16 kHz → the mean of :func:`mel_cepstral_distances`, in dB."""
    return float(mel_cepstral_distances(waveform, other).mean())
