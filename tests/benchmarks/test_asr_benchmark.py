"""Records are cut into sentences without loss, and what is measured is written and shown."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import asr, report
from lst.data.loader import DataConfig
from lst.data.records import Record, RecordWriter, Word
from lst.errors import UserError
from lst.model import ModelConfig, StackConfig
from lst.presets import PRESETS
from lst.train.config import TrainConfig
from lst.vocabulary import fingerprint, train_tokenizer

pytest.importorskip("jiwer", reason="lst[speech] is not installed")
SAID = "The fox ran. It saw a hen! Where? Home."


def recorded(name: str) -> Record:
    """A silence of 2 frames before every word of 3, and one of 5 at the end."""
    words = tuple(Word(w, 5 * n + 2, 5 * n + 5) for n, w in enumerate(SAID.split()))
    units = np.arange(5 * len(words) + 5, dtype=np.int16) % 20
    return Record(name, SAID, units, words, None, "anna", "test")


def test_sentences_put_together_are_the_record() -> None:
    record = recorded("r")
    parts = list(asr.sentences(record))
    assert [part.text for part in parts] == ["The fox ran.", "It saw a hen!", "Where?", "Home."]
    assert record.units is not None
    assert np.concatenate([part.units for part in parts]).tolist() == record.units.tolist()
    # The silence between two sentences, 2 frames, is cut in half.
    assert [len(part.units) for part in parts] == [16, 20, 5, 9]
    assert [part.words[0].start for part in parts] == [2, 1, 1, 1]
    for part in parts:
        for word in part.words:
            assert part.units[word.start : word.stop].tolist() in [
                record.units[each.start : each.stop].tolist()
                for each in record.words or ()
                if each.word == word.word
            ]


def test_both_arms_are_measured_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "demo"
    corpus.mkdir()
    tokenizer = train_tokenizer([SAID] * 4, corpus / "tokenizer.model", num_pieces=290)
    (corpus / "codebook.safetensors").write_text("a codebook")
    (corpus / "corpus.json").write_text('{"settings": {}}')
    codebook = fingerprint(corpus / "codebook.safetensors")
    for name in ("train/speech", "valid/speech", "valid/voice"):
        with RecordWriter(corpus / name, codebook=codebook, tokenizer=None, num_units=20) as writer:
            for number in range(5):
                writer.write(recorded(f"{name}-{number}"))
    assert tokenizer.num_pieces == 290
    stack = StackConfig(layers=1, dim=16, heads=1)
    tiny = TrainConfig(
        name="demo",
        model=ModelConfig(encoder=stack, global_transformer=replace(stack, dim=32), decoder=stack),
        data=DataConfig(rows=4, units_per_sequence=64),
        steps=2,
        out=tmp_path / "unused",
        device="cpu",
    )
    monkeypatch.setitem(PRESETS, "demo", tiny)
    monkeypatch.setattr("lst.train.metrics.plot_losses", lambda *_: None)
    options = ["--out", tmp_path / "results", "--runs", tmp_path / "runs", "--corpus", corpus]
    options += ["--presets", "demo", "--steps", 1, 2, "--utterances", 3, "--from-scratch"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.asr", *map(str, options)])
    asr.main()
    (path,) = (tmp_path / "results").iterdir()
    (run,) = json.loads(path.read_text())["runs"]
    assert [(point["step"], point["set"]) for point in run["points"]] == [
        (step, name) for step in (1, 2) for name in ("valid/speech", "valid/voice")
    ]
    first, *_, last = run["points"]
    assert [rate["num_utterances"] for rate in first["scores"]] == [3, 3]
    assert 0 < first["hours_heard"] < last["hours_heard"]
    (result,) = report.read_results(path.parent)
    told = "\n".join(report.asr_section(result))
    assert "From scratch, 4 × 256 units a step" in told
    spent = f"{last['hours_heard']:.1f} | {last['training_flops'] / 1e12:.1f}"
    assert f"| demo | valid/voice | 2 | {spent} | " in told

    # Again: what is trained already is measured alone.
    monkeypatch.setattr(asr, "train", lambda config: pytest.fail("it was trained again"))
    asr.main()
    monkeypatch.setattr(sys, "argv", ["benchmarks.asr", "--out", "x", "--steps", "2", "3"])
    with pytest.raises(UserError, match=r"--steps: expected multiples of the first, got \[2, 3\]"):
        asr.main()
