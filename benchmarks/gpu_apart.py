"""GPU rows in a process of their own: one that hangs, or that takes the device from its process, costs itself alone.

An access outside of memory ends the CUDA context of the process that made it: every later call there fails, whatever it
does. A kernel without an end cannot be stopped but with its process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .gpu_tools import ROOT

POLL_S = 0.5
GRACE_S = 60.0
"""Seconds that a process may take, beside those of its row, before it is taken to hang: imports, probes, ceilings."""

Command = Callable[[Sequence[str], Path, float], list[str]]


def measure_apart(
    names: Sequence[str],
    seconds: Callable[[str], float],
    deadline: float,
    command: Command,
    found: Callable[[dict[str, Any]], None],
) -> None:
    """Have all rows measured, by one process or, where one is lost, by several.

    Parameters
    ----------
    names : sequence of str
        The rows, in their order.
    seconds : callable
        What a row is planned to take; three times as much is a hang.
    deadline : float
        Of `time.monotonic`, for the rows together.
    command : callable
        ``command(names, folder, seconds)``: the command line of a process that measures rows for so many seconds and
        writes ``folder/gpu.json``, whole, after each. A key ``lost`` in it says that the device is lost to the process.
    found : callable
        Gets what a process has written, as it grows, and what is to be said of a row whose process ended before it.
    """
    left = list(names)
    while left and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gpu.json"
            process = subprocess.Popen(
                command(left, Path(folder), deadline - time.monotonic()), cwd=ROOT, start_new_session=True
            )
            saved: dict[str, Any] = {}
            started, why = time.monotonic(), ""
            try:
                while True:
                    over = process.poll() is not None
                    saved, before = read(path, saved), saved
                    if len(saved.get("rows", ())) > len(before.get("rows", ())):
                        found(saved)
                        started = time.monotonic()
                        left = [name for name in left if name not in {row.get("row") for row in saved["rows"]}]
                    if over or not left:
                        why = f"its process ended with status {process.returncode}"
                        break
                    allowed = GRACE_S + 3 * seconds(left[0])
                    if time.monotonic() > min(started + allowed, deadline + GRACE_S):
                        why = f"no end after {time.monotonic() - started:.0f} seconds"
                        break
                    time.sleep(POLL_S)
            finally:
                end(process, patience=30 if not left else 0)
        if left and not saved.get("lost"):
            found({"rows": [{"name": left[0], "row": left[0], "status": "failed", "notes": {"error": why}}]})
            left = left[1:]
        elif left:
            print(f"the device was lost to {saved['lost']}; going on in another process", flush=True)
    late = {"status": "not measured", "notes": {"reason": "out of time"}}
    if left:
        found({"rows": [{"name": name, "row": name, **late} for name in left]})


def read(path: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What lies at `path`; `before` where nothing does yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return before


def end(process: subprocess.Popen, patience: float) -> None:
    """End a process, with all that it started, unless it ends by itself within `patience` seconds."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pattern(names: Sequence[str]) -> str:
    """The expression of exactly these rows."""
    return f"^({'|'.join(map(re.escape, names))})$"
