"""A rank that hangs before its watchdog is there is ended, with a reason; one that is slow is not.

Programs of a few lines stand for what the command imports: none of it but the first is torch.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lst
from lst.train.work import USUAL, state_of

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="told by /proc"),
    pytest.mark.timeout(100),
]
ROOT = Path(lst.__file__).parents[1]
PATIENCE = 2.0  # seconds
BEGIN = "import ctypes, os, signal, sys, time\nfrom lst.train import monitor\nmonitor.begin()\n"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """``start(*arguments, patience=…)``: of Python, in a session of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)

    def start(*arguments: object, patience: float = PATIENCE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments), "--hang-timeout", str(patience)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def said(
    process: subprocess.Popen[str], number: str, why: str = "", *, stepped: bool = False
) -> str:
    """All that it says, with the reason; it was killed for it."""
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    (reason,) = re.findall("^error: (.*)$", err, re.M)
    what = rf"hangs{'' if stepped else ' as it starts'}: nothing done for {number} s{why}"
    assert re.fullmatch(rf"rank 0 \(\S+, pid {process.pid}\) {what}", reason), reason
    return err


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "action",
    [
        "import time; time.sleep(1000)",
        # Holding Python's lock, as what loads libraries does.
        "import ctypes, os; ctypes.PyDLL(None).read(os.pipe()[0], b' ', 1)",
    ],
    ids=["sleeps", "holds the lock"],
)
def test_a_command_that_hangs_in_an_import_is_ended_and_says_in_which(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    (tmp_path / "tyro.py").write_text(action)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    began = time.monotonic()
    err = said(start("-m", "lst.train", "demo"), "2")
    assert PATIENCE < time.monotonic() - began < 10 * PATIENCE
    assert f'File "{tmp_path / "tyro.py"}", line 1 in <module>' in err


def test_one_that_hangs_is_ended_where_nobody_can_be_told(start: Start) -> None:
    full = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
    assert start("-c", full + BEGIN + "time.sleep(1000)").wait() == -signal.SIGKILL


def test_one_that_is_stopped_is_ended_sooner(start: Start) -> None:
    process = start("-c", BEGIN + "os.kill(os.getpid(), signal.SIGSTOP)", patience=3.0)
    said(process, "[12]", ", as it is stopped")


def test_one_that_waits_for_a_disk_is_ended_and_says_so(start: Start) -> None:
    """As the parent of a process that has been forked by vfork does."""
    wait = "if ctypes.PyDLL(None).vfork() == 0:\n    time.sleep(1000)\n    os._exit(0)"
    said(start("-c", BEGIN + wait), "2", ", as it waits for a disk")


@pytest.mark.parametrize("spin", ["while True: pass", "hashlib.pbkdf2_hmac('md5', b'', b'', N)"])
def test_one_that_spins_in_an_import_is_ended(start: Start, spin: str) -> None:
    said(start("-c", BEGIN + "import hashlib; N = 10**9\n" + spin), "[23]")


@pytest.mark.parametrize(
    "action",
    [
        """
import mmap  # files and maps of libraries that come slowly
zero, library = os.open("/dev/zero", os.O_RDONLY), mmap.mmap(-1, 1 << 20)
for turn in range(4):
    time.sleep(0.6 * PATIENCE)
    if turn % 2:
        os.read(zero, 1)
    else:
        library[turn * 4 * mmap.PAGESIZE] = 1
""",
        """
import subprocess  # a compiler
code = f"import time\\nuntil = time.monotonic() + {2 * PATIENCE}"
code += "\\nwhile time.monotonic() < until: pass"
subprocess.run([sys.executable, "-c", code], check=True)
""",
    ],
    ids=["reads", "compiles"],
)
def test_one_that_is_slow_is_waited_for(start: Start, action: str) -> None:
    process = start("-c", BEGIN + action.replace("PATIENCE", str(PATIENCE)))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""


def test_time_in_which_all_are_suspended_does_not_count(start: Start) -> None:
    process = start("-c", BEGIN + f"time.sleep({PATIENCE / 2}); print('there')")
    time.sleep(PATIENCE / 4)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * PATIENCE)
    os.killpg(process.pid, signal.SIGCONT)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "there\n"), err


