"""The wheel holds the native library, serves every CPython, and can do without the library.

Everything is built from a copy of the tree, with the build tools of the development environment.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = re.compile(r"lst_kernels/native/liblst_kernels\.(so|dylib|dll)")
NO_COMPILER = str(Path(os.sep, "no", "such", "compiler"))

SUM_OF_TWO_PATCHES = """
import warnings
import torch
from lst_kernels import PatchLayout, native, patch_pool

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = patch_pool(torch.ones(3, 1), PatchLayout.from_lengths([1, 2], [2]), "sum")
print(native.__file__, native.unavailable_reason(), out.flatten().tolist(), sep="\\n")
print(*(warning.message for warning in caught), sep="\\n", end="")
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_installed(folder: Path) -> list[str]:
    """What SUM_OF_TWO_PATCHES prints when it finds the packages in this folder."""
    return run(sys.executable, "-P", "-c", SUM_OF_TWO_PATCHES, PYTHONPATH=str(folder)).splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    built = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__")
    for package in ("lst", "lst_kernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=built)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, which so is found complete."""
    out = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-c"),
        "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]);"
        "build_meta.build_sdist(sys.argv[2])",
        *(tree, out),
    )
    (source,) = out.glob("lst-*.tar.gz")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    log = run(*pip_wheel, "--verbose", "--wheel-dir", out, source)
    assert "were not built" not in log, log
    (built,) = out.glob("*.whl")
    return built


def test_one_wheel_serves_every_cpython(wheel: Path):
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_the_wheel_holds_the_library_and_no_sources(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if LIBRARY.fullmatch(name)]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert {"lst_kernels/py.typed", "lst/py.typed", "lst/errors.py"} <= set(names)
    assert not [name for name in names if name.startswith("tests")]


def test_the_library_of_the_wheel_runs(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    where, reason, sums, *warnings = run_installed(tmp_path)
    assert Path(where).is_relative_to(tmp_path)
    assert (reason, sums, warnings) == ("None", "[1.0, 2.0]", [])


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads the library's symbols")
def test_the_library_links_neither_python_nor_torch(wheel: Path, tmp_path: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = filter(LIBRARY.fullmatch, archive.namelist())
    library = archive.extract(name, tmp_path)
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", library))
    assert needed
    assert not [name for name in needed if re.search("python|torch|c10|gomp", name)]
    symbols = run("readelf", "--dyn-syms", "--wide", library).split()
    assert "lst_abi_version" in symbols
    assert not [symbol for symbol in symbols if re.match("_?Py|_ZN?K?[0-9]*(torch|c10|at)", symbol)]


def test_an_install_without_a_compiler_runs_the_reference(tree: Path, tmp_path: Path):
    target = tmp_path / "site"
    pip_install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    log = run(*pip_install, "--verbose", "--target", target, tree, CXX=NO_COMPILER)
    assert log.count("the native CPU kernels were not built") == 1
    assert not list(target.glob("lst_kernels/native/liblst_kernels*"))
    where, reason, sums, *warnings = run_installed(target)
    assert Path(where).is_relative_to(target)
    assert "the native library was not built" in reason
    assert sums == "[1.0, 2.0]"
    assert len(warnings) == 1
    assert "the native library was not built" in warnings[0]
