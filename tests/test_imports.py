"""What may import what, what an import may load, and how long `import ttt4as_fast` may take."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ttt4as_fast", "kernels", "tests", "benchmarks", "examples")
OPERATIONS = tuple(sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")))
HEAVY = ("torch", "timm", "numba", "cupy", "triton", "cuml", "sklearn", "skimage", "matplotlib", "scipy.signal")
SECONDS = 0.3


def imports(source: str, file: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that the file at the root-relative path `file` imports, relative ones resolved.

    ``from a import b`` counts as ``a.b``: whether b is a module cannot be told from the text.
    """
    package = Path(file).parent.parts
    found = []
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            prefix = (base + (node.module or "")).strip(".")
            found += [(node.lineno, f"{prefix}.{alias.name}".strip(".")) for alias in node.names]
    return found


def offences(source: str, file: str) -> list[str]:
    """What the layout forbids the file at the root-relative path `file` to import."""
    found = []
    relative = {name for _, name in imports(source, file)} - {name for _, name in imports(source, "file.py")}
    own = Path(file).parts
    for line, name in imports(source, file):
        parts = name.split(".")
        where = f"{file}:{line}: {name}"
        if parts[0] == "kernels" and name not in relative:
            found.append(f"{where}: a second copy; the package is ttt4as_fast.kernels")
        if own[0] == "ttt4as_fast" and parts[:2] == ["ttt4as_fast", "benchmarks"]:
            found.append(f"{where}: nothing but the command that runs it needs the benchmark suite")
        if own[0] != "kernels":
            continue
        if parts[0] == "ttt4as_fast":
            found.append(f"{where}: kernels imports nothing from the rest of ttt4as_fast, and itself relatively")
        if own[1] in OPERATIONS and len(parts) > 2 and parts[1] in OPERATIONS and parts[1] != own[1]:
            if parts[2] in ("reference", "cpu", "gpu", "numba", "cuml"):
                found.append(f"{where}: an operation uses another's public function, not its backend file")
    return found


def run(code: str, folder: Path) -> str:
    """What `code` prints in a fresh interpreter that stands in `folder`, away from the sources."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout


def loaded(statement: str, folder: Path) -> set[str]:
    return set(run(f"import sys; {statement}; print(*sys.modules)", folder).split())


@pytest.mark.parametrize("folder", FOLDERS)
def test_layout(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    found = [line for path in files for line in offences(path.read_text("utf-8"), str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_layout_has_operations() -> None:
    assert {"bilinear", "coreset", "knn", "linear_svm", "peaks", "segment"} <= set(OPERATIONS)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tests/test_x.py", "import kernels"),
        ("tests/test_x.py", "import kernels.knn as knn"),
        ("ttt4as_fast/x.py", "from kernels import knn"),
        ("ttt4as_fast/x.py", "def f():\n    from kernels.knn import KnnIndex"),
        ("ttt4as_fast/x.py", "def f():\n    from .benchmarks import machine"),
        ("kernels/knn/cpu.py", "from kernels import arrays"),
        ("kernels/knn/cpu.py", "from ttt4as_fast.kernels import arrays"),
        ("kernels/knn/cpu.py", "from ttt4as_fast import io"),
        ("kernels/segment/cpu.py", "from ..bilinear.cpu import upsample"),
        ("kernels/segment/cpu.py", "from ..bilinear import reference"),
    ],
)
def test_layout_guard_sees_an_offence(file: str, source: str) -> None:
    assert offences(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tests/test_x.py", "from ttt4as_fast import kernels"),
        ("ttt4as_fast/x.py", "from . import kernels"),
        ("ttt4as_fast/x.py", "from .kernels.knn import KnnIndex"),
        ("kernels/__init__.py", "from . import bilinear"),
        ("kernels/knn/cpu.py", "from .. import arrays"),
        ("kernels/knn/cpu.py", "from . import reference"),
        ("kernels/segment/cpu.py", "from ..bilinear import bilinear_sample"),
        ("kernels/gpu_common/geometry.py", "from ..bilinear.reference import taps"),
    ],
)
def test_layout_guard_lets_pass(file: str, source: str) -> None:
    assert not offences(source, file)


@pytest.mark.parametrize(
    "statement",
    [
        "import ttt4as_fast",
        "import ttt4as_fast; dir(ttt4as_fast), ttt4as_fast.__version__",
        "from ttt4as_fast import kernels",
    ],
)
def test_import_loads_nothing_heavy(statement: str, tmp_path: Path) -> None:
    modules = loaded(statement, tmp_path)
    assert "ttt4as_fast" in modules
    assert not modules & set(HEAVY)


def test_first_uses_from_several_threads_do_not_wait_for_each_other(tmp_path: Path) -> None:
    # One thread is stopped within the import of kernels until another has come to a part of it, if it does.
    code = """
import sys, threading
import ttt4as_fast

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "ttt4as_fast.kernels.segment":
            reached.set()
        if name == "ttt4as_fast.kernels.bilinear":
            other.start()
            reached.wait(0.5)

reached = threading.Event()
other = threading.Thread(target=lambda: ttt4as_fast.TTT4AS)
sys.meta_path.insert(0, Stop())
ttt4as_fast.kernels
other.join()
print("TTT4AS" in vars(ttt4as_fast))
"""
    assert run(code, tmp_path).strip() == "True"


def test_numpy_arrays_need_no_torch(tmp_path: Path) -> None:
    statement = "import numpy as np; from ttt4as_fast import kernels; kernels.bilinear_upsample(np.ones((1, 2, 2)), 4)"
    assert not loaded(statement, tmp_path) & {"torch", "timm", "triton", "cupy"}


def test_import_is_quick(tmp_path: Path) -> None:
    # The one bound on time in the suite, because it is a promise. The best of several: a busy machine delays some of
    # them, a slow import all of them.
    code = "import time; t = time.perf_counter(); import ttt4as_fast; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(8):
        seconds.append(float(run(code, tmp_path)))
        if seconds[-1] < SECONDS:
            return
    pytest.fail(f"import ttt4as_fast took {min(seconds):.3f} s at best of {len(seconds)}, expected < {SECONDS} s")


@pytest.mark.parametrize("module", ["torch", "numba", "scipy.signal"])
def test_import_guard_would_see(module: str, tmp_path: Path) -> None:
    # The names in HEAVY are those under which the libraries register: an import of one must be noticed.
    assert loaded(f"import {module}", tmp_path) & set(HEAVY)
