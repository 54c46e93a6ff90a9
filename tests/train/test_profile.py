"""``--profile`` writes what it says, of the steps it says, and is nothing where it is off."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.profile import ACTIVE, SKIPPED, Profiler

Tiny = Callable[..., TrainConfig]


def test_a_profiled_run_leaves_a_trace_and_a_summary(
    make_tiny: Tiny, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_tiny(tmp_path / "run", steps=SKIPPED + 1 + ACTIVE, profile=True, evaluate=False)
    train(config)
    folder = config.out / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["summary.json", "trace.json"]
    assert f"{ACTIVE} steps are profiled in {folder}" in capsys.readouterr().out
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= ACTIVE
    summary = json.loads((folder / "summary.json").read_text())
    operations = {each["name"]: each for each in summary["operations"]}
    # As many optimizer steps as were recorded, each with every attention of the forward pass.
    assert summary["steps"] == ACTIVE
    assert operations["lst_kernels::range_attention"]["calls"] % 5 == 0
    shares = [each["share"] for each in summary["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1 + 1e-9


def test_without_it_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lst.train.profile.torch_profile", None)  # calling it would raise
    profiler = Profiler(tmp_path, torch.device("cpu"), active=False)
    for _ in range(20):
        profiler.before()
        assert not profiler.writes
        assert profiler.after() is None
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_early_stops_recording(
    make_tiny: Tiny, tmp_path: Path, undrawn: None
) -> None:
    config = make_tiny(tmp_path / "run", steps=SKIPPED + 2, profile=True, evaluate=False)
    train(config)
    assert not (config.out / "profile").exists()
    with torch.profiler.profile():  # a profiler left running would refuse another
        pass
