"""Checkpoints are written while training goes on; one that fails is told of and tried again."""

import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lst.train.checkpointer as checkpointer
import lst.train.loop as loop
from lst.errors import UserError
from lst.model import LanguageModel, build_model
from lst.train.checkpoint import ALONE, State, complete_checkpoints, load_model, load_tensors
from lst.train.checkpointer import Checkpointer
from lst.train.config import TrainConfig
from lst.train.corpus import open_corpus
from lst.train.loop import train
from lst.train.optimizer import build_optimizer, optimizer_tensors
from lst.train.watchdog import WRITER

Tiny = Callable[..., TrainConfig]


class Log:
    """What a Checkpointer needs of MetricsLog."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[tuple[int, dict[str, Any]]] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def event(self, step: int, values: dict[str, Any]) -> None:
        self.events.append((step, values))


class Bench:
    """A model and the Checkpointer of its run, without the run."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.log = config, Log()
        self.corpus = open_corpus(config.data)
        self.model = self.new_model()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.checkpoints = Checkpointer(
            config, self.corpus.tokenizer, ALONE, self.log, resumed=(None, 0)
        )

    def new_model(self) -> LanguageModel:
        return build_model(self.config.model, self.corpus.vocabulary)

    def save(self, step: int) -> None:
        state = State(step=step, vocabulary=self.corpus.vocabulary, datasets={})
        self.checkpoints.save(state, self.model, self.optimizer)

    def poll(self, step: int) -> None:
        """Once the save under way has ended."""
        thread = self.checkpoints._thread
        if thread is not None:
            thread.join()
        self.checkpoints.poll(step)


def failing(monkeypatch: pytest.MonkeyPatch, times: int, error: BaseException) -> None:
    """Let the next saves fail."""
    real, calls = checkpointer.save_checkpoint, [0]

    def save(*args: Any) -> Path:
        calls[0] += 1
        if calls[0] <= times:
            raise error
        return real(*args)

    monkeypatch.setattr(checkpointer, "save_checkpoint", save)


def test_what_changes_after_save_returns_is_not_written(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny())
    for tensor in optimizer_tensors(bench.model, bench.optimizer).values():
        tensor.copy_(torch.rand_like(tensor))
    tensors = {**bench.model.weights(), **optimizer_tensors(bench.model, bench.optimizer)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    changed, real = threading.Event(), checkpointer.save_checkpoint

    def save(*args: Any) -> Path:
        assert changed.wait(60)
        return real(*args)

    monkeypatch.setattr(checkpointer, "save_checkpoint", save)
    bench.save(1)
    bench.checkpoints.poll(1)  # does not wait
    assert bench.checkpoints.saved is None
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    changed.set()
    bench.checkpoints.finish()

    model = bench.new_model()
    optimizer = build_optimizer(model, bench.config.optimizer)
    assert bench.checkpoints.saved is not None
    load_tensors(bench.checkpoints.saved, model, optimizer)
    for name, tensor in {**model.weights(), **optimizer_tensors(model, optimizer)}.items():
        assert torch.equal(tensor, before[name]), name


def test_one_save_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny())
    running: list[int] = []
    real = checkpointer.save_checkpoint

    def save(*args: Any) -> Path:
        running.append(1)
        assert len(running) == 1
        time.sleep(0.05)
        folder = real(*args)
        running.clear()
        return folder

    monkeypatch.setattr(checkpointer, "save_checkpoint", save)
    for step in (1, 2, 3):
        bench.save(step)
    bench.checkpoints.finish()
    assert bench.log.said == []
    assert [f.name[-1] for f in complete_checkpoints(bench.config.out)] == ["1", "2", "3"]


def test_a_failed_save_is_told_of_and_tried_again_after_more_and_more_steps(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny(checkpoint_every=100))
    checkpoints = bench.checkpoints
    failing(monkeypatch, 2, UserError("x: cannot be written (No space left on device)"))
    assert checkpoints.due(100, last=False)
    bench.save(100)
    bench.poll(101)
    message = "the checkpoint of step 100 was not saved: x: cannot be written (No space left"
    assert bench.log.said == [f"{message} on device); trying again after step 111"]
    error = "x: cannot be written (No space left on device)"
    event = {"event": "checkpoint", "checkpoint": 100, "error": error}
    assert bench.log.events == [(101, event)]
    assert next(s for s in range(102, 200) if checkpoints.due(s, last=False)) == 111
    bench.save(111)
    bench.poll(112)
    assert bench.log.said[1].endswith("trying again after step 132")
    assert not checkpoints.due(131, last=False)
    assert checkpoints.due(132, last=False)
    bench.save(132)
    bench.poll(133)
    assert bench.log.said[2:] == ["the checkpoint of step 132 is saved"]
    assert checkpoints.saved == bench.config.out / "checkpoints" / "step-00000132"
    assert [s for s in range(133, 301) if checkpoints.due(s, last=False)] == [200, 300]


