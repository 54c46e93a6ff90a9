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
# leaves a mark, where "module.function" is called with a path, or a number, like the pattern.
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

def resting(first, *args, **kwargs):
    if fnmatch.fnmatch(str(first), pattern):
        Path(preset).with_suffix(".mark").touch()
        time.sleep(1000)
    return real(first, *args, **kwargs)

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


def kill(config: TrainConfig, running: Any, *, saved: str = "") -> None:
    """Kill all ranks as soon as one has come to rest, and that checkpoint is there."""
    deadline = time.monotonic() + SECONDS
    wanted = [config.out.with_suffix(".mark")]
    if saved:
        wanted.append(config.out / "checkpoints" / saved)
    while not all(path.exists() for path in wanted):
        assert time.monotonic() < deadline, running.printed()
        time.sleep(0.001)
    running.kill()
    assert running.codes[0] == -9, running.printed()


def in_step(number: int) -> tuple[str, str, str]:
    """Where to rest in the middle of a step, whatever is written by then."""
    return ("lst.train.loop", "learning_rate", str(number))


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

    moments = [
        in_step(rng.randrange(1, EVERY + 1)),
        ("lst.train.checkpoint", "_join_shards", "*-00000003.tmp/model"),  # tensors are written
        in_step(rng.randrange(1, 2 * EVERY)),
        ("lst.train.checkpoint", "_publish", "*-00000006.tmp"),  # all is written
        in_step(rng.randrange(2 * EVERY, 3 * EVERY)),
        ("shutil", "rmtree", "*.old.tmp"),  # a new one is complete, the oldest goes
    ]
    for rest in moments:
        kill(killed, start(killed, ranks=ranks, rest=rest))
    for folder in folders(killed, "step-*"):
        load_model(folder, "cpu")  # none is there in part
    start(killed, ranks=ranks).succeed()
    assert_same_run(whole, killed)


@pytest.mark.timeout(4 * SECONDS)
def test_a_run_goes_on_with_other_workers_bit_for_bit(tiny: Tiny, start: Start) -> None:
    whole, killed = configured(tiny, "whole"), configured(tiny, "killed")
    start(whole).succeed()
    for workers, step, saved in ((0, 5, "step-00000003"), (2, 8, "step-00000006")):
        running = start(killed, "--data.num-workers", workers, rest=in_step(step))
        kill(killed, running, saved=saved)
    start(killed).succeed()
    assert_same_run(whole, killed)


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize(("first", "second", "strategy"), [(1, 2, "fsdp"), (2, 1, "ddp")])
def test_a_run_goes_on_with_other_processes_on_the_same_batches(
    tiny: Tiny, start: Start, first: int, second: int, strategy: str
) -> None:
    whole, killed = configured(tiny, "whole"), configured(tiny, "killed")
    start(whole, ranks=first).succeed()
    kill(killed, start(killed, ranks=first, rest=in_step(5)), saved="step-00000003")
    start(killed, "--parallel.strategy", strategy, ranks=second).succeed()
    for a, b in zip(told(killed), told(whole), strict=True):
        for key in ("step", "split", "lr", "seen_tokens", "seen_units"):
            assert a.get(key) == b.get(key), key
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)
