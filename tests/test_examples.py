"""Every example runs as a user runs it, and what it trains learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_learns(path, tmp_path):
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, last = re.findall(r"(?:first|last) steps (\d+\.\d+)", done.stdout.splitlines()[-1])
    assert float(last) < float(first) / 2


def test_every_example_is_linked_from_the_gallery():
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert len(EXAMPLES) >= 4
    assert [path.name for path in EXAMPLES if f"](examples/{path.name})" not in text] == []
