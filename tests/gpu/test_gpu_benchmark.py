"""The GPU benchmark where there is no GPU: it says so; its rows run on tiny inputs; its arithmetic is right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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
    assert len(saved["rows"]) == 13 and {row["status"] for row in saved["rows"]} == {"not measured"}
    assert all("ours" not in row for row in saved["rows"])
    assert gpu.table(saved["rows"]).count("not measured") == 13


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("name", ["segment-1", "segment-64", "knn-784-1-1024", "coreset", "bilinear", "peaks"])
def test_rows_on_tiny_inputs(device, name):
    """Every row's own code on the device at hand: the answer is right, each peer is timed or says why not."""
    rows = module("gpu_rows")
    bench = rows.prepare(device, small=True)
    row = rows.ROWS[name](bench)
    saved = json.loads(json.dumps(row.as_json()))
    assert saved["status"] == "ok", saved
    assert saved["ours"]["p50_ms"] > 0 and saved["over_floor"] > 0 and saved["goal_met"] in (True, False)
    assert saved["ratios"]
    assert all(isinstance(peer, dict) or peer.startswith("not measured") for peer in saved["peers"].values())
    assert "floors" in module("gpu").table([saved])


def test_a_wrong_answer_prints_no_ratio():
    rows, measure = module("gpu_rows"), module("gpu_measure")
    row = rows.Row("x", "goal", measure.Times(1.0, 2.0, 3), False, {"peer": measure.Times(9.0, 9.0, 3)}, 0.5)
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
