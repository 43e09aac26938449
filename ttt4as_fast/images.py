"""Images and masks from disk: what is in a folder, and pixels as promised or an `ImageError` that names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from .kernels.arrays import check_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageError(ValueError):
    """An image or mask that cannot be read; `path` and `reason` say which and why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_image(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """One image as 8-bit RGB, upright.

    Orientation in the EXIF data is applied. Grey and palette images are expanded. Transparent pixels are laid over
    black, in proportion to their alpha. 16-bit grey is scaled by its full range (65535 becomes 255, so a camera that
    fills only 12 of the 16 bits gives dark images); floating-point images are taken to lie in [0, 1]. Of an animation
    or a multi-page TIFF the first frame is read.

    Parameters
    ----------
    path : path-like or binary file
        An image file that Pillow can read.

    Returns
    -------
    PIL.Image.Image
        Mode ``"RGB"``, fully decoded.

    Raises
    ------
    ImageError
        The file is absent, no image, truncated, corrupt, or holds values outside the ranges above.
    """
    return _guarded(path, as_rgb)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as `read_image` gives it.

    Raises
    ------
    ValueError
        A value outside the ranges there, or no pixel.
    """
    return _to_rgb(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def read_mask(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """One ground-truth mask: True where the file marks a defect.

    A pixel is marked if it is not zero - sets store 1, 255 or a class number. In a palette image the index counts, in a
    colour image red, green and blue, not alpha; JPEG, which smears zeros, counts from 128. EXIF orientation is applied.

    Parameters
    ----------
    path : path-like
        An image file that Pillow can read.
    size : (int, int), optional
        Height and width of the image that the mask belongs to, checked if given.

    Returns
    -------
    numpy.ndarray of bool, shape (H, W)

    Raises
    ------
    ImageError
        The file cannot be read, holds NaN, or its size is not `size`.
    """

    def convert(image: Image.Image) -> np.ndarray:
        lossy = image.format == "JPEG"
        image = ImageOps.exif_transpose(image)
        if image.mode in ("CMYK", "YCbCr"):  # in which black is not all zero
            image = image.convert("RGB")
        pixels = np.asarray(image)
        if np.isnan(pixels).any():
            raise ValueError("a mask with NaN")
        if pixels.ndim == 3:
            pixels = pixels[:, :, : pixels.shape[2] - (pixels.shape[2] in (2, 4))].max(axis=2)
        return pixels > 127 if lossy else pixels != 0

    size = None if size is None else check_size(size)
    mask = _guarded(path, convert)
    if size is not None and mask.shape != size:
        raise ImageError(
            path,
            f"the mask is {mask.shape[0]} x {mask.shape[1]} pixels, its image {size[0]} x {size[1]} (height x width)",
        )
    return mask


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image once it is upright, from its header alone where that says it.

    A PNG is decoded: its EXIF data may follow its pixels.

    Raises
    ------
    ImageError
        The file is absent or no image, its header is corrupt, or it is a PNG and truncated.
    """

    def upright(image: Image.Image) -> tuple[int, int]:
        turned = _orientation(image) in (5, 6, 7, 8)  # these swap the axes
        return (image.width, image.height) if turned else (image.height, image.width)

    return _guarded(path, upright)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 in the terms of EXIF; 1 is upright."""
    return image.getexif().get(0x0112, 1)


def list_images(
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Paths of the images that `images` names, in natural order within a folder ("2" before "10").

    Parameters
    ----------
    images : path-like or iterable of path-like
        An image file, a folder (its own images, not those of its sub-folders; hidden files are passed over), or several
        of either. A file named outright is listed whatever its suffix.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        A folder holds no images, or the iterable is empty.
    """
    if isinstance(images, (str, os.PathLike)):
        return _list_one(Path(images))
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a path or an iterable of paths, got {type(images).__name__}")
    several = []
    for path in images:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"images: expected a path or an iterable of paths, got one of {type(path).__name__}")
        several.append(Path(path))
    if not several:
        raise ValueError("images: expected at least one path, got none")
    return [path for one in several for path in _list_one(one)]


def _list_one(path: Path) -> list[Path]:
    if path.is_dir():
        found = images_in(path)
        if not found:
            raise ValueError(
                f"images: expected a folder with images ({' '.join(IMAGE_SUFFIXES)}), "
                f"got {str(path)!r}, which holds {contents(path)}"
            )
        return found
    if not path.exists():
        raise FileNotFoundError(f"images: no such file or folder: {str(path)!r}")
    return [path]


def natural_key(name: str | Path) -> tuple[Any, ...]:
    """Sort key under which numbers within names count as numbers: "part2" before "part10"."""
    text = name.name if isinstance(name, Path) else name
    # re.split with a group puts the numbers at the odd places: like is compared with like. The text itself breaks ties.
    parts = re.split(r"([0-9]+)", text.lower())
    return (*(int(part) if place % 2 else part for place, part in enumerate(parts)), text)


def _guarded(source: str | os.PathLike[str] | IO[bytes], convert: Callable[[Image.Image], Any]) -> Any:
    """`convert` applied to the opened image, with every failure as ImageError."""
    path = source if isinstance(source, (str, os.PathLike)) else "<stream>"
    if os.path.isdir(path):
        raise ImageError(path, "a folder, not an image")
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would be to wait for its writer
        raise ImageError(path, "not a regular file")
    try:
        # By its name: a Path Pillow 10.0 resolves, which raises RuntimeError for links in a circle.
        with Image.open(os.fspath(source) if isinstance(source, os.PathLike) else source) as image:
            return convert(image)
    except FileNotFoundError:
        raise ImageError(path, "a link to no file" if os.path.islink(path) else "no such file") from None
    except MemoryError:
        raise
    # Pillow's readers raise whatever their parsing meets in a damaged file: OSError, SyntaxError, struct.error,
    # EOFError, zlib.error, DecompressionBombError. All of them mean the same to the caller.
    except Exception as error:
        raise ImageError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"images: expected at least one pixel, got {image.width} x {image.height} (width x height)")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"images: integer values in [{pixels.min()}, {pixels.max()}], expected [0, 65535]")
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN fails too
            raise ValueError(f"images: floating-point values in [{values.min():g}, {values.max():g}], expected [0, 1]")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    rgb = image.convert("RGB")
    rgb.load()
    return rgb


def images_in(folder: Path) -> list[Path]:
    """What a folder holds under the name of an image, in natural order; none if the folder does not exist.

    A broken link is listed too, so that whoever reads it reports it; left out here, it would go unnoticed.
    """
    if not folder.is_dir():
        return []
    found = (
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    return sorted((path for path in found if not path.is_dir()), key=natural_key)


def contents(folder: Path) -> str:
    """What a folder holds, in a few words for an error message."""
    names = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir(), key=natural_key)]
    return shorten(names) if names else "nothing"


def shorten(names: list[str], limit: int = 8) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
