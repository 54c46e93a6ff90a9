"""What a run of the benchmarks writes is right, whole, and of the device that it ran on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[2]

TWO_DEVICES = """
from benchmarks import conftest
describe = conftest.describe_machine
conftest.describe_machine = lambda gpu: describe(None) | ({"device": "Toy GPU"} if gpu else {})

def test_on_the_processor(race):
    race("on the processor", lambda: None, {"peer": lambda: None}, floors={}, rounds=2)

def test_on_a_gpu(benchmark, add_row):
    benchmark(lambda: None)
    facts = {"device": "Toy GPU"}
    add_row(case="on a GPU", peer="p", ours="", theirs="", ratio=1.0, floor=None, facts=facts)
"""
AMISS = """
def slow():
    return sum(range(50_000))

def test_right(race):
    race("right", lambda: None, {"peer": slow}, floors={"peer": 1.0}, rounds=2)

def test_too_slow(race):
    race("too slow", slow, {"peer": lambda: None}, floors={"peer": 1.0}, rounds=2)

def test_wrong(race):
    def check():
        raise ArithmeticError("the peer gives something else")
    race("wrong", slow, {"peer": lambda: None}, floors={"peer": 1.0}, rounds=2, check=check)

def test_wrong_after_its_rows(race):
    race("wrong after its rows", lambda: None, {"peer": slow}, floors={}, rounds=2)
    raise ValueError("what was timed is wrong")
"""
INTERRUPTED = """
def test_done(race):
    race("done", lambda: None, {"peer": lambda: None}, floors={}, rounds=2)

def test_stopped(benchmark):
    raise KeyboardInterrupt  # no SIGINT: what a shell starts in the background ignores it
"""


def run(folder: Path, *arguments: str | Path) -> tuple[int, str]:
    """The exit status of the benchmarks in ``folder``, and what was printed."""
    plugins = ("-p", "benchmarks.conftest", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-q", "--rootdir", folder, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], str]:
    """The result files of a run of two files, by the beginning of their names; what it printed."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "test_devices.py").write_text(TWO_DEVICES)
    (folder / "test_amiss_cpu.py").write_text(AMISS)
    status, said = run(folder, "--results", folder / "a" / "b")
    assert status == pytest.ExitCode.TESTS_FAILED, said
    paths = sorted((folder / "a" / "b").iterdir())
    assert all(f"written to {path}" in said for path in paths)
    keys = ("amiss", "devices", "devices of the GPU")
    return {k: json.loads(path.read_text()) for k, path in zip(keys, paths, strict=True)}, said


def cases(result: dict) -> list[str]:
    return [row["case"] for row in result["rows"]]


def test_a_benchmark_that_fails_leaves_no_figure_but_a_ratio_that_is_too_low(ran):
    files, said = ran
    assert cases(files["amiss"]) == ["right", "too slow"]
    assert [row["passed"] for row in files["amiss"]["rows"]] == [True, False]
    assert files["amiss"]["failed"] == {
        "test_wrong": "the peer gives something else",
        "test_wrong_after_its_rows": "what was timed is wrong",
    }
    table = said.partition(" ratios ")[2].splitlines()
    told = [case for case in ("right", "too slow", "wrong") for line in table if case in line[:9]]
    assert told == ["right", "too slow"]
    assert any("TOO LOW" in line for line in table)


def test_figures_of_two_devices_go_to_two_files(ran):
    files, said = ran
    assert cases(files["devices"]) == ["on the processor"]
    assert "threads" in files["devices"]["machine"]
    assert cases(files["devices of the GPU"]) == ["on a GPU"]
    assert files["devices of the GPU"]["machine"]["device"] == "Toy GPU"
    assert "failed" not in files["devices"]
    assert said.count(" ratios ") == 2


def test_a_run_that_is_broken_off_writes_no_part_of_a_file(tmp_path):
    (tmp_path / "test_devices.py").write_text(TWO_DEVICES)
    (tmp_path / "test_stopped.py").write_text(INTERRUPTED)
    status, said = run(tmp_path, "--results", "results")
    assert status == pytest.ExitCode.INTERRUPTED, said
    written = {path.name.split("-")[0] for path in (tmp_path / "results").iterdir()}
    assert written == {"devices"}
    assert "not written: stopped, for test_stopped did not run" in said


@pytest.mark.parametrize(
    ("results", "why"), [("file", "File exists"), ("file/a", "Not a directory")]
)
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_runs(tmp_path, results, why):
    (tmp_path / "file").touch()
    (tmp_path / "test_devices.py").write_text(TWO_DEVICES)
    status, said = run(tmp_path, "--results", tmp_path / results)
    assert status == pytest.ExitCode.USAGE_ERROR
    line = f"ERROR: --results: {tmp_path / results}: cannot be written ({why})"
    assert said.strip().splitlines() == [line]
