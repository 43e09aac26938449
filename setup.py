"""What pyproject.toml cannot say: where the packages lie, and how the C++ core is built.

The core is optional: without a C++ compiler, CMake or pybind11 the install succeeds and the package works, slower, with
one BackendWarning at run time. These environment variables steer the build:

- ``TTT4AS_BUILD_CORE``: ``auto`` (default), ``0`` to leave the core out, ``1`` to fail where it cannot be built;
- ``CMAKE_ARGS``: further arguments for CMake's configure step;
- CMake's own, such as ``CMAKE_GENERATOR`` and ``CMAKE_BUILD_PARALLEL_LEVEL``, the number of compilers at once.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SUITES = ("headline", "cpu", "growth", "latency", "integrations", "gpu")
"""Whose committed results an installation reports."""
CORE = "ttt4as_fast.kernels._core"


def packages() -> list[str]:
    """Every folder with an ``__init__.py``; ``kernels`` and ``benchmarks`` become parts of ``ttt4as_fast``."""
    return [
        "ttt4as_fast",
        *(f"ttt4as_fast.{name}" for name in find_packages(str(ROOT / "ttt4as_fast"))),
        "ttt4as_fast.kernels",
        *(f"ttt4as_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
        "ttt4as_fast.benchmarks",
    ]


def program(name: str, folder_attribute: str) -> str | None:
    """The path of a build tool: from its PyPI package, which need not be on PATH, else from PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=str(folder)) or shutil.which(name)


class BuildCore(build_ext):
    """Builds the core with CMake and lets the install go on without it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install one extension into the build tree.

        Raises
        ------
        setuptools.errors.CompileError
            It cannot be built. setuptools carries on, because the extension is optional, unless the core is required.
        """
        # pip reuses build/ of a checkout: neither an old core nor a CMake cache of another environment may survive.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        build_dir = Path(self.build_temp).resolve() / "core"
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        try:
            self.cmake_build(build_dir)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            self.warn(f"THE C++ CORE WAS NOT BUILT: {error}")
            self.warn(
                "ttt4as_fast works without it, slower. To have it, install a C++17 compiler and reinstall "
                "with TTT4AS_BUILD_CORE=1 and --no-cache-dir."
            )
            raise CompileError(str(error)) from error

    def cmake_build(self, build_dir: Path) -> None:
        """Run CMake; leaves the module in the build tree, at the place of `CORE`."""
        cmake = program("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise CompileError("CMake is not installed")
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("pybind11 is not installed") from error
        # setuptools builds into this tree even in place, and copies the module into kernels/ afterwards.
        prefix = Path(self.get_ext_fullpath(CORE)).resolve().parents[CORE.count(".")]
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir)),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTTT4AS_BUILD_PYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        ninja = program("ninja", "BIN_DIR")
        if ninja and "CMAKE_GENERATOR" not in os.environ and sys.platform != "win32":
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        config = ["--config", "Release"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)  # by itself make has no limit
        subprocess.run([cmake, "--build", str(build_dir), *config, "--parallel", jobs], check=True)
        install = ["--install", str(build_dir), *config, "--component", "python", "--prefix", str(prefix)]
        subprocess.run([cmake, *install], check=True)


def core_extensions() -> list[Extension]:
    """The C++ core, as ``TTT4AS_BUILD_CORE`` wants it."""
    choice = os.environ.get("TTT4AS_BUILD_CORE", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"TTT4AS_BUILD_CORE: expected auto, 0 or 1, got {choice!r}")
    return [] if choice == "0" else [Extension(CORE, sources=[], optional=choice == "auto")]


setup(
    packages=packages(),
    package_dir={"ttt4as_fast.kernels": "kernels", "ttt4as_fast.benchmarks": "benchmarks"},
    include_package_data=False,  # the sources of the core belong into the sdist, not into every installation
    # CUDA sources are compiled at run time; tables are read then.
    package_data={
        "": ["py.typed", "*.cu", "*.cuh", "*.json"],
        "ttt4as_fast.benchmarks": [*(f"results/{suite}.json" for suite in SUITES), "page.css", "page.js"],
    },
    ext_modules=core_extensions(),
    cmdclass={"build_ext": BuildCore},
)
