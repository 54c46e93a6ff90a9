"""The Triton kernels' own tests, and the suite that every backend passes, each file in a process of
its own, as many at a time as there are cores.

Whether kernels are interpreted is settled when they are defined, so the process that interprets
them cannot be the one that compiles them (`test_aot.py`).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lst_kernels.triton import launch

HERE = Path(__file__).parent
FILES = ("triton_attention.py", "triton_pooling.py", "triton_scan.py")
# The longest first, so that at the end no core waits for long.
SUITE = ("test_pooling.py", "test_attention.py", "test_scan.py", "test_operators.py")
INTERPRETED = {**dict.fromkeys(SUITE, ("-k", "triton")), **dict.fromkeys(FILES, ())}


def run(file, *options, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    command += options
    return subprocess.run(
        command,
        env=os.environ | environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


def expect_passed(done):
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def interpreted(request):
    """What becomes of each file that a test of this run asks for."""
    wanted = {
        item.callspec.params["file"]
        for item in request.session.items
        if "interpreted" in getattr(item, "fixturenames", ())
    }
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            file: pool.submit(run, file, *options, **environment)
            for file, options in INTERPRETED.items()
            if file in wanted
        }


@pytest.mark.timeout(900)  # each may have to wait for those before it
@pytest.mark.parametrize("file", INTERPRETED)
@pytest.mark.skipif(launch.interpreter_fault() is not None, reason=str(launch.interpreter_fault()))
def test_kernels_are_right_in_the_interpreter(file, interpreted):
    expect_passed(interpreted[file].result())


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.1", "2.5.2", True)],
)
def test_an_interpreter_that_numpy_breaks_is_a_reason(monkeypatch, triton, numpy, runs):
    monkeypatch.setattr(launch.triton, "__version__", triton)
    monkeypatch.setattr(launch.np, "__version__", numpy)
    told = launch.interpreter_fault()
    assert told is None if runs else f"Triton {triton} needs NumPy before 2.4; {numpy}" in told


@pytest.mark.gpu
@pytest.mark.timeout(900)  # a minute or more of it compiling
@pytest.mark.parametrize("file", FILES)
def test_kernels_are_right_on_the_gpu(file):
    expect_passed(run(file))
