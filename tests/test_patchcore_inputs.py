"""What PatchCore takes as images and options, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttt4as_fast.patchcore import PatchCore

from .small_patchcore import CROP, assert_close, assert_equal, defective, fitted, small, textures, write, write_all


@pytest.fixture(scope="module")
def model() -> PatchCore:
    return fitted()


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return defective()


@pytest.fixture
def folder(tmp_path: Path, queries: torch.Tensor) -> Path:
    return write_all(tmp_path / "images", queries)


@pytest.mark.parametrize("kind", ["turned", "transparent", "sixteen bits", "palette"])
def test_an_open_image_is_its_file(model, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(4)
    pixels, options = rng.integers(0, 255, (70, 90, 3), np.uint8), {}
    image = Image.fromarray(pixels)
    if kind == "turned":
        exif = image.getexif()
        exif[0x0112] = 6
        options = {"exif": exif}
    elif kind == "transparent":
        image.putalpha(Image.fromarray(pixels[:, :, 0]))
    elif kind == "sixteen bits":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    else:
        image = image.convert("P")
    path = tmp_path / "a.png"
    image.save(path, **options)
    assert_equal(model.predict([path]), model.predict([Image.open(path)]))


def test_files_folders_and_pictures_are_one(model, folder):
    paths = [folder / f"{i}.png" for i in range(5)]
    expected = model.predict(folder)
    assert isinstance(expected.anomaly_map, np.ndarray) and expected.anomaly_map.dtype == np.float32
    assert expected.pred_score.shape == (5,) and expected.pred_score.dtype == np.float32
    assert_equal(expected, model.predict(paths))
    assert_equal(expected, model.predict([str(path) for path in paths], batch_size=2))
    assert_equal(expected, model.predict(iter(paths)))
    kept = model.predict(paths, keep_on_device=True)  # of no consequence on a CPU
    assert isinstance(kept.features, np.ndarray)
    assert_equal(expected, kept)
    assert_equal(expected, model.predict([Image.open(path) for path in paths]))
    assert_equal(expected, model.predict(paths[0]), slice(0, 1))
    assert_equal(expected, model.predict(Image.open(paths[0])), slice(0, 1))


def test_file_and_tensor_agree(model, folder, queries):
    as_tensor, as_file = model.predict(queries), model.predict(folder)
    assert_close(as_tensor, as_file, 1e-6)  # these pixels are multiples of 1/255 and need no resizing
    big = textures(1, 7, side=150)
    pixels = [model.preprocessing.prepare(x) for x in (big, [write(folder / "big.png", big[0])])]
    assert pixels[0].shape == pixels[1].shape == (1, 3, CROP, CROP)
    assert (pixels[0] - pixels[1]).abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits after each axis


def test_grey_alpha_16_bit_and_palette(model, queries, tmp_path):
    rgb = Image.open(write(tmp_path / "rgb.png", queries[0]))
    grey = rgb.convert("L")
    grey.save(tmp_path / "grey.png")
    rgb.convert("RGBA").save(tmp_path / "rgba.png")
    grey.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    found = model.predict([tmp_path / f"{name}.png" for name in ("rgb", "grey", "rgba", "palette", "deep")])
    for i in range(1, 5):
        np.testing.assert_array_equal(found.anomaly_map[i], found.anomaly_map[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (640, 480)])
def test_images_of_any_size(model, tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = model.predict(tmp_path / "x.png")
    assert found.anomaly_map.shape == (1, CROP, CROP) and np.isfinite(found.anomaly_map).all()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert model.predict(tensor).anomaly_map.shape == (1, CROP, CROP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model, queries, dtype):
    given = queries[:1].to(dtype)
    assert_equal(model.predict(given), model.predict(given.float()))
    assert model.predict(given).anomaly_map.dtype == torch.float32


def test_memory_layouts(model, queries):
    expected = model.predict(queries)
    assert_equal(expected, model.predict(queries.contiguous(memory_format=torch.channels_last)))
    assert_equal(expected, model.predict(queries.numpy()))
    frozen = queries.numpy().copy()[::-1]
    frozen.flags.writeable = False
    assert_equal(expected, model.predict(frozen), [4, 3, 2, 1, 0])
    assert isinstance(model.predict(frozen).features, np.ndarray)
    assert isinstance(expected.features, torch.Tensor) and not expected.features.is_inference()


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"images: expected 4 dimensions, got shape \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"images: expected shape \(N, 3, H, W\), got \(1, 1, 64, 64\)"),
        (torch.zeros(1, 64, 64, 3), ValueError, r"images: expected shape \(N, 3, H, W\)"),
        (torch.zeros(0, 3, 64, 64), ValueError, r"images: expected no empty axis, got shape \(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 0, 64), ValueError, "images: expected no empty axis"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            TypeError,
            "got uint8; divide 8-bit images by 255, or give a frame",
        ),
        (np.zeros((1, 3, 64, 64), np.int64), TypeError, "got int64; divide 8-bit images by 255"),
        (np.zeros((1, 3, 64, 64), np.complex64), TypeError, "images: .*got complex64"),
        (np.full((1, 3, 64, 64), "x"), TypeError, "images: expected dtype"),
        (torch.full((1, 3, 64, 64), 255.0), ValueError, r"images: expected values in \[0, 1\], got 255 to 255"),
        (torch.full((1, 3, 64, 64), -0.1), ValueError, r"images: expected values in \[0, 1\], got -0.1"),
        (torch.full((1, 3, 64, 64), float("nan")), ValueError, r"images: expected values in \[0, 1\], got nan"),
        (torch.full((1, 3, 64, 64), float("inf")), ValueError, r"images: expected values in \[0, 1\], got inf"),
        ([], ValueError, "images: expected at least one path, got none"),
        (3, TypeError, "images: expected a path or an iterable of paths, got int"),
        ("/nowhere/at/all.png", FileNotFoundError, "images: no such file or folder"),
        ([Image.new("RGB", (8, 8)), "x.png"], TypeError, "expected PIL images only or paths only, got str too"),
        ([torch.zeros(3, 64, 64)], TypeError, "expected a path or an iterable of paths, got one of Tensor"),
        (Image.fromarray(np.full((8, 8), 7, np.float32)), ValueError, r"images: floating-point values in \[7, 7\]"),
        (Image.new("RGB", (0, 5)), ValueError, "images: expected at least one pixel, got 0 x 5"),
        (Image.new("F", (5, 0)), ValueError, "images: expected at least one pixel, got 5 x 0"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "calibrate", "predict"])
def test_wrong_images(model, images, error, message, method):
    target = small() if method == "fit" else model
    with pytest.raises(error, match=message):
        getattr(target, method)(images)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_open_image_of_a_truncated_file(model, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Image.open(path) as image, pytest.raises(ValueError, match="images: expected PIL images that can be decoded"):
        model.predict(image)


def test_one_bad_value_among_many(model, queries):
    broken = queries.clone()
    broken[4, 2, 71, 71] = float("nan")
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got nan"):
        model.predict(broken, batch_size=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "vgg"}, ValueError, "backbone: expected one of 'efficientnet_lite0'"),
        ({"coreset_ratio": 0}, ValueError, r"coreset_ratio: expected a number in \(0, 1\], got 0"),
        ({"coreset_ratio": 1.5}, ValueError, "coreset_ratio"),
        ({"coreset_ratio": "all"}, TypeError, "coreset_ratio"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors: expected an integer >= 1, got 0"),
        ({"image_size": 7}, ValueError, "image_size"),
        ({"image_size": 100, "crop_size": 101}, ValueError, r"crop_size: expected an integer in \[8, 100\], got 101"),
        ({"crop_size": 64.0}, TypeError, "crop_size"),
        ({"blur_sigma": -1}, ValueError, "blur_sigma"),
        ({"blur_sigma": float("nan")}, ValueError, "blur_sigma"),
        ({"random_state": -1}, ValueError, "random_state"),
        ({"random_state": None}, TypeError, "random_state"),
        ({"backend": "magic"}, ValueError, "backend: expected one of 'auto', .*got 'magic'"),
        ({"device": "gpu"}, ValueError, "device"),
        ({"standardize": "yes"}, TypeError, "standardize: expected a bool, got 'yes'"),
        ({"max_patches": 0}, ValueError, "max_patches"),
        (
            {"backbone": "dino_vitb8", "image_size": 100, "crop_size": 100},
            ValueError,
            "crop_size: expected multiples of 8",
        ),
        ({"layers": ["layer2"]}, ValueError, "layers: expected names among .*got 'layer2'"),
        ({"backbone": "dino_vits8", "layers": "blocks.1"}, TypeError, "layers: expected a sequence of names"),
        ({"backbone": "dinov2_vits14", "crop_size": 222}, ValueError, "crop_size: expected multiples of 14"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        PatchCore(**{"device": "cpu", **options})


def test_wrong_rates(model):
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        model.predict(textures(1, 0), batch_size=0)
    for call in (small().fit, model.calibrate, model.predict):
        with pytest.raises(TypeError, match=r"progress: expected a function of \(stage, done, total\), got 3"):
            call(textures(1, 0), progress=3)
    with pytest.raises(TypeError, match="keep_on_device: expected a bool, got 1"):
        model.predict(textures(1, 0), keep_on_device=1)
    with pytest.raises(TypeError, match="extrapolate: expected a bool, got 'no'"):
        model.calibrate(textures(1, 0), extrapolate="no")
    with pytest.raises(ValueError, match="false_alarm_rate"):
        model.calibrate(textures(1, 0), false_alarm_rate=1.5)
