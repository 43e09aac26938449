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


def start(side: str, *operations: str) -> subprocess.Popen:
    pytest.importorskip("triton", reason="Triton is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are guarded as Linux does it")
    require_interpreter()
    command = [sys.executable, "-W", "ignore", SCRIPT, side, *operations]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_access_outside():
    from . import emulator

    operations = ["knn", "coreset", "bilinear"]
    if emulator.compiler() is not None:  # to build CUDA sources for the host with
        operations += ["peaks", "segment", "linear_svm"]
    running = [start(side, *operations) for side in ("before", "after")]
    for process in running:
        output, errors = process.communicate()
        assert output.split() == operations and process.returncode == 0, (process.args, errors[-3000:])


def test_an_access_outside_ends_the_process():
    running = [start(side, "outside") for side in ("before", "after")]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGSEGV and not output, process.args
