"""The command in this process and in one of its own, and the pictures that it is given."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TTT4AS_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **more}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ttt4as_fast", *map(str, arguments)]


@dataclass
class Done:
    """How an invocation ended."""

    stdout: str
    stderr: str


def ttt4as(*arguments: object, code: int = 0, **environ: str) -> Done:
    """Run the command in this process and check its exit code; an exception that reaches the top fails the test."""
    from ttt4as_fast.cli import app

    with warnings.catch_warnings():  # the command replaces warnings.showwarning
        result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="ttt4as", env={"COLUMNS": "120", **environ})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stdout + result.stderr
    return Done(result.stdout, result.stderr)


Run = tuple[Path, Done]


def one_line(done: Done) -> str:
    """The only line on stderr, which starts with ``error:``."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text("utf-8").splitlines()]


def tree(folder: Path) -> dict[str, int]:
    """Files below a folder with their times of change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def texture(seed: int, side: int = 96) -> np.ndarray:
    """A grainy stripe pattern: the nominal look of these tests."""
    rng = np.random.default_rng(seed)
    stripes = 110 + 50 * np.sin((np.arange(side) + rng.integers(12)) * 2 * np.pi / 12)
    picture = stripes[None, :, None] + rng.normal(0, 6, (side, side, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def spoiled(seed: int, side: int = 96) -> np.ndarray:
    picture = texture(seed, side)
    picture[40:60, 30:56] = np.random.default_rng(seed).integers(0, 255, (20, 26, 3), dtype=np.uint8)
    return picture


def labelled(work: Path, dataset: Path, n: int) -> Path:
    """A data set with `n` test images of each kind."""
    shutil.copytree(work / "train", dataset / "train")
    truth = np.zeros((96, 96), np.uint8)
    truth[40:60, 30:56] = 255
    for kind in ("test/good", "test/noise", "ground_truth/noise"):
        (dataset / kind).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(texture(300 + i)).save(dataset / "test/good" / f"{i:03d}.png")
        Image.fromarray(spoiled(310 + i)).save(dataset / "test/noise" / f"{i:03d}.png")
        Image.fromarray(truth).save(dataset / "ground_truth/noise" / f"{i:03d}_mask.png")
    return dataset
