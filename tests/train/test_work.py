"""CPU time and bytes tell that a process works: of every thread and child, but not of who asks."""

import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lst.train.work import Work, state_of, work_of_thread, work_so_far

pytestmark = pytest.mark.skipif(work_so_far() is None, reason="the system does not tell")


def difference(act: Callable[[], None]) -> Work:
    """What ``act`` adds, seen by another thread, the same before and after, as the watchdog is."""
    with ThreadPoolExecutor(1) as watchdog:
        before = watchdog.submit(work_so_far).result()
        act()
        after = watchdog.submit(work_so_far).result()
    assert before is not None
    assert after is not None
    return Work(
        seconds=after.seconds - before.seconds,
        children=after.children - before.children,
        moved=after.moved - before.moved,
        flushed=after.flushed,
        touched=after.touched - before.touched,
    )


def quietest(act: Callable[[], None]) -> Work:
    """The least of three: what is no work may still be the first to touch code that the system has
    put out of memory."""
    return min((difference(act) for _ in range(3)), key=lambda work: work.moved + work.touched)


NOTHING = Work(seconds=0, children=0, moved=0, flushed=0, touched=0)


def spin(seconds: float = 0.5) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_the_time_of_this_process_is_its_threads() -> None:
    def in_a_thread() -> None:
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()

    for act in (spin, in_a_thread):
        work = difference(act)
        assert 0.4 < work.seconds < 5
        assert work.children < 0.1


def test_the_time_of_the_thread_that_asks_does_not_count() -> None:
    before = work_so_far()
    spin()
    after = work_so_far()
    assert before is not None
    assert after is not None
    assert after.seconds - before.seconds < 0.3


@pytest.mark.parametrize("ended", [True, False])
def test_the_time_of_children_counts_while_they_run_and_when_they_have_ended(ended: bool) -> None:
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    # A grandchild: compilers start others.
    command = [
        sys.executable,
        "-c",
        f"import subprocess, sys; subprocess.run({[sys.executable, '-c', code]})",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def act() -> None:
            process.stdout.readline()
            if ended:
                process.communicate(b"\n")

        work = difference(act)
        process.communicate(None if ended else b"\n")
    assert work.children > 0.3
    assert work.seconds < 0.3


def test_sleeping_is_no_work() -> None:
    slept = quietest(lambda: time.sleep(0.5))
    assert not slept.differs(NOTHING, seconds=0.1, size=10_000, own=True, touching=False)


def test_bytes_count_whoever_moves_them(tmp_path: Path) -> None:
    size = 3 << 20
    work = difference(lambda: (tmp_path / "file").write_bytes(b"0" * size) and None)
    assert size <= work.moved < 4 * size
    copy = ["dd", f"if={tmp_path / 'file'}", "of=/dev/null", "bs=1M"]
    work = difference(lambda: subprocess.run(copy, check=True, capture_output=True) and None)
    assert size <= work.moved < 4 * size


def test_a_spinning_wait_is_told_apart_from_other_work() -> None:
    before = Work(seconds=1, children=2, moved=3, flushed=4, touched=5)
    more = {"seconds": 2.0, "children": 3.0, "moved": 1000, "flushed": 1000}
    for name, value in more.items():
        after = Work(**{**vars(before), name: value})
        assert after.differs(before, seconds=0.5, size=500, own=True, touching=False)
        spun = name == "seconds"
        assert after.differs(before, seconds=0.5, size=500, own=False, touching=False) != spun
        assert after.differs(before, seconds=0.5, size=500, own=True, touching=True) != spun
        assert not after.differs(before, seconds=2, size=2000, own=True, touching=False)


def test_a_call_that_spins_is_told_apart_from_one_that_comes_by_memory() -> None:
    def fill() -> None:
        spin()
        mmap.mmap(-1, 1 << 20).write(bytes(1 << 20))

    def read() -> None:
        spin()
        os.pread(zero, 1 << 20, 0)

    buffer, zero = np.ones(1 << 20), os.open("/dev/zero", os.O_RDONLY)

    def sort() -> None:
        spin()
        buffer.sort()

    for act, works in ((spin, False), (sort, False), (fill, True), (read, True)):
        work = quietest(act)
        assert work.differs(NOTHING, seconds=0.3, size=1 << 30, own=True, touching=False)
        assert work.differs(NOTHING, seconds=0.3, size=1 << 30, own=True, touching=True) == works
    os.close(zero)


def test_while_a_thread_waits_for_a_disk_what_the_machine_writes_counts(tmp_path: Path) -> None:
    """A process and its threads as /proc shows them, as no test can have a slow disk."""
    numbers = " ".join(map(str, range(4, 53)))
    process = tmp_path / str(os.getpid())
    for thread, state in ((1, "S"), (2, "D"), (threading.get_native_id(), "R")):
        folder = process / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "stat").write_text(f"{thread} (a (b) c) {state} {numbers}\n")
    (process / "stat").write_text(f"1 (a (b) c) S {numbers}\n")
    (tmp_path / "meminfo").write_text("MemFree: 7 kB\nDirty: 3 kB\nWriteback: 2 kB\n")
    work = work_so_far(tmp_path)
    assert work is not None
    assert work.flushed == 5 << 10
    for thread, flushed in ((1, 0), (2, 5 << 10)):
        of_thread = work_of_thread(thread, tmp_path)
        assert of_thread is not None
        assert of_thread.flushed == flushed
    (process / "task/2/stat").write_text(f"2 (a (b) c) S {numbers}\n")
    work = work_so_far(tmp_path)
    assert work is not None
    assert work.flushed == 0
    of_thread = work_of_thread(2, tmp_path)
    assert of_thread is not None
    assert of_thread.flushed == 0


def test_of_a_thread_its_own_work_alone_counts(tmp_path: Path) -> None:
    def write() -> None:
        spin()
        (tmp_path / "file").write_bytes(b"0" * (3 << 20))

    with ThreadPoolExecutor(1) as busy, ThreadPoolExecutor(1) as idle:
        ids = [pool.submit(threading.get_native_id).result() for pool in (busy, idle)]
        before = [work_of_thread(each) for each in ids]
        busy.submit(write).result()
        after = [work_of_thread(each) for each in ids]
    for a, b, does in zip(before, after, (True, False), strict=True):
        assert a is not None
        assert b is not None
        for limits in ({"seconds": 0.3, "size": 100 << 20}, {"seconds": 100.0, "size": 2 << 20}):
            assert b.differs(a, **limits, own=True, touching=False) == does


def test_the_state_of_a_process_is_told() -> None:
    assert state_of(os.getpid()) == "R"
    assert state_of(0) == ""


def test_what_is_told_of_another_process_of_the_same_number_is_not_believed() -> None:
    """In a namespace of numbers of its own, with /proc as it is outside."""
    code = "import os; from lst.train.work import *; print(os.getpid(), work_so_far(), state_of(1))"
    alone = ["unshare", "--pid", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no right to make a namespace")
    told = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "1 None \n", told.stderr


def test_where_the_system_tells_nothing_nothing_is_made_up(tmp_path: Path) -> None:
    assert work_so_far(tmp_path) is None
    assert work_of_thread(threading.get_native_id(), tmp_path) is None
    assert work_of_thread(0) is None
