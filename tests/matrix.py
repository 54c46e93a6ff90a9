"""The suite at the extremes of what may stand beside an installed lst, a fresh environment each.

    make test-matrix                              every extreme that this machine can hold
    python tests/matrix.py bare                   one of them
    python tests/matrix.py bare -- tests/kernels  with other arguments for pytest

``python -m build`` makes the packages once; every environment installs one of them from there, with
what it needs from the package index, and runs the tests against it instead of the checkout. A line
tells of each: passed or FAILED, seconds, what was installed, the log. An environment that passed is
removed; one that failed stays, beside its log in build/matrix.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "matrix"
EXTRAS = "[speech,scale,llama,float8,log,plots,eval,demo]"
TEST_TOOLS = ("hypothesis", "pytest", "pytest-benchmark", "pytest-timeout")
BUILD_TOOLS = ("build", "setuptools", "cmake", "ninja")
COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|icpx|nvcc|cmake|ninja)(-[\d.]+)?")


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """An environment, and what is run in it."""

    extras: str = EXTRAS
    requirements: tuple[str, ...] = ()
    unpinned: tuple[str, ...] = ()  # packages that constraints.txt shall not hold here
    absent: tuple[str, ...] = ()  # what must not be there in the end
    compiler: bool = True
    tests: tuple[str, ...] = ("tests",)
    needs_gpu: bool = False  # run without being named only where there is one


EXTREMES = {
    # What development is pinned to, and all of the suite.
    "pinned": Extreme(requirements=("triton==3.7.1", *BUILD_TOOLS)),
    "newest-triton": Extreme(
        requirements=("triton>3.7.1",), unpinned=("triton",), tests=("tests/kernels",)
    ),
    "no-triton": Extreme(absent=("triton",), tests=("tests/kernels", "tests/model", "tests/train")),
    # What `pip install lst` brings and no more.
    "bare": Extreme(extras="", absent=("triton", "transformers", "lhotse", "scipy", "matplotlib")),
    # Built from the sources where they cannot be compiled; torch.compile has no compiler either.
    "no-compiler": Extreme(
        compiler=False,
        absent=("triton",),
        tests=("tests/kernels", "tests/model", "tests/data", "tests/train"),
    ),
    # The oldest that is supported, with the CUDA libraries it brings: gigabytes.
    "torch-2.11": Extreme(
        requirements=("torch==2.11.*", *BUILD_TOOLS),
        unpinned=("torch", "triton", "torchao"),
        tests=("tests", "-m", "gpu or not gpu"),
        needs_gpu=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="extreme", help=", ".join(EXTREMES))
    own, pytest = sys.argv[1:], []
    if "--" in own:
        own, pytest = own[: own.index("--")], own[own.index("--") + 1 :]
    names = parser.parse_args(own).names
    if unknown := set(names) - EXTREMES.keys():
        parser.error(f"expected some of {', '.join(EXTREMES)}; got {', '.join(sorted(unknown))}")
    has_gpu = shutil.which("nvidia-smi") is not None
    names = names or [name for name in EXTREMES if has_gpu or not EXTREMES[name].needs_gpu]

    dist = build()
    passed = [run(name, EXTREMES[name], dist, pytest) for name in names]
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    sys.exit(not all(passed))


def build() -> Path:
    """The folder of a wheel and of the source distribution it was built from."""
    shutil.rmtree(OUT / "dist", ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / "build.log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "build", "--outdir", OUT / "dist", ROOT],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"the packages were not built; see {log}")
    return OUT / "dist"


def run(name: str, extreme: Extreme, dist: Path, pytest: list[str]) -> bool:
    """Make the environment, run the tests in it, print the line. True where they passed."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log, start, found = folder / "log.txt", time.monotonic(), ""
    try:
        with log.open("w") as file:
            environment = make(folder, extreme, dist, file)
            found = look(folder, extreme, environment)
            print(found, file=file, flush=True)
            call([folder / "bin/pytest", *(pytest or extreme.tests)], environment, file)
        passed = True
        shutil.rmtree(folder / "lib")
    except subprocess.CalledProcessError as error:
        passed, found = False, found or f"failed: {' '.join(map(str, error.cmd[:4]))} …"
    seconds = time.monotonic() - start
    word = "passed" if passed else "FAILED"
    print(f"{name:14}{word}{seconds:6.0f} s  {found}  {log.relative_to(ROOT)}", flush=True)
    return passed


def make(folder: Path, extreme: Extreme, dist: Path, log: IO[str]) -> dict[str, str]:
    """Install lst and the test tools; return the variables under which to run."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "CC", "CXX", "VIRTUAL_ENV")
    }
    if not extreme.compiler:
        environment["PATH"] = str(programs_but_compilers(folder / "programs"))
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    # A checkout in the current folder must not stand in for what was installed.
    environment["PYTHONSAFEPATH"] = "1"

    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0] not in extreme.unpinned]
    constraints.write_text("\n".join(kept) + "\n")
    (package,) = dist.glob("*.whl" if extreme.compiler else "*.tar.gz")
    call([sys.executable, "-m", "venv", folder], environment, log)
    call(
        [
            *(folder / "bin/python", "-m", "pip", "install", "-c", constraints),
            *(f"{package}{extreme.extras}", *TEST_TOOLS, *extreme.requirements),
        ],
        environment,
        log,
    )
    return environment


def look(folder: Path, extreme: Extreme, environment: dict[str, str]) -> str:
    """What was installed, in a line, once it is what the extreme calls for."""
    python = folder / "bin/python"
    absent = (
        f"from importlib.util import find_spec as f; assert not any(map(f, {extreme.absent!r}))"
    )
    subprocess.run([python, "-c", absent], env=environment, check=True)
    command = [python, ROOT / "tests/installed.py", *(["--native"] if extreme.compiler else [])]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def call(command: list[str | Path], environment: dict[str, str], log: IO[str]) -> None:
    subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def programs_but_compilers(folder: Path) -> Path:
    """A folder of links to every program on PATH that neither compiles nor drives compilers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return folder


if __name__ == "__main__":
    main()
