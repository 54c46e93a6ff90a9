"""Two processes under ``torchrun`` train as one does, stop and go on, and end cleanly."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lst.train.checkpoint import load_model
from lst.train.config import TrainConfig, to_json
from lst.train.distributed import num_threads
from lst.train.loop import train

Tiny = Callable[..., TrainConfig]
SECONDS = 120  # that a command may take before its test fails


# Each rank trains the first configuration; then the second, with a signal to rank 1 alone in the
# middle of step 3, and goes on with it.
STOP_AND_GO = """
import os, signal, sys
from pathlib import Path
import lst.train.loop as loop
from lst.train.config import read_config

whole, parts = (read_config(Path(path)) for path in sys.argv[1:3])
ports = iter(sys.argv[3:])

def train(config, **options):
    # A meeting place of its own for every run: torchrun's serves one.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=next(ports))
    loop.train(config, **options)

train(whole)
backward, calls = loop.backward, []

def interrupted(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*args, **kwargs)

loop.backward = interrupted
train(parts)
loop.backward = backward
train(parts, resume=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_processes(*command: object) -> subprocess.Popen[str]:
    """``torchrun`` of two ranks, in a process group of its own."""
    launch = ["--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, [*launch, *command])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for exit code, output and errors; a command that hangs is killed with its ranks."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def train_lines(config: TrainConfig) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "train"]


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.usefixtures("undrawn")
def test_two_processes_train_as_one_and_go_on_bit_for_bit(tiny: Tiny) -> None:
    one, two, parts = tiny("one"), tiny("two"), tiny("parts")
    train(one)
    for config in (two, parts):
        config.out.with_suffix(".json").write_text(json.dumps(to_json(config)))
    paths = [config.out.with_suffix(".json") for config in (two, parts)]
    ports = [free_port() for _ in range(3)]
    launched = two_processes("--no-python", sys.executable, "-c", STOP_AND_GO, *paths, *ports)
    code, out, err = finish(launched)
    assert code == 0, err
    assert out.count("step 6/6") == 2  # rank 0 alone speaks
    assert (
        out.count(f"stopped after step 3; resume with: python -m lst.train --resume {parts.out}")
        == 1
    )

    for a, b in zip(train_lines(one), train_lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)

    def told(config: TrainConfig) -> list[tuple[float, ...]]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in train_lines(config)]

    assert told(two) == told(parts)
    expected = load_model(two.out, "cpu")[0].state_dict()
    for name, tensor in load_model(parts.out, "cpu")[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    # One process goes on from where two stopped.
    for step in (4, 6):
        shutil.rmtree(parts.out / "checkpoints" / f"step-{step:08d}")
    train(parts, resume=True)
    assert [loss for _, loss, _ in told(parts)] == pytest.approx(
        [loss for _, loss, _ in told(two)], rel=1e-4
    )


@pytest.mark.timeout(2 * SECONDS)
def test_two_processes_say_a_mistake_once_and_end_cleanly(corpus: Path, tmp_path: Path) -> None:
    options = ["--data.corpus", corpus, "--data.rows", 3, "--out", tmp_path / "run"]
    code, _, err = finish(two_processes("-m", "lst.train", "demo", *options))
    assert code != 0
    assert err.count("error: ") == 1, err
    assert "exitcode  : 2" in err
    assert "Aborted" not in err
    assert not (tmp_path / "run").exists()


# A rank that sleeps before it has a watchdog, as in an import.
ASLEEP = """
import os, time
from lst.train import monitor
monitor.begin()
if os.environ["RANK"] == "1":
    time.sleep(10_000)
from lst.errors import run_command
from lst.train.__main__ import main
run_command(main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="told by /proc")
def test_a_rank_that_hangs_as_it_starts_ends_the_job_and_says_so(tiny: Tiny) -> None:
    config = tiny()
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    options = ["--resume", config.out, "--hang-timeout", 3]
    code, _, err = finish(two_processes("--no-python", sys.executable, "-c", ASLEEP, *options))
    assert code == 1
    said = r"rank 1 \(\S+, pid \d+\) hangs as it starts: nothing done for 3 s"
    assert len(re.findall(f"^error: {said}$", err, re.M)) == 1, err
    assert err.count("error: ") == 1


def test_threads_are_shared_between_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert num_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what torchrun sets where it is unset
    assert num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert num_threads() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert num_threads() is None
