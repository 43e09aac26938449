"""Reading images and masks, and listing folders of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import pytest
from PIL import Image

from ttt4as_fast.images import ImageError, image_size, list_images, read_image, read_mask

from .image_files import write_image, write_mask

ORIENTATION = 0x0112


def pixel(path: Path | IO[bytes]) -> tuple[int, int, int]:
    image = read_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


# ---------------------------------------------------------------------------------------------------------------------
# read_image


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
        ("RGBA", (200, 100, 50, 51), (40, 20, 10)),
        ("LA", (200, 51), (40, 40, 40)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 128, (0, 0, 0)),
    ],
)
def test_png_modes_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (3, 2), value).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected
    with open(tmp_path / "a.png", "rb") as file:
        assert pixel(file) == expected


def test_sixteen_bits_are_scaled_by_their_full_range_and_rounded(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[:, :, 1], expected)


def test_palette_and_its_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50] + [0] * 762)
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "plain.png")).tolist() == [[[9, 8, 7], [200, 100, 50]]]
    assert np.asarray(read_image(tmp_path / "clear.png")).tolist() == [[[9, 8, 7], [0, 0, 0]]]


def test_cmyk_jpeg_is_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert pixel(tmp_path / "a.jpg") == (255, 255, 255)


def test_float_tiff_lies_in_0_1(tmp_path):
    for value, level in ((0.0, 0), (0.5, 128), (1.0, 255)):
        Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "a.tiff")
        assert pixel(tmp_path / "a.tiff") == (level, level, level)
    for bad in (1.5, -0.1, np.nan):
        Image.fromarray(np.array([[0.5, bad]], np.float32)).save(tmp_path / "b.tiff")
        with pytest.raises(ImageError, match=r"b\.tiff.*expected \[0, 1\]"):
            read_image(tmp_path / "b.tiff")


def test_integer_tiff_beyond_sixteen_bits_is_refused(tmp_path):
    for bad in (70000, -1):
        Image.fromarray(np.array([[7, bad]], np.int32)).save(tmp_path / "a.tiff")
        with pytest.raises(ImageError, match="65535"):
            read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_image_size_and_mask(tmp_path, orientation):
    upright = np.zeros((4, 6), np.uint8)
    upright[0, 0], upright[0, 5] = 250, 120
    # How a camera stores `upright` under each orientation: the inverse of what the reader must undo.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[:, :, 0], upright)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), upright > 0)
    assert image_size(tmp_path / "a.png") == (4, 6)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_truncated_file_is_an_error_with_its_path(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.6, 0.02):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert caught.value.path == path


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_no_image_absent_file_and_folder_are_image_errors(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for path, reason in (("a.png", "cannot be read"), ("absent.png", "no such file"), (".", "a folder")):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(ImageError, match=reason):
                read(tmp_path / path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_no_image_and_nobody_waits_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/null"):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(ImageError, match="not a regular file"):
                read(path)
    assert list_images(tmp_path) == [tmp_path / "a.png"]


def test_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "why")))
    assert (str(error), error.path, error.reason) == ("a.png: why", Path("a.png"), "why")


def test_one_pixel(tmp_path):
    write_image(tmp_path / "a.png", 5, (1, 1))
    assert read_image(tmp_path / "a.png").size == (1, 1)
    assert image_size(tmp_path / "a.png") == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# read_mask


@pytest.mark.parametrize("value", [1, 2, 127, 255])
def test_mask_is_whatever_is_not_zero(tmp_path, value):
    mask = read_mask(write_mask(tmp_path / "m.png", value=value))
    assert mask.dtype == bool
    assert mask.shape == (4, 6)
    assert mask.sum() == 4


def test_mask_modes(tmp_path):
    expected = np.zeros((3, 4), bool)
    expected[1, 2] = True
    grey = expected.astype(np.uint8) * 255
    palette = Image.fromarray(expected.astype(np.uint8), mode="L").convert("P")
    palette.putpalette([255, 255, 255] * 256)  # every colour is white: only the index tells
    palette.putdata(expected.astype(np.uint8).ravel().tolist())
    rgba = np.dstack([np.zeros_like(grey), grey, np.zeros_like(grey), np.full_like(grey, 255)])
    for place, image in enumerate(
        (
            Image.fromarray(grey),
            Image.fromarray(grey).convert("1"),
            palette,
            Image.fromarray(rgba),
            Image.fromarray(rgba[:, :, :3]),
            Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), mode="LA"),
            Image.fromarray(expected.astype(np.uint16) * 300),
        )
    ):
        image.save(tmp_path / f"{place}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{place}.png"), expected, err_msg=image.mode)


READS_YCBCR = int(PIL.__version__.partition(".")[0]) >= 13
YCBCR = pytest.mark.skipif(not READS_YCBCR, reason="before 13 Pillow cannot read the YCbCr TIFF that it writes")


@pytest.mark.parametrize(
    ("mode", "name"), [("CMYK", "m.tiff"), ("CMYK", "m.jpg"), pytest.param("YCbCr", "m.tiff", marks=YCBCR)]
)
def test_black_is_unmarked_in_every_colour_space(tmp_path, mode, name):
    marked = np.zeros((32, 32, 3), np.uint8)
    marked[8:24, 8:24] = 255
    Image.fromarray(marked).convert(mode).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    np.testing.assert_array_equal(read_mask(tmp_path / name), marked[:, :, 0] > 0)


def test_mask_with_nan_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "m.tiff")
    with pytest.raises(ImageError, match=r"m\.tiff.*NaN"):
        read_mask(tmp_path / "m.tiff")


def test_jpeg_mask_counts_from_128(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[9:23, 9:23] = 255
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=60)
    assert (np.asarray(Image.open(tmp_path / "m.jpg")) != 0).sum() > (mask > 0).sum()  # there is something to ignore
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), mask > 0)


def test_mask_of_another_size_than_its_image_is_refused(tmp_path):
    path = write_mask(tmp_path / "m.png")
    assert read_mask(path, (4, 6)).shape == (4, 6)
    with pytest.raises(ImageError, match=r"m\.png.*4 x 6.*6 x 4"):
        read_mask(path, (6, 4))
    with pytest.raises(ImageError, match=r"m\.png.*4 x 6.*4 x 4"):
        read_mask(path, 4)
    with pytest.raises(TypeError, match=r"size: expected \(height, width\), got 'x'"):
        read_mask(path, "x")


# ---------------------------------------------------------------------------------------------------------------------
# list_images


def test_folder_is_listed_naturally_without_hidden_files_and_sub_folders(tmp_path):
    for name in ("b10.png", "b2.PNG", "a.jpg", ".hidden.png", "sub/c.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b2.PNG", "b10.png"]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_broken_links_are_listed_and_an_image_error(tmp_path):
    write_image(tmp_path / "b.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "moved.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "d.png").symlink_to(tmp_path / "sub.png")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.png", "c.png"]
    for name, reason in (("a.png", "a link to no file"), ("c.png", "symbolic links")):
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)


def test_files_and_folders_together(tmp_path):
    write_image(tmp_path / "d" / "1.png")
    odd = tmp_path / "camera.raw8"
    odd.write_bytes(b"")
    assert [path.name for path in list_images([odd, tmp_path / "d"])] == ["camera.raw8", "1.png"]
    assert list_images(odd) == [odd]


def test_list_images_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="at least one"):
        list_images([])
    with pytest.raises(TypeError, match="images"):
        list_images(3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing"):
        list_images(tmp_path / "empty")
