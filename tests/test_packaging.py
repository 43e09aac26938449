"""The package as users get it: sdist, wheel and editable installs, with the C++ core and without a compiler.

Each install goes into an environment of its own that sees the libraries of this one but not its ttt4as_fast.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ttt4as_fast
from ttt4as_fast.benchmarks.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
JUNK = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so", "demo-output")
# The core of the tests is built without optimisation: what counts is that it is built, and by whom.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TTT4AS_", "CMAKE_", "COV_", "PIP_REQ"))},
    "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0",
    "TTT4AS_BUILD_CORE": "1",
}
# Stands before the compiler: every build here has the same sources and flags, so each object is compiled once.
LAUNCHER = """
import shutil, subprocess, sys
from pathlib import Path
command = sys.argv[1:]
target = Path(command[command.index("-o") + 1])
kept = Path(__file__).parent / str(target).replace("/", "+")
if "-c" not in command or target.is_absolute() or not kept.exists():
    code = subprocess.run(command).returncode
    if code or "-c" not in command or target.is_absolute():
        sys.exit(code)
    shutil.copy(target, kept)
else:
    shutil.copy(kept, target)
"""
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "TTT4AS_BUILD_CORE": "auto"}
# Prints what an installed package is: its two folders, why the core cannot serve, the warnings, and a right answer.
PROBE = """
import json, warnings
import numpy as np
import ttt4as_fast
from ttt4as_fast.benchmarks.suites import SUITES
from ttt4as_fast import kernels
x = np.random.default_rng(0).random((3, 5, 7), dtype=np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [kernels.bilinear_upsample(x, (11, 13)) for _ in range(3)]
np.testing.assert_allclose(results[-1], kernels.bilinear_upsample(x, (11, 13), backend="reference"), atol=1e-6)
if kernels.backends()["peaks"]["cpu"] is None:  # in the core's debug build pybind11 sees to the GIL
    rows = x.reshape(-1, 7)
    masks = [kernels.local_maxima(x, 90.0, backend="cpu"), kernels.dilate(x > 0.9, 1, backend="cpu")]
    assert all(mask.shape == x.shape for mask in masks)
    assert kernels.nearest_neighbors(rows, rows, 1, backend="cpu")[1].ravel().tolist() == list(range(15))
    assert len(set(kernels.k_center_greedy(rows, 15, backend="cpu").tolist())) == 15
    assert kernels.fit_linear_svm(rows, np.arange(15) % 2, backend="cpu").coef.shape == (7,)
    for segment in (kernels.segment, kernels.segment_robust):
        assert segment(x[0], x, backend="cpu").pred_mask.shape == (5, 7)
print(json.dumps({
    "package": ttt4as_fast.__file__,
    "kernels": kernels.__file__,
    "core": kernels.backends()["bilinear"]["cpu"],
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
}))
"""


def call(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, away from the sources; what it prints stands in the result, and in the failure."""
    variables = {**ENVIRONMENT, **environment}
    return subprocess.run(
        list(map(str, command)), cwd=sys.prefix, env=variables, check=False, capture_output=True, text=True
    )


def succeed(*command: str | Path, **environment: str) -> str:
    """What a command prints that must end well."""
    result = call(*command, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of `source` in `folder`, and what its build printed."""
    result = call(*PIP, "wheel", *OFFLINE, "--verbose", "--wheel-dir", folder, source, **environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, as a clone has them."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*JUNK)))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is installed here except the package itself."""
    folder = tmp_path_factory.mktemp("libraries")
    site = Path(importlib.metadata.distribution("numpy").locate_file("")).resolve()
    for path in site.iterdir():
        if "ttt4as" not in path.name and path.name != "__pycache__" and path.suffix != ".pth":
            (folder / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return folder


@pytest.fixture
def environment(tmp_path: Path, libraries: Path) -> Callable[..., dict[str, object]]:
    """Installs what it is given with pip into a fresh environment, and probes it from a folder of its own."""

    def install(*arguments: str | Path) -> dict[str, object]:
        venv = tmp_path / "venv"
        succeed(sys.executable, "-m", "venv", "--without-pip", venv)
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(f"{libraries}\n")
        python = venv / "bin" / "python"
        before = call(python, "-c", "import ttt4as_fast")
        assert "No module named 'ttt4as_fast'" in before.stderr, "the environment is not fresh"
        succeed(python, "-m", "pip", "--disable-pip-version-check", "install", *OFFLINE, *arguments)
        return json.loads(succeed(python, "-c", PROBE))

    return install


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The builds of the tests that ask for it share their objects."""
    launcher = tmp_path_factory.mktemp("objects") / "launcher.py"
    launcher.write_text(LAUNCHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "CMAKE_CXX_COMPILER_LAUNCHER", f"{sys.executable};{launcher}")
        yield


def operations() -> set[str]:
    return {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_wheel_from_sdist(source: Path, tmp_path: Path, environment: Callable[..., dict[str, object]]) -> None:
    (source / "kernels" / "_core.left-over.so").touch()  # what an editable install leaves in the tree
    (source / "kernels" / "new_operation").mkdir()
    (source / "kernels" / "new_operation" / "__init__.py").touch()
    (source / "kernels" / "new_operation" / "table.json").touch()
    script = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=source, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    archive = tmp_path / result.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for tracked in ("kernels/cpp", "tests", "benchmarks", "examples"):
        files = {str(path.relative_to(source)) for path in (source / tracked).rglob("*") if path.is_file()}
        assert files <= names, f"not in the sdist: {sorted(files - names)}"
    tops = {"CMakeLists.txt", "Makefile", "LICENSE", "README.md", "pyproject.toml", "setup.py", ".ci/run"}
    assert {top for top in tops if (ROOT / top).exists()} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    wheel, _ = build_wheel(archive, tmp_path / "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.rpartition("/")[0] for name in names}
    assert {f"ttt4as_fast/kernels/{name}" for name in operations() | {"new_operation"}} <= folders
    assert {"ttt4as_fast/py.typed", "ttt4as_fast/benchmarks/page.css"} <= names
    committed = {path.name for path in (source / "benchmarks" / "results").glob("*.json")}
    reported = {name.rpartition("/")[2] for name in names if name.startswith("ttt4as_fast/benchmarks/results/")}
    assert reported == committed & {f"{suite.name}.json" for suite in SUITES} | {"gpu.json"}
    data = {path for pattern in ("*.cu", "*.cuh", "*.json") for path in (source / "kernels").rglob(pattern)}
    assert {f"ttt4as_fast/{path.relative_to(source)}" for path in data} <= names
    assert len([name for name in names if name.startswith("ttt4as_fast/kernels/_core.")]) == 1
    assert {folder.partition("/")[0].partition("-")[0] for folder in folders} == {"ttt4as_fast"}
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".left-over.so"))]
    assert "none-any" not in wheel.name

    found = environment(wheel)
    assert found["core"] is None
    assert found["warnings"] == []
    assert str(tmp_path / "venv") in str(found["package"])
    assert str(tmp_path / "venv") in str(found["kernels"])
    assert "evaluate" in succeed(tmp_path / "venv" / "bin" / "ttt4as", "--help")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_editable(source: Path, environment: Callable[..., dict[str, object]]) -> None:
    found = environment("--editable", source)
    assert found["core"] is None
    assert found["warnings"] == []
    assert found["package"] == str(source / "ttt4as_fast" / "__init__.py")
    assert found["kernels"] == str(source / "kernels" / "__init__.py")
    assert len(list((source / "kernels").glob("_core.*"))) == 1


@pytest.mark.slow
def test_without_a_compiler(source: Path, tmp_path: Path, environment: Callable[..., dict[str, object]]) -> None:
    wheel, log = build_wheel(source, tmp_path / "wheel", **NO_COMPILER)
    assert "THE C++ CORE WAS NOT BUILT" in log
    assert "install a C++17 compiler" in log
    found = environment(wheel)
    assert "the C++ core is not built" in str(found["core"])
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert warning.startswith("BackendWarning: bilinear: backend 'cpu'")


@pytest.mark.slow
def test_without_cmake(source: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "cmake.py").write_text("raise ImportError('hidden')\n")
    _, log = build_wheel(source, tmp_path / "wheel", **{**NO_COMPILER, "PYTHONPATH": str(hidden), "PATH": str(hidden)})
    assert "THE C++ CORE WAS NOT BUILT: CMake is not installed" in log


@pytest.mark.slow
def test_an_old_core_does_not_survive(source: Path, tmp_path: Path) -> None:
    tag = f"_core{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale = next(iter(succeed(sys.executable, "-c", BUILD_LIB).split()))
    path = source / stale / "ttt4as_fast" / "kernels" / tag
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of an earlier build")
    wheel, _ = build_wheel(source, tmp_path / "wheel", **NO_COMPILER)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_core" in name]


BUILD_LIB = """
from setuptools import Distribution, Extension
command = Distribution({"ext_modules": [Extension("x", [])]}).get_command_obj("build")
command.ensure_finalized()
print(command.build_lib)
"""


@pytest.mark.slow
def test_left_out_core_makes_a_pure_wheel(source: Path, tmp_path: Path) -> None:
    wheel, _ = build_wheel(source, tmp_path / "wheel", TTT4AS_BUILD_CORE="0")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is needed")
def test_the_build_keeps_to_its_number_of_compilers(source: Path, tmp_path: Path) -> None:
    make = tmp_path / "make"  # does what CMake tries, then says how it is called
    make.write_text(
        f'#!/bin/sh\ncase "$*" in *-j*) echo called with "$@"; exit 1;; esac\nexec {shutil.which("make")} "$@"\n'
    )
    make.chmod(0o755)
    chosen = {"CMAKE_GENERATOR": "Unix Makefiles", "CMAKE_BUILD_PARALLEL_LEVEL": "3"}
    result = call(
        *(*PIP, "wheel", *OFFLINE, "--verbose", "-w", tmp_path, source),
        **{**chosen, "CMAKE_ARGS": f"-DCMAKE_MAKE_PROGRAM={make}"},
    )
    assert re.search("called with .*-j *3", result.stdout + result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "message"),
    [("1", "THE C++ CORE WAS NOT BUILT"), ("yes", "TTT4AS_BUILD_CORE: expected auto, 0 or 1, got 'yes'")],
)
def test_a_required_core_fails_the_build(source: Path, tmp_path: Path, choice: str, message: str) -> None:
    result = call(*PIP, "wheel", *OFFLINE, "-w", tmp_path, source, **{**NO_COMPILER, "TTT4AS_BUILD_CORE": choice})
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("ttt4as_fast")
    assert metadata["Version"] == ttt4as_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"gpu", "cuml", "anomalib", "bench", "test", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra") or [])


def test_a_numba_that_cuml_takes_is_allowed() -> None:
    from packaging.requirements import Requirement

    required = [Requirement(line) for line in importlib.metadata.requires("ttt4as_fast") or []]
    (numba,) = (r for r in required if r.name == "numba" and r.marker is None)
    assert numba.specifier.contains("0.64.0")


def test_lint_versions_agree() -> None:
    pinned = re.compile(r"\"((?:ruff|clang-format)==[^\"]+)\"")
    development = set(pinned.findall((ROOT / "pyproject.toml").read_text("utf-8")))
    assert len(development) == 2
    assert set(pinned.findall((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))) == development