def test_what_watches_ends_with_the_command_or_before(start: Start) -> None:
    process = start("-c", BEGIN + "print(); time.sleep(1000)", patience=USUAL)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = children(process.pid)
    began = time.monotonic()
    while Path(f"/proc/{child}/comm").read_text() != "lst-monitor\n":  # a name to know it by
        assert time.monotonic() - began < 5
        time.sleep(0.01)
    process.kill()
    began = time.monotonic()
    process.communicate()  # whatever holds on to its pipes
    while state_of(child) not in ("", "Z"):
        time.sleep(0.01)
    assert time.monotonic() - began < 5
    process = start("-c", BEGIN + "monitor.end(); monitor.end(); os.waitpid(-1, 0)")
    assert "ChildProcessError" in process.communicate()[1]


def test_a_rank_goes_on_where_what_watches_it_is_killed(start: Start) -> None:
    kill = "os.kill(monitor.pid(), signal.SIGKILL); "
    then = "time.sleep(0.5); monitor.all_is_well(patience=3.0); monitor.end(); print('there')"
    for waited in ("", "os.waitpid(monitor.pid(), 0); "):
        out, err = start("-c", BEGIN + kill + waited + then).communicate()
        assert (out, err) == ("there\n", "")


def test_a_rank_may_say_for_how_long_it_may_do_nothing(start: Start) -> None:
    allow, hang = "monitor.all_is_well(patience={})\n", "time.sleep(1000)"
    said(start("-c", BEGIN + allow.format(1.0) + hang, patience=USUAL), "1")
    process = start("-c", BEGIN + allow.format(USUAL) + f"time.sleep({2 * PATIENCE})")
    assert process.wait() == 0


BEATS = """
import threading
def beat():
    while True:
        monitor.all_is_well()
        time.sleep(0.1 * PATIENCE)
threading.Thread(target=beat, daemon=True).start()
""".replace("PATIENCE", str(PATIENCE))


def test_a_rank_whose_watchdog_looks_at_it_is_left_to_that(start: Start) -> None:
    process = start("-c", BEGIN + BEATS + f"time.sleep({3 * PATIENCE}); print('there')")
    assert process.communicate() == ("there\n", "")


def test_a_watchdog_that_cannot_look_any_more_is_missed(start: Start) -> None:
    """A call holds Python's lock; the little that others do meanwhile is no work."""
    stepped = "monitor.all_is_well(stepped=True)\n"
    little = """
zero = os.open("/dev/zero", os.O_RDONLY)
if os.fork() == 0:
    while True:
        time.sleep(0.1)
        os.read(zero, 1)
"""
    hang = "time.sleep(0.5); ctypes.PyDLL(None).read(os.pipe()[0], b' ', 1)"
    process = start("-c", BEGIN + BEATS + stepped + little + hang)
    err = said(process, "[23]", stepped=True)
    assert 'File "<string>"' in err


def test_a_watchdog_is_not_silent_for_ever_whatever_else_is_done(start: Start) -> None:
    slow = BEGIN.replace("monitor.begin", "monitor.SLOW = 5.0\nmonitor.begin")
    work = "zero = open('/dev/zero', 'rb')\nwhile True: zero.read(1 << 16)"
    err = start("-c", slow + "monitor.all_is_well(stepped=True)\n" + work).communicate()[1]
    said = r"^error: rank 0 \(.*\) hangs: its watchdog has been silent for [56] s$"
    assert re.search(said, err, re.M), err


