"""Recordings that need no synthesiser, and a codebook for them."""

import numpy as np
import pytest

from lst.speech.units import LogMelKMeans

RATE = 16_000


def hum(seconds: float, pitch: float, seed: int) -> np.ndarray:
    """Harmonics that come and go, over a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    sound = 0.003 * rng.normal(size=len(time))
    for harmonic in range(1, 12):
        swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time + rng.uniform(0, 6))
        sound += 0.06 * swell * np.sin(2 * np.pi * pitch * harmonic * time)
    return sound.astype(np.float32)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of six WAV files of two speakers, with manifest.csv, and codebook.safetensors."""
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("recordings")
    rows, waveforms = ["audio,speaker"], []
    for number in range(6):
        waveforms.append(hum(1.5 + 0.13 * number, 110 + 90 * (number % 2), number))
        soundfile.write(folder / f"{number}.wav", waveforms[-1], RATE)
        rows.append(f"{number}.wav,{('low', 'high')[number % 2]}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    LogMelKMeans.fit(waveforms, num_units=20).save(folder / "codebook.safetensors")
    return folder
