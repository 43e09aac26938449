"""No GPU kernel touches what lies before or behind a tensor: `guard` puts a page there that ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import require_interpreter

pytestmark = pytest.mark.interpret
SCRIPT = Path(__file__).with_name("guard.py")


def run(side: str, operation: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton", reason="Triton is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are guarded as Linux does it")
    require_interpreter()
    return subprocess.run([sys.executable, "-W", "ignore", SCRIPT, side, operation], capture_output=True, text=True)


@pytest.mark.parametrize("operation", ["knn", "coreset", "bilinear", "peaks", "segment"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_no_access_outside(side, operation):
    from . import emulator

    if operation in ("peaks", "segment") and emulator.compiler() is None:
        pytest.skip("no C++ compiler to build CUDA sources for the host with")
    done = run(side, operation)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-3000:]


@pytest.mark.parametrize("side", ["before", "after"])
def test_an_access_outside_ends_the_process(side):
    assert run(side, "outside").returncode == -signal.SIGSEGV
