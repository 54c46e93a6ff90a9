"""A slowdown beyond noise is told, noise is not, and both revisions run what is theirs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import compare
from lst.errors import UserError


def words(base, ours):
    return {each.name: each.word for each in compare.judge(base, ours)}


def test_a_slowdown_beyond_noise_is_told_and_a_smaller_one_is_not():
    base = {"steady": [1.0, 1.01, 0.99], "noisy": [1.0, 1.4, 0.9], "small": [1.0, 1.0, 1.0]}
    ours = {"steady": [1.2, 1.21, 1.19], "noisy": [1.2, 1.6, 1.1], "small": [1.04, 1.04, 1.04]}
    assert words(base, ours) == {"steady": "SLOWER", "noisy": "same", "small": "same"}
    assert words(ours, base) == {"steady": "faster", "noisy": "same", "small": "same"}


def test_the_slowest_comes_first_and_what_one_tree_lacks_is_said():
    base = {"a": [1.0, 1.0], "b": [1.0, 1.0], "gone": [1.0]}
    ours = {"a": [1.0, 1.0], "b": [2.0, 2.0], "fresh": [1.0]}
    verdicts = compare.judge(base, ours)
    assert [each.name for each in verdicts] == ["b", "a"]
    text = compare.table(verdicts, base, ours, "v1")
    assert "not timed in this tree, absent or failed: gone" in text
    assert "not timed in v1, absent or failed: fresh" in text
    cells = ["b", "1000.00", "ms", "2000.00", "ms", "+100.0%", "0.0%", "SLOWER"]
    assert text.splitlines()[1].split() == cells
    assert text.endswith("2 compared, 1 slower than v1 beyond noise")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["benchmarks/", "--compare", "HEAD", "-k", "x"], ["benchmarks/", "-k", "x"]),
        (["--compare=HEAD~1", "--benchmark-only"], ["--benchmark-only"]),
        (["a", "--results", "d", "--compare", "b", "c"], ["a", "c"]),
    ],
)
def test_only_its_own_options_are_taken_away(given, kept):
    assert compare.without_option(given) == kept


BENCHMARK = """
import time
def test_wait(benchmark):
    benchmark.pedantic(lambda: time.sleep({seconds}), rounds=2)
"""
SETUP = """
from pathlib import Path
Path("lst_kernels/native").mkdir(parents=True)
Path("lst_kernels/native/liblst_kernels.so").touch()
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Its first commit's benchmark waits 10 ms, its second's 40; its native library is no more than
    a name."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "setup.py").write_text(SETUP)
    for seconds in (0.01, 0.04):
        (tmp_path / "test_wait.py").write_text(BENCHMARK.format(seconds=seconds))
        git("add", ".")
        git("commit", "-qm", f"{seconds}")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return tmp_path


def test_two_revisions_run_side_by_side(repository, capsys):
    assert compare.compare("HEAD~1", ["test_wait.py", "--benchmark-only"], rounds=2) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == ["round 1 of 2: HEAD~1", "round 1 of 2: this tree"]
    assert "SLOWER" in said
    trees = subprocess.run(
        ["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert len(trees.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("revision", "said"), [("nowhere", "invalid reference"), ("--nothing", "unknown option")]
)
def test_no_such_revision_is_one_line(repository, revision, said):
    with pytest.raises(UserError, match=rf"^--compare: git worktree add [^\n]* {said}[^\n]*$"):
        compare.compare(revision, [])


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["absent.py"], r"file or directory not found: absent\.py"),
        (["test_wait.py::test_absent"], r"not found: test_wait\.py::test_absent"),
        (["test_wait.py", "-k", "absent"], r"1 deselected in .*"),
    ],
)
def test_no_such_benchmark_is_one_line(repository, asked, why):
    with pytest.raises(UserError, match=f"^--compare: no benchmark was timed in HEAD: {why}$"):
        compare.compare("HEAD", [*asked, "--benchmark-only"], rounds=1)


FAILING = """
def test_wait(benchmark):
    benchmark(int, "x")
"""


def test_what_is_not_committed_is_compared_and_what_fails_is_named(repository, capsys):
    file = repository / "test_wait.py"
    file.write_text(BENCHMARK.format(seconds=0.001))
    assert compare.compare("HEAD", ["test_wait.py", "--benchmark-only"], rounds=1) == 0
    assert "faster" in capsys.readouterr().out
    file.write_text(FAILING + BENCHMARK.format(seconds=0.001).replace("test_wait", "test_other"))
    compare.compare("HEAD", ["test_wait.py", "--benchmark-only"], rounds=1)
    said = capsys.readouterr().out.splitlines()
    assert "not timed in this tree, absent or failed: test_wait.py::test_wait" in said
    assert "not timed in HEAD, absent or failed: test_wait.py::test_other" in said
    file.write_text(FAILING)
    with pytest.raises(UserError, match=r"no benchmark was timed in this tree: [^\n]*$"):
        compare.compare("HEAD", ["test_wait.py", "--benchmark-only"], rounds=1)


def test_a_comparison_that_is_ended_leaves_no_worktree(repository):
    ended = f"import os, signal\nos.kill({os.getpid()}, signal.SIGTERM)\nsignal.pause()\n"
    (repository / "test_wait.py").write_text(ended)
    with pytest.raises(SystemExit, match="143"):
        compare.compare("HEAD", ["test_wait.py", "--benchmark-only"], rounds=1)
    trees = ["git", "worktree", "list"]
    listed = subprocess.run(trees, cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_library_that_is_not_built_is_one_line(repository):
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "broken"],
        cwd=repository,
        check=True,
    )
    with pytest.raises(UserError, match="native library of HEAD was not built: no compiler"):
        compare.compare("HEAD", [])
