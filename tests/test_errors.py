"""What a user can cause is one line; devices and numbers are checked where they are named."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lst.errors import (
    UserError,
    expect_not_negative,
    expect_option,
    expect_positive,
    expect_text,
    run_command,
    tell,
)
from lst.machine import find_device


@dataclass
class Options:
    batch_size: int = 1
    minutes: float | None = None
    sizes: tuple[int, ...] = (4, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        ({"minutes": 0.0}, "--minutes: expected more than 0, got 0.0"),
        ({"minutes": float("nan")}, "--minutes: expected more than 0, got nan"),
        ({"minutes": float("inf")}, "--minutes: expected more than 0, got inf"),
        ({"sizes": (4, 0)}, "--sizes: expected 1 or more, got 0"),
        ({"batch_size": 2**63}, f"--batch-size: expected 1 or more, below 2^63, got {2**63}"),
        ({"sizes": (4, 10**20)}, f"--sizes: expected 1 or more, below 2^63, got {10**20}"),
    ],
)
def test_a_number_that_is_not_above_zero_is_named_by_its_option(values, message):
    with pytest.raises(UserError) as caught:
        expect_positive(Options(**values), "batch_size", "minutes", "sizes")
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), -float("inf")])
def test_a_number_below_zero_or_none_is_named_by_its_option(value):
    expect_not_negative(Options(minutes=0.0, batch_size=0), "minutes", "batch_size")
    with pytest.raises(UserError, match=rf"^--a\.minutes: expected 0 or more, got {value}$"):
        expect_not_negative(Options(minutes=value), "minutes", within="a.")


@dataclass
class Named:
    out: Path
    name: str | None = None


def test_a_name_that_is_no_text_is_shown_in_ascii():
    expect_text(Named(out=Path("é\n"), name="a b"), "out", "name")
    expect_text(Named(out=Path()), "out", "name")
    with pytest.raises(UserError) as caught:
        expect_text(Named(out=Path("a/\udcff")), "name", "out")
    assert str(caught.value) == "--out: expected a name in UTF-8, got 'a/\\udcff'"


def test_what_is_expected_passes_in_silence():
    expect_positive(Options(minutes=1e-9), "batch_size", "minutes")
    expect_positive(Options(batch_size=2**63 - 1), "minutes", "sizes", "batch_size")
    expect_option(True, "seed", "0 or more", 3)


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "", "cuda:99"])
def test_a_device_that_is_not_here_is_one_line(name):
    with pytest.raises(UserError, match=f"^device {name}: expected one that is here, such as cpu"):
        find_device(name)


def test_a_device_that_is_here_is_found():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


def test_a_command_ends_with_one_line_and_code_2(capsys):
    def main():
        raise UserError("a: expected b, got c")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a: expected b, got c\n"


def test_a_name_without_text_or_with_an_end_of_line_leaves_one_line(capsys):
    def main():
        print("\udcff")  # stdout, too, takes the name of a file that is not UTF-8
        raise UserError("a\nb\udcff\x1bé: expected a file, got none")

    with pytest.raises(SystemExit):
        run_command(main)
    said = capsys.readouterr()
    assert said.out == "\\udcff\n"
    assert said.err == "error: a\\nb\\udcff\\x1bé: expected a file, got none\n"


def test_a_name_that_is_too_long_for_a_file_is_the_users_mistake(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: (tmp_path / ("x" * 5000)).is_file())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/xxx")
    assert said.endswith("xxx: File name too long\n")


def test_more_than_the_memory_holds_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: np.zeros(2**62, np.int8).sum())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not the memory for this (Unable to allocate 4.00 EiB")
    assert said.count("\n") == 1


def test_what_no_user_caused_keeps_its_traceback():
    def main():
        raise FileNotFoundError("of the program itself")

    with pytest.raises(FileNotFoundError):
        run_command(main)


def test_a_line_that_cannot_be_printed_is_let_go(capsys):
    full = open("/dev/full", "w")  # noqa: SIM115  closing it raises
    for _ in range(3):
        tell("x", full)
    with pytest.raises(OSError, match="No space left"):
        full.close()
    tell("a")
    assert capsys.readouterr().out == "a\n"


def test_who_interrupts_a_command_sees_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
