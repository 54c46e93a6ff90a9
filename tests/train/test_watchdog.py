"""A rank or worker that dies, stops or hangs ends the whole job, which says why; nothing else does.

Real processes, started as torchrun starts ranks but without it: it would end the others itself. The
times are shorter than the usual ones by --hang-timeout.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lst.train.loop as loop
from lst.train.config import TrainConfig, to_json
from lst.train.loop import train

Tiny = Callable[..., TrainConfig]
Processes = list["subprocess.Popen[str]"]
SECONDS = 100  # that anything may take before its test fails
pytestmark = [pytest.mark.timeout(3 * SECONDS), pytest.mark.usefixtures("undrawn")]

# The command, where one rank does something of its own in the middle of a step.
PATCHED = """
import os, sys, time
import lst.train.loop as loop
from lst.errors import run_command
from lst.train.__main__ import main

backward, calls = loop.backward, []

def interposed(*args, **kwargs):
    calls.append(1)
    if len(calls) == STEP and os.environ["RANK"] == "RANK_":
        ACTION
    return backward(*args, **kwargs)

loop.backward = interposed
run_command(main)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def job(
    config: TrainConfig,
    *,
    ranks: int = 1,
    world: int | None = None,
    action: str | None = None,
    step: int = 3,
) -> Iterator[Processes]:
    """The ranks of a run, killed at the end of the block; the last does ``action`` in ``step``."""
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    module = ["-m", "lst.train"]
    if action is not None:
        patched = PATCHED.replace("STEP", str(step)).replace("RANK_", str(ranks - 1))
        module = ["-c", patched.replace("ACTION", action)]
    shared = {"WORLD_SIZE": world or ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(ranks):
        own = {**shared, **meeting, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(
                [sys.executable, *module, "--resume", str(config.out)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **{name: str(value) for name, value in own.items()}},
                start_new_session=True,
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def endless(tiny: Tiny, timeout: float, **changes: Any) -> TrainConfig:
    config = tiny(steps=1_000_000, validate_every=1_000_000, checkpoint_every=1_000_000, **changes)
    return replace(config, hang_timeout=timeout)


def wait_for_lines(config: TrainConfig, number: int, processes: Processes) -> None:
    """Until the run has taken so many steps more."""
    path, until = config.out / "metrics.jsonl", time.monotonic() + SECONDS

    def lines() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    number += lines()
    while lines() < number:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < until
        time.sleep(0.05)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, err = process.communicate(timeout=SECONDS)
    return process.returncode, err


def reason(config: TrainConfig) -> str:
    got = json.loads((config.out / "status.json").read_text())
    assert got["state"] == "failed"
    return str(got["reason"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others(tiny: Tiny, victim: int) -> None:
    config = endless(tiny, 45.0)
    with job(config, ranks=2) as processes:
        wait_for_lines(config, 3, processes)
        started = time.monotonic()
        processes[victim].kill()
        code, err = end(processes[1 - victim])
        assert time.monotonic() - started < 30
    assert code == 1
    assert f"error: rank {victim} died (" in err
    assert err.count("error: ") == 1
    assert reason(config).startswith(f"rank {victim} died (")


def test_a_stopped_rank_ends_the_others(tiny: Tiny) -> None:
    config = endless(tiny, 9.0)
    with job(config, ranks=2) as processes:
        wait_for_lines(config, 3, processes)
        processes[1].send_signal(signal.SIGSTOP)
        code, err = end(processes[0])
    assert code == 1
    assert "error: rank 1 has not been heard of for " in err
    assert reason(config).startswith("rank 1 has not been heard of for ")


def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Tiny) -> None:
    config = endless(tiny, 6.0)
    with job(config, ranks=2, action="time.sleep(10_000)") as processes:
        ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [1, 1]
    for rank, (_, err) in enumerate(ends):
        assert f"rank {rank} was here:" in err
        assert "Thread 0x" in err
    said = reason(config)
    assert said.startswith("no progress for ")
    assert "rank 1: step 3, at <string>:" in said
    assert "(interposed)" in said
    assert f"error: {said}\n" in ends[0][1]
    assert "error: " not in ends[1][1]


def test_what_one_rank_alone_raises_ends_the_job_with_that_reason(tiny: Tiny) -> None:
    config = endless(tiny, 45.0)
    with job(config, ranks=2, action='raise MemoryError("too large")') as processes:
        ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [1, 1]
    assert reason(config) == "rank 1: MemoryError: too large"
    assert "error: rank 1: MemoryError: too large\n" in ends[0][1]
    assert "MemoryError: too large" in ends[1][1].splitlines()[-1]  # a traceback


def worker_of(process: "subprocess.Popen[str]") -> int:
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise AssertionError("no data worker")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="tells by /proc")


def with_worker(config: TrainConfig) -> TrainConfig:
    return replace(config, data=replace(config.data, num_workers=1))


@needs_proc
def test_a_killed_data_worker_ends_the_run_in_one_line(tiny: Tiny) -> None:
    config = with_worker(endless(tiny, 45.0))
    with job(config) as processes:
        wait_for_lines(config, 3, processes)
        worker = worker_of(processes[0])
        os.kill(worker, signal.SIGKILL)
        code, err = end(processes[0])
    assert code == 2
    assert err.startswith(f"error: data worker (pid {worker}) died")
    assert err.count("\n") == 1, err
    assert reason(config).startswith(f"data worker (pid {worker}) died")


@needs_proc
def test_a_stopped_data_worker_is_named_and_does_not_outlive_the_run(tiny: Tiny) -> None:
    config = with_worker(endless(tiny, 6.0))
    with job(config) as processes:
        wait_for_lines(config, 3, processes)
        worker = worker_of(processes[0])
        os.kill(worker, signal.SIGSTOP)
        code, _ = end(processes[0])
    assert code == 1
    said = reason(config)
    assert "rank 0: waiting for data, at " in said
    assert f"(pid {worker}) is stopped" in said
    assert not Path(f"/proc/{worker}").exists() or "(zombie)" in (
        Path(f"/proc/{worker}/status").read_text()
    )


def test_a_signal_ends_a_rank_that_waits_for_others_to_start(tiny: Tiny) -> None:
    """In the rendezvous no Python runs in the main thread that could hear it."""
    config = endless(tiny, 9.0)
    with job(config, ranks=1, world=2) as processes:
        until = time.monotonic() + SECONDS
        while not (config.out / "status.json").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1)  # the rendezvous is next
        processes[0].send_signal(signal.SIGUSR1)
        code, err = end(processes[0])
    assert code == 0, err
    got = json.loads((config.out / "status.json").read_text())
    assert (got["state"], got["signal"]) == ("stopped", "SIGUSR1")


def test_a_signal_ends_a_first_step_that_compiles_for_long(tiny: Tiny, tmp_path: Path) -> None:
    config = endless(tiny, 9.0)
    mark = tmp_path / "compiling"
    action = f"open({str(mark)!r}, 'w').close()\n        while True: pass"
    with job(config, action=action, step=1) as processes:
        until = time.monotonic() + SECONDS
        while not mark.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        processes[0].send_signal(signal.SIGTERM)
        code, err = end(processes[0])
    assert code == 0, err
    got = json.loads((config.out / "status.json").read_text())
    assert (got["state"], got["signal"], got["step"]) == ("stopped", "SIGTERM", 0)


def test_a_gradient_that_one_rank_alone_spoils_is_skipped_by_all(tiny: Tiny) -> None:
    config = tiny(steps=5, validate_every=5, checkpoint_every=5)
    action = (
        "weight = next(args[0].parameters())\n"
        "        once = weight.register_hook(lambda g: (once.remove(), g * float('nan'))[1])"
    )
    with job(config, ranks=2, action=action) as processes:
        ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [0, 0], ends
    (event,) = map(json.loads, (config.out / "events.jsonl").read_text().splitlines())
    assert (event["step"], event["event"]) == (3, "skipped")
    texts = (config.out / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, texts) if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert all(line["loss"] > 0 for line in lines)


def test_a_job_that_is_suspended_as_a_whole_goes_on(tiny: Tiny) -> None:
    config = endless(tiny, 6.0)
    with job(config, ranks=2) as processes:
        wait_for_lines(config, 3, processes)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(7)  # longer than any of the times
        for process in processes:
            process.send_signal(signal.SIGCONT)
        wait_for_lines(config, 10, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [end(process)[0] for process in processes] == [0, 0]


def test_work_without_an_end_in_sight_is_no_hang(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler, say: three times as long as the timeout, but its stack moves."""
    real = loop.validate

    def busy(depth: int) -> int:
        return 0 if depth == 0 else 1 + busy(depth - 1)

    def validate(*args: Any) -> Any:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            for depth in range(50):
                busy(depth)
        return real(*args)

    monkeypatch.setattr(loop, "validate", validate)
    config = replace(tiny(steps=3), hang_timeout=1.0)
    train(config)
    assert json.loads((config.out / "status.json").read_text())["state"] == "finished"
