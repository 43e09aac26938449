"""``python -m benchmarks.gpu --output DIR``: everything that only a GPU can tell, in one command on a bare machine.

Builds and installs the package without a network, runs the tests marked ``gpu``, measures every row of `gpu_rows` in
the order of their weight, in a process of their own, runs compute-sanitizer over a short set of tests, and writes
``DIR/gpu.json`` (whole, after each step, so that a run cut short keeps what it had). Builds and tests that take longer
than planned take their time from the sanitizer, never from the rows. Needs torch with a usable CUDA device, Triton and
CuPy; peers and tools that are not installed are named as absent. Planned for less than eight minutes on one H200-class
device; what does not fit is left out and said. A second, shorter run: ``--no-build --no-tests --no-sanitizer --rows
PATTERN``.

``DIR/gemm_from.json`` is the table of `kernels.knn` with this device's crossover in it, to be committed in its place.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_apart import measure_apart
from .gpu_apart import pattern as pattern_of
from .gpu_tools import ROOT, find, profile, run, sanitize

NO_DEVICE = 2
"""Exit status without a CUDA device."""
SANITIZER_S = 80.0
"""Seconds that the rows leave for compute-sanitizer."""
START_S = 20.0
"""Seconds that the rows' process takes to start."""
NCU_S = 60.0
"""Seconds that they leave for Nsight Compute, where it is asked for."""
GEMM_FROM = ROOT / "kernels" / "knn" / "gemm_from.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        The exit status: 0, 1 (the build or a test failed, an answer was wrong, or the sanitizer found something) or 2
        (no CUDA device).
    """
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
    end = start + options.budget_s
    result: dict[str, Any] = {"schema": 1, "build": None, "tests": None, "sanitizer": None, "ncu": None, "rows": []}

    def done(part: str, found: dict[str, Any]) -> None:
        result[part] = found
        write(output / "gpu.json", result)
        print(f"{part}: {found.get('summary', found['status'])}, {time.monotonic() - start:.0f} s", flush=True)

    from .gpu_rows import ROWS

    names = [name for name in ROWS if re.search(options.rows, name)]
    planned = sum(ROWS[name].seconds for name in names) + START_S
    if not options.no_build:
        done("build", build(output / "build.log"))
        if result["build"]["status"] != "ok":
            print(tail(output / "build.log"))
            from_checkout()  # whatever is installed, it is not this checkout
    if not options.no_tests:
        done("tests", run_tests(output / "tests.log", min(240.0, max(30.0, end - planned - time.monotonic()))))
        if result["tests"]["status"] != "ok":
            print(tail(output / "tests.log"), *result["tests"]["outcomes"].get("failures", ()), sep="\n")
    spare = max(0.0, end - planned - time.monotonic())
    reserved = 0.0 if options.no_sanitizer or find("compute-sanitizer") is None else min(SANITIZER_S, spare)
    reserved += NCU_S if options.ncu else 0.0
    if options.here:
        measure(result, options.rows, output / "gpu.json", end - reserved, commit=options.commit)
    else:
        rows_apart(result, names, output / "gpu.json", end - reserved, options.commit)
    if not options.no_sanitizer:
        done("sanitizer", sanitize(output, end - (NCU_S if options.ncu else 0.0)))
    if options.ncu:
        done("ncu", profile(output, max(end, time.monotonic() + NCU_S)))
    result["seconds"] = time.monotonic() - start
    write(output / "gpu.json", result)
    print(table(result["rows"]))
    table_of_crossovers = gemm_from(result)
    if table_of_crossovers:
        write(output / "gemm_from.json", table_of_crossovers)
        print(f"knn: {table_of_crossovers['pairs']} -> {output / 'gemm_from.json'}, for {GEMM_FROM.relative_to(ROOT)}")
    return 0 if succeeded(result) else 1


def succeeded(result: dict[str, Any]) -> bool:
    """Whether nothing that ran failed; a tool that is absent or out of time is no failure."""
    wrong = any(row["status"] in ("wrong answer", "failed") for row in result["rows"])
    failed = any(part is not None and part["status"] != "ok" for part in (result["build"], result["tests"]))
    checks = [check for check in (result["sanitizer"] or {}).values() if isinstance(check, dict)]
    return not (wrong or failed or any(check.get("errors") for check in checks))


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--output", required=True, metavar="DIR", help="where gpu.json and the logs go")
    found.add_argument("--rows", metavar="PATTERN", default="", help="only rows whose name holds this expression")
    found.add_argument("--no-build", action="store_true", help="use the package that is installed")
    found.add_argument("--no-tests", action="store_true", help="measure without running the tests first")
    found.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    found.add_argument("--ncu", action="store_true", help="profile each operation once with Nsight Compute")
    found.add_argument("--here", action="store_true", help="measure in this process: losing the device costs all")
    found.add_argument("--commit", metavar="SHA", help="the commit that is measured, where this is no checkout of it")
    found.add_argument("--budget-s", type=float, default=460, metavar="S", help="all of it, in seconds")
    found.add_argument("--not-measured", action="store_true", help="write the rows without numbers; needs no GPU")
    return found


def build(log: Path) -> dict[str, Any]:
    """Install the package from this checkout, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
    done = run(command, log, timeout=240)
    importlib.invalidate_caches()  # this process looked into site-packages before
    return done


