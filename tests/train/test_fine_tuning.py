"""A run that begins from another's weights, and one that learns a task alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lst.data.interleave import record_document, stable_rng
from lst.data.loader import DataConfig
from lst.data.packing import patch_document
from lst.data.patching import PatchingConfig, Static
from lst.data.records import Dataset, Record, RecordWriter
from lst.errors import UserError
from lst.model import StackConfig, build_model
from lst.presets import PRESETS, fine_tuning
from lst.train.__main__ import parse
from lst.train.checkpoint import load_model, newest_checkpoint, read_state
from lst.train.config import TrainConfig, from_json, to_json
from lst.train.corpus import open_corpus
from lst.train.loop import train
from lst.train.parallel import initialise_weights
from lst.train.warm_start import start_from_checkpoint
from lst.vocabulary import train_tokenizer

Tiny = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def trained(make_tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lst.train.metrics.plot_losses", lambda *_: None)
        config = make_tiny(tmp_path_factory.mktemp("trained") / "run", steps=2)
        train(config)
    return config


def task_run(config: TrainConfig, task: Any, out: Path, **changes: Any) -> TrainConfig:
    """Fine-tuning of ``config``'s run with rows long enough for its documents."""
    tuned = fine_tuning(config, task)
    data = replace(tuned.data, units_per_sequence=400)
    return replace(tuned, init_from=config.out, data=data, out=out, steps=4, **changes)


def lines(out: Path, split: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["split"] == split]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(out, "cpu")[0].state_dict())


def test_a_run_begins_with_the_weights_of_another_and_a_schedule_of_its_own(
    trained: TrainConfig, tmp_path: Path
) -> None:
    config = replace(trained, init_from=trained.out, out=tmp_path / "next", seed=7)
    corpus = open_corpus(config.data)
    model = build_model(config.model, corpus.vocabulary)
    initialise_weights(model, config.seed)
    start_from_checkpoint(model, config, corpus)
    before = weights(trained.out)
    assert before
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Steps too small to be seen: the weights after them are still those, and steps count from 1.
    train(replace(config, optimizer=replace(config.optimizer, lr=1e-12)))
    for name, value in weights(config.out).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-8)
    assert [line["step"] for line in lines(config.out, "train")] == [1, 2]
    assert lines(config.out, "train")[0]["lr"] == pytest.approx(0.5e-12)


def test_of_a_task_only_the_answers_are_counted(trained: TrainConfig, tmp_path: Path) -> None:
    """In training and in validation, which reads the sets that the task can be asked of alone."""
    for task, learnt, other in (
        ("asr", "loss_text", "loss_speech"),
        ("tts", "loss_speech", "loss_text"),
    ):
        config = task_run(trained, task, tmp_path / task)
        train(config)
        for split in ("train", "valid/speech"):
            found = lines(config.out, split)
            assert found
            for line in found:
                assert line[learnt] > 0
                if task == "asr":
                    assert line[other] is None
                    assert line["loss"] == line[learnt]
                assert line["seen_speech_units"] > 0  # and what is asked is read
        assert not lines(config.out, "valid/text")


def test_fine_tuning_goes_on_as_if_it_had_not_stopped(trained: TrainConfig, tmp_path: Path) -> None:
    """And needs what it began from no more."""
    begun = tmp_path / "begun"
    shutil.copytree(trained.out, begun)
    config = replace(task_run(trained, "asr", tmp_path / "whole"), init_from=begun)
    train(config)
    stopped = replace(config, out=tmp_path / "stopped")
    shutil.copytree(config.out, stopped.out)
    newest = newest_checkpoint(stopped.out)
    assert newest is not None
    assert newest.name == "step-00000004"
    shutil.rmtree(newest)
    shutil.rmtree(begun)
    train(stopped, resume=True)
    for name, value in weights(config.out).items():
        assert torch.equal(value, weights(stopped.out)[name]), name
    keys = ("step", "loss", "grad_norm")
    whole, again = (
        [[line[key] for key in keys] for line in lines(out, "train")]
        for out in (config.out, stopped.out)
    )
    assert whole == again


