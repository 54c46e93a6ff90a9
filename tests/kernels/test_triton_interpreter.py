"""The Triton kernels' own tests, and the suite that every backend passes, each file in a process of
its own.

Whether kernels are interpreted is settled when they are defined, so the process that interprets
them cannot be the one that compiles them (`test_aot.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = ("triton_attention.py", "triton_pooling.py", "triton_scan.py")


SUITE = ("test_attention.py", "test_pooling.py", "test_scan.py", "test_operators.py")


def run(file, *options, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    command += options
    done = subprocess.run(
        command,
        env=os.environ | environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("file", FILES)
def test_kernels_are_right_in_the_interpreter(file):
    run(file, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("file", SUITE)
def test_every_backends_suite_passes_in_the_interpreter(file):
    run(file, "-k", "triton", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_kernels_are_right_on_the_gpu(file):
    run(file)
