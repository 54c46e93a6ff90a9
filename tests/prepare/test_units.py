"""A codebook fitted to a source is the codebook of its audio, and is never written over."""

import re

import numpy as np
import pytest

from lst.errors import UserError
from lst.prepare.units import CodebookConfig, fit_codebook
from lst.speech.units import LogMelKMeans

soundfile = pytest.importorskip("soundfile")


def test_a_codebook_of_all_audio_is_that_of_its_waveforms(spoken_folder, tmp_path):
    (spoken_folder / "broken.flac").write_bytes(b"")
    out = tmp_path / "units" / "codebook.safetensors"
    line = fit_codebook(CodebookConfig(out=out, folder=spoken_folder, codes=20))
    assert re.search(r"20 codes, fitted to 0\.\d minutes of speech \(1 files passed over\)", line)
    waveforms = [
        soundfile.read(path, dtype="float32")[0] for path in sorted(spoken_folder.rglob("*/*.flac"))
    ]
    # The order of the sample is drawn: fitted to the same frames, codes fit them as closely.
    ours, theirs = LogMelKMeans.load(out), LogMelKMeans.fit(waveforms, num_units=20)
    assert len(set(np.concatenate(list(map(ours.encode, waveforms))).tolist())) > 15
    assert distance(ours, waveforms) < 1.15 * distance(theirs, waveforms)
    again = tmp_path / "again.safetensors"
    fit_codebook(CodebookConfig(out=again, folder=spoken_folder, codes=20))
    assert again.read_bytes() == out.read_bytes()


def distance(codebook, waveforms):
    """Mean squared distance of frames to their codes' mean log-mels."""
    from lst.speech.units import log_mels

    squares = [
        np.square(log_mels(waveform) - codebook.log_mels[codebook.encode(waveform)])
        for waveform in waveforms
    ]
    return np.concatenate(squares).mean()


def test_a_sample_is_no_longer_than_asked_for(spoken_folder, tmp_path):
    out = tmp_path / "codebook.safetensors"
    line = fit_codebook(CodebookConfig(out=out, folder=spoken_folder, codes=5, minutes=0.05))
    assert "fitted to 0.1 minutes" in line  # 3 seconds, of 10


def test_what_is_in_the_way_of_a_codebook(spoken_folder, tmp_path):
    out = tmp_path / "codebook.safetensors"
    with pytest.raises(UserError, match=r"expected at least 100000 frames to fit"):
        fit_codebook(CodebookConfig(out=out, folder=spoken_folder, codes=100_000))
    assert not out.exists()
    for path in spoken_folder.rglob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"got none that is fit: .*\.flac: .*not readable as audio"):
        fit_codebook(CodebookConfig(out=out, folder=spoken_folder))
    out.write_bytes(b"")
    with pytest.raises(UserError, match=r"codebook\.safetensors: exists"):
        fit_codebook(CodebookConfig(out=out, folder=spoken_folder))
    for options, message in [
        ({"text": ("a",)}, "--text: expected a source of audio"),
        ({"folder": "a", "codes": 0}, "--codes: expected 1 or more, got 0"),
        ({"folder": "a", "minutes": float("nan")}, "--minutes: expected more than 0, got nan"),
        ({"folder": "a", "seed": -1}, r"--seed: expected 0 or more, below 2\^32, got -1"),
        ({"folder": "a", "hubert": "x"}, "expected --hubert and --layer together"),
    ]:
        with pytest.raises(UserError, match=message):
            CodebookConfig(out=out, **options)


@pytest.mark.parametrize("minutes", [1e308, 1e-320])
def test_minutes_beyond_measure_are_all_or_hardly_any(spoken_folder, tmp_path, minutes):
    config = CodebookConfig(folder=spoken_folder, out=tmp_path / "c", codes=5, minutes=minutes)
    if minutes > 1:
        assert fit_codebook(config).startswith(f"{tmp_path / 'c'}: 5 codes")
    else:
        with pytest.raises(UserError, match="expected"):
            fit_codebook(config)