def from_checkout() -> None:
    """Let this process and those that it starts import the package as it lies here, without its C++ core."""
    package = Path(tempfile.mkdtemp()) / "ttt4as_fast"
    package.mkdir()
    for place in (*(ROOT / "ttt4as_fast").iterdir(), ROOT / "kernels", ROOT / "benchmarks"):
        (package / place.name).symlink_to(place)
    sys.path.insert(0, str(package.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))


def run_tests(log: Path, timeout: float) -> dict[str, Any]:
    """The tests marked ``gpu``, several processes at a time where pytest-xdist is here: most of it is compiling."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    done = run(command, log, timeout)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    return done | {"summary": re.sub(r"=+", "", lines[-1]).strip(), "outcomes": outcomes(lines)}


def outcomes(lines: Sequence[str]) -> dict[str, Any]:
    """How many tests ended how, and the names of those that failed, by pytest's progress: of a run that was stopped,
    too.
    """
    names = {"PASSED": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "error"}
    names |= {"XFAIL": "xfailed", "XPASS": "xpassed"}
    ends = "|".join(names)
    counts: dict[str, Any] = {}
    failures = []
    for line in lines:
        found = re.match(rf"\[gw\d+\] \[ *\d+%\] (?P<end>{ends}) (?P<test>.+)", line)  # by pytest-xdist
        found = found or re.match(rf"(?P<test>\S+::.+?) (?P<end>{ends})\b", line)
        if found is None:
            continue
        name = names[found["end"]]
        counts[name] = counts.get(name, 0) + 1
        if name in ("failed", "error"):
            failures.append(found["test"].strip())
    return counts | ({"failures": failures} if failures else {})


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log, where what failed is said."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def rows_apart(result: dict[str, Any], names: Sequence[str], path: Path, deadline: float, commit: str | None) -> None:
    """Measure the rows in a process of their own into `result`, and save it after each."""
    from .gpu_rows import ROWS

    def command(left: Sequence[str], folder: Path, seconds: float) -> list[str]:
        quick = ["--no-build", "--no-tests", "--no-sanitizer", "--here"]
        known = [] if commit is None else ["--commit", commit]
        given = ["--output", str(folder), "--rows", pattern_of(left), "--budget-s", f"{seconds:.0f}"]
        return [sys.executable, "-m", "benchmarks.gpu", *given, *quick, *known]

    def found(saved: dict[str, Any]) -> None:
        known = {row["row"] for row in result["rows"]}
        result["rows"] += [row for row in saved["rows"] if row["row"] not in known]
        for name in ("machine", "ceilings"):
            if name in saved:
                result.setdefault(name, saved[name])
        if "machine_after" in saved:
            result["machine_after"] = saved["machine_after"]
        write(path, result)

    measure_apart(names, lambda name: ROWS[name].seconds, deadline, command, found)


def measure(
    result: dict[str, Any], pattern: str, path: Path, deadline: float, bench: Any = None, commit: str | None = None
) -> None:
    """Measure the rows into `result`, and save it after each; `bench` is one for this device unless given."""
    import torch

    from .gpu_bench import prepare
    from .gpu_measure import machine
    from .gpu_rows import ROWS

    if bench is None:
        bench = prepare(torch.device("cuda", torch.cuda.current_device()))
    result |= {"machine": machine(commit), "ceilings": bench.limits}
    for name, case in ROWS.items():
        if not re.search(pattern, name):
            continue
        if time.monotonic() + case.seconds > deadline:
            late = {"name": name, "row": name, "status": "not measured", "notes": {"reason": "out of time"}}
            result["rows"].append(late)
            continue
        start = time.monotonic()
        try:
            row = case.measure(bench).as_json()
        except Exception as error:  # one row must not cost the others
            row = {"name": name, "status": "failed", "notes": {"error": f"{type(error).__name__}: {error}"[:2000]}}
        row |= {"row": name, "seconds": time.monotonic() - start}
        result["rows"].append(row)
        write(path, result)
        print(f"{name}: {row['status']}, {row['seconds']:.0f} s", row["notes"].get("error", ""), flush=True)
        try:
            bench.clock.synchronize()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            result["machine_after"] = machine(commit)["device"]
        except RuntimeError:  # an access outside of memory, say: no later call here can succeed
            result["lost"] = name
            break
    write(path, result)


def gemm_from(result: dict[str, Any]) -> dict[str, Any] | None:
    """The committed table with the crossover that was just measured; None if none was."""
    found = [row for row in result["rows"] if row.get("row") == "knn-crossover" and row["status"] == "ok"]
    device = (result.get("machine") or {}).get("device")
    if not found or not device:
        return None
    content = json.loads(GEMM_FROM.read_text(encoding="utf-8"))
    content["pairs"].pop(device["capability"], None)
    if found[0]["notes"]["gemm_from"] is not None:
        content["pairs"][device["capability"]] = found[0]["notes"]["gemm_from"]
    return content


def not_measured() -> dict[str, Any]:
    """The rows as they stand before any run: no number that no run printed."""
    from .gpu_rows import ROWS

    rows = [{"name": name, "status": "not measured"} for name in ROWS]
    parts = dict.fromkeys(("build", "tests", "sanitizer", "ncu", "machine", "ceilings"))
    return {"schema": 1, **parts, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        ours = row.get("ours")
        if row["status"] != "ok" or ours is None:
            lines.append(f"{row['name']:52} {row['status']}")
            continue
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["ratios"].items())
        met = {True: "goal met", False: "goal missed", None: "no goal"}[row["goal_met"]]
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
