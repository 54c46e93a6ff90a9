"""A rank or worker that dies, stops or hangs ends the whole job, which says why; nothing else does.

Real processes, without torchrun: it would end the others itself. The times are shorter than the
usual ones by --hang-timeout.
"""

import bz2
import hashlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lst.train.checkpointer as checkpointer
import lst.train.loop as loop
from lst.train.config import TrainConfig, to_json
from lst.train.loop import train
from lst.train.work import state_of

Tiny = Callable[..., TrainConfig]
Job = Callable[..., Any]
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="tells by /proc")
SECONDS = 100  # that anything may take before its test fails
pytestmark = [pytest.mark.timeout(3 * SECONDS), pytest.mark.usefixtures("undrawn")]

# The command, where the last rank does something of its own the n-th time that it comes somewhere.
PROGRAM = """
import os, signal, sys, time
import lst.train.checkpointer, lst.train.loop
from lst.errors import run_command
from lst.train.__main__ import main

where, name, number, action = {patched}
place, last = sys.modules[where], int(os.environ["WORLD_SIZE"]) - 1
real, calls = getattr(place, name), []

def interposed(*args, **kwargs):
    calls.append(1)
    if len(calls) == number and os.environ["RANK"] == str(last):
        exec(action, globals() | locals())
    return real(*args, **kwargs)

setattr(place, name, interposed)
run_command(main)
"""
# One of two ranks, the other of which does not come.
ALONE = """
import os
os.environ.update(WORLD_SIZE="2", RANK="{rank}")
from lst.errors import run_command
from lst.train.__main__ import main
run_command(main)
"""
NOWHERE = ("lst.train.loop", "backward", 0, "")
HANG = "time.sleep(10_000)"
HANG_LOCKED = "import ctypes; ctypes.PyDLL(None).read(os.pipe()[0], b' ', 1)"  # Python's lock


@pytest.fixture
def job(fork: Job) -> Job:
    """``job(config, ranks=1)``: the ranks of a run; ``patched`` is the module and name of a
    function, which of its calls, and what the last rank does there; ``first`` what all do."""

    def start(
        config: TrainConfig,
        *,
        ranks: int = 1,
        patched: tuple[Any, ...] = NOWHERE,
        first: str = "",
    ) -> Any:
        config.out.mkdir()
        (config.out / "config.json").write_text(json.dumps(to_json(config)))
        return fork(first + PROGRAM.format(patched=patched), "--resume", config.out, ranks=ranks)

    return start


def in_step(number: int, action: str) -> tuple[Any, ...]:
    return ("lst.train.loop", "backward", number, action)


def endless(tiny: Tiny, timeout: float, **changes: Any) -> TrainConfig:
    config = tiny(steps=1_000_000, validate_every=1_000_000, checkpoint_every=1_000_000, **changes)
    return replace(config, hang_timeout=timeout)


def wait_for_lines(config: TrainConfig, number: int, ranks: Any) -> None:
    """Until the run has taken so many steps more."""
    path = config.out / "metrics.jsonl"

    def lines() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    number += lines()
    wait_until(lambda: lines() >= number, ranks)


def wait_until(true: Callable[[], bool], ranks: Any) -> None:
    until = time.monotonic() + SECONDS
    while not true():
        assert not ranks.ended, ranks.printed()
        assert time.monotonic() < until, ranks.printed()
        time.sleep(0.05)


def reason(config: TrainConfig) -> str:
    got = json.loads((config.out / "status.json").read_text())
    assert got["state"] == "failed"
    return str(got["reason"])


@pytest.mark.parametrize(("victim", "timeout"), [(0, 45.0), (1, 1e9)])
def test_a_killed_rank_ends_the_others(tiny: Tiny, job: Job, victim: int, timeout: float) -> None:
    config = endless(tiny, timeout)
    ranks = job(config, ranks=2)
    wait_for_lines(config, 3, ranks)
    started = time.monotonic()
    os.kill(ranks.pids[victim], signal.SIGKILL)
    assert ranks.codes[1 - victim] == 1
    assert time.monotonic() - started < 30
    err = ranks.printed(1 - victim)
    assert f"error: rank {victim} died (" in err
    assert err.count("error: ") == 1
    assert reason(config).startswith(f"rank {victim} died (")


