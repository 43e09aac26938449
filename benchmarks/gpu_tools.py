"""What NVIDIA's tools say of the kernels: compute-sanitizer over a few tests, Nsight Compute over the rows' calls.

Neither is part of Python: each is looked for on PATH, in the CUDA toolkit and in pip's nvidia packages, and where it is
absent the result says so.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "tests/gpu/test_gpu_sanitize.py"
"""Every kernel once, on sizes that leave blocks partly empty."""
CHECK_S = 10
"""Seconds without which a check is not begun; it takes about as many on an H200."""
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "device memory moved",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "device memory, share of its peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, share of their peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active, share of the most",
    "launch__registers_per_thread": "registers a thread",
}
"""Nsight Compute's names -> ours."""
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard).*")


def find(tool: str) -> str | None:
    """The path of ``compute-sanitizer`` or ``ncu``; None where there is none."""
    found = shutil.which(tool)
    if found:
        return found
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path("/usr/local/cuda"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    spec = importlib.util.find_spec("nvidia")
    folders += [Path(place) / "cu13" for place in (spec.submodule_search_locations or [] if spec else [])]
    for folder in folders:
        for place in (folder / "bin" / tool, folder / "compute-sanitizer" / tool, folder / tool):
            if place.is_file() and os.access(place, os.X_OK):
                return str(place)
    return None


def run(command: list[str], log: Path, timeout: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `command` from the checkout into `log`; past `timeout` seconds it ends, with all that it started."""
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(timeout, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    status = "ok" if code == 0 else ("timed out" if code is None else f"exit status {code}")
    return {"status": status, "seconds": time.monotonic() - start, "command": plain(command)}


def plain(command: list[str]) -> str:
    """A command as one would type it in the checkout: programs by their names, without the places of one machine."""
    names = {sys.executable: "python", str(ROOT): "."}
    first, *rest = (names.get(part, part) for part in command)
    return " ".join((Path(first).name, *rest))


def sanitize(folder: Path, deadline: float) -> dict[str, Any]:
    """memcheck and racecheck over `SANITIZED`: for each its status and how many errors or hazards it counted.

    Tensors get an allocation each, so that a read past one is a read past an allocation.
    """
    tool = find("compute-sanitizer")
    if tool is None:
        return {"status": "not run: compute-sanitizer is neither on PATH nor in a CUDA toolkit"}
    tests = [sys.executable, "-m", "pytest", SANITIZED, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    checks: dict[str, Any] = {}
    for share, check in ((0.5, "memcheck"), (1.0, "racecheck")):
        left = share * (deadline - time.monotonic())
        if left < CHECK_S:
            checks[check] = {"status": "not run: out of time"}
            continue
        log = folder / f"{check}.log"
        # torch and CuPy ask the driver for things that need not be there, and take no for an answer: no error of ours.
        quiet = ["--report-api-errors", "no"] if check == "memcheck" else []
        command = [tool, "--tool", check, *quiet, "--error-exitcode", "99", *tests]
        checks[check] = run(command, log, left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        checks[check] |= read_summary(log.read_text("utf-8", errors="replace"))
    clean = all(check["status"] == "ok" and check.get("errors") == 0 for check in checks.values())
    return {"status": "ok" if clean else "see the checks", "tool": Path(tool).name, **checks}


def read_summary(log: str) -> dict[str, Any]:
    """Errors or hazards that a log's last summary counts, and that line; None where the tool wrote none."""
    found = list(_SUMMARY.finditer(log))
    if not found:
        return {"errors": None, "summary": log.strip().splitlines()[-1][:300] if log.strip() else "no output"}
    return {"errors": int(found[-1].group(1) or found[-1].group(2)), "summary": found[-1].group(0).strip()}


def profile(folder: Path, deadline: float) -> dict[str, Any]:
    """Nsight Compute over the calls of `gpu_profile`: the metrics of each launch, in their order.

    The device's clocks are left as they are.
    """
    tool = find("ncu")
    if tool is None:
        return {"status": "not run: ncu is neither on PATH nor in a CUDA toolkit"}
    report = folder / "ncu.csv"
    report.unlink(missing_ok=True)
    command = [
        *(tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"),
        *("--metrics", ",".join(METRICS), "--log-file", str(report)),
        *(sys.executable, "-m", "benchmarks.gpu_profile"),
    ]
    done = run(command, folder / "ncu.log", deadline - time.monotonic())
    text = report.read_text("utf-8", errors="replace") if report.exists() else ""
    launches = read_profile(text)
    if done["status"] == "ok" and not launches:
        done["status"] = f"no launch was profiled: {text.strip()[-300:]}"
    return done | {"launches": launches}


def read_profile(text: str) -> list[dict[str, str]]:
    """Launches of a CSV report: kernel, and each metric with its unit."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    heads, units, *rows = csv.reader(lines)
    launches = []
    for row in rows:
        values, unit = dict(zip(heads, row, strict=False)), dict(zip(heads, units, strict=False))
        launch = {"kernel": values.get("Kernel Name", "")[:80]}
        for name, meaning in METRICS.items():
            if name in values:
                launch[meaning] = f"{values[name]} {unit[name]}".strip()
        launches.append(launch)
    return launches
