"""The GPU benchmark where there is no GPU: it says so; its rows run on tiny inputs; its arithmetic is right."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def module(name: str):
    """``benchmarks.NAME``, which lies beside the package, or in it once installed."""
    try:
        return importlib.import_module(f"ttt4as_fast.benchmarks.{name}")
    except ImportError:
        sys.path.insert(0, str(ROOT))
        try:
            return importlib.import_module(f"benchmarks.{name}")
        finally:
            sys.path.remove(str(ROOT))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "no CUDA device: nothing was measured"
    assert not (tmp_path / "out").exists()


def test_rows_before_any_run(tmp_path):
    gpu = module("gpu")
    assert gpu.main(["--output", str(tmp_path), "--not-measured"]) == 0
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert len(saved["rows"]) == 16 and {row["status"] for row in saved["rows"]} == {"not measured"}
    assert all("ours" not in row for row in saved["rows"])
    assert gpu.table(saved["rows"]).count("not measured") == 16
    assert gpu.succeeded(saved) and gpu.gemm_from(saved) is None


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize(
    "name",
    [
        *("segment-1", "segment-64", "knn-784-1-1024", "knn-784-9-1024", "coreset", "bilinear", "peaks"),
        *("knn-crossover", "knn-tiles", "knn-refining"),
    ],
)
def test_rows_on_tiny_inputs(device, name, tmp_path):
    """Every row's own code on the device at hand, as the command runs it: the answer is right, each peer is timed or
    says why not, and the file holds the row."""
    gpu = module("gpu")
    bench = module("gpu_bench").prepare(device, small=True)
    result = {"build": None, "tests": None, "sanitizer": None, "rows": []}
    gpu.measure(result, f"^{name}$", tmp_path / "gpu.json", time.monotonic() + 1000, bench, commit="abc")
    (saved,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert saved["status"] == "ok" and saved["row"] == name, saved
    assert saved["ours"]["p50_ms"] > 0 and saved["over_floor"] > 0
    assert saved["goal_met"] in ((None,) if name in ("knn-crossover", "knn-tiles", "knn-refining") else (True, False))
    assert saved["ratios"]
    assert all(isinstance(peer, dict) or peer.startswith("not measured") for peer in saved["peers"].values())
    assert "floors" in gpu.table([saved]) and gpu.succeeded(result)


def test_rows_are_those_that_the_tiny_inputs_cover():
    """The k-NN rows differ in sizes alone; every other row is run above."""
    names = [name for name in module("gpu_rows").ROWS if not re.fullmatch(r"knn-\d+-[19]-\d+", name)]
    proposals = ["knn-crossover", "knn-refining", "knn-tiles"]
    assert sorted(names) == ["bilinear", "coreset", *proposals, "peaks", "segment-1", "segment-64"]


def test_a_row_that_does_not_fit_is_left_out_and_a_failure_is_told(tmp_path, monkeypatch):
    gpu, rows = module("gpu"), module("gpu_rows")

    def broken(bench):
        raise RuntimeError("a typo")

    monkeypatch.setattr(rows, "ROWS", {"long": rows.Case(broken, 60), "short": rows.Case(broken, 0)})
    result = {"build": None, "tests": None, "sanitizer": None, "rows": []}
    bench = module("gpu_bench").prepare(torch.device("cpu"), small=True)
    gpu.measure(result, "", tmp_path / "gpu.json", time.monotonic() + 30, bench)
    assert [row["status"] for row in result["rows"]] == ["not measured", "failed"]
    assert result["rows"][1]["notes"]["error"] == "RuntimeError: a typo"
    assert not gpu.succeeded(result)


def test_a_row_that_takes_the_device_with_it_ends_the_process_s_rows(tmp_path, monkeypatch):
    """Every call fails after an access outside of memory, even one that asks what the device is."""
    gpu, rows = module("gpu"), module("gpu_rows")
    bench = module("gpu_bench").prepare(torch.device("cpu"), small=True)

    def broken(bench):
        def fails():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(bench.clock, "synchronize", fails)
        fails()

    monkeypatch.setattr(rows, "ROWS", {"first": rows.Case(broken, 0), "second": rows.Case(broken, 0)})
    result = {"build": None, "tests": None, "sanitizer": None, "rows": []}
    gpu.measure(result, "", tmp_path / "gpu.json", time.monotonic() + 30, bench)
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["row"] for row in saved["rows"]] == ["first"] and saved["lost"] == "first"


class TestApart:
    """Rows in other processes: a script plays the one that measures."""

    SCRIPT = (
        "import json, os, pathlib, sys, time\n"
        "path, rows = pathlib.Path(sys.argv[1]) / 'gpu.json', []\n"
        "for name in sys.argv[2:]:\n"
        "    if name == 'dies': os._exit(9)\n"
        "    if name == 'hangs': time.sleep(600)\n"
        "    rows.append({'name': name, 'row': name, 'status': 'failed' if name == 'loses' else 'ok'})\n"
        "    lost = {'lost': name} if name == 'loses' else {}\n"
        "    part = path.with_name('part'); part.write_text(json.dumps({'rows': rows, **lost})); part.replace(path)\n"
        "    if lost: sys.exit(1)\n"
    )

    def measured(self, names: list[str], monkeypatch, seconds: float = 60) -> dict[str, dict]:
        apart = module("gpu_apart")
        monkeypatch.setattr(apart, "GRACE_S", 3.0)
        monkeypatch.setattr(apart, "POLL_S", 0.02)
        rows: dict[str, dict] = {}

        def command(left, folder, _):
            return [sys.executable, "-I", "-c", self.SCRIPT, str(folder), *left]

        deadline = time.monotonic() + seconds
        apart.measure_apart(
            names,
            lambda _: 0,
            deadline,
            command,
            lambda saved: [rows.setdefault(row["row"], row) for row in saved["rows"]],
        )
        return rows

    def test_what_others_measured_is_kept(self, monkeypatch):
        names = ["a", "loses", "b", "dies", "c", "hangs", "d"]
        rows = self.measured(names, monkeypatch)
        assert list(rows) == names
        assert {name for name, row in rows.items() if row["status"] == "ok"} == set("abcd")
        assert "status 9" in rows["dies"]["notes"]["error"] and "no end" in rows["hangs"]["notes"]["error"]

    def test_out_of_time(self, monkeypatch):
        rows = self.measured(["a"], monkeypatch, seconds=0)
        assert rows["a"]["notes"] == {"reason": "out of time"}

    def test_rows_apart_gather_in_one_file(self, tmp_path, monkeypatch):
        gpu, apart = module("gpu"), module("gpu_apart")
        machine = {"device": {"capability": "9.0"}}

        def measured(names, seconds, deadline, command, found):
            line = command(names, tmp_path, 99.0)
            assert "--here" in line and line[line.index("--commit") + 1] == "abc"
            assert [
                name for name in module("gpu_rows").ROWS if re.search(line[line.index("--rows") + 1], name)
            ] == names
            found({"rows": [{"row": "peaks"}], "machine": machine, "ceilings": {"x": 1}, "machine_after": {"state": 2}})
            found({"rows": [{"row": "peaks"}, {"row": "bilinear"}]})

        monkeypatch.setattr(gpu, "measure_apart", measured)
        result = {"rows": []}
        gpu.rows_apart(result, ["peaks", "bilinear"], tmp_path / "gpu.json", 0, "abc")
        saved = json.loads((tmp_path / "gpu.json").read_text())
        assert [row["row"] for row in saved["rows"]] == ["peaks", "bilinear"] and saved["machine"] == machine
        assert apart.pattern(["a.b", "c"]) == r"^(a\.b|c)$"


def test_the_package_can_be_used_as_it_lies_in_the_checkout(monkeypatch):
    """Where the build fails: without a C++ core, in this process and in those that it starts."""
    gpu = module("gpu")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(gpu, "ROOT", ROOT)  # where this file lies, whatever is installed
    gpu.from_checkout()
    script = "import ttt4as_fast.kernels as k, ttt4as_fast.benchmarks.gpu; print(k.__file__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(sys.path[0])


def test_outcomes_of_tests_that_were_stopped():
    """Beside pytest-xdist and without; a test's name may hold spaces, and words that mean how one ended."""
    from ttt4as_fast.benchmarks.gpu import outcomes

    log = (
        "bringing up nodes...\n"
        "[gw0] [  1%] PASSED tests/gpu/test_a.py::test_shapes[(1, 2)] \n"
        "tests/gpu/test_a.py::test_waits \n"
        "[gw1] [ 50%] SKIPPED tests/gpu/test_a.py::test_two_devices \n"
        "[gw1] [ 60%] FAILED tests/gpu/test_b.py::TestB::test_PASSED[(3, 4)] \n"
        "tests/gpu/test_c.py::test_one PASSED                 [ 70%]\n"
        "tests/gpu/test_c.py::test_two SKIPPED (no device)    [ 80%]\n"
        "tests/gpu/test_c.py::test_three[a b] ERROR           [ 90%]\n"
    )
    assert outcomes(log.splitlines()) == {
        "passed": 2,
        "skipped": 2,
        "failed": 1,
        "error": 1,
        "failures": ["tests/gpu/test_b.py::TestB::test_PASSED[(3, 4)]", "tests/gpu/test_c.py::test_three[a b]"],
    }
    assert outcomes(["no output"]) == {}