def test_a_stopped_rank_ends_the_others(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 6.0)
    ranks = job(config, ranks=2)
    wait_for_lines(config, 3, ranks)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    wait_until(lambda: "error: " in ranks.printed(0), ranks)
    os.kill(ranks.pids[1], signal.SIGKILL)  # as a launcher would
    assert ranks.codes == [1, -signal.SIGKILL]
    assert "error: rank 1 has not been heard of for " in ranks.printed(0)
    assert reason(config).startswith("rank 1 has not been heard of for ")


def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 4.0)
    ranks = job(config, ranks=2, patched=in_step(3, HANG))
    assert ranks.codes == [1, 1]
    for rank in range(2):
        assert f"rank {rank} was here:" in ranks.printed(rank)
        assert "Thread 0x" in ranks.printed(rank)
    said = reason(config)
    assert said.startswith("no progress for ")
    assert "rank 1: step 3, at <string>:1 (<module>)" in said
    assert f"error: {said}\n" in ranks.printed(0)
    assert "error: " not in ranks.printed(1)


@pytest.mark.parametrize(
    ("name", "action", "said"),
    [
        ("build_model", HANG, r"no progress for .* rank 1: building the model, at <string>:1 "),
        (
            "open_corpus",
            "time.sleep(1); os.kill(os.getpid(), signal.SIGSTOP)",
            r"rank 1 has not been heard of for .*\(last: opening the run and its data, at ",
        ),
        ("backward", HANG, r"no progress for .* rank 1: step 1, at <string>:1 "),
    ],
)
def test_a_rank_that_hangs_before_its_first_step_is_named(
    tiny: Tiny, job: Job, name: str, action: str, said: str
) -> None:
    config = endless(tiny, 4.0)
    ranks = job(config, ranks=2, patched=("lst.train.loop", name, 1, action))
    wait_until(lambda: "error: " in ranks.printed(0), ranks)
    if "SIGSTOP" in action:
        os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.codes[0] == 1
    assert re.match(said, reason(config)), reason(config)


def test_a_rank_that_hangs_before_it_meets_the_others_ends_itself(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 2.0)
    ranks = job(config, ranks=2, patched=("lst.train.distributed", "_device", 1, HANG))
    wait_until(lambda: "error: " in ranks.printed(1), ranks)
    os.kill(ranks.pids[0], signal.SIGTERM)  # as a launcher would
    assert ranks.codes == [0, 1]
    said = ranks.printed(1)
    assert re.search(r"^error: no progress for . s: rank 1: starting, at <string>:1 ", said, re.M)
    assert "rank 1 was here:" in said
    assert "error: " not in ranks.printed(0)
    assert re.match("no progress for . s: rank 1: starting, at ", reason(config))


def test_a_rank_that_waits_for_others_to_start_may_wait_for_longer(tiny: Tiny, fork: Job) -> None:
    config = endless(tiny, 1.0)
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    ranks = fork(ALONE.format(rank=1), "--resume", config.out)
    time.sleep(4)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.codes == [0], ranks.printed()
    assert "rank 1 was here:" not in ranks.printed()


def test_a_rank_that_hangs_after_it_has_met_the_others_ends_all(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 3.0)
    ranks = job(config, ranks=2, patched=("lst.train.watchdog", "open_links", 1, HANG))
    assert ranks.codes == [1, 1]
    said = [
        re.search(
            f"no progress for . s: rank {rank}: connecting to the other ranks, at {where}", text
        )
        for rank, where, text in ((0, "", ranks.printed(0)), (1, "<string>:1 ", ranks.printed(1)))
    ]
    assert said[1], ranks.printed()
    # The other waits for it, and may find its connection closed before its own watchdog speaks.
    assert said[0] or "Connection closed by peer" in ranks.printed(0), ranks.printed()


