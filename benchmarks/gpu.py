"""``python -m benchmarks.gpu --output DIR``: everything that only a GPU can tell, in one command on a bare machine.

Builds and installs the package without a network, runs the tests marked ``gpu``, measures every row of `gpu_rows`, and
writes ``DIR/gpu.json`` (whole, after each row, so that a run cut short keeps what it had). Needs torch with a usable
CUDA device, Triton and CuPy; peers that are not installed are named as absent. Under eight minutes on one H200-class
device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = 2
"""Exit status without a CUDA device."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (a test failed or an answer was wrong) or 2 (no CUDA device)."""
    options = parser().parse_args(arguments)
    output = Path(options.output)
    try:
        import torch

        usable = torch.cuda.is_available()
    except ImportError as error:
        print(f"no CUDA device: torch is not installed ({error})", file=sys.stderr)
        return NO_DEVICE
    if options.not_measured:
        write(output / "gpu.json", not_measured())
        return 0
    if not usable:
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return NO_DEVICE
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "build": None, "tests": None, "rows": []}
    if not options.no_build:
        result["build"] = build(output / "build.log")
        print(f"build: {result['build']['status']}, {time.monotonic() - start:.0f} s", flush=True)
    if not options.no_tests:
        result["tests"] = run_tests(output / "tests.log")
        print(f"tests: {result['tests']['summary']}, {time.monotonic() - start:.0f} s", flush=True)
    measure(result, options.rows, output / "gpu.json", start + options.budget_s)
    result["seconds"] = time.monotonic() - start
    write(output / "gpu.json", result)
    print(table(result["rows"]))
    wrong = any(row["status"] == "wrong answer" for row in result["rows"])
    failed = any(part is not None and part["status"] != "ok" for part in (result["build"], result["tests"]))
    return 1 if wrong or failed else 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    found.add_argument("--output", required=True, metavar="DIR", help="where gpu.json and the logs go")
    found.add_argument("--rows", metavar="PATTERN", default="", help="only rows whose name holds this expression")
    found.add_argument("--no-build", action="store_true", help="use the package that is installed")
    found.add_argument("--no-tests", action="store_true", help="measure without running the tests first")
    found.add_argument("--budget-s", type=float, default=450, metavar="S", help="start no row after this many seconds")
    found.add_argument("--not-measured", action="store_true", help="write the rows without numbers; needs no GPU")
    return found


def build(log: Path) -> dict[str, Any]:
    """Install the package from this checkout, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
    return _run(command, log, timeout=240)


def run_tests(log: Path) -> dict[str, Any]:
    """The tests marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = _run(command, log, timeout=300)
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
    return done | {"summary": re.sub(r"=+", "", lines[-1]).strip()}


def _run(command: list[str], log: Path, timeout: float) -> dict[str, Any]:
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        try:
            code: int | None = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    status = "ok" if code == 0 else ("timed out" if code is None else f"exit status {code}")
    return {"status": status, "seconds": time.monotonic() - start, "command": " ".join(command[1:])}


def measure(result: dict[str, Any], pattern: str, path: Path, deadline: float) -> None:
    """Measure the rows into `result`, and save it after each."""
    import torch

    from .gpu_measure import machine
    from .gpu_rows import ROWS, prepare

    bench = prepare(torch.device("cuda", torch.cuda.current_device()))
    result |= {"machine": machine(), "ceilings": bench.limits}
    for name, function in ROWS.items():
        if not re.search(pattern, name):
            continue
        if time.monotonic() > deadline:
            result["rows"].append({"name": name, "status": "not measured", "notes": {"reason": "out of time"}})
            continue
        start = time.monotonic()
        try:
            row = function(bench).as_json()
        except Exception as error:  # one row must not cost the others
            row = {"name": name, "status": "failed", "notes": {"error": f"{type(error).__name__}: {error}"[:2000]}}
        row["seconds"] = time.monotonic() - start
        result["rows"].append(row)
        result["machine_after"] = machine()["device"]
        write(path, result)
        print(f"{row['name']}: {row['status']}, {row['seconds']:.0f} s", flush=True)
        torch.cuda.empty_cache()


def not_measured() -> dict[str, Any]:
    """The rows as they stand before any run: no number that no run printed."""
    from .gpu_rows import ROWS

    rows = [{"name": name, "status": "not measured"} for name in ROWS]
    return {"schema": 1, "build": None, "tests": None, "machine": None, "ceilings": None, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        ours = row.get("ours")
        if row["status"] != "ok" or ours is None:
            lines.append(f"{row['name']:52} {row['status']}")
            continue
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["ratios"].items())
        met = "goal met" if row["goal_met"] else "goal missed"
        lines.append(
            f"{row['name']:52} {ours['p50_ms']:9.4f} ms  p95 {ours['p95_ms']:9.4f}  {row['over_floor']:6.1f} floors  "
            f"{met}  ({ratios})"
        )
    return "\n".join(lines)


def write(path: Path, result: dict[str, Any]) -> None:
    """Save `result` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
