"""The Triton kernels' own tests, each file in a process of its own.

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
FILES = ("triton_attention.py", "triton_pooling.py")


def run(file, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
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


@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_kernels_are_right_on_the_gpu(file):
    run(file)
