"""Mel cepstral distortion: what its formula says, computed another way."""

import numpy as np
import pytest

from lst.errors import UserError
from lst.speech.distortion import mel_cepstra, mel_cepstral_distortion

RATE = 16_000


def vowel(seconds: float, *, pitch: float, tilt: float, seed: int = 0) -> np.ndarray:
    """Harmonics that fall off by their number, and a little noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    harmonics = np.arange(1, int(7000 / pitch))[:, None]
    waves = np.sin(2 * np.pi * pitch * harmonics * time) * harmonics**-tilt
    return 0.1 * waves.sum(0) + 1e-3 * np.random.default_rng(seed).normal(size=len(time))


def test_a_waveform_is_at_no_distance_from_itself() -> None:
    speech = vowel(0.5, pitch=120, tilt=1.0)
    assert mel_cepstral_distortion(speech, speech) == 0.0


def test_it_is_symmetric_and_grows_with_the_change() -> None:
    speech = vowel(0.5, pitch=120, tilt=1.0)
    near, far = vowel(0.5, pitch=120, tilt=1.2), vowel(0.5, pitch=120, tilt=2.0)
    assert mel_cepstral_distortion(speech, near) == mel_cepstral_distortion(near, speech)
    assert 0 < mel_cepstral_distortion(speech, near) < mel_cepstral_distortion(speech, far)


def test_loudness_does_not_count() -> None:
    loud = vowel(0.5, pitch=120, tilt=0.5)  # far above the floor in every band
    assert mel_cepstral_distortion(loud, 0.5 * loud) < 0.02


def test_it_is_what_scipy_and_a_plain_spectrum_make_of_the_formula() -> None:
    """Bands as a matrix over scipy's spectrogram, cepstra by its orthonormal cosine transform."""
    fft = pytest.importorskip("scipy.fft")
    signal = pytest.importorskip("scipy.signal")

    def to_mel(hertz):
        return 2595 * np.log10(1 + hertz / 700)

    edges = 700 * (10 ** (np.linspace(to_mel(60), to_mel(7600), 42) / 2595) - 1)
    bins = np.arange(257) * RATE / 512
    bands = np.zeros((40, 257))
    for band in range(40):
        bands[band] = np.interp(bins, edges[band : band + 3], [0, 1, 0], left=0, right=0)
    bands /= bands.sum(1, keepdims=True)

    def cepstra(samples):
        padded = np.pad(samples, (256, 512))
        _, _, spectra = signal.stft(
            padded, window="hann", nperseg=512, noverlap=352, boundary=None, padded=False
        )
        power = np.square(np.abs(spectra) * 256)  # scipy divides by the window's sum
        mels = np.log(bands @ power + 1e-6)[:, : -(-len(samples) // 160)]
        return fft.dct(mels, axis=0, norm="ortho")[:14].T / np.sqrt(80)

    one, other = vowel(0.43, pitch=120, tilt=1.0), vowel(0.43, pitch=180, tilt=1.6, seed=1)
    found = mel_cepstra(one)
    np.testing.assert_allclose(found[:, 1:], cepstra(one)[:, 1:], atol=1e-9)
    frames = [
        10 * np.sqrt(2) / np.log(10) * np.linalg.norm(a[1:] - b[1:])
        for a, b in zip(cepstra(one), cepstra(other), strict=True)
    ]
    assert mel_cepstral_distortion(one, other) == pytest.approx(np.mean(frames), rel=1e-9)


def test_a_tilt_of_the_spectrum_has_the_distance_in_decibels_that_one_works_out() -> None:
    """White noise, and the same with all of its cepstrum in c_1: 2 c_1 cos(…) in every band."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=RATE)
    first = 0.3
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(RATE, 1 / RATE) / 700)
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (60, 7600))
    place = (mel - low) / (high - low) * 41 / 40 - 1 / 80  # (b + 1/2) / 40 at a band's centre
    tilted = np.fft.irfft(np.fft.rfft(noise) * np.exp(first * np.cos(np.pi * place)), RATE)
    expected = 10 * np.sqrt(2) / np.log(10) * first
    assert mel_cepstral_distortion(noise, tilted) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (np.zeros(10), np.zeros(11), r"one length above 0, got \(10,\) and \(11,\)"),
        (np.zeros(0), np.zeros(0), "above 0"),
        (np.array([0.0, np.nan]), np.zeros(2), "NaN or infinity"),
    ],
)
def test_what_cannot_be_compared_is_refused(one, other, message) -> None:
    with pytest.raises(UserError, match=message):
        mel_cepstral_distortion(one, other)