def test_why_a_rank_was_ended_is_in_its_status(start: Start, tmp_path: Path) -> None:
    status, hang = tmp_path / "status.json", "time.sleep(1000)"
    tell = f"monitor.all_is_well(status={str(status)!r})\n"
    status.write_text(json.dumps({"state": "running", "reason": None, "step": 7, "time": "then"}))
    err = said(start("-c", BEGIN + tell + hang), "[23]")
    got = json.loads(status.read_text())
    assert f"error: {got.pop('reason')}\n" in err
    assert got.pop("time") > "2026-01-01T"
    assert got == {"state": "failed", "step": 7}
    ended = json.dumps({"state": "stopped", "reason": "SIGTERM"})
    status.write_text(ended)
    said(start("-c", BEGIN + tell + hang), "[23]")
    assert status.read_text() == ended
    status.write_text("[")
    said(start("-c", BEGIN + tell + hang), "[23]")
    assert status.read_text() == "["


def test_a_status_on_a_disk_that_hangs_holds_nothing_up(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    tell = f"monitor.all_is_well(status={str(tmp_path / 'status.json')!r})\n"
    quick = BEGIN.replace("monitor.begin", "monitor.DISK_SECONDS = 0.5\nmonitor.begin")
    said(start("-c", quick + tell + "time.sleep(1000)"), "[23]")


def test_what_a_rank_has_started_ends_with_it(start: Start) -> None:
    """A data worker that is stopped would stay."""
    child = "subprocess.Popen(['sleep', '1000'], stdout=subprocess.DEVNULL, stderr=2)"
    stop = "os.kill(child.pid, signal.SIGSTOP); print(child.pid, flush=True); time.sleep(1000)"
    process = start("-c", BEGIN + f"import subprocess; child = {child}; {stop}")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    said(process, "[23]")
    began = time.monotonic()
    while state_of(pid) not in ("", "Z"):
        assert time.monotonic() - began < 5
        time.sleep(0.01)


def test_a_hang_timeout_of_zero_is_for_ever(start: Start) -> None:
    process = start("-c", BEGIN + "os.waitpid(-1, 0)", patience=0)
    assert "ChildProcessError" in process.communicate()[1]


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_ends_a_command_that_imports_without_a_word(start: Start, ignored: bool) -> None:
    """But not one that runs in a shell's background, where it is ignored from the start."""
    ask = "os.kill(os.getpid(), signal.SIGINT); print('there')"
    at_first = "SIG_IGN" if ignored else "default_int_handler"
    before = f"import signal; signal.signal(signal.SIGINT, signal.{at_first})\n"
    process = start("-c", before + BEGIN + ask)
    assert process.communicate() == ("there\n" if ignored else "", "")
    assert process.returncode == (0 if ignored else -signal.SIGINT)


@pytest.mark.parametrize("patience", [0, USUAL])
def test_a_rank_prints_its_stacks_when_it_is_asked_to(start: Start, patience: float) -> None:
    ask = "os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.1); monitor.end(); print('there')"
    out, err = start("-c", BEGIN + ask, patience=patience).communicate()
    assert out == "there\n"
    assert 'File "<string>", line 4 in <module>' in err


def test_where_too_little_is_told_nothing_watches(start: Start, tmp_path: Path) -> None:
    """The bytes that are read are kept secret of some, or not counted at all."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "stat").touch()
    proc = f"from pathlib import Path\nmonitor.PROC = Path({str(tmp_path)!r})\nmonitor.begin"
    process = start("-c", BEGIN.replace("monitor.begin", proc) + "os.waitpid(-1, 0)")
    assert "ChildProcessError" in process.communicate()[1]


def test_the_timeout_is_read_before_there_is_a_parser() -> None:
    from lst.train.monitor import _patience

    assert _patience(["demo", "--steps", "3"]) == USUAL
    assert _patience(["demo", "--hang-timeout", "60", "--steps", "3"]) == 60
    assert _patience(["--hang-timeout=0"]) == _patience(["--hang_timeout", "0"]) == 0
    for wrong in (["--hang-timeout"], ["--hang-timeout", "long"]):  # the parser says so
        assert _patience(wrong) == USUAL