def test_the_crossover_becomes_the_table_that_the_package_reads(tmp_path):
    gpu = module("gpu")
    row = {"row": "knn-crossover", "status": "ok", "notes": {"gemm_from": 12845056}}
    content = gpu.gemm_from({"rows": [row], "machine": {"device": {"capability": "9.0"}}})
    gpu.write(tmp_path / "gemm_from.json", content)
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.knn.gpu import GEMM_FROM, read_gemm_from

    assert read_gemm_from(tmp_path / "gemm_from.json") == GEMM_FROM | {(9, 0): 12845056}
    row["notes"]["gemm_from"] = None  # GEMM never wins: the architecture is not listed
    content = gpu.gemm_from({"rows": [row], "machine": {"device": {"capability": "9.0"}}})
    assert "9.0" not in content["pairs"]


@pytest.mark.usefixtures("cuda_source")
def test_profiled_calls(device):
    """What a profiler is pointed at runs."""
    bench = module("gpu_bench").prepare(device, small=True)
    found = module("gpu_profile").calls(bench)
    assert len(found) == 7
    for name in ("segment-64", "knn-25088-9", "coreset", "bilinear", "peaks"):
        assert found[name]() is not None


class TestTools:
    """compute-sanitizer and ncu: a program of that name on PATH stands in for the tool, the rest is the command's."""

    def stand_in(self, folder: Path, name: str, script: str, monkeypatch) -> None:
        tool = folder / name
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def test_clean(self, tmp_path, monkeypatch):
        tools = module("gpu_tools")
        script = 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"; echo "========= ERROR SUMMARY: 0 errors"'
        self.stand_in(tmp_path, "compute-sanitizer", script, monkeypatch)
        found = tools.sanitize(tmp_path, time.monotonic() + 100)
        assert found["status"] == "ok" and found["memcheck"]["errors"] == found["racecheck"]["errors"] == 0
        log = (tmp_path / "racecheck.log").read_text()
        assert log.startswith("1 --tool racecheck --error-exitcode 99") and tools.SANITIZED in log
        assert (ROOT / tools.SANITIZED).is_file()

    def test_errors_and_refusals(self, tmp_path, monkeypatch):
        tools, gpu = module("gpu_tools"), module("gpu")
        script = (
            'if [ $2 = memcheck ]; then echo "========= ERROR SUMMARY: 3 errors"; exit 99; fi; '
            'echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 99'
        )
        self.stand_in(tmp_path, "compute-sanitizer", script, monkeypatch)
        found = tools.sanitize(tmp_path, time.monotonic() + 100)
        assert found["status"] != "ok" and (found["memcheck"]["errors"], found["racecheck"]["errors"]) == (3, 2)
        assert not gpu.succeeded({"build": None, "tests": None, "rows": [], "sanitizer": found})
        self.stand_in(tmp_path, "compute-sanitizer", 'echo "Device not supported"; exit 1', monkeypatch)
        found = tools.sanitize(tmp_path, time.monotonic() + 100)
        assert found["memcheck"]["errors"] is None and found["memcheck"]["summary"] == "Device not supported"
        assert tools.sanitize(tmp_path, time.monotonic())["memcheck"]["status"] == "not run: out of time"

    def test_absent(self, tmp_path, monkeypatch):
        tools = module("gpu_tools")
        monkeypatch.setattr(tools, "find", lambda tool: None)
        assert tools.sanitize(tmp_path, 0)["status"].startswith("not run: compute-sanitizer")
        assert tools.profile(tmp_path, 0)["status"].startswith("not run: ncu")

    def test_a_run_past_its_time_ends_with_its_children(self, tmp_path):
        tools = module("gpu_tools")
        done = tools.run(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], tmp_path / "log", 1)
        assert done["status"] == "timed out"
        child = int((tmp_path / "log").read_text())
        status = Path(f"/proc/{child}/stat")

        def ended() -> bool:  # gone, or a zombie that nobody has collected yet
            return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

        patience = time.monotonic() + 20
        while not ended() and time.monotonic() < patience:
            time.sleep(0.05)
        assert ended()

    def test_profile(self, tmp_path, monkeypatch):
        tools = module("gpu_tools")
        report = (
            '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
            '"","","us","register/thread"\n"0","svm_solve(float const *, int)","31.5","128"\n'
        )
        (tmp_path / "report").write_text(report)
        script = f'while [ "$1" != --log-file ]; do shift; done; cp {tmp_path}/report "$2"'
        self.stand_in(tmp_path, "ncu", script, monkeypatch)
        found = tools.profile(tmp_path, time.monotonic() + 100)
        assert found["status"] == "ok" and found["launches"] == [
            {
                "kernel": "svm_solve(float const *, int)",
                "time": "31.5 us",
                "registers a thread": "128 register/thread",
            }
        ]
        assert tools.read_profile("==ERROR== no counters") == []


