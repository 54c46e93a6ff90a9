"""A run killed −9 at any moment goes on as if it had not stopped, with the same command."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lst.train.checkpoint import load_model
from lst.train.config import TrainConfig, to_json

Tiny = Callable[..., TrainConfig]
SECONDS = 60  # that one start of a run may take
STEPS, EVERY = 12, 3

# The command as a cluster gives it again and again, for a preset in a file. It comes to rest, and
# leaves a mark, where "module.function" is called with a path like the pattern.
COMMAND = """
import fnmatch, pkgutil, sys, time
from pathlib import Path
import lst.train.__main__ as command
import lst.train.metrics
from lst.errors import run_command
from lst.train.config import read_config

preset, module, function, pattern, *options = sys.argv[1:]
command.PRESETS["tiny"] = read_config(Path(preset))
command.DESCRIPTIONS["tiny"] = "a run of a second"
command.SILENCE = 0.0
lst.train.metrics.plot_losses = lambda *_: None

def resting(path, *args, **kwargs):
    if fnmatch.fnmatch(str(path), pattern):
        Path(preset).with_suffix(".mark").touch()
        time.sleep(1000)
    return real(path, *args, **kwargs)

if module:
    place = pkgutil.resolve_name(module)
    real = getattr(place, function)
    setattr(place, function, resting)
sys.argv = ["lst.train", "tiny", "--resume", "auto", *options]
run_command(command.main)
"""

Start = Callable[..., Any]


@pytest.fixture
def start(fork: Callable[..., Any]) -> Start:
    """``start(config, *options, ranks=1, rest=…)``: give the command."""

    def give(
        config: TrainConfig,
        *options: object,
        ranks: int = 1,
        rest: tuple[str, str, str] = ("", "", ""),
    ) -> Any:
        preset = config.out.with_suffix(".json")
        preset.write_text(json.dumps(to_json(config)))
        preset.with_suffix(".mark").unlink(missing_ok=True)
        return fork(COMMAND, preset, *rest, *options, ranks=ranks)

    return give


def configured(tiny: Tiny, name: str) -> TrainConfig:
    return tiny(name, steps=STEPS, checkpoint_every=EVERY, validate_every=STEPS, keep=2)


def told(config: TrainConfig) -> list[dict[str, Any]]:
    """The lines of metrics, without what depends on the clock and the machine."""
    path = config.out / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines())
    return [
        {k: v for k, v in line.items() if "second" not in k and k not in ("mfu", "memory_gib")}
        for line in lines
    ]


def folders(config: TrainConfig, pattern: str) -> list[Path]:
    return list((config.out / "checkpoints").glob(pattern))


def kill(running: Any, moment: Callable[[], bool]) -> None:
    """Kill all ranks as soon as it is the moment; the run must not end before."""
    deadline = time.monotonic() + SECONDS
    while not moment():
        assert time.monotonic() < deadline, running.printed()
        time.sleep(0.001)
    running.kill()
    assert running.codes[0] == -9, running.printed()


def assert_same_run(first: TrainConfig, second: TrainConfig) -> None:
    """Bit for bit."""
    assert told(first) == told(second)
    expected = load_model(second.out, "cpu")[0].state_dict()
    for name, tensor in load_model(first.out, "cpu")[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert {p.name for p in folders(first, "*")} == {p.name for p in folders(second, "*")}


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_equals_one_that_was_not(
    tiny: Tiny, start: Start, ranks: int
) -> None:
    whole, killed = configured(tiny, "whole"), configured(tiny, "killed")
    start(whole, ranks=ranks).succeed()
    rng = random.Random(ranks)

    def kill_after_step(number: int) -> None:
        running = start(killed, ranks=ranks)
        kill(running, lambda: f"step {number}/" in running.printed(0))

    def kill_in(module: str, function: str, pattern: str) -> None:
        rest = (module, function, pattern)
        mark = killed.out.with_suffix(".mark")
        kill(start(killed, ranks=ranks, rest=rest), mark.exists)

    kill_after_step(rng.randrange(1, EVERY))
    kill_in("lst.train.checkpoint", "_join_shards", "*-00000003.tmp/model")  # tensors are written
    kill_after_step(rng.randrange(1, 2 * EVERY))
    kill_in("lst.train.checkpoint", "_publish", "*-00000006.tmp")  # all is written
    kill_after_step(rng.randrange(4, 3 * EVERY))
    kill_in("shutil", "rmtree", "*.old.tmp")  # a new one is complete, the oldest goes
    for folder in folders(killed, "step-*"):
        load_model(folder, "cpu")  # none is there in part
    start(killed, ranks=ranks).succeed()
    assert_same_run(whole, killed)


@pytest.mark.timeout(4 * SECONDS)
def test_a_run_goes_on_with_other_workers_bit_for_bit(tiny: Tiny, start: Start) -> None:
    whole, killed = configured(tiny, "whole"), configured(tiny, "killed")
    start(whole).succeed()
    for workers, number in ((0, 5), (2, 8)):
        running = start(killed, "--data.num-workers", workers)
        kill(running, lambda r=running, n=number: f"step {n}/" in r.printed(0))
    start(killed).succeed()
    assert_same_run(whole, killed)


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize(("first", "second", "strategy"), [(1, 2, "fsdp"), (2, 1, "ddp")])
def test_a_run_goes_on_with_other_processes_on_the_same_batches(
    tiny: Tiny, start: Start, first: int, second: int, strategy: str
) -> None:
    whole, killed = configured(tiny, "whole"), configured(tiny, "killed")
    start(whole, ranks=first).succeed()
    running = start(killed, ranks=first)
    kill(running, lambda: f"step {2 * EVERY}/" in running.printed(0))
    start(killed, "--parallel.strategy", strategy, ranks=second).succeed()
    for a, b in zip(told(killed), told(whole), strict=True):
        for key in ("step", "split", "lr", "seen_tokens", "seen_units"):
            assert a.get(key) == b.get(key), key
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)
