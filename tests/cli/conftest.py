"""A model that the command fitted, and what it predicted with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .command import Run, spoiled, texture, ttt4as


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, a model fitted on them through the command, and test images of every kind."""
    folder = tmp_path_factory.mktemp("cli work") / "größe 1"
    for name in ("train/good", "one", "two [b]"):
        (folder / name).mkdir(parents=True)
    for i in range(16):
        Image.fromarray(texture(i)).save(folder / "train/good" / f"{i}.png")
    Image.fromarray(texture(100)).save(folder / "one" / "good.png")
    Image.fromarray(spoiled(101)).save(folder / "one" / "bad ü.png")
    Image.fromarray(spoiled(102)[..., 0]).save(folder / "one" / "grey.png")
    Image.fromarray(np.dstack([spoiled(103), np.full((96, 96), 255, np.uint8)])).save(folder / "one" / "rgba.png")
    Image.fromarray(spoiled(104)[:, :80]).resize((250, 301)).save(folder / "one" / "large.jpg", quality=95)
    Image.fromarray(spoiled(105)).save(folder / "two [b]" / "good.png")
    whole = (folder / "one" / "good.png").read_bytes()
    (folder / "one" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "two [b]" / "link.png").symlink_to("moved.png")
    (folder / "one" / "notes.txt").write_text("no image")
    done = ttt4as(
        "fit", folder, "--model", folder / "m.safetensors", "--image-size", 96, "--crop-size", 80, "--seed", 3
    )
    assert "13 images to train on, 3 to validate, 0 skipped" in done.stdout
    return folder


@pytest.fixture(scope="session")
def predicted(work: Path) -> Run:
    done = ttt4as("predict", work / "m.safetensors", work / "one", work / "two [b]", "-o", work / "out", code=1)
    return work / "out", done