def test_documents_that_no_row_holds_are_told_of(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset.open(f"{trained.data.corpus}/train/speech")
    corpus = open_corpus(trained.data)
    tools = corpus.vocabulary, corpus.tokenizer
    documents = [record_document(each, *tools, stable_rng(0), "asr") for each in dataset.read()]
    sizes = sorted(
        len(patch_document(each, corpus.vocabulary, Static(size=4)).lengths) for each in documents
    )
    units = sizes[len(sizes) // 2]  # so the longer half is left out
    config = task_run(trained, "asr", tmp_path / "run")
    config = replace(config, data=replace(config.data, units_per_sequence=units + 1))
    train(config)
    expected = f"documents so far were left out, being longer than a row of {units} units"
    assert expected in capsys.readouterr().out
    events = [json.loads(line) for line in (config.out / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"left out"}
    state = read_state(config.out / "checkpoints" / "step-00000004")
    counts = [lane["sources"]["speech:asr"]["left_out"] for lane in state.lanes.values()]
    assert events[-1]["documents"] == sum(counts) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: replace(model, global_transformer=StackConfig(layers=1, dim=64, heads=2)),
            r"step-00000002: expected model.global_transformer.dim = 32, as it was trained, got 64",
        ),
        (
            lambda model: replace(model, local_window=8),
            r"step-00000002: expected model.local_window = 16, as it was trained, got 8",
        ),
    ],
)
def test_another_model_is_refused(
    trained: TrainConfig, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    config = replace(task_run(trained, "asr", tmp_path / "run"), model=change(trained.model))
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()


def write_corpus(folder: Path, *, lines: list[str], codebook: str | None = None) -> Path:
    folder.mkdir()
    tokenizer = train_tokenizer(lines, folder / "tokenizer.model", num_pieces=300)
    record = Record("r", lines[0], np.zeros(9, np.int16), None, None, None, "test")
    for split in ("train", "valid"):
        with RecordWriter(
            folder / split / "speech",
            codebook=codebook,
            tokenizer=tokenizer.fingerprint,
            num_units=20,
        ) as writer:
            writer.write(record)
    return folder


def test_a_corpus_of_another_tokenizer_or_codebook_is_refused(
    trained: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    config = task_run(trained, "asr", tmp_path / "run")
    other = write_corpus(tmp_path / "spoken", lines=["entirely other words"] * 9)
    with pytest.raises(UserError, match=r"spoken: expected a corpus made with the tokenizer of .*"):
        train(replace(config, data=replace(config.data, corpus=str(other))))

    wide = tmp_path / "wide"
    shutil.copytree(corpus, wide)
    record = Record("r", "a fox", np.zeros(9, np.int16), None, None, None, "test")
    with RecordWriter(
        wide / "train" / "speech", codebook=None, tokenizer=None, num_units=30
    ) as writer:
        writer.write(record)
    with pytest.raises(UserError, match=r"wide: expected the vocabulary of .*num_units=20.* got "):
        train(replace(config, data=replace(config.data, corpus=str(wide))))

    ours, theirs = (
        write_corpus(
            tmp_path / name, lines=["a story of small red foxes"] * 9, codebook=f"sha256:{name}"
        )
        for name in ("ours", "theirs")
    )
    run = fine_tuning(replace(trained, out=tmp_path / "of", steps=1), "asr")
    run = replace(run, data=replace(run.data, corpus=str(ours)))
    train(run)
    config = replace(run, init_from=run.out, out=config.out)
    with pytest.raises(UserError, match=r"theirs: expected a corpus made with the codebook of .*"
                       r"step-00000001, sha256:ours, got sha256:theirs"):  # fmt: skip
        train(replace(config, data=replace(config.data, corpus=str(theirs))))
    assert not config.out.exists()


def test_what_is_no_checkpoint_is_refused(trained: TrainConfig, tmp_path: Path) -> None:
    config = replace(task_run(trained, "asr", tmp_path / "run"), init_from=tmp_path / "none")
    with pytest.raises(UserError, match=r"none: expected a checkpoint or a run folder"):
        train(config)
    with pytest.raises(UserError, match=r"--init-from: expected it or --warm-start, got both"):
        replace(config, warm_start=tmp_path)


def test_records_without_an_answer_are_named_before_the_first_step(
    trained: TrainConfig, tmp_path: Path
) -> None:
    config = task_run(trained, "asr", tmp_path / "run")
    config = replace(config, data=replace(config.data, mixture={"text:asr": 1.0}))
    with pytest.raises(UserError, match=r"'text:asr' of the mixture: expected units in every rec"):
        train(config)


# --- the command line -----------------------------------------------------------------------------


def test_a_task_gives_a_preset_its_documents_and_static_patches() -> None:
    command = parse(["lst-1b", "--task", "tts", "--steps", "20000"])
    preset, config = PRESETS["lst-1b"], command.config
    assert config.data.mixture == {"speech:tts": 1.0}
    assert config.data.patching == PatchingConfig(strategy="static", size=4)
    assert (config.out, config.name) == (Path("runs/lst-1b-tts"), "lst-1b-tts")
    assert (config.model, config.optimizer) == (preset.model, preset.optimizer)
    assert (config.steps, config.evaluate) == (20000, False)
    baseline = parse(["baseline-1b", "--task", "asr", "--data.mixture", "other:asr", "1"]).config
    assert baseline.data.patching == PRESETS["baseline-1b"].data.patching
    assert baseline.data.mixture == {"other:asr": 1.0}


def test_a_checkpoint_gives_the_values_that_no_preset_gives(trained: TrainConfig) -> None:
    config = parse(["--init-from", str(trained.out), "--task", "asr", "--steps", "3"]).config
    assert config == replace(fine_tuning(trained, "asr"), init_from=trained.out, steps=3)
    assert config == parse(f"--init_from {trained.out} --task asr --steps 3".split()).config
    config = parse(["demo", f"--init-from={trained.out}"]).config
    assert config == replace(PRESETS["demo"], init_from=trained.out)


def test_the_same_command_starts_and_resumes(
    trained: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tuned"
    options = ["--task", "asr", "--init-from", str(trained.out), "--out", str(out)]
    options += ["--data.units-per-sequence", "400", "--steps", "2", "--resume", "auto"]
    first = parse(options)
    assert first.resume is None
    train(first.config)
    again = parse(options)
    assert again == replace(first, resume=str(out))
    train(again.config, resume=True)
    assert parse(["--resume", str(out)]).config == first.config


def test_a_mixture_of_another_task_is_refused() -> None:
    for mixture in (["speech", "1"], ["speech:tts", "1"], ["speech:asr", "1", "speech:tts", "1"]):
        with pytest.raises(UserError, match=r"--task asr: expected a mixture with documents of th"):
            parse(["--task", "asr", "--data.mixture", *mixture])
    assert parse(["--task", "asr", "--data.mixture", "speech:asr", "3", "text", "1"])


def test_the_task_of_a_mixture_is_the_one_that_it_has() -> None:
    def task(*names: str) -> str | None:
        mixture = dict.fromkeys(names, 1.0)
        return DataConfig(rows=1, units_per_sequence=9, mixture=mixture).task

    assert task("speech:asr") == task("speech:asr", "other:asr", "text") == "asr"
    assert task("speech:tts") == "tts"
    assert task("speech", "text") is task("speech:asr", "speech:tts") is None
    assert task("speech:speech-to-text") is None


def test_a_configuration_from_before_init_from_is_read(trained: TrainConfig) -> None:
    values = to_json(trained)
    del values["init_from"]
    assert from_json(values, "c.json") == trained
