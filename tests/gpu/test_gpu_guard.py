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


def run(side: str, *operations: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton", reason="Triton is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are guarded as Linux does it")
    require_interpreter()
    command = [sys.executable, "-W", "ignore", SCRIPT, side, *operations]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("side", ["before", "after"])
def test_no_access_outside(side):
    from . import emulator

    operations = ["knn", "coreset", "bilinear"]
    if emulator.compiler() is not None:  # to build CUDA sources for the host with
        operations += ["peaks", "segment"]
    done = run(side, *operations)
    assert done.stdout.split() == operations and done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("side", ["before", "after"])
def test_an_access_outside_ends_the_process(side):
    done = run(side, "outside")
    assert done.returncode == -signal.SIGSEGV and not done.stdout
