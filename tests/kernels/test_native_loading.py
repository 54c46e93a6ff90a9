"""A native library that is absent, damaged or stale is a reason in one line, never an exception."""

import shutil
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
