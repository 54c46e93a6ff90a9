"""Training in one process: what it writes, and that stopping and going on changes nothing."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lst.train.loop as loop
from lst.errors import UserError
from lst.train.checkpoint import ALONE, load_model, newest_checkpoint
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.manifest import file_names, hash_files, write_manifest

Tiny = Callable[..., TrainConfig]
CLOCK = ("seconds", "_per_second", "mfu", "memory_gib")  # keys of what is not the same twice


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    """The lines of metrics, without what depends on the clock."""
    texts = (config.out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(text).items() if not k.endswith(CLOCK)} for text in texts]


def losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in lines(config) if line["split"] == "train"]


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return load_model(config.out, "cpu")[0].state_dict()


def assert_same_run(first: TrainConfig, second: TrainConfig) -> None:
    """Bit for bit."""
    assert lines(first) == lines(second)
    others = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, others[name]), name


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do ``action`` in the middle of the step of that number."""
    real, calls = loop.backward, [0]

    def backward(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "backward", backward)


def test_a_run_writes_what_it_promises(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    config = tiny()
    train(config)
    out = config.out
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    got = [(line["step"], line["split"]) for line in lines(config)]
    valid = ["valid/speech", "valid/text"]
    assert got == [
        *((step, "train") for step in (1, 2, 3)),
        *((3, split) for split in valid),
        *((step, "train") for step in (4, 5, 6)),
        *((6, split) for split in valid),
    ]
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line["bits"] == pytest.approx(line["loss"] / 0.6931471805599453)
        if line["split"] == "train":
            assert line["tokens_per_second"] >= line["units_per_second"] > 0
            assert (line["speech_hours_per_second"] > 0) == (line["loss_speech"] is not None)
            assert {"lr", "grad_norm", "seconds", "loss_text", "loss_speech"} <= line.keys()
            assert line["step_seconds"] > line["data_seconds"] > 0
            assert line["memory_gib"] > 0.01
            assert line["skipped"] == 0
            assert line["mfu"] is None  # of a CPU whose peak nobody has named
    assert [folder.name for folder in sorted((out / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (2, 4, 6)
    ]
    said = capsys.readouterr().out
    assert "step 6/6  loss " in said
    assert "tokens/s" in said
    assert "elapsed" in said
    assert "items holds no stories" in said
    assert not (out / "story_completion.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_loss_falls(tiny: Tiny) -> None:
    config = tiny(steps=40, checkpoint_every=40, validate_every=40)
    train(config)
    curve = losses(config)
    assert sum(curve[-5:]) / 5 < curve[0] - 0.5


@pytest.mark.usefixtures("undrawn")
def test_stories_are_completed_at_the_end(
    tiny: Tiny, stories: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=1)
    train(config)
    scores = json.loads((config.out / "story_completion.json").read_text())
    assert {(score["mode"], score["num_items"]) for score in scores} == {("S→S", 2), ("T→T", 2)}
    table = (config.out / "story_completion.md").read_text()
    assert table in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_the_same_run_twice_is_the_same_bit_for_bit(tiny: Tiny) -> None:
    first, second = tiny("first"), tiny("second")
    train(first)
    train(second)
    assert_same_run(first, second)


@pytest.mark.usefixtures("undrawn")
def test_another_seed_is_another_run(tiny: Tiny) -> None:
    first, second = tiny("first", steps=1), tiny("second", steps=1, seed=1)
    train(first)
    train(second)
    assert losses(first) != losses(second)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Checkpoints are at 2, 4 and 6; steps after the last of them, or all, are taken again."""
    whole, killed = tiny("whole", steps=7), tiny("killed", steps=7)
    train(whole)

    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        stop_at(step, patch, die)
        with pytest.raises(MemoryError):
            train(killed)
    with (killed.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # torn by the kill
    train(killed, resume=True)
    assert_same_run(whole, killed)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 5), (signal.SIGTERM, 3), (signal.SIGUSR1, 5)]
)
def test_a_signal_lets_the_step_finish_and_the_run_goes_on(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
) -> None:
    """Step 3 also has a validation due, which is left for later."""
    whole, stopped = tiny("whole"), tiny("stopped")
    train(whole)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(step, patch, lambda: os.kill(os.getpid(), number))
        train(stopped)
    assert signal.getsignal(number) is handler
    assert newest_checkpoint(stopped.out).name == f"step-{step:08d}"
    said = capsys.readouterr().out
    assert (
        f"{number.name}: stopped after step {step}; "
        f"resume with: python -m lst.train --resume {stopped.out}" in said
    )
    assert len(losses(stopped)) == step
    train(stopped, resume=True)
    assert_same_run(whole, stopped)


@pytest.mark.usefixtures("undrawn")
def test_a_signal_during_validation_stops_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tiny("whole"), tiny("stopped")
    train(whole)
    real = loop.validate

    def validate(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", validate)
        train(stopped)
    assert newest_checkpoint(stopped.out).name == "step-00000003"
    train(stopped, resume=True)
    assert_same_run(whole, stopped)


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_resumed_takes_no_step(tiny: Tiny) -> None:
    config = tiny(steps=2)
    train(config)
    before = lines(config)
    train(config, resume=True)
    assert lines(config) == before


@pytest.mark.usefixtures("undrawn")
def test_accumulation_changes_nothing(tiny: Tiny) -> None:
    once, twice = tiny("once"), tiny("twice", accumulation=2)
    train(once)
    train(twice)
    for a, b in zip(lines(once), lines(twice), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(accumulation=2, max_skipped=1)
    batches: list[Any] = []
    real = loop.backward

    def backward(model: torch.nn.Module, micro_batches: Any, **kwargs: Any) -> Any:
        batches.append(micro_batches)
        sums = real(model, micro_batches, **kwargs)
        if len(batches) == 4:
            sums[1][0] = torch.nan
        return sums

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    guilty, innocent = batches[3][1].record_ids, batches[3][0].record_ids
    assert message.startswith("step 4: expected a finite loss and gradient, got loss nan")
    assert f"records {', '.join(guilty)};" in message
    assert not set(innocent) - set(guilty) & set(message.split("records ")[1].split(", "))
    assert "; 1 updates in a row were skipped; " in message
    assert message.endswith(f"last checkpoint: {config.out / 'checkpoints' / 'step-00000002'}")
    assert [line["loss"] for line in lines(config)][-1] is None  # NaN is no JSON
    assert newest_checkpoint(config.out).name == "step-00000002"


@pytest.mark.usefixtures("undrawn")
def test_a_diverging_run_stops(tiny: Tiny) -> None:
    config = tiny(max_skipped=3)
    config = replace(config, optimizer=replace(config.optimizer, lr=1e38, warmup_steps=0))
    with pytest.raises(UserError, match=r"^step [4-6]: expected a finite loss and gradient, got"):
        train(config)


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_holds_a_run_is_left_alone(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already") as caught:
        train(config)
    assert f"--resume {config.out}" in str(caught.value)
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_a_run_folder_that_cannot_be_written_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\)"):
        train(tiny("file/run"))


def test_a_missing_corpus_is_named_and_nothing_is_left(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    config = replace(config, data=replace(config.data, corpus=tmp_path / "none"))
    with pytest.raises(UserError, match=r"none: expected a corpus folder, got none"):
        train(config)
    assert not config.out.exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_not_resumed_on_other_data(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config)
    folder = newest_checkpoint(config.out)
    assert folder is not None
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"text": "sha256:', '"text": "sha256:0'))
    (folder / "manifest.json").unlink()
    write_manifest(folder, hash_files(folder, file_names(folder), ALONE))
    with pytest.raises(UserError, match="was trained on dataset 'text' sha256:0"):
        train(config, resume=True)


@pytest.mark.usefixtures("undrawn")
def test_the_process_is_left_as_it_was(tiny: Tiny) -> None:
    threads = torch.get_num_threads()
    train(tiny(steps=1))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