def test_inputs_in_turn_outgrow_the_cache_and_those_of_tests_stay_few(monkeypatch):
    measure, device = module("gpu_measure"), torch.device("cuda")
    found = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert measure.Clock(device).rotation(lambda i: i, 10 << 20) == list(range(16))
    assert measure.Clock(device, calls=1).rotation(lambda i: i, 1000) == [0, 1]


def test_calls_that_are_timed_by_turns_take_turns():
    """Two of one and two of the other, inputs in rotation; those before do not count."""
    measure, order = module("gpu_measure"), []
    clock = measure.Clock(torch.device("cpu"), calls=20, budget_s=1e6, warmup=0)
    calls = [(lambda i, name=name: order.append((name, i)), [(0,), (1,), (2,)]) for name in "ab"]
    times = clock.times_by_turns(calls)
    assert [one.calls for one in times] == [20, 20]
    assert order[2:] == [(name, i % 3) for turn in range(0, 20, 2) for name in "ab" for i in (turn, turn + 1)]


def test_a_graph_that_cannot_be_had_takes_no_other_with_it():
    def broken():
        raise RuntimeError("no such graph")

    bench, measure = module("gpu_bench"), module("gpu_measure")
    row = bench.Row("x", "goal")
    clock = measure.Clock(torch.device("cpu"), calls=1, warmup=0)
    found = bench.Bench(clock, {}).note_captured(row, {"broken": (broken, [()]), "fine": (list, [()])})
    assert found[0] != found[0] and found[1] == row.notes["fine"]["p50_ms"] > 0
    assert row.notes["broken"] == "not measured: RuntimeError: no such graph"


def test_a_wrong_answer_prints_no_ratio():
    bench, measure = module("gpu_bench"), module("gpu_measure")
    row = bench.Row("x", "goal", measure.Times(1.0, 2.0, 3), False, {"peer": measure.Times(9.0, 9.0, 3)}, 0.5)
    saved = row.as_json()
    assert saved["status"] == "wrong answer" and "ratios" not in saved and "goal_met" not in saved
    assert module("gpu").table([saved]).endswith("wrong answer")


def test_summary_and_floor():
    measure = module("gpu_measure")
    times = measure.summary([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (times.p50, times.p95, times.calls) == (3.0, 5.0, 5)
    assert measure.summary(range(1, 101)).p95 == 95
    limits = {"copy_bytes_per_s": 1e12, "bf16_flops_per_s": 1e14}
    assert measure.floor_ms(limits, 1e9) == pytest.approx(1.0)
    assert measure.floor_ms(limits, 1e9, 1e12) == pytest.approx(10.0)
    assert measure.machine()["torch"] == torch.__version__