def test_a_save_that_stalls_is_told_of_once_and_that_it_is_saved(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, go_on, real = Bench(tiny()), threading.Event(), checkpointer.save_checkpoint

    def save(*args: Any) -> Path:
        go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(checkpointer, "save_checkpoint", save)
    bench.save(1)
    (writer,) = (each for each in threading.enumerate() if each.name == WRITER)
    where = "no progress for 45 s: rank 0: at x.py:1 (f)"
    bench.checkpoints.poll(2, None)
    bench.checkpoints.poll(3, (threading.Thread(), where))  # an earlier save's
    assert bench.log.said == []
    for step in (4, 5):
        bench.checkpoints.poll(step, (writer, where))
    message = f"the checkpoint of step 1: {where}; training goes on"
    assert bench.log.said == [message]
    assert bench.log.events == [
        (4, {"event": "checkpoint stalled", "checkpoint": 1, "reason": where})
    ]
    go_on.set()
    bench.checkpoints.finish()
    assert bench.log.said == [message, "the checkpoint of step 1 is saved"]


def test_the_last_save_that_fails_is_an_error_and_an_earlier_one_is_told_of(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny())
    failing(monkeypatch, 3, UserError("x: cannot be written"))
    bench.save(2)
    bench.save(3)  # waits for the first
    assert bench.log.said == [
        "the checkpoint of step 2 was not saved: x: cannot be written; trying again after step 3"
    ]
    with pytest.raises(UserError, match=r"^x: cannot be written$"):
        bench.checkpoints.finish()
    bench.save(4)
    bench.checkpoints.close()  # after another error
    assert bench.log.said[1:] == ["the checkpoint of step 4 was not saved: x: cannot be written"]


def test_a_mistake_of_the_program_is_not_hidden(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny())
    failing(monkeypatch, 1, ZeroDivisionError())
    bench.save(1)
    with pytest.raises(ZeroDivisionError):
        bench.poll(2)


def test_what_a_killed_run_left_is_removed(tiny: Tiny) -> None:
    config = tiny()
    for name in (".step-00000002.tmp", ".step-00000001.old.tmp"):
        (config.out / "checkpoints" / name / "model").mkdir(parents=True)
    Bench(config)
    assert list((config.out / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_the_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny(keep=1))
    bench.save(1)
    bench.checkpoints.finish()

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("shutil.rmtree", refuse)
    bench.save(2)
    bench.checkpoints.finish()
    (said,) = bench.log.said
    assert said.startswith("an old checkpoint was not removed: ")
    assert said.endswith("step-00000001: cannot be written (Operation not permitted)")
    assert [f.name for f in complete_checkpoints(bench.config.out)] == ["step-00000002"]


# Whole runs ---------------------------------------------------------------------------------------


def losses(config: TrainConfig) -> list[float]:
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def steps_taken(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Call ``action`` with the number of every step, in the middle of it."""
    real, step = loop.backward, [0]

    def backward(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        action(step[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "backward", backward)


@pytest.mark.usefixtures("undrawn")
def test_saving_changes_no_loss(tiny: Tiny) -> None:
    often, never = tiny("often", checkpoint_every=1), tiny("never", checkpoint_every=100)
    train(often)
    train(never)
    assert losses(often) == losses(never)
    expected = load_model(never.out, "cpu")[0].weights()
    for name, tensor in load_model(often.out, "cpu")[0].weights().items():
        assert torch.equal(tensor, expected[name]), name


def assert_outlived(config: TrainConfig, undisturbed: TrainConfig, said: str, reason: str) -> None:
    """A run whose checkpoint of step 6 failed: tried again before that of step 12, on its way."""
    message = "the checkpoint of step 6 was not saved: "
    assert said.count(message) == 1
    told = said.split(message)[1].splitlines()[0]
    assert f"cannot be written ({reason})" in told
    assert "; trying again after step " in told
    events = map(json.loads, (config.out / "events.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["event"] == "checkpoint"]
    assert event["checkpoint"] == 6
    assert event["error"] in told
    again, last = sorted((config.out / "checkpoints").iterdir())
    assert (again.name > "step-00000006", last.name) == (True, "step-00000012")
    assert f"the checkpoint of step {int(again.name[-8:])} is saved" in said
    load_model(again, "cpu")
    assert losses(config) == losses(undisturbed)


@pytest.mark.usefixtures("undrawn")
def test_a_run_outlives_files_that_cannot_grow(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses for real to write more than 64 KiB to a file, in steps 6 and 7."""
    changes = {"steps": 12, "checkpoint_every": 6, "validate_every": 12}
    undisturbed, run = tiny("undisturbed", **changes), tiny("run", **changes)
    train(undisturbed)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def action(step: int) -> None:
        if step == 8:
            run_checkpoints_ended()
        limit = 2**16 if step in (6, 7) else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    with ended_saves(monkeypatch) as run_checkpoints_ended, monkeypatch.context() as patch:
        patch.setattr(checkpointer, "RETRY_STEPS", 1)
        steps_taken(patch, action)
        capsys.readouterr()
        try:
            train(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_outlived(run, undisturbed, capsys.readouterr().out, "File too large")


@contextmanager
def ended_saves(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function that waits for the first save of a run to end."""
    ended, real = threading.Event(), checkpointer.save_checkpoint

    def save(*args: Any) -> Path:
        try:
            return real(*args)
        finally:
            ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "save_checkpoint", save)
        yield lambda: None if ended.wait(60) else pytest.fail("no save has ended")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB, which holds four checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("undrawn")
def test_a_run_outlives_a_full_disk(
    tiny: Tiny,
    make_tiny: Callable[..., TrainConfig],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"steps": 12, "checkpoint_every": 6, "validate_every": 12, "keep": 2}
    undisturbed, run = tiny("undisturbed", **changes), make_tiny(small_disk / "run", **changes)
    train(undisturbed)
    filler = small_disk / "filler"

    def action(step: int) -> None:
        if step == 6:  # all but a part of a checkpoint
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            filler.write_bytes(bytes(free - 2**18))
        if step == 8:
            run_checkpoints_ended()
            filler.unlink()

    with ended_saves(monkeypatch) as run_checkpoints_ended, monkeypatch.context() as patch:
        patch.setattr(checkpointer, "RETRY_STEPS", 1)
        steps_taken(patch, action)
        capsys.readouterr()
        train(run)
    assert_outlived(run, undisturbed, capsys.readouterr().out, "No space left on device")
