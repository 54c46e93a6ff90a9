"""A number that is none is refused before a benchmark makes or measures anything."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from lst.errors import UserError

NUMBERS = {
    "asr": ("--steps", "--lr", "--utterances"),
    "alignment": ("--minutes", "--steps"),
    "gpu": ("--minutes",),
    "train_steps": ("--steps",),
    "vocoder": ("--minutes", "--steps", "--stories"),
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in NUMBERS for option in NUMBERS[name]]
)
def test_a_number_that_is_not_above_zero_is_named_by_its_option(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = import_module(f"benchmarks.{name}").main
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "out"), option, "0"])
    with pytest.raises(UserError, match=rf"^{option}: expected .*, got 0"):
        main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["alignment", "vocoder"])
def test_without_a_corpus_no_folder_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--out", str(tmp_path / "out"), "--corpus", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(UserError, match=r"python -m lst\.prepare demo"):
        import_module(f"benchmarks.{name}").main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", ".", "page"])
def test_a_page_without_the_name_of_a_file_is_refused(
    out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "--out", out])
    with pytest.raises(UserError, match=r"^--out .*: expected a file to write, such as"):
        import_module("benchmarks.report").main()
    assert list(tmp_path.iterdir()) == []
