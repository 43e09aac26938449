"""The library as a C++ user meets it: installed, found by CMake, built against, and equal to Python to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttt4as_fast import kernels
from ttt4as_fast.kernels import dispatch

from .kernels.cases import smooth_map, structured_features

ROOT = Path(__file__).resolve().parents[1]


def find_cmake() -> str | None:
    """CMake from its PyPI package, which need not be on PATH, else from PATH."""
    try:
        import cmake
    except ImportError:
        return shutil.which("cmake")
    return shutil.which("cmake", path=str(cmake.CMAKE_BIN_DIR)) or shutil.which("cmake")


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The folder with the built examples."""
    cmake = find_cmake()
    if cmake is None or not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("CMake and a C++ compiler are needed")
    if not (ROOT / "examples" / "cpp").is_dir():
        pytest.skip("not a checkout")
    base = tmp_path_factory.mktemp("embed")
    # The shared library, its headers in a place of the installer's choice; the C++ tests build the static one.
    options = ["-DBUILD_SHARED_LIBS=ON", "-DCMAKE_INSTALL_INCLUDEDIR=include/one"]
    options += ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_CXX_FLAGS=-ffast-math"]  # as a project around it may have them
    steps = [
        ["-S", str(ROOT), "-B", str(base / "library"), *options],
        ["--build", str(base / "library"), "--parallel"],
        ["--install", str(base / "library"), "--prefix", str(base / "prefix")],
        ["-S", str(ROOT / "examples" / "cpp"), "-B", str(base / "example"), f"-DCMAKE_PREFIX_PATH={base / 'prefix'}"],
        ["--build", str(base / "example"), "--parallel"],
    ]
    for step in steps:
        done = subprocess.run([cmake, *step], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return base / "example"


def read_pgm(path: Path) -> np.ndarray:
    magic, size, most, pixels = path.read_bytes().split(b"\n", 3)
    assert (magic, most) == (b"P5", b"255")
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width)


@pytest.mark.parametrize(("size", "shape"), [((224, 224), (64, 28, 28)), ((61, 47), (33, 7, 11))], ids=str)
def test_the_example_equals_python_to_the_bit(example, tmp_path, size, shape):
    if isinstance(dispatch.native_core(), str):
        pytest.skip(dispatch.native_core())
    rng = np.random.default_rng(5)
    anomaly_map, features = smooth_map(rng, *size), structured_features(rng, *shape) * 20
    np.save(tmp_path / "map.npy", anomaly_map)
    np.save(tmp_path / "features.npy", features)
    command = [example / "segment_npy", "map.npy", "features.npy", "mask.pgm", "decision.f32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = kernels.segment(anomaly_map, features, backend="cpu")
    assert expected.pred_mask.any()
    np.testing.assert_array_equal(read_pgm(tmp_path / "mask.pgm"), expected.pred_mask * np.uint8(255))
    decision = np.fromfile(tmp_path / "decision.f32", np.float32).reshape(size)
    np.testing.assert_array_equal(decision, expected.decision_map)


def test_the_example_refuses_what_it_cannot_read(example, tmp_path):
    np.save(tmp_path / "map.npy", np.zeros((8, 8)))  # float64
    np.save(tmp_path / "features.npy", np.zeros((2, 4, 4), np.float32))
    (tmp_path / "short.npy").write_bytes((tmp_path / "features.npy").read_bytes()[:-9])
    for map_name, features_name in (("map.npy", "features.npy"), ("features.npy", "short.npy"), ("none.npy", "x.npy")):
        command = [example / "segment_npy", map_name, features_name, "mask.pgm"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and "segment_npy:" in done.stderr
        assert not (tmp_path / "mask.pgm").exists()


def test_the_c_example_runs(example):
    done = subprocess.run([example / "segment_c"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cmake_project(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Configure a project of one CMakeLists.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.20)\n{text}\n", "utf-8")
    command = [find_cmake(), "-S", str(folder), "-B", str(folder / "build"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_installed_header_is_exported(example, tmp_path):
    """Functions of the headers that no class of the examples calls, against the shared library."""
    prefix = f"-DCMAKE_PREFIX_PATH={example.parent / 'prefix'}"
    project = """project(user LANGUAGES CXX)
        find_package(ttt4as REQUIRED)
        add_executable(user main.cpp)
        target_link_libraries(user PRIVATE ttt4as::ttt4as)"""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "main.cpp").write_text(
        """
        #include "ttt4as/bilinear.hpp"
        #include "ttt4as/peaks.hpp"
        template <class T>
        bool upsamples() {
            const T in[4] = {};
            T out[16];
            const ttt4as::FeatureView<T> view{in, 1, 2, 2, 4, 2, 1};
            ttt4as::bilinear_upsample<T>(view, 4, 4, out, 1);
            return true;
        }
        int main() {
            const float map[4] = {0, 1, 2, 3};
            ttt4as::PeakScratch<float> scratch;
            const bool right = ttt4as::map_percentile<float>(map, 4, 50, scratch) == 1.5;
            const bool found = ttt4as::map_range<float>(map, 4).greatest == 3;
            return right && found && upsamples<float>() && upsamples<ttt4as::Half>() ? 0 : 1;
        }""",
        "utf-8",
    )
    done = cmake_project(tmp_path / "user", project, prefix)
    assert done.returncode == 0, done.stderr
    build = subprocess.run([find_cmake(), "--build", str(tmp_path / "user" / "build")], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-3000:]
    assert subprocess.run([tmp_path / "user" / "build" / "user"]).returncode == 0


def test_a_project_in_c_alone_is_told_what_it_lacks(example, tmp_path):
    text = "project(user LANGUAGES C)\nfind_package(ttt4as REQUIRED)"
    done = cmake_project(tmp_path / "c", text, f"-DCMAKE_PREFIX_PATH={example.parent / 'prefix'}")
    assert done.returncode != 0
    assert "project(... LANGUAGES C CXX)" in " ".join(done.stderr.split())


def test_within_another_project_it_leaves_that_one_as_it_is(example, tmp_path):
    done = cmake_project(
        tmp_path / "host", f'project(host LANGUAGES CXX)\nadd_subdirectory("{ROOT.as_posix()}" ttt4as)'
    )
    assert done.returncode == 0, done.stderr
    cache = (tmp_path / "host" / "build" / "CMakeCache.txt").read_text("utf-8")
    assert "TTT4AS_BUILD_PYTHON:BOOL=OFF" in cache and "TTT4AS_INSTALL:BOOL=OFF" in cache
    assert "BUILD_SHARED_LIBS" not in cache and "CMAKE_BUILD_TYPE:STRING=Release" not in cache


@pytest.mark.skipif(sys.platform != "linux", reason="symbols of a process are bound otherwise there")
def test_the_python_module_keeps_to_its_own_copy(tmp_path):
    """Another libttt4as in the process, of whatever version, takes none of its calls."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    core = dispatch.native_core()
    if compiler is None or isinstance(core, str):
        pytest.skip("a C++ compiler and the C++ core are needed")
    other = tmp_path / "other.cpp"
    other.write_text("namespace ttt4as { int max_threads() noexcept { return 77777; } }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "other.so", other], check=True)
    code = "from ttt4as_fast.kernels import native; print(native.core().max_threads())"
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "other.so")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 77777
