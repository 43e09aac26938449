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
ELSEWHERE = {"anomalib_patchcore.py", "serve_client.py"}  # tests/test_anomalib.py; below


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


def test_client_without_a_service(tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    done = run(tmp_path, "serve_client.py", "x.png", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr
