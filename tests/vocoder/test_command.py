"""The command's ways: from recordings to a WAV file, and what it says of bad input."""

import csv
import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest

from lst.errors import UserError
from lst.speech.sound import load_voice, sound_of
from lst.speech.units import LogMelKMeans
from lst.vocoder.__main__ import main, read_units

soundfile = pytest.importorskip("soundfile")


def command(*words) -> str:
    argv, sys.argv = sys.argv, ["lst.vocoder", *map(str, words)]
    try:
        with redirect_stdout(StringIO()) as out:
            main()
    finally:
        sys.argv = argv
    return out.getvalue()


@pytest.fixture
def codebook(recordings):
    return recordings / "codebook.safetensors"


def test_units_are_said_by_a_vocoder_and_by_a_codebook(recordings, codebook, tmp_path):
    said = command(
        "train", "--manifest", recordings / "manifest.csv", "--codebook", codebook, "--out",
        tmp_path / "run", "--size", "tiny", "--by-speaker", "--batch", 1, "--stretch-units", 2,
        "--steps", 1, "--alone-steps", 1, "--held-out", 1, "--predict-durations",
    )  # fmt: skip
    assert "a vocoder of tiny size, trained for 1 steps" in said
    units = [3, 3, 19, 0, 7, 7, 7]
    (tmp_path / "units.txt").write_text(" ".join(map(str, units)) + "\n")
    np.save(tmp_path / "units.npy", np.array(units, np.int16))
    for voice, file in ((tmp_path / "run", "units.npy"), (codebook, "units.txt")):
        out = tmp_path / "said.wav"
        said = command("synthesise", "--vocoder", voice, "--units", tmp_path / file, "--out", out)
        assert said == f"{out}: 0.28 s of 7 units\n"
        samples, rate = soundfile.read(out, dtype="float32")
        assert rate == 16_000
        expected = sound_of(np.array(units), load_voice(voice))
        np.testing.assert_allclose(samples, expected, atol=1.1 / 32768)
    words = ["--vocoder", tmp_path / "run", "--units", tmp_path / "units.txt", "--speaker", "low"]
    said = command("synthesise", *words, "--predict-durations", "--out", tmp_path / "quick.wav")
    num_samples = soundfile.info(tmp_path / "quick.wav").frames
    assert num_samples % 640 == 0
    assert num_samples >= 4 * 640


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3 4 x", "units.txt: expected speech units"),
        ("3 4 5000", r"units in \[0, 20\), got 3 to 5000"),
        ("-1", r"units in \[0, 20\), got -1 to -1"),
        ("1.5", "units.txt: expected speech units"),
        ("9" * 20, "units.txt: expected speech units"),
    ],
)
def test_units_that_are_none_leave_no_file(codebook, tmp_path, content, message):
    (tmp_path / "units.txt").write_text(content)
    words = ["--vocoder", codebook, "--units", tmp_path / "units.txt", "--out", tmp_path / "a.wav"]
    with pytest.raises(UserError, match=message):
        command("synthesise", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["units.txt"]


def test_a_file_of_no_units_is_no_sound(codebook, tmp_path):
    (tmp_path / "units.txt").write_text("\n")
    words = ["--units", tmp_path / "units.txt", "--out", tmp_path / "a.wav"]
    assert "0.00 s of 0 units" in command("synthesise", "--vocoder", codebook, *words)
    assert soundfile.info(tmp_path / "a.wav").frames == 0


def test_files_of_units_that_hold_something_else_are_told_of(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "floats.npy", np.array([1.0, 2.0]))
    np.save(tmp_path / "table.npy", np.array([[1], [2]]))
    whole = (tmp_path / "table.npy").read_bytes()
    (tmp_path / "header.npy").write_bytes(whole.replace(b"}", b"("))
    names = ("objects.npy", "cut.npy", "floats.npy", "table.npy", "header.npy")
    for name in (*names, "absent.npy", "absent.txt"):
        with pytest.raises(UserError, match=f"{name}: expected speech units"):
            read_units(tmp_path / name)


def test_what_a_codebook_cannot_do_is_told_of(codebook, tmp_path):
    (tmp_path / "units.txt").write_text("1 2")
    words = ["--vocoder", codebook, "--units", tmp_path / "units.txt", "--out", tmp_path / "a.wav"]
    with pytest.raises(UserError, match="--predict-durations: expected a vocoder, got a codebook"):
        command("synthesise", *words, "--predict-durations")
    with pytest.raises(UserError, match="expected no speaker"):
        command("synthesise", *words, "--speaker", "low")


def test_the_demo_corpus_is_spoken_again(tiny_corpus, tmp_path):
    """The recordings give the corpus's units, but for what 16 bits change."""
    from lst.data.records import Dataset

    said = command(
        "recordings", "--corpus", tiny_corpus / "train/speech", "--out", tmp_path, "--minutes", 0.4
    )
    with (tmp_path / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert f"{len(rows)} recordings" in said
    codebook = LogMelKMeans.load(tiny_corpus / "codebook.safetensors")
    records = list(Dataset.open(tiny_corpus / "train/speech"))
    assert 0 < len(rows) < len(records)
    for row, record in zip(rows, records, strict=False):
        assert (row["speaker"], row["text"]) == (record.speaker, record.text)
        samples, rate = soundfile.read(tmp_path / row["audio"])
        assert rate == 16_000
        assert np.mean(codebook.encode(samples) == record.units) > 0.98
    with pytest.raises(UserError, match="was not spoken by a voice of the demo corpus"):
        command("recordings", "--corpus", tiny_corpus / "train/text", "--out", tmp_path / "text")


def test_the_configuration_has_the_names_of_codehifigan(recordings, codebook, tmp_path):
    command(
        "train", "--folder", recordings, "--codebook", codebook, "--out", tmp_path / "run",
        "--size", "tiny", "--batch", 1, "--stretch-units", 2, "--steps", 1, "--alone-steps", 1,
        "--held-out", 1,
    )  # fmt: skip
    about = json.loads((tmp_path / "run/config.json").read_text())
    expected = {
        "num_embeddings": 20, "embedding_dim": 64, "model_in_dim": 64, "multispkr": False,
        "sampling_rate": 16000, "code_hop_size": 640, "dur_predictor_params": None,
        "upsample_rates": [10, 8, 8], "upsample_kernel_sizes": [20, 16, 16],
    }  # fmt: skip
    assert {name: about[name] for name in expected} == expected


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_recordings_of_no_length_are_refused(tmp_path, minutes):
    words = ["--corpus", tmp_path, "--out", tmp_path / "out", "--minutes", minutes]
    with pytest.raises(UserError, match="--minutes: expected more than 0, got"):
        command("recordings", *words)
    assert not (tmp_path / "out").exists()
