"""Small files for tests to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, value: int = 100, size: tuple[int, int] = (6, 4)) -> Path:
    """An RGB image of one value; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_mask(path: Path, marked: bool = True, value: int = 255, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    mask[1:3, 2:4] = value * marked
    Image.fromarray(mask).save(path)
    return path
