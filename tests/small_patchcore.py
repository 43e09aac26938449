"""A PatchCore small enough for tests, and crops of a photograph to fit it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ttt4as_fast.patchcore import PatchCore

SIZE, CROP = 72, 64


def textures(n: int, seed: int, side: int = SIZE) -> torch.Tensor:
    """Crops of a photograph of bricks: (n, 3, side, side) in [0, 1]."""
    from skimage import data

    photo = data.brick()
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 512 - side, (n, 2))
    grey = np.stack([photo[row : row + side, column : column + side] for row, column in corners])
    return torch.from_numpy(grey).float().div(255)[:, None].repeat(1, 3, 1, 1)


def small(**options) -> PatchCore:
    return PatchCore(**{"image_size": SIZE, "crop_size": CROP, "device": "cpu", **options})


def fitted() -> PatchCore:
    return small().fit(textures(8, 0)).calibrate(textures(5, 1))


def defective() -> torch.Tensor:
    """Five crops, a square of the first turned to its negative."""
    x = textures(5, 2)
    x[0, :, 20:40, 20:40] = 1 - x[0, :, 20:40, 20:40]
    return x


def write(path: Path, image: torch.Tensor) -> Path:
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
    return path


def write_all(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        write(folder / f"{i}.png", image)
    return folder


def arrays(prediction) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x) for x in (prediction.anomaly_map, prediction.pred_score, prediction.features))


def assert_equal(one, other, order=slice(None)) -> None:
    for x, y in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(x[order], y)


def assert_close(one, other, tolerance: float) -> None:
    for x, y in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max())


def resnet(folder: Path, seed: int) -> Path:
    import timm

    torch.manual_seed(seed)
    path = folder / f"resnet18-{seed}.pth"
    torch.save(timm.create_model("resnet18", pretrained=False, num_classes=0).state_dict(), path)
    return path
