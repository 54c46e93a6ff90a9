"""The vocoder's benchmark in miniature: its parts by eye, and from a corpus to the page."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import alignment, report, vocoder
from lst.speech.audio import Timed


def test_texts_are_compared_by_the_characters_that_are_read():
    assert vocoder.as_written("“Don't go,” she said —\n to Ann.") == "DON'T GO SHE SAID TO ANN"


def test_labels_are_read_once_and_blanks_not_at_all():
    spelled = ["<pad>", "H", "H", "<pad>", "E", "L", "L", "<pad>", "L", "O", "|", "|", "A", "|"]
    emissions = np.full((len(spelled), len(alignment.VOCABULARY)), -9.0)
    for frame, token in enumerate(spelled):
        emissions[frame, alignment.VOCABULARY[token]] = 0.0
    reader = SimpleNamespace(emissions=lambda waveforms: [emissions])
    assert vocoder.as_heard(reader, [np.zeros(1)]) == ["HELLO A"]


def test_windows_within_words_are_those_whose_centres_are():
    words = (Timed("a", 0.0, 0.02), Timed("b", 0.05, 0.06))
    story = SimpleNamespace(speech=SimpleNamespace(words=words))
    expected = [True, True, False, False, False, True, False]
    assert vocoder.in_words(story, 7).tolist() == expected


def test_a_run_becomes_a_section_of_the_page(tiny_corpus, tmp_path, monkeypatch):
    for name in ("jiwer", "soundfile", "transformers"):
        pytest.importorskip(name)
    heard = list(alignment.spoken(tiny_corpus / "train/speech", 20))
    examples = [sentence for story in heard for sentence in alignment.sentences(story)]
    reader = tmp_path / "aligner"
    alignment.train(reader, examples, 1)
    (reader / "training.json").write_text("{}")
    words = [
        "--out", tmp_path / "results", "--corpus", tiny_corpus, "--recordings",
        tmp_path / "recordings", "--vocoder", tmp_path / "vocoder", "--aligner", reader,
        "--steps", 1, "--stories", 2,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmarks.vocoder", *map(str, words)])
    vocoder.main()
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    original = result["known_voices"]["original"]
    assert original["distortion_db"] == original["distortion_db_in_words"] == 0
    assert original["share_of_units_kept"] == 1
    for part in ("known_voices", "unknown_voice"):
        assert result[part]["stories"] == 2
        inversion, made = result[part]["inversion"], result[part]["vocoder"]
        assert 0 < inversion["distortion_db"] < made["distortion_db"]  # of one step's training
        assert inversion["share_of_units_kept"] > made["share_of_units_kept"]
        assert all(0 < each["largest_sample"] <= 1 for each in (inversion, made))
    text = report.render(report.read_results(path.parent), tmp_path / "performance.md", [])
    assert "## Sound from units" in text
    distortion = result["known_voices"]["inversion"]["distortion_db"]
    assert f"| known voices | inversion | {distortion:.2f} |" in text
