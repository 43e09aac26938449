"""Every example in Python runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "sklearn_linear_svc.py": ["ttt4as_fast", "scikit-learn", "relative duality gap"],
    "torch_module.py": ["compiled agrees: True, exported agrees: True"],
    "faiss_index.py": ["read back, the same neighbours: True"],
    "streaming.py": ["20 frames at 20 a second, 20 with a mask, 0 dropped", "p99"],
}
OPTIONS = {"streaming.py": ["--frames", "20", "--rate", "20", "--queue", "20"]}
ELSEWHERE = {"anomalib_patchcore.py", "serve_client.py"}  # below; the client of a service in tests/test_serve.py too


def run(cwd: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *ELSEWHERE}


@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    done = run(tmp_path, name, *OPTIONS.get(name, []))
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout


def test_anomalib_example(tmp_path):
    """The same AUROC beside anomalib's own PatchCore, and a picture of the masks."""
    pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'ttt4as_fast[anomalib]'")
    done = run(tmp_path, "anomalib_patchcore.py", "--side", "64", "--threads", "1", "--output", "masks.png")
    assert done.returncode == 0, done.stderr
    rows = {line[:44].strip(): line[44:].split() for line in done.stdout.splitlines()}
    for metric in ("image_AUROC", "pixel_AUROC"):
        stock, *ours = rows[f"anomalib's {metric}"]
        assert ours == [stock, stock] and float(stock) > 0.6
    assert len(rows["mean F1 of the masks of defective images"]) == 3
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_client_without_a_service(tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    done = run(tmp_path, "serve_client.py", "x.png", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr
