"""A process of this machine that does nothing is told from one that works."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lst.train.siblings as siblings
from lst.train.siblings import Siblings, processes_of_ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="told by /proc")
EVERY = 0.1  # seconds


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a line of Python."""
    code = f"print(flush=True)\n{request.param}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def looks(pid: int, monkeypatch: pytest.MonkeyPatch, *, patience: float, seconds: float) -> str:
    """What is said first, and after how many seconds."""
    monkeypatch.setattr(siblings, "processes_of_ranks", lambda: {5: pid})
    watch, start = Siblings(patience), time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        said = watch.look([5], every=EVERY)
        if said is not None:
            assert passed > patience / 3
            return said
        assert watch.look([], every=EVERY) is None  # it has come
        time.sleep(EVERY)
    return ""


@pytest.mark.parametrize("process", ["import time; time.sleep(1000)"], indirect=True)
def test_one_that_sleeps_or_is_stopped_is_named(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = looks(process.pid, monkeypatch, patience=1.0, seconds=20)
    assert said == f"rank 5 (pid {process.pid}) has not come, and done nothing for 1 s"
    os.kill(process.pid, signal.SIGSTOP)
    said = looks(process.pid, monkeypatch, patience=1.5, seconds=20)
    expected = f"rank 5 (pid {process.pid}) has not come, and done nothing for 1 s: it is stopped"
    assert said == expected
    assert looks(process.pid, monkeypatch, patience=0.0, seconds=0.5) == ""


@pytest.mark.parametrize("process", ["while True: pass"], indirect=True)
def test_one_that_works_is_waited_for(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert looks(process.pid, monkeypatch, patience=1.0, seconds=2) == ""


def test_time_in_which_nobody_looked_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all are suspended."""
    monkeypatch.setattr(siblings, "processes_of_ranks", lambda: {5: os.getpid()})
    monkeypatch.setattr(siblings, "work_of", lambda _: "nothing more")
    monkeypatch.setattr(siblings, "did_work", lambda *_: False)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Siblings(10.0)
    for now[0] in (1.0, 2.0, 1000.0, 2000.0, 2001.0, 2002.0):
        assert watch.look([5], every=1.0) is None
    now[0] = 2010.0
    assert watch.look([5], every=10.0) is not None


def test_of_a_process_of_another_job_nothing_is_known() -> None:
    assert processes_of_ranks() == {}
