"""``status.json`` tells a script what to do next, however a run ends; signals end it in order."""

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import lst.train.loop as loop
from lst.errors import UserError
from lst.train.config import TrainConfig, to_json
from lst.train.loop import train

Tiny = Callable[..., TrainConfig]
SECONDS = 120  # that a command may take before its test fails
pytestmark = pytest.mark.usefixtures("undrawn")


def status(config: TrainConfig) -> dict[str, Any]:
    return json.loads((config.out / "status.json").read_text())


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def before(function: Any, action: Callable[[], None]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return function(*args, **kwargs)

    return wrapped


def test_a_run_that_ends_is_finished(tiny: Tiny) -> None:
    config = tiny(steps=3)
    train(config)
    got = status(config)
    times = [datetime.strptime(got.pop(key), "%Y-%m-%dT%H:%M:%SZ") for key in ("started", "time")]
    now = datetime.now(UTC).replace(tzinfo=None)
    assert times[0] <= times[1] <= now
    assert (now - times[0]).total_seconds() < SECONDS
    assert got.pop("host")
    assert got == {
        "state": "finished",
        "reason": None,
        "signal": None,
        "step": 3,
        "steps": 3,
        "checkpoint": "checkpoints/step-00000003",
        "processes": 1,
        "pid": os.getpid(),
    }


def test_a_run_under_way_is_running(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = tiny(steps=5), []
    monkeypatch.setattr(
        loop, "backward", before(loop.backward, lambda: seen.append(status(config)))
    )
    train(config)
    assert {each["state"] for each in seen} == {"running"}
    # Written where there is a new checkpoint, which is written in the background.
    assert seen[0]["checkpoint"] is None
    assert seen[-1]["step"] in (2, 3, 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["open_corpus", "parallelise", "rehearse"])
def test_a_signal_before_the_first_step_ends_the_run_at_once_and_it_can_go_on(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    where: str,
) -> None:
    config = tiny(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, where, before(getattr(loop, where), lambda: ask(number)))
        patch.setattr(loop, "backward", lambda *_, **__: pytest.fail("a step was taken"))
        train(config)
    assert f"{number.name}: stopped after step 0; resume with: " in capsys.readouterr().out
    if where == "open_corpus":  # before there is a folder
        assert not config.out.exists()
        train(config)
    else:
        got = status(config)
        assert (got["state"], got["signal"], got["step"]) == ("stopped", number.name, 0)
        assert got["checkpoint"] is None
        train(config, resume=True)
    assert status(config)["state"] == "finished"


@pytest.mark.parametrize("where", ["find_resumed", "rehearse"])
@pytest.mark.parametrize("told", ["of this run", "of a step that is lost", "nothing"])
def test_a_run_that_is_stopped_as_it_goes_on_still_says_where_it_stands(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, where: str, told: str
) -> None:
    config = tiny(steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", before(loop.backward, ask))
        train(config)
    stood = status(config)
    assert (stood["step"], stood["checkpoint"]) == (1, "checkpoints/step-00000001")
    path = config.out / "status.json"
    if told == "nothing":
        path.unlink()
    elif told == "of a step that is lost":
        path.write_text(json.dumps(stood | {"step": 3, "state": "running"}))
    monkeypatch.setattr(loop, where, before(getattr(loop, where), ask))
    train(config, resume=True)
    got = status(config)
    assert (got["state"], got["signal"]) == ("stopped", "SIGTERM")
    assert (got["step"], got["checkpoint"]) == (stood["step"], stood["checkpoint"])


def test_a_signal_while_stories_are_completed_stops_and_they_are_when_resumed(
    tiny: Tiny, stories: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lst.train.stories as module

    config = tiny(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "story_completion", before(module.story_completion, ask))
        train(config)
    got = status(config)
    assert (got["state"], got["step"], got["steps"]) == ("stopped", 2, 2)
    assert got["checkpoint"] == "checkpoints/step-00000002"
    assert not (config.out / "story_completion.json").exists()
    train(config, resume=True)
    assert status(config)["state"] == "finished"
    assert (config.out / "story_completion.json").exists()


def test_mistakes_and_crashes_are_failures_with_their_reason(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=4)

    def crash() -> None:
        raise MemoryError("two\nlines")

    def mistake() -> None:
        raise UserError("what, where")

    for action, reason in ((crash, "MemoryError: two lines"), (mistake, "what, where")):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "rehearse", before(loop.rehearse, action))
            with pytest.raises((MemoryError, UserError)):
                train(config, resume=config.out.exists())
        assert (status(config)["state"], status(config)["reason"]) == ("failed", reason)


def test_what_another_rank_failed_of_outlasts_the_signal_that_its_launcher_sends(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=5)

    def fail() -> None:
        path = config.out / "status.json"
        path.write_text(json.dumps(status(config) | {"state": "failed", "reason": "rank 1: why"}))
        ask()

    monkeypatch.setattr(loop, "rehearse", before(loop.rehearse, fail))
    train(config)
    assert (status(config)["state"], status(config)["reason"]) == ("failed", "rank 1: why")


def test_a_folder_that_holds_another_run_keeps_its_status(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config)
    before = status(config)
    with pytest.raises(UserError, match="holds a run already"):
        train(config)
    assert status(config) == before


def test_what_ended_another_process_first_stays_the_reason(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a rank that was ended from beside, which this one then misses."""
    config = tiny(steps=2)

    def fail() -> None:
        told = status(config) | {"state": "failed", "reason": "rank 1 hangs"}
        (config.out / "status.json").write_text(json.dumps(told))
        raise RuntimeError("rank 1 died")

    monkeypatch.setattr(loop, "backward", before(loop.backward, fail))
    with pytest.raises(RuntimeError, match="rank 1 died"):
        train(config)
    assert (status(config)["state"], status(config)["reason"]) == ("failed", "rank 1 hangs")
    monkeypatch.setattr(loop, "backward", before(loop.backward, lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train(config, resume=True)  # what ended the run before is no reason of this one's
    assert "ZeroDivisionError" in status(config)["reason"]


# The command itself, in a process group of its own.
GROUP = """
import os
os.setpgrp()
from lst.errors import run_command
from lst.train.__main__ import main
run_command(main)
"""


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.timeout(2 * SECONDS)
def test_a_signal_to_the_whole_job_stops_it_with_code_0_workers_and_all(
    tiny: Tiny, fork: Callable[..., Any]
) -> None:
    """scancel and a terminal's Ctrl-C reach the processes that make the rows as well."""
    from dataclasses import replace

    config = tiny(steps=100_000, validate_every=100_000)
    config = replace(config, data=replace(config.data, num_workers=1))
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    job, until = fork(GROUP, "--resume", config.out), time.monotonic() + SECONDS
    while lines(config.out / "metrics.jsonl") < 3:
        assert not job.ended, job.printed()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(job.pids[0], signal.SIGUSR1)
    out = job.succeed()
    got = status(config)
    assert (got["state"], got["signal"]) == ("stopped", "SIGUSR1")
    assert got["checkpoint"] == f"checkpoints/step-{got['step']:08d}"
    assert f"SIGUSR1: stopped after step {got['step']}; resume with: " in out
