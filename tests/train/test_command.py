"""``python -m lst.train``: what it accepts, and the one line that it says to each mistake."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lst.errors import run_command
from lst.presets import DESCRIPTIONS, PRESETS
from lst.train.__main__ import Command, main, parse
from lst.train.checkpoint import newest_checkpoint
from lst.train.config import TrainConfig, to_json
from lst.train.loop import train
from lst.train.manifest import size_faults

Tiny = Callable[..., TrainConfig]


def call(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["lst.train", *map(str, options)])
    try:
        run_command(main)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    return 0


def test_without_a_preset_it_is_the_demo() -> None:
    assert parse([]) == Command(config=PRESETS["demo"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_taken_by_its_name(name: str) -> None:
    assert parse([name]) == Command(config=PRESETS[name])


def test_options_change_a_preset() -> None:
    options = "demo-baseline --steps 7 --optimizer.lr 0.5 --data.rows 8 --no-evaluate --out x"
    config = parse(options.split()).config
    assert config.name == "demo-baseline"
    assert (config.steps, config.optimizer.lr, config.data.rows) == (7, 0.5, 8)
    assert (config.evaluate, config.out) == (False, Path("x"))
    assert config.model == PRESETS["demo-baseline"].model


def test_a_mixture_is_given_whole() -> None:
    """The paper's ratios of speech to text (A.3), and SpiritLM's third of each kind."""
    assert parse([]).config.data.mixture == {"text": 2.0, "speech": 1.0}
    for text in (1, 3):
        config = parse(f"--data.mixture text {text} speech 1 --steps 3".split()).config
        assert config.data.mixture == {"text": float(text), "speech": 1.0}
    spirit = "text 1 speech:interleaved 1 speech:speech 1"
    config = parse(["demo", "--data.mixture", *spirit.split()]).config
    assert config.data.mixture == {"text": 1.0, "speech:interleaved": 1.0, "speech:speech": 1.0}
    for wrong in ("text", "text much", "text 1 text 2"):
        with pytest.raises(SystemExit) as leaving:
            parse(["--data.mixture", *wrong.split()])
        assert leaving.value.code == 2


def test_help_lists_every_preset_and_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(["--help"])
    assert leaving.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, description in DESCRIPTIONS.items():
        assert f"{name} {description}" in said
    for option in ("--steps", "--optimizer.lr", "--data.rows", "--model.encoder.dim", "--resume"):
        assert option in said
    assert f"(default: {PRESETS['demo'].steps})" in said


@pytest.mark.usefixtures("undrawn")
def test_mistakes_leave_with_code_2_and_one_line(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, empty = tiny(steps=1), tmp_path / "empty"
    train(run)
    checkpoint = newest_checkpoint(run.out)
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({**to_json(run), "stepz": 1}))
    cases: list[tuple[list[object], str]] = [
        (
            ["demo2"],
            f"preset: expected one of {', '.join(PRESETS)}, got 'demo2'",
        ),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--gpus", "2"], "--gpus: expected 1 or more, of a --dry-run, got 2 without --dry-run"),
        (["--dry-run", "--gpus", "3"], "data: expected rows that divide by 3 processes × 1 micro-"),
        (["--data.corpus", tmp_path / "no"], f"{tmp_path / 'no'}: expected a corpus folder, got"),
        (["--data.corpus", __file__], f"{__file__}: expected a corpus folder, got a file"),
        (["--optimizer.lr", "inf"], "--optimizer.lr: expected more than 0, got inf"),
        (["--resume", tmp_path / "no"], f"{tmp_path / 'no'}: expected a run folder to resume, got"),
        (["--resume", empty], f"{empty}: expected a run folder to resume, got one without config"),
        (["--resume", broken], f"{broken / 'config.json'}: unknown key stepz"),
        (
            ["--resume", run.out, "--optimizer.lr", "0.5"],
            f"{checkpoint}: expected optimizer.lr = 0.01, as the run was started, got 0.5",
        ),
        (
            ["--resume", run.out, "--out", empty],
            f"--out: a run goes on in its own folder, {run.out}",
        ),
        (
            ["demo", "--resume", run.out, "--data.corpus", run.data.corpus],
            f"{checkpoint}: expected model.",
        ),
    ]
    for options, message in cases:
        capsys.readouterr()
        assert call(monkeypatch, *options) == 2, options
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {message}"), said.err
        assert said.err.count("\n") == 1, said.err


@pytest.mark.parametrize(
    "options", [["--stepz", "3"], ["--steps", "many"], ["--precision", "int8"], ["demo", "more"]]
)
def test_options_that_do_not_parse_leave_with_code_2(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(options)
    assert leaving.value.code == 2
    assert options[-2 if options[0].startswith("--") else -1] in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_resumed_by_its_folder_alone_and_told_of_more_often(tiny: Tiny) -> None:
    run = tiny(steps=1)
    train(run)
    moved = run.out.with_name("moved")
    run.out.rename(moved)
    command = parse(["--resume", str(moved), "--log-every", "5"])
    assert command.resume == str(moved)
    config = command.config
    assert (config.out, config.log_every, config.model) == (moved, 5, run.model)
    assert parse([f"--resume={moved}"]).config.out == moved


@pytest.mark.usefixtures("undrawn")
def test_resume_auto_starts_a_run_and_goes_on_with_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, as a cluster gives it again and again."""
    run = tiny()
    monkeypatch.setitem(PRESETS, "tiny", run)
    monkeypatch.setitem(DESCRIPTIONS, "tiny", "a run of a second")
    command = ["tiny", "--resume", "auto", "--out", str(run.out), "--steps", "2"]
    assert parse(command) == Command(config=replace(run, steps=2))
    assert call(monkeypatch, *command) == 0
    assert "resuming from" not in capsys.readouterr().out

    (newest,) = (run.out / "checkpoints").iterdir()
    going_on = Command(config=replace(run, steps=2), resume=str(run.out))
    assert parse(command) == going_on
    assert call(monkeypatch, *command) == 0
    assert f"{run.out}: resuming from {newest}\n" in capsys.readouterr().out
    assert parse(["--resume=auto", f"--out={run.out}"]) == going_on

    newest.rename(newest.with_name(f".{newest.name}.tmp"))  # as if killed in its first save
    assert call(monkeypatch, *command) == 0
    said = capsys.readouterr().out
    assert f"{run.out}: resuming from the start, as it has no checkpoint yet\n" in said
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == [newest.name]


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_checkpoint_is_passed_over_aloud(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny(steps=4, validate_every=4)
    train(run)
    metrics = (run.out / "metrics.jsonl").read_text()
    second, fourth = sorted((run.out / "checkpoints").iterdir())
    weights = fourth / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    capsys.readouterr()
    assert call(monkeypatch, "--resume", run.out) == 0
    said = capsys.readouterr().out
    expected = (
        f"{fourth}: expected a complete checkpoint; model/model.safetensors: expected SHA-256"
    )
    assert said.startswith(f"passed over: {expected} ")
    assert f"\n{run.out}: resuming from {second}\n" in said
    assert size_faults(fourth) == []
    assert [json.loads(line)["loss"] for line in metrics.splitlines()] == [
        json.loads(line)["loss"] for line in (run.out / "metrics.jsonl").read_text().splitlines()
    ]

    for folder in (second, fourth):
        (folder / "config.json").write_text("")
    capsys.readouterr()
    assert call(monkeypatch, "--resume", run.out) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {run.out}: every checkpoint in it is damaged; the newest: {fourth}: expected a "
        "complete checkpoint; config.json: expected "
    )


