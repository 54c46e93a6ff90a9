"""Losses in nats and bits, lines cut back to a checkpoint, what other loggers get, a full disk."""

import json
import math
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lst.errors import UserError
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.metrics import (
    Loss,
    MetricsLog,
    Seen,
    StepTimes,
    drop_lines_after,
    plot_losses,
    read_metrics,
)

Tiny = Callable[..., TrainConfig]

# What the package of that name is to a run, keeping what it is told in a file.
FAKE_WANDB = """
import json, pathlib

class Run:
    def __init__(self, **options):
        self._path = pathlib.Path(options["dir"]) / "told.jsonl"
        self._tell("init", options)
    def _tell(self, *what):
        with self._path.open("a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, values, *, step):
        self._tell("log", values, step)
    def finish(self):
        self._tell("finish")

def login(*, timeout):
    return 0 < timeout < 45

init, Settings = Run, dict
"""
FAILING_WANDB = """
Settings = dict

def login(*, timeout):
    return True

def init(**options):
    raise ConnectionError("Run initialization has timed out after 30 sec.\\nPlease see the docs")
"""
WANDB_WITHOUT_A_KEY = FAKE_WANDB.replace("0 < timeout < 45", "False")


def test_a_loss_is_a_mean_over_targets_in_nats_and_in_bits() -> None:
    loss = Loss(
        text=6 * math.log(2),
        speech=2 * math.log(2),
        text_targets=3,
        speech_targets=1,
        units_to_predict=5,
    )
    got = loss.per_token()
    assert [got[name] for name in ("bits", "bits_text", "bits_speech")] == pytest.approx([2, 2, 2])
    assert got["loss"] == pytest.approx(2 * math.log(2))
    # The one speech target is a piece of 5 units: 2 bits in a fifth of a second.
    assert got["bits_per_second"] == pytest.approx(10)


def test_a_modality_without_targets_has_no_loss() -> None:
    got = Loss(
        text=3.0, speech=0.0, text_targets=2, speech_targets=0, units_to_predict=0
    ).per_token()
    assert (got["loss"], got["loss_text"], got["loss_speech"], got["bits_speech"]) == (
        1.5,
        1.5,
        None,
        None,
    )


def test_lines_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 1, "split": "train"}, {"step": 2, "split": "valid/text"}]
    texts = [json.dumps(line) for line in [*kept, {"step": 3, "split": "train"}]]
    path.write_text("\n".join([*texts, '{"step": 1, "spl']))
    assert drop_lines_after(path, 2) == kept
    assert [json.loads(text) for text in path.read_text().splitlines()] == kept
    assert drop_lines_after(tmp_path / "none.jsonl", 2) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1, "spl', "expected JSON"),
        ("3", "expected an object with a step, got 3"),
        ('{"step": "1"}', "expected an object with a step"),
        ('{"step": 1, "loss": []}', r"expected loss to be a number, got \[\]"),
        ('{"step": 1, "split": 2}', "expected split to be"),
    ],
)
def test_a_damaged_line_before_the_checkpoint_is_named_and_nothing_is_dropped(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1, "split": "train"}}\n{line}\n{{"step": 2, "split": "train"}}\n'
    path.write_text(content)
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {message}"):
        drop_lines_after(path, 2)
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {message}"):
        read_metrics(path)
    assert path.read_text() == content
    assert len(drop_lines_after(path, 1)) == 1


def test_losses_are_drawn_also_where_a_modality_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        {"step": step, "split": split, "loss_text": 3.0 / step, "loss_speech": None}
        for step in (1, 2)
        for split in ("train", "valid/text")
    ]
    plot_losses(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.usefixtures("undrawn")
def test_wandb_gets_every_line_and_one_run_goes_on_under_one_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=2, wandb="speech")
    with wandb_that_is(FAKE_WANDB, tmp_path / "modules", monkeypatch):
        train(config)
        train(config, resume=True)
    told = [json.loads(text) for text in (config.out / "told.jsonl").read_text().splitlines()]
    first, second = (line[1] for line in told if line[0] == "init")
    assert (first["project"], first["name"], first["resume"]) == ("speech", "run", "allow")
    assert first["id"] == second["id"]
    assert first["config"]["optimizer"]["lr"] == config.optimizer.lr
    lines = [json.loads(text) for text in (config.out / "metrics.jsonl").read_text().splitlines()]
    logged = [line[1:] for line in told if line[0] == "log"]
    assert [step for _, step in logged] == [line["step"] for line in lines]
    for (values, _), line in zip(logged, lines, strict=True):
        assert values["loss/" + line["split"]] == line["loss"]
    assert told[-1] == ["finish"]


@contextmanager
def wandb_that_is(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder.mkdir()
    (folder / "wandb.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    try:
        yield
    finally:
        sys.modules.pop("wandb", None)


def test_a_run_of_wandb_that_does_not_begin_is_one_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_that_is(FAILING_WANDB, tmp_path / "modules", monkeypatch):
        expected = "--wandb: expected a run of project 'speech' to begin, got Run initialization "
        with pytest.raises(UserError, match=f"^{expected}has timed out after 30 sec.$"):
            train(tiny(wandb="speech"))


def test_nobody_is_waited_for_to_log_in_to_wandb(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with wandb_that_is(WANDB_WITHOUT_A_KEY, tmp_path / "modules", monkeypatch):
        with pytest.raises(UserError, match="got no key; run `wandb login` first, or set WANDB_M"):
            train(tiny(wandb="speech"))
        monkeypatch.setenv("WANDB_MODE", "offline")
        train(replace(tiny(wandb="speech", steps=1), out=tmp_path / "offline"))


def test_without_wandb_the_option_names_what_to_install_and_leaves_no_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb: .* pip install 'lst\[wandb\]'$"):
        train(tiny(wandb="speech"))
    assert not tiny().out.exists()


@pytest.mark.usefixtures("undrawn")
def test_on_a_terminal_a_bar_tells_the_time_left(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    train(tiny(steps=3))
    said = capsys.readouterr()
    bars = said.err.split("\r")
    assert any(re.match(r"step 2/3 .*\d\d:\d\d<\d\d:\d\d, loss \d", bar) for bar in bars), bars
    assert "step 2/3" not in said.out
    assert "step 3  valid/text" in said.out


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_keeps_lines_waiting_and_says_so_once(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    config = tiny(steps=9, log_every=1)
    config.out.mkdir()
    log = MetricsLog(
        config, step=0, seconds=0.0, seen=Seen(), peak=None, num_devices=1, active=True
    )
    loss = Loss(text=1.0, speech=2.0, text_targets=1, speech_targets=1, units_to_predict=1)

    def step(number: int) -> None:
        seen = Seen(tokens=number)
        times = StepTimes(seconds=1.0, data=0.0)
        log.training_step(number, loss, seen, times, lr=0.1, grad_norm=1.0, skipped=0)

    path = config.out / "metrics.jsonl"
    step(1)
    with files_of_at_most(path.stat().st_size + 100):  # room for a part of a line
        step(2)
        assert len(path.read_text().splitlines()) == 1
        step(3)
        log.event(3, {"event": "made up", "records": ["x" * 2000]})
        log.sync()
    said = capsys.readouterr().out
    assert said.count(f"{path}: cannot be written (File too large); the run goes on") == 1
    assert said.count("tensorboard: cannot be written (File too large); no more is") == 1
    assert said.count("events.jsonl: cannot be written") == 1
    step(4)
    log.close()
    lines: list[Any] = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert json.loads((config.out / "events.jsonl").read_text())["event"] == "made up"