def test_a_checkpoint_that_is_not_written_ends_the_job_and_names_the_rank(
    tiny: Tiny, job: Job
) -> None:
    """Its thread sleeps, and the next checkpoint waits for it."""
    config = replace(endless(tiny, 4.0), checkpoint_every=2)
    where = ("lst.train.checkpointer", "save_checkpoint", 1, HANG)
    ranks = job(config, ranks=2, patched=where)
    assert ranks.codes == [1, 1]
    said = reason(config)
    assert said.startswith("no progress for ")
    assert re.search(r"rank 1: a checkpoint, .* whose checkpoint writer is at <string>:1 ", said)
    assert re.search(r"rank 0: a checkpoint, .* whose checkpoint writer is at (?!<string>)", said)


ONE_CHECKPOINT = """
from lst.train.checkpointer import Checkpointer
Checkpointer.due = lambda _, step, *, last: step == 3
"""


def test_a_checkpoint_that_stalls_is_told_of_while_training_goes_on(
    tiny: Tiny, job: Job, tmp_path: Path
) -> None:
    config, pipe = endless(tiny, 5.0), tmp_path / "pipe"
    os.mkfifo(pipe)
    where = ("lst.train.checkpointer", "save_checkpoint", 1, f"open({str(pipe)!r}).read()")
    ranks = job(config, ranks=2, patched=where, first=ONE_CHECKPOINT)
    wait_until(lambda: "training goes on" in ranks.printed(0), ranks)
    wait_for_lines(config, 3, ranks)
    pipe.write_text("")  # the writer goes on
    wait_until(lambda: "the checkpoint of step 3 is saved" in ranks.printed(0), ranks)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.codes == [0, 0], ranks.printed()
    (event,) = map(json.loads, (config.out / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["checkpoint"]) == ("checkpoint stalled", 3)
    said = event["reason"]
    assert re.match(r"no progress for . s: rank 0: at .*; rank 1: at <string>:1 ", said)
    assert ranks.printed(0).count(f"the checkpoint of step 3: {said}; training goes on\n") == 1
    assert (config.out / "checkpoints" / "step-00000003").is_dir()


def test_a_run_that_has_to_wait_for_a_checkpoint_that_stalls_ends_at_once(
    tiny: Tiny, job: Job
) -> None:
    config = endless(tiny, 6.0)
    where = ("lst.train.checkpointer", "save_checkpoint", 1, HANG)
    ranks = job(config, patched=where, first=ONE_CHECKPOINT)
    wait_until(lambda: "training goes on" in ranks.printed(), ranks)
    started = time.monotonic()
    os.kill(ranks.pids[0], signal.SIGTERM)  # and the run waits for what is being written
    assert ranks.codes == [1]
    assert time.monotonic() - started < 4
    assert re.match(r"no progress for .* whose checkpoint writer is at <string>:1 ", reason(config))


@needs_proc
def test_a_checkpoint_that_takes_long_is_not_told_of(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is in one call for twice the timeout, and computes."""
    monkeypatch.setattr(
        checkpointer, "save_checkpoint", after(compute, checkpointer.save_checkpoint)
    )
    monkeypatch.setattr(loop, "backward", after(lambda: time.sleep(0.2), loop.backward))
    config = replace(tiny(steps=12, checkpoint_every=1000, validate_every=12), hang_timeout=1.0)
    monkeypatch.setattr(checkpointer.Checkpointer, "due", lambda _, step, *, last: step == 1)
    train(config)
    assert (config.out / "checkpoints" / "step-00000001").is_dir()
    assert not (config.out / "events.jsonl").exists()


# A log on a disk that is full.
FULL = """
import os
for stream in (1, 2):
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
"""


def test_a_run_outlives_a_log_that_cannot_be_written(tiny: Tiny, job: Job) -> None:
    config = tiny(steps=3, validate_every=3)
    ranks = job(config, first=FULL)
    assert ranks.codes == [0]
    assert json.loads((config.out / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("action", "code", "state"), [(HANG, 1, "failed"), ("stop()", 0, "stopped")]
)
def test_a_job_ends_where_nobody_can_be_told(
    tiny: Tiny, job: Job, action: str, code: int, state: str
) -> None:
    stop = "stop = lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(10_000))\n"
    config = endless(tiny, 4.0)
    ranks = job(config, patched=in_step(1, action), first=FULL + stop)
    assert ranks.codes == [code]
    assert json.loads((config.out / "status.json").read_text())["state"] == state


def test_what_one_rank_alone_raises_ends_the_job_with_that_reason(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 45.0)
    ranks = job(config, ranks=2, patched=in_step(3, 'raise RuntimeError("too large")'))
    assert ranks.codes == [1, 1]
    assert reason(config) == "rank 1: RuntimeError: too large"
    assert "error: rank 1: RuntimeError: too large\n" in ranks.printed(0)
    assert "RuntimeError: too large" in ranks.printed(1).splitlines()[-1]  # a traceback


def worker_of(pid: int) -> int | None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    return None


def with_worker(config: TrainConfig) -> TrainConfig:
    return replace(config, data=replace(config.data, num_workers=1))


@needs_proc
def test_a_killed_data_worker_ends_the_run_in_one_line(tiny: Tiny, job: Job) -> None:
    config = with_worker(endless(tiny, 45.0))
    ranks = job(config)
    wait_for_lines(config, 3, ranks)
    worker = worker_of(ranks.pids[0])
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    assert ranks.codes == [2]
    errors = [line for line in ranks.printed().splitlines() if "rror" in line]
    assert len(errors) == 1, ranks.printed()
    assert errors[0].startswith(f"error: data worker (pid {worker}) died")
    assert reason(config).startswith(f"data worker (pid {worker}) died")


@needs_proc
def test_a_stopped_data_worker_is_named_and_does_not_outlive_the_run(tiny: Tiny, job: Job) -> None:
    config = with_worker(endless(tiny, 4.0))
    ranks = job(config)
    wait_for_lines(config, 3, ranks)
    worker = worker_of(ranks.pids[0])
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    assert ranks.codes == [1]
    said = reason(config)
    assert "rank 0: waiting for data, at " in said
    assert f"(pid {worker}) is stopped" in said
    until = time.monotonic() + 10  # it was killed a moment ago
    while state_of(worker) not in ("", "Z"):
        assert time.monotonic() < until
        time.sleep(0.05)


SLEEPER = """
import time

class Sleeper:
    def __iter__(self):
        time.sleep(10_000)
        yield
"""


@needs_proc
def test_a_data_worker_that_hangs_before_its_first_batch_is_named_with_its_stack(
    tiny: Tiny, job: Job, tmp_path: Path
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    put = f"""
sys.path.append({str(tmp_path)!r})
import lst.data.loader, sleeper
lst.data.loader._MicroBatches = lambda *_: sleeper.Sleeper()
"""
    config = with_worker(endless(tiny, 4.0))
    ranks = job(config, patched=("lst.train.loop", "open_corpus", 1, put))
    wait_until(lambda: worker_of(ranks.pids[0]) is not None, ranks)
    worker = worker_of(ranks.pids[0])
    assert ranks.codes == [1]
    said = reason(config)
    assert said.startswith("no progress for ")
    assert "rank 0: waiting for data, at " in said
    assert re.search(rf"data worker \S+ \(pid {worker}\) is silent$", said), said
    assert re.search(r'File "\S*sleeper.py", line 6 in __iter__', ranks.printed())


def test_a_signal_ends_a_rank_that_waits_for_others_to_start(tiny: Tiny, fork: Job) -> None:
    """In the rendezvous no Python runs in the main thread that could hear it."""
    config = endless(tiny, 9.0)
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    ranks = fork(ALONE.format(rank=0), "--resume", config.out)
    wait_until(lambda: (config.out / "status.json").exists(), ranks)
    time.sleep(1)  # the rendezvous is next
    os.kill(ranks.pids[0], signal.SIGUSR1)
    assert ranks.codes == [0], ranks.printed()
    got = json.loads((config.out / "status.json").read_text())
    assert (got["state"], got["signal"]) == ("stopped", "SIGUSR1")


@pytest.mark.parametrize("timeout", [4.0, 1e9])  # however patient the run is elsewhere
def test_a_signal_ends_a_first_step_that_compiles_for_long(
    tiny: Tiny, job: Job, tmp_path: Path, timeout: float
) -> None:
    config = endless(tiny, timeout)
    mark = tmp_path / "compiling"
    ranks = job(config, patched=in_step(1, f"open({str(mark)!r}, 'w').close()\nwhile True: pass"))
    wait_until(mark.exists, ranks)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.codes == [0], ranks.printed()
    got = json.loads((config.out / "status.json").read_text())
    assert (got["state"], got["signal"], got["step"]) == ("stopped", "SIGTERM", 0)


def test_a_gradient_that_one_rank_alone_spoils_is_skipped_by_all(tiny: Tiny, job: Job) -> None:
    config = tiny(steps=5, validate_every=5, checkpoint_every=5)
    action = """
weight = next(args[0].parameters())
once = weight.register_hook(lambda g: (once.remove(), g * float('nan'))[1])
"""
    ranks = job(config, ranks=2, patched=in_step(3, action))
    assert ranks.codes == [0, 0], ranks.printed()
    (event,) = map(json.loads, (config.out / "events.jsonl").read_text().splitlines())
    assert (event["step"], event["event"]) == (3, "skipped")
    texts = (config.out / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, texts) if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert all(line["loss"] > 0 for line in lines)


def test_a_job_that_is_suspended_as_a_whole_goes_on(tiny: Tiny, job: Job) -> None:
    config = endless(tiny, 4.0)
    ranks = job(config, ranks=2)
    wait_for_lines(config, 3, ranks)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)  # longer than any of the times
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
    wait_for_lines(config, 10, ranks)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.codes == [0, 0], ranks.printed()


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


@needs_proc
def test_long_work_before_the_first_step_is_no_hang(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single calls, each twice as long as the timeout: of this process, as it comes by memory
    or, in the first step on a CPU, without; of a child; and for bytes that come slowly."""
    monkeypatch.setattr(loop, "open_corpus", after(compress, loop.open_corpus))
    monkeypatch.setattr(loop, "build_model", after(read_slowly, loop.build_model))
    monkeypatch.setattr(loop, "global_counts", after(compile_long, loop.global_counts))
    monkeypatch.setattr(loop, "backward", after(compute, loop.backward))
    config = replace(tiny(steps=1), hang_timeout=1.0)
    train(config)
    assert json.loads((config.out / "status.json").read_text())["state"] == "finished"


def after(work: Callable[[], None], real: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        work()
        return real(*args, **kwargs)

    return both


def compress() -> None:
    """A map of memory, in one call."""
    number, seconds = 1 << 20, 0.0
    while seconds < 2:
        compressor, start = bz2.BZ2Compressor(), time.perf_counter()
        compressor.compress(mmap.mmap(-1, number))
        seconds, number = time.perf_counter() - start, 2 * number


def compute() -> None:
    start = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = 2 / (time.perf_counter() - start)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(100_000 * rounds))


def read_slowly() -> None:
    code = "import os, time\nfor _ in range(200): os.read(0, 1 << 16), time.sleep(0.01)"
    with Path("/dev/zero").open("rb") as source:
        subprocess.run([sys.executable, "-c", code], stdin=source, check=True)


def compile_long() -> None:
    code = "import time\nwhile time.process_time() < 2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_proc
def test_a_call_that_spins_while_a_run_opens_is_a_hang(tiny: Tiny, job: Job) -> None:
    spin = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    config = endless(tiny, 4.0)
    ranks = job(config, patched=("lst.train.loop", "open_corpus", 1, spin))
    assert ranks.codes == [1]
    said = r"no progress for \d+ s: rank 0: opening the run and its data, at <string>:1 "
    assert re.match(said, reason(config)), reason(config)


FROM_BESIDE = """
from lst.train import monitor
monitor.begin()
"""


@needs_proc
@pytest.mark.parametrize("place", ["distributed._device", "loop.backward"])
def test_a_rank_that_hangs_with_pythons_lock_before_its_first_step_is_done_is_ended(
    tiny: Tiny, job: Job, place: str
) -> None:
    """No thread of its own can run."""
    module, name = place.split(".")
    where = (f"lst.train.{module}", name, 1, HANG_LOCKED)
    config = endless(tiny, 3.0)
    ranks = job(config, patched=where, first=FROM_BESIDE)
    assert ranks.codes == [-signal.SIGKILL]
    assert "hangs as it starts: nothing done for 3 s\n" in ranks.printed()
    if name == "backward":  # the run has a folder
        assert "hangs as it starts: nothing done for 3 s" in reason(config)


@needs_proc
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_hangs_with_pythons_lock_is_ended_and_status_says_why(
    tiny: Tiny, job: Job, ranks: int
) -> None:
    """Alone, after steps that are done; another rank misses one sooner."""
    config = endless(tiny, 6.0)
    ended = job(config, patched=in_step(3, HANG_LOCKED), first=FROM_BESIDE, ranks=ranks)
    if ranks == 1:
        assert ended.codes == [-signal.SIGKILL]
        assert re.fullmatch(r"rank 0 \(.*\) hangs: nothing done for [67] s", reason(config))
        assert f"error: {reason(config)}\n" in ended.printed()
        assert "<string>" in ended.printed()  # where
    else:
        assert sorted(ended.codes) == [-signal.SIGKILL, 1]
        assert "has not been heard of for" in reason(config)


@needs_proc
def test_a_watchdog_that_looks_is_never_silent_however_long_the_run(tiny: Tiny, job: Job) -> None:
    slow = FROM_BESIDE.replace("monitor.begin", "monitor.SLOW = 4.0\nmonitor.begin")
    config = endless(tiny, 4.0)
    ranks = job(config, first=slow)
    wait_for_lines(config, 1, ranks)
    time.sleep(2 * 4.0)
    wait_for_lines(config, 1, ranks)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.codes == [0], ranks.printed()


@needs_proc
def test_a_rank_that_is_stopped_is_ended_though_it_is_alone(tiny: Tiny, job: Job) -> None:
    stop = in_step(3, "os.kill(os.getpid(), signal.SIGSTOP)")
    config = endless(tiny, 6.0)
    assert job(config, patched=stop, first=FROM_BESIDE).codes == [-signal.SIGKILL]
    assert re.search(r"hangs: nothing done for [23] s, as it is stopped$", reason(config))


@needs_proc
def test_a_signal_that_comes_as_the_command_imports_ends_it_with_code_0(
    tiny: Tiny, job: Job
) -> None:
    config = endless(tiny, 45.0)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)\n"
    ranks = job(config, ranks=2, first=FROM_BESIDE + kill)
    assert ranks.codes == [0, 0], ranks.printed()
    got = json.loads((config.out / "status.json").read_text())
    assert (got["state"], got["signal"], got["step"]) == ("stopped", "SIGUSR1", 0)
    assert ranks.printed(0).count("SIGUSR1: stopped after step 0; resume with: ") == 1


@needs_proc
def test_a_rank_that_hangs_though_its_job_was_asked_to_stop_is_ended(tiny: Tiny, job: Job) -> None:
    """What watches it from beside outlives a signal to all processes."""
    where = ("lst.train.distributed", "_device", 1, "os.killpg(0, signal.SIGTERM); " + HANG_LOCKED)
    ranks = job(endless(tiny, 3.0), patched=where, first="import os; os.setpgrp()" + FROM_BESIDE)
    assert ranks.codes == [-signal.SIGKILL]
    assert "hangs as it starts: nothing done for 3 s\n" in ranks.printed()


@needs_proc
def test_what_is_beside_a_rank_waits_as_long_as_the_run_that_goes_on_says(
    tiny: Tiny, job: Job
) -> None:
    """The watchdog's looks are rarer than what watches it from beside expected at first."""
    first = "from lst.train import monitor\nmonitor.USUAL = 0.5\nmonitor.begin()\n"
    config = replace(endless(tiny, 180.0), steps=1)
    ranks = job(config, patched=("lst.train.loop", "open_corpus", 1, "time.sleep(3)"), first=first)
    assert ranks.codes == [0], ranks.printed()


@needs_proc
def test_a_wait_for_a_gpu_is_no_work_though_it_spins(tiny: Tiny, job: Job) -> None:
    spin = """
import hashlib
args[3]._spins = True  # the watchdog's: as on a GPU
lst.train.loop.global_counts = lambda *_: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    config = endless(tiny, 4.0)
    ranks = job(config, patched=("lst.train.loop", "prepare", 1, spin))
    assert ranks.codes == [1]
    assert re.match(r"no progress for \d+ s: rank 0: step 1, at <string>:", reason(config))
