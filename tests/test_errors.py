"""What a user can cause is one line; devices and numbers are checked where they are named."""

from dataclasses import dataclass

import pytest
import torch

from lst.errors import UserError, expect_option, expect_positive, run_command, tell
from lst.machine import find_device


@dataclass
class Options:
    batch_size: int = 1
    minutes: float | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        ({"minutes": 0.0}, "--minutes: expected more than 0, got 0.0"),
        ({"minutes": float("nan")}, "--minutes: expected more than 0, got nan"),
        ({"minutes": float("inf")}, "--minutes: expected more than 0, got inf"),
    ],
)
def test_a_number_that_is_not_above_zero_is_named_by_its_option(values, message):
    with pytest.raises(UserError) as caught:
        expect_positive(Options(**values), "batch_size", "minutes")
    assert str(caught.value) == message


def test_what_is_expected_passes_in_silence():
    expect_positive(Options(minutes=1e-9), "batch_size", "minutes")
    expect_positive(Options(), "minutes")
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


def test_a_line_that_cannot_be_printed_is_let_go(capsys):
    full = open("/dev/full", "w")  # noqa: SIM115  closing it raises
    for _ in range(3):
        tell("x", full)
    with pytest.raises(OSError, match="No space left"):
        full.close()
    tell("a")
    assert capsys.readouterr().out == "a\n"
