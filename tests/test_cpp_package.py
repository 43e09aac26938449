"""The library as a C++ user meets it: installed, found by CMake, built against, and equal to Python to the bit."""

from __future__ import annotations

import shutil
import subprocess
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
    steps = [
        ["-S", str(ROOT), "-B", str(base / "library"), "-DTTT4AS_BUILD_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release"],
        ["--build", str(base / "library"), "--parallel"],
        ["--install", str(base / "library"), "--component", "embed", "--prefix", str(base / "prefix")],
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
