"""Builds ``lst_kernels/native`` with CMake. Everything else stands in pyproject.toml.

The library has a C interface and links neither Python nor torch, so one wheel serves every CPython.
It is optional: where it cannot be built the install succeeds without it, and lst_kernels runs its
reference path.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = "liblst_kernels" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def find_program(name: str) -> str | None:
    """Find a build tool on PATH, or beside a Python whose environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


class BuildNative(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        # No tag of the interpreter in the name: the loader looks for one file on every Python.
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # an older build's library must not pass for this one's
        build = Path(self.build_temp, "native").resolve()
        cmake, ninja = find_program("cmake") or "cmake", find_program("ninja")
        # --fresh: a cache left by an earlier build names tools of an environment long gone.
        configure = [cmake, "--fresh", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        compile_ = [cmake, "--build", build, "--config", "Release"]
        install = [cmake, "--install", build, "--config", "Release", "--prefix", target.parent]
        try:
            for command in (configure, compile_, install):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error if isinstance(error, OSError) else "cmake says above why"
            # The extension is optional: setuptools prints this line and goes on without it.
            raise CompileError(
                f"the native CPU kernels were not built ({reason}); the install goes on, and"
                " lst_kernels will run its slower reference path on the CPU"
            ) from error

    def copy_extensions_to_source(self) -> None:
        # The end of an editable install. As above: if the build failed, nothing may stay.
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: for one platform, and every CPython on it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("lst_kernels.native.liblst_kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