def test_only_rank_0_speaks_of_a_shared_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("lst.train.__main__.SILENCE", 0.0)
    assert call(monkeypatch, "demo2") == 2
    assert call(monkeypatch, "--help") == 0
    assert call(monkeypatch, "--stepz") == 2
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_is_silent_leaves_as_soon_as_its_launcher_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("lst.train.__main__.SILENCE", 1000.0)
    monkeypatch.setattr("lst.train.monitor.asked", bytearray([signal.SIGTERM]))
    assert call(monkeypatch, "demo2") == 2


def test_the_command_itself_leaves_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lst.train", "demo", "--data.corpus", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'no'}: expected a corpus folder")
    assert done.stderr.count("\n") == 1


# The command; as Python ends, a signal comes once its handlers are gone.
ENDING = """
import os, runpy, signal

class Late:
    def __del__(self, os=os, number=signal.SIGTERM):
        os.kill(os.getpid(), number)

late = Late()
runpy.run_module("lst.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.usefixtures("undrawn")
def test_what_comes_as_python_ends_does_not_change_the_code_of_a_run_that_ended_well(
    tiny: Tiny,
) -> None:
    """A second signal, and a log on a full disk."""
    run = tiny(steps=1)
    train(run)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ENDING, "--resume", str(run.out)],
            stdout=full,
            stderr=full,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0
    assert json.loads((run.out / "status.json").read_text())["state"] == "finished"
