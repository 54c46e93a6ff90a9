"""The demo corpus is a function of its settings, however often its making was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lst.data.records import Dataset, Record, read_items
from lst.errors import UserError
from lst.prepare import demo
from lst.prepare.demo import DemoConfig, describe, prepare_demo
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES
from lst.speech.units import LogMelKMeans
from lst.vocabulary import Tokenizer

pytest.importorskip("espeakng_loader")

PARTS = ("train/text", "train/speech", "valid/text", "valid/speech", "valid/voice")


def records_of(folder: Path) -> list[Record]:
    dataset = Dataset.open(folder)
    return [dataset[row] for row in range(len(dataset))]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file; of corpus.json all but the time that it took."""
    content = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    facts = json.loads(content["corpus.json"])
    del facts["seconds"]
    return {**content, "corpus.json": json.dumps(facts).encode()}


@pytest.fixture(scope="module")
def config() -> DemoConfig:
    return DemoConfig(
        hours=0.02, text_tokens=2000, questions=8, validation=8, pieces=320, codes=60, workers=1
    )


@pytest.fixture(scope="module")
def made(config: DemoConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in one go, by this process alone."""
    return prepare_demo(replace(config, out=tmp_path_factory.mktemp("made") / "demo"))


def test_a_tokenizer_that_there_is_makes_the_same_corpus(
    config: DemoConfig, made: Path, tmp_path: Path
) -> None:
    given = replace(config, out=tmp_path / "demo", tokenizer=made)
    same, expected = content_of(prepare_demo(given)), content_of(made)
    facts = json.loads(same.pop("corpus.json"))
    assert facts["settings"].pop("tokenizer") == Tokenizer.load(made).fingerprint
    unnamed = json.loads(expected.pop("corpus.json"))
    assert unnamed["settings"].pop("tokenizer") is None
    assert (facts, same) == (unnamed, expected)
    with pytest.raises(UserError, match=r"holds a corpus of tokenizer sha256:.*, not None"):
        prepare_demo(replace(given, tokenizer=None))


class Stopped(BaseException):
    """As KeyboardInterrupt: nothing but the command is meant to catch it."""


def synthesis_that_stops(after: int) -> Callable[..., Any]:
    """synthesize, but for ``after`` calls only."""
    calls = iter(range(after))
    synthesize = demo.synthesize

    def limited(*args: Any) -> Any:
        if next(calls, None) is None:
            raise Stopped
        return synthesize(*args)

    return limited


def wait_for_end_of_group(group: int) -> None:
    """multiprocessing's own tracker ends a moment after the process that it served."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("a process outlives the command that started it")


# The corpus ---------------------------------------------------------------------------------------


def test_corpus_has_what_was_asked_for(tiny_corpus: Path) -> None:
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer.model")
    texts = [record.text for record in records_of(tiny_corpus / "train/text")]
    assert tokenizer.num_pieces == 400
    assert 40_000 <= sum(len(tokenizer.encode(text or "")) for text in texts) < 40_200
    assert 0.05 <= Dataset.open(tiny_corpus / "train/speech").info.hours < 0.056
    assert LogMelKMeans.load(tiny_corpus / "codebook.safetensors").num_units == 501
    assert [len(Dataset.open(tiny_corpus / part)) for part in PARTS[2:]] == [8, 8, 8]
    tasks = [item.task for item in read_items(tiny_corpus / "items")]
    assert {task: tasks.count(task) for task in set(tasks)} == {
        "storycloze": 8,
        "topicstorycloze": 8,
        "hellaswag": 8,
    }


def test_fingerprints_are_those_of_the_files(tiny_corpus: Path) -> None:
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer.model").fingerprint
    codebook = LogMelKMeans.load(tiny_corpus / "codebook.safetensors").fingerprint
    for part in PARTS:
        info = Dataset.open(tiny_corpus / part, codebook=codebook, tokenizer=tokenizer).info
        expected = (None, tokenizer) if part.endswith("text") else (codebook, None)
        assert (info.codebook, info.tokenizer) == expected
    read_items(tiny_corpus / "items", codebook=codebook, tokenizer=tokenizer)
    with pytest.raises(UserError, match="data made with codebook"):
        Dataset.open(tiny_corpus / "train/speech", codebook="sha256:another")


def test_words_spell_the_text_and_are_not_empty(tiny_corpus: Path) -> None:
    items = read_items(tiny_corpus / "items")
    spoken = [record for item in items for record in (item.prompt, *item.endings)]
    for part in ("train/speech", "valid/speech", "valid/voice"):
        spoken += records_of(tiny_corpus / part)
    for record in spoken:
        assert record.words is not None
        assert " ".join(word.word for word in record.words) == record.text
        assert all(word.start < word.stop for word in record.words)


def test_no_story_is_told_twice(tiny_corpus: Path) -> None:
    written = {record.text for record in records_of(tiny_corpus / "train/text")}
    spoken = {record.text for record in records_of(tiny_corpus / "train/speech")}
    held_out = {record.text for record in records_of(tiny_corpus / "valid/text")}
    asked = {
        f"{item.prompt.text} {item.endings[item.answer].text}"
        for item in read_items(tiny_corpus / "items")
    }
    sets = [written, spoken, held_out, asked]
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_validation_parts_are_the_same_stories(tiny_corpus: Path) -> None:
    texts = [[record.text for record in records_of(tiny_corpus / part)] for part in PARTS[2:]]
    assert texts[0] == texts[1] == texts[2]


def test_the_held_out_voice_is_heard_in_its_part_alone(tiny_corpus: Path) -> None:
    training = {voice.name for voice in TRAINING_VOICES}
    speakers = {
        part: {record.speaker for record in records_of(tiny_corpus / part)} for part in PARTS
    }
    assert speakers["valid/voice"] == {HELD_OUT_VOICE.name}
    assert speakers["train/speech"] <= training
    assert len(speakers["train/speech"]) > 3
    assert speakers["valid/speech"] <= training
    for item in read_items(tiny_corpus / "items"):
        voices = {record.speaker for record in (item.prompt, *item.endings)}
        assert len(voices) == 1
        assert voices <= training


def test_corpus_json_counts_what_is_there(tiny_corpus: Path) -> None:
    facts = json.loads((tiny_corpus / "corpus.json").read_text())
    assert facts["settings"]["hours"] == 0.05
    for part in PARTS:
        records = records_of(tiny_corpus / part)
        assert facts["parts"][part]["records"] == len(records)
        units = sum(0 if record.units is None else len(record.units) for record in records)
        assert facts["parts"][part]["units"] == units
    assert 5 < facts["frames_per_word"] < 7  # the paper's speech: 5.8
    assert 3 < facts["frames_per_silence"] < 6  # 3.7
    assert "train/speech" in describe(tiny_corpus)
    assert not (tiny_corpus / "work").exists()


# Making it ----------------------------------------------------------------------------------------


def test_another_seed_is_another_corpus(made: Path, config: DemoConfig, tmp_path: Path) -> None:
    other = content_of(prepare_demo(replace(config, out=tmp_path / "demo", seed=1)))
    first = content_of(made)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_two_processes_make_the_same_bytes(made: Path, config: DemoConfig, tmp_path: Path) -> None:
    again = prepare_demo(replace(config, out=tmp_path / "demo", workers=2))
    assert content_of(again) == content_of(made)


def test_stopped_again_and_again_it_makes_the_same_bytes(
    made: Path, config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run may speak 20 utterances: one portion of 16, and some in vain."""
    runs = 0
    while not (tmp_path / "demo" / "corpus.json").exists():
        with monkeypatch.context() as patch:
            patch.setattr(demo, "synthesize", synthesis_that_stops(after=20))
            try:
                prepare_demo(replace(config, out=tmp_path / "demo"))
            except Stopped:
                assert not (tmp_path / "demo" / "corpus.json").exists()
        runs += 1
        assert runs < 20
    assert runs > 2
    assert content_of(tmp_path / "demo") == content_of(made)


def test_a_made_corpus_is_not_made_again(
    made: Path, config: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "synthesize", synthesis_that_stops(after=0))
    before = content_of(made)
    assert prepare_demo(replace(config, out=made, workers=2)) == made
    assert content_of(made) == before


def test_ctrl_c_ends_every_process_and_loses_no_finished_portion(
    made: Path, config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    options = {"out": out, **config.settings, "workers": 2}
    command = [sys.executable, "-m", "lst.prepare", "demo"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # The first portion of the training speech is there, so two processes are at work.
    deadline = time.monotonic() + 120
    while not (out / "work" / "train-00000" / "dataset.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.strip().endswith("interrupted: the same command goes on from here")
    assert "Traceback" not in output
    wait_for_end_of_group(process.pid)
    finished = (out / "work" / "train-00000" / "shard-00000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(demo, "synthesize", synthesis_that_stops(after=0))
    with pytest.raises(Stopped):
        prepare_demo(replace(config, out=out))
    again = (out / "work" / "train-00000" / "shard-00000.parquet").stat().st_mtime_ns
    assert again == finished
    monkeypatch.undo()
    assert content_of(prepare_demo(replace(config, out=out))) == content_of(made)


# Mistakes -----------------------------------------------------------------------------------------


def test_other_settings_in_the_same_folder_are_refused(made: Path, config: DemoConfig) -> None:
    before = content_of(made)
    expected = (
        f"--out {made}: holds a corpus of hours 0.02, not 3.0, seed 0, not 7; "
        "choose another --out or remove the folder"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        prepare_demo(replace(config, out=made, hours=3.0, seed=7))
    assert content_of(made) == before


def test_other_settings_in_a_half_made_folder_are_refused(
    config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "synthesize", synthesis_that_stops(after=0))
    with pytest.raises(Stopped):
        prepare_demo(replace(config, out=tmp_path))
    with pytest.raises(UserError, match="holds a corpus of codes 60, not 61"):
        prepare_demo(replace(config, out=tmp_path, codes=61))


def test_a_folder_of_other_files_is_left_alone(config: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="expected an empty or absent folder, got other files"):
        prepare_demo(replace(config, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_named(config: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(UserError, match=re.escape(f"--out {out}: cannot be written")):
            prepare_demo(replace(config, out=out))


def test_a_damaged_corpus_json_is_named(config: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(UserError, match=r"corpus\.json: expected the settings of a corpus"):
        prepare_demo(replace(config, out=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hours": 0.0}, "--hours: expected more than 0, got 0.0"),
        ({"hours": float("nan")}, "--hours: expected more than 0, got nan"),
        ({"text_tokens": -1}, "--text-tokens: expected 1 or more, got -1"),
        ({"questions": 12}, "--questions: expected a multiple of 8, got 12"),
        ({"validation": 0}, "--validation: expected a multiple of 8, got 0"),
        ({"workers": 0}, "--workers: expected 1 or more, got 0"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DemoConfig(**options)


def test_the_command_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "lst.prepare", "demo", "--out", str(tmp_path / "file")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == f"error: --out {tmp_path}/file: cannot be written (Not a directory)\n"
    assert process.stdout == ""


def test_a_tokenizer_that_is_none_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="none: expected a tokenizer, got no file"):
        prepare_demo(DemoConfig(out=tmp_path / "demo", tokenizer=tmp_path / "none"))
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hours": 1e308}, "--hours: expected at most 1,000, got 1e"),
        ({"text_tokens": 2**31}, "--text-tokens: expected at most 1,000,000,000, got 2147"),
        ({"questions": 2**31}, "--questions: expected at most 100,000, got 2147"),
        ({"validation": 2**63}, "--validation: expected at most 100,000, got 9223"),
        ({"seed": -1}, "--seed: expected 0 or more, below 2.32, got -1"),
        ({"seed": 2**32}, "--seed: expected 0 or more, below 2.32, got 4294967296"),
    ],
)
def test_more_than_a_demo_and_a_seed_that_is_none_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DemoConfig(**options)
