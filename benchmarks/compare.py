"""Is this tree slower than another revision? Both run side by side.

    pytest benchmarks/ --benchmark-only --compare BASE

BASE is anything that git can name. It is checked out into a temporary worktree and gets a native
build of its own there. Then the same selection of benchmarks runs in both trees, in turn and
``ROUNDS`` times each, every run in a process of its own, each tree with its own benchmarks. Of
every benchmark that both have, the least time of each run is kept: their median is the tree's time,
and the spread of these times from run to run is the noise. Slower is what is slower than BASE by
more than ``LEAST`` and more than the noise of both. The exit status is 1 if anything is.

What this tree has not committed is measured, too: it is the tree that runs.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lst.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
LEAST = 0.05  # of the time: less is never called slower

Runs = Mapping[str, Sequence[float]]  # seconds of every run, by the benchmark's name


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One benchmark in both trees."""

    name: str
    base: float  # seconds
    ours: float
    noise: float  # relative

    @property
    def change(self) -> float:
        """Relative; positive is slower."""
        return self.ours / self.base - 1

    @property
    def word(self) -> str:
        if abs(self.change) <= max(LEAST, self.noise):
            return "same"
        return "SLOWER" if self.change > 0 else "faster"


def judge(base: Runs, ours: Runs) -> list[Verdict]:
    """A verdict on every benchmark that was timed in both trees, the slowest first."""
    verdicts = [
        Verdict(
            name=name,
            base=statistics.median(base[name]),
            ours=statistics.median(ours[name]),
            noise=_spread(base[name]) + _spread(ours[name]),
        )
        for name in ours.keys() & base.keys()
    ]
    return sorted(verdicts, key=lambda each: (-each.change, each.name))


def _spread(times: Sequence[float]) -> float:
    return (max(times) - min(times)) / statistics.median(times)


def table(verdicts: Sequence[Verdict], base: Runs, ours: Runs, revision: str) -> str:
    """What is printed."""
    lines = [("benchmark", revision, "this tree", "change", "noise", "")]
    for each in verdicts:
        lines.append(
            (
                each.name, f"{each.base * 1e3:.2f} ms", f"{each.ours * 1e3:.2f} ms",
                f"{each.change:+.1%}", f"{each.noise:.1%}", each.word,
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if at in (0, 5) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    for where, names in (("this tree", base.keys() - ours.keys()), (revision, ours.keys() - base)):
        text += [f"not timed in {where}, absent or failed: {name}" for name in sorted(names)]
    slower = sum(each.word == "SLOWER" for each in verdicts)
    text.append(f"{len(verdicts)} compared, {slower} slower than {revision} beyond noise")
    return "\n".join(text)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of ``revision`` with its own native library, gone again afterwards.

    Raises:
        UserError: there is no such revision, or its native library could not be built.
    """
    with tempfile.TemporaryDirectory(prefix="lst-compare-") as folder:
        tree = Path(folder) / "base"
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        # A comparison that is ended gives its worktree back, too.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
            if done.returncode or not list((tree / "lst_kernels" / "native").glob("liblst_*")):
                said = (done.stderr.strip() or "no library").splitlines()[-1]
                raise UserError(
                    f"--compare: the native library of {revision} was not built: {said}"
                )
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))
            signal.signal(signal.SIGTERM, before)


def _git(*arguments: str) -> None:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or "without a reason").splitlines()[0]
        raise UserError(f"--compare: git {' '.join(arguments)}: {said}")


def run_benchmarks(name: str, tree: Path, arguments: Sequence[str]) -> dict[str, float]:
    """The least seconds of every benchmark in ``tree``; those that fail are left out.

    Raises:
        UserError: nothing was timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "times.json"
        command = [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"),
            *(*arguments, f"--benchmark-json={found}"),
        ]
        done = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not found.exists() or not found.stat().st_size:
            said = (done.stdout.strip() or "pytest says nothing").splitlines()
            why = next((line for line in said if line.startswith("ERROR: ")), said[-1])
            why = why.removeprefix("ERROR: ").replace(f"{tree}{os.sep}", "")
            raise UserError(f"--compare: no benchmark was timed in {name}: {why}")
        benchmarks = json.loads(found.read_text())["benchmarks"]
    return {each["fullname"]: each["stats"]["min"] for each in benchmarks}


def compare(revision: str, arguments: Sequence[str], rounds: int = ROUNDS) -> int:
    """Run pytest's ``arguments`` in both trees, print the table, return the exit status."""
    base: dict[str, list[float]] = {}
    ours: dict[str, list[float]] = {}
    with checked_out(revision) as tree:
        for number in range(rounds):
            for name, where, runs in ((revision, tree, base), ("this tree", ROOT, ours)):
                print(f"round {number + 1} of {rounds}: {name}", flush=True)
                for benchmark, seconds in run_benchmarks(name, where, arguments).items():
                    runs.setdefault(benchmark, []).append(seconds)
    verdicts = judge(base, ours)
    print(table(verdicts, base, ours, revision))
    return int(any(each.word == "SLOWER" for each in verdicts))


def without_option(arguments: Sequence[str]) -> list[str]:
    """pytest's arguments but ``--compare BASE`` and ``--results DIR``."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--compare", "--results"):
            next(rest, None)
        elif not argument.startswith(("--compare=", "--results=")):
            kept.append(argument)
    return kept
