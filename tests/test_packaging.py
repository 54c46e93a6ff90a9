"""The wheel holds the native library, serves every CPython, and can do without the library.

Everything is built from a copy of the tree, with the build tools of the development environment.
What is installed goes into environments of its own, which find the packages that lst depends on in
the development environment and nothing of the checkout, so no test needs a network.
"""

import ast
import importlib.metadata
import re
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = re.compile(r"lst_kernels/native/liblst_kernels\.(so|dylib|dll)")


def test_one_wheel_serves_every_cpython(wheel: Path):
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_the_wheel_holds_the_library_and_no_sources(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if LIBRARY.fullmatch(name)]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert {"lst_kernels/py.typed", "lst/py.typed", "lst/errors.py"} <= set(names)
    assert "lst/demo/picture.css" in names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_pip_takes_the_wheel_on(version, run, wheel, tmp_path):
    options = ("--python-version", version, "--only-binary", ":all:", "--target", tmp_path)
    run(sys.executable, "-m", "pip", "install", "--no-deps", *options, wheel)
    assert (tmp_path / "lst_kernels" / "native").is_dir()


def test_the_wheel_installed_in_a_clean_environment_computes(run, wheel, clean_shell):
    run("bash", "-c", "pip install dist/*.whl", cwd=wheel.parents[1], **clean_shell)
    line = run("bash", "-c", f"python -P '{ROOT}/tests/installed.py' --native", **clean_shell)
    assert line.endswith("native\n")


def test_every_line_of_the_blt_page_runs_on_the_wheel(run, wheel, clean_shell, tmp_path):
    """As a user would: type the console lines, with the page's code in the file they name."""
    pytest.importorskip("transformers.models.blt")
    page = (ROOT / "docs" / "blt.md").read_text()
    (console,) = re.findall(r"^```console\n(.*?)^```$", page, re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (name,) = re.findall(r"(\w+\.py)$", console, re.M)
    (tmp_path / "dist").symlink_to(wheel.parent)
    (tmp_path / name).write_text(code)
    lines = [line.removeprefix("$ ") for line in console.splitlines() if line.startswith("$ ")]
    assert any(line.startswith("pip install dist/*.whl") for line in lines)
    out = run("bash", "-euc", "\n".join(lines), cwd=tmp_path, **clean_shell)
    shown = [line for line in console.splitlines() if not line.startswith("$ ")]
    assert shown
    assert out.splitlines()[-len(shown) :] == shown


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads the library's symbols")
def test_the_library_links_neither_python_nor_torch(run, wheel, tmp_path):
    archive = zipfile.ZipFile(wheel)
    (name,) = filter(LIBRARY.fullmatch, archive.namelist())
    library = archive.extract(name, tmp_path)
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", library))
    expected = r"(libc|libm|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so\.\d"
    assert needed
    assert [name for name in needed if not re.fullmatch(expected, name)] == []
    symbols = run("readelf", "--dyn-syms", "--wide", library).split()
    assert "lst_abi_version" in symbols
    assert not [symbol for symbol in symbols if re.match("_?Py|_ZN?K?[0-9]*(torch|c10|at)", symbol)]


def test_an_install_without_a_compiler_runs_the_reference(run, tree, clean_shell, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    without = {**clean_shell, "CXX": str(tmp_path / "no" / "compiler")}
    log = run("bash", "-c", "pip install -v --no-build-isolation .", cwd=tree, **without)
    assert log.count("the native CPU kernels were not built") == 1
    line = run("bash", "-c", f"python -P '{ROOT}/tests/installed.py'", **clean_shell)
    assert line.endswith("no native library\n")


# --- what is imported is declared ---------------------------------------------------------------

# Modules that nothing imports before it is asked for what they do.
BEHIND_AN_EXTRA = (
    "lst_kernels/triton/",
    "lst_kernels/aot.py",
    "lst/prepare/pipeline.py",
    "lst/evaluate/harness.py",
)


def imports(tree: ast.Module, *, of_module: bool) -> Iterator[str]:
    """The packages that a module imports when it is imported, or inside its functions."""
    outside = set()
    nodes = [tree]
    while nodes:
        for child in ast.iter_child_nodes(nodes.pop()):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                outside.add(child)
                nodes.append(child)
    for node in ast.walk(tree):
        if (node in outside) != of_module:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def declared(requirements: list[str]) -> set[str]:
    """The names to import of these requirements."""
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in requirements}
    for package, distributions in importlib.metadata.packages_distributions().items():
        if names & {name.replace("-", "_").lower() for name in distributions}:
            names.add(package)
    return names


def test_every_import_is_of_a_declared_dependency():
    """A module may import at its top only what is required: an extra waits for its function."""
    pytest.importorskip("sklearn", reason="only what is installed tells its names")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = declared(project["dependencies"]) | {"lst", "lst_kernels"} | sys.stdlib_module_names
    users = [line for extra in extras if extra not in ("dev", "bench") for line in extras[extra]]
    optional = required | declared(users) | {"triton"}  # torch's wheels for CUDA bring Triton
    undeclared = []
    for path in sorted(p for name in ("lst", "lst_kernels") for p in (ROOT / name).rglob("*.py")):
        tree = ast.parse(path.read_text())
        place = str(path.relative_to(ROOT))
        allowed = optional if place.startswith(BEHIND_AN_EXTRA) else required
        undeclared += [
            (place, name) for name in imports(tree, of_module=True) if name not in allowed
        ]
        undeclared += [
            (place, name) for name in imports(tree, of_module=False) if name not in optional
        ]
    assert undeclared == []


def test_the_page_on_installing_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    table = page.split("## What the extras bring")[1].split("##")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert set(named) == project["optional-dependencies"].keys() - {"dev", "bench", "docs"}
