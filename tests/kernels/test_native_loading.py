"""A native library that is absent, damaged or stale is a reason in one line, never an exception,
and one warning where an op would have run on it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lst_kernels import native


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    assert native.unavailable_reason() == (
        "the native library was not built; reinstall lst where there is a C++17 compiler"
    )
    with pytest.raises(RuntimeError, match="was not built"):
        native.patch_pool(torch.zeros(1, 1), torch.tensor([0, 1], dtype=torch.int32), "sum")


def test_a_damaged_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", damaged)
    reason = native.unavailable_reason()
    assert reason is not None
    assert "does not load" in reason


POOL = """
import sys, warnings
from pathlib import Path
import torch
from lst_kernels import PatchLayout, native, patch_pool
native.LIBRARY, native.ABI_VERSION = Path(sys.argv[1]), int(sys.argv[2])
warnings.simplefilter("always")
for _ in range(2):
    layout = PatchLayout.from_lengths([2, 1], [2])
    layout.tokens_read_patches()
    assert patch_pool(torch.tensor([1.0, 3.0, 5.0]), layout).tolist() == [2.0, 5.0]
"""


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
@pytest.mark.parametrize(
    ("kept", "version", "reason"),
    [(0.5, 0, "is cut short"), (1.0, 1, "is of version")],
)
@pytest.mark.skipif(sys.platform != "linux", reason="libraries of other systems are no ELF files")
def test_with_a_library_that_is_cut_short_or_stale_the_reference_runs_and_one_warning_tells(
    tmp_path: Path, kept: float, version: int, reason: str
):
    """In a process of its own, for loading what is not whole ends it by a signal."""
    whole = native.LIBRARY.read_bytes()
    library = tmp_path / native.LIBRARY.name
    library.write_bytes(whole[: int(kept * len(whole))])
    command = [sys.executable, "-c", POOL, str(library), str(native.ABI_VERSION + version)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: lst_kernels runs without its native backend") == 1
    assert run.stderr.count("Warning") == 1
    assert reason in run.stderr


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
def test_a_library_of_another_version_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Under another path: the answer for each library is found once.
    stale = shutil.copy(native.LIBRARY, tmp_path / native.LIBRARY.name)
    monkeypatch.setattr(native, "LIBRARY", stale)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    version = native.ABI_VERSION
    reason = native.unavailable_reason()
    assert reason is not None
    assert f"is of version {version - 1}, not {version}" in reason
