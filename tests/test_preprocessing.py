"""Images and masks to the model's crop, and back to the pixels of the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttt4as_fast import PatchCore
from ttt4as_fast.preprocessing import Preprocessing


@pytest.mark.parametrize("shape", [(1, 1), (31, 97), (72, 72), (320, 320), (103, 632)])
@pytest.mark.parametrize("sizes", [(72, 64), (256, 224), (64, 64), (65, 64)])
def test_mask_goes_the_way_of_the_image(shape, sizes):
    geometry = Preprocessing(*sizes)
    mask = np.random.default_rng(0).random(shape) < 0.5
    resized = Image.fromarray(mask.astype(np.uint8)).resize((sizes[0], sizes[0]), Image.Resampling.NEAREST)
    cut = (sizes[0] - sizes[1]) // 2
    expected = np.asarray(resized)[cut : cut + sizes[1], cut : cut + sizes[1]] > 0
    found = geometry.transform_mask(mask)
    # A centre on the edge between two pixels has no nearest one: Pillow's rounding errors choose.
    clear = [(2 * (np.arange(sizes[1]) + cut) + 1) * n % (2 * sizes[0]) != 0 for n in shape]
    assert all(side.mean() > 0.5 for side in clear)
    np.testing.assert_array_equal(found[np.ix_(*clear)], expected[np.ix_(*clear)])
    np.testing.assert_array_equal(geometry.transform_mask(torch.from_numpy(mask)), found)


def test_without_scaling_the_way_back_is_a_shift():
    geometry = Preprocessing(256, 224)
    rng = np.random.default_rng(0)
    mask, psi = rng.random((224, 224)) > 0.5, rng.random((224, 224), dtype=np.float32)
    placed = geometry.inverse_transform_mask(mask, (256, 256))
    np.testing.assert_array_equal(placed[16:240, 16:240], mask)
    assert placed.sum() == mask.sum()
    full = geometry.inverse_transform_map(psi, (256, 256))
    np.testing.assert_allclose(full[16:240, 16:240], psi, rtol=1e-6)
    assert np.isnan(full).sum() == 256 * 256 - 224 * 224
    np.testing.assert_array_equal(geometry.transform_mask(placed), mask)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((300, 500), (256, 224)),
        ((97, 640), (64, 57)),
        ((1, 1), (32, 28)),
        ((3, 1000), (224, 224)),
        ((37, 41), (256, 128)),
        ((2, 2), (64, 8)),
    ],
)
def test_a_ramp_comes_back_as_the_same_ramp(size, sizes):
    geometry = Preprocessing(*sizes)
    image_size, crop_size = sizes
    at = (np.arange(crop_size) + 0.5 + geometry.offset) / image_size  # position in the image, of 1
    ramp = (3 * at[:, None] + 5 * at[None, :]).astype(np.float32)
    full = geometry.inverse_transform_map(ramp, size)
    assert full.shape == size and full.dtype == np.float32
    rows, columns = ((np.arange(n) + 0.5) / n for n in size)
    expected = 3 * rows[:, None] + 5 * columns[None, :]
    seen = np.isfinite(full)
    # At the border the map is clamped, not continued: half a crop pixel at most.
    np.testing.assert_allclose(full[seen], expected[seen], atol=(3 + 5) * 0.5 / image_size + 1e-5)
    covered = geometry.inverse_transform_mask(np.ones((crop_size, crop_size), bool), size)
    np.testing.assert_array_equal(covered, seen)
    inside = (np.abs(rows - 0.5) < crop_size / image_size / 2 - 1 / image_size)[:, None] & (
        np.abs(columns - 0.5) < crop_size / image_size / 2 - 1 / image_size
    )
    assert seen[inside].all()
    for values in (torch.from_numpy(ramp), ramp.astype(np.float64)):
        np.testing.assert_array_equal(geometry.inverse_transform_map(values, size), full)


def test_the_model_has_the_same_geometry():
    model = PatchCore(image_size=72, crop_size=64, device="cpu")
    rng = np.random.default_rng(0)
    mask, psi = rng.random((64, 64)) > 0.5, rng.random((64, 64), dtype=np.float32)
    for size in ((100, 90), (64, 200)):
        placed = model.inverse_transform_mask(mask, size)
        np.testing.assert_array_equal(placed, model.preprocessing.inverse_transform_mask(mask, size))
        np.testing.assert_array_equal(model.transform_mask(placed), model.preprocessing.transform_mask(placed))
        np.testing.assert_array_equal(
            model.inverse_transform_map(psi, size), model.preprocessing.inverse_transform_map(psi, size)
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.transform_mask(np.zeros((4, 4))), TypeError, "mask: expected dtype bool, got float64"),
        (lambda g: g.transform_mask(np.zeros((4, 4, 1), bool)), ValueError, r"mask: expected shape \(H, W\), got"),
        (lambda g: g.transform_mask(np.zeros((0, 4), bool)), ValueError, r"mask: expected shape \(H, W\), got"),
        (
            lambda g: g.inverse_transform_mask(np.zeros((64, 63), bool), (9, 9)),
            ValueError,
            r"mask: expected shape \(64, 64\), got \(64, 63\)",
        ),
        (lambda g: g.inverse_transform_mask(np.zeros((64, 64)), (9, 9)), TypeError, "mask: expected dtype bool"),
        (
            lambda g: g.inverse_transform_map(np.zeros((1, 64)), (9, 9)),
            ValueError,
            r"anomaly_map: expected shape \(64, 64\), got \(1, 64\)",
        ),
        (lambda g: g.inverse_transform_map(np.zeros((64, 64)), (9,)), TypeError, r"size: expected \(height, width\)"),
        (lambda g: g.inverse_transform_mask(np.zeros((64, 64), bool), (0, 9)), ValueError, r"size\[0\]: expected"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(Preprocessing(72, 64))
