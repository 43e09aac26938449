"""What the tests of the integrations are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttt4as_fast import demo

SIDE = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data set in anomalib's folder layout: crops of a photograph, some with parts of another blended in."""
    root = tmp_path_factory.mktemp("brick")
    crops = {
        area: demo.texture_crops("brick", area, n, SIDE, 0)
        for area, n in (("train", 12), ("test", 5), ("validation", 5))
    }
    defective, masks = demo.make_defects(crops["test"], [demo.load_texture("grass")], size=(0.05, 0.1))
    content = {"good": crops["train"], "good_test": crops["validation"], "bad": defective, "masks": 255 * masks}
    for name, images in content.items():
        (root / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
