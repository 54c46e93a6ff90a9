"""``--profile`` writes what it says, of the steps it says, and is nothing where it is off."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.profile import ACTIVE, STEPS, Profiler

Tiny = Callable[..., TrainConfig]


def test_a_profiled_run_leaves_a_trace_and_a_summary(
    make_tiny: Tiny, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_tiny(tmp_path / "run", steps=STEPS, profile=True, evaluate=False)
    train(config)
    folder = config.out / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["summary.json", "trace.json"]
    said = capsys.readouterr().out
    assert f"{ACTIVE} steps are profiled in {folder}" in said
    assert "nothing is recorded" not in said
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
    assert profiler.close() is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_early_stops_recording(
    make_tiny: Tiny, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_tiny(tmp_path / "run", steps=STEPS - 2, profile=True, evaluate=False)
    train(config)
    assert not (config.out / "profile").exists()
    said = f"--profile: expected {STEPS} steps to be taken, got {STEPS - 2}; nothing is recorded\n"
    assert capsys.readouterr().out.count(said) == 1
    with torch.profiler.profile():  # a profiler left running would refuse another
        pass


def test_a_run_outlives_a_profile_that_cannot_be_written(
    make_tiny: Tiny, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_tiny(tmp_path / "run", steps=STEPS + 1, profile=True, evaluate=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        real = Profiler.after

        def after(self: Profiler) -> str | None:
            limit = 2**12 if self.writes else soft  # bytes of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                return real(self)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        patch.setattr(Profiler, "after", after)
        train(config)
    said = capsys.readouterr().out
    assert f"step {STEPS + 1}/{STEPS + 1}" in said
    assert f"{config.out / 'profile'}: cannot be written (" in said
    assert list((config.out / "profile").iterdir()) == []
