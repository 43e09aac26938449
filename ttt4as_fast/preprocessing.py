"""From images of any form and size to the square crops that a detector sees, and masks with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .images import as_rgb, list_images, read_image
from .kernels.arrays import as_float_array, check_dense, check_int, check_size, dtype_name, is_tensor, to_numpy

if TYPE_CHECKING:
    from .kernels.arrays import Array

_SLACK = 1e-6  # rounding that values in [0, 1] may have picked up on their way here


@dataclass(frozen=True)
class Preprocessing:
    """Resize to a square, then crop its centre. Files and tensors of any size go the same way.

    Files are resized by Pillow in 8 bits, tensors by torch in float32; both bilinear and antialiased, so that they
    differ by rounding to 1/255.

    Parameters
    ----------
    image_size : int
        Side of the square, 8 to 16384 pixels.
    crop_size : int
        Side of the crop, 8 to `image_size` pixels.

    Raises
    ------
    ValueError, TypeError
        A size out of range.
    """

    image_size: int
    crop_size: int

    def __post_init__(self) -> None:
        size = check_int(self.image_size, "image_size", 8, 16384)
        object.__setattr__(self, "image_size", size)
        object.__setattr__(self, "crop_size", check_int(self.crop_size, "crop_size", 8, size))

    @property
    def offset(self) -> int:
        """First row and column of the crop in the square."""
        return (self.image_size - self.crop_size) // 2

    def transform(self, image: Image.Image) -> np.ndarray:
        """An RGB image as its crop: (crop_size, crop_size, 3) uint8."""
        end = self.offset + self.crop_size
        return np.array(self.square(image).crop((self.offset, self.offset, end, end)))

    def square(self, image: Image.Image) -> Image.Image:
        """An image resized to the square that the crop is cut from; one of that size is as it was."""
        return image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)

    def prepare(self, batch: list[Any] | torch.Tensor) -> torch.Tensor:
        """Paths, PIL images or a tensor (N, 3, H, W) in [0, 1] as a float32 tensor (N, 3, crop_size, crop_size).

        A PIL image is taken as its file would be: upright, transparency over black, see `read_image`.

        Raises
        ------
        ValueError
            A value is not in [0, 1], or a PIL image's outside the ranges of `read_image`, or its file is damaged.
        ImageError
            A file cannot be read as an image.
        """
        if not isinstance(batch, torch.Tensor):
            opened = (_decoded(image) if isinstance(image, Image.Image) else read_image(image) for image in batch)
            return as_batch([self.transform(image) for image in opened])
        low, high = (float(x) for x in torch.aminmax(batch))
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # written so that NaN fails too
            raise ValueError(f"images: expected values in [0, 1], got {low:g} to {high:g}")
        batch = batch.float()
        if tuple(batch.shape[2:]) != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            # One by one: the result for an image must not depend on its batch.
            batch = torch.cat([F.interpolate(x[None], size, mode="bilinear", antialias=True) for x in batch])
        inside = slice(self.offset, self.offset + self.crop_size)
        return batch[:, :, inside, inside]

    def transform_mask(self, mask: Any) -> np.ndarray:
        """A mask of an image on the grid of its anomaly map, nearest pixel.

        Parameters
        ----------
        mask : bool array or tensor, (H, W)

        Returns
        -------
        numpy.ndarray, (crop_size, crop_size) bool

        Raises
        ------
        ValueError, TypeError
            Wrong rank or dtype, or an empty axis.
        """
        pixels = _as_mask(mask)
        # Pixel i of the crop has its centre at (i + offset + 1/2) / image_size of the image; integers keep it exact.
        centres = 2 * (np.arange(self.crop_size) + self.offset) + 1
        rows, columns = (centres * n // (2 * self.image_size) for n in pixels.shape)
        return pixels[np.ix_(rows, columns)]

    def inverse_transform_mask(self, mask: Any, size: tuple[int, int]) -> np.ndarray:
        """A mask on the grid of an anomaly map in the pixels of its image: nearest pixel, False outside the crop.

        Parameters
        ----------
        mask : bool array or tensor, (crop_size, crop_size)
        size : (int, int)
            Height and width of the image, before it was resized.

        Returns
        -------
        numpy.ndarray, (height, width) bool

        Raises
        ------
        ValueError, TypeError
            Wrong shape or dtype, or a size that is none.
        """
        height, width = check_size(size)
        pixels = _as_mask(mask, (self.crop_size, self.crop_size))
        (rows, y), (columns, x) = self._seen(height), self._seen(width)
        placed = np.zeros((height, width), dtype=bool)
        placed[rows, columns] = pixels[np.ix_(y.astype(int), x.astype(int))]
        return placed

    def inverse_transform_map(self, anomaly_map: Any, size: tuple[int, int]) -> np.ndarray:
        """An anomaly map in the pixels of its image: bilinear, NaN outside the crop.

        Parameters
        ----------
        anomaly_map : array or tensor of floats, (crop_size, crop_size)
        size : (int, int)
            Height and width of the image, before it was resized.

        Returns
        -------
        numpy.ndarray, (height, width) float32

        Raises
        ------
        ValueError, TypeError
            Wrong shape or dtype, or a size that is none.
        """
        height, width = check_size(size)
        values = to_numpy(as_float_array(anomaly_map, "anomaly_map", (2,))).astype(np.float32, copy=False)
        if values.shape != (self.crop_size, self.crop_size):
            raise ValueError(f"anomaly_map: expected shape {(self.crop_size, self.crop_size)}, got {values.shape}")
        (rows, y), (columns, x) = self._seen(height), self._seen(width)
        for axis, centres in enumerate((y, x)):
            at = np.clip(centres - 0.5, 0, self.crop_size - 1)
            below = at.astype(int)
            above = np.minimum(below + 1, self.crop_size - 1)
            share = np.expand_dims((at - below).astype(np.float32), 1 - axis)
            values = (1 - share) * values.take(below, axis) + share * values.take(above, axis)
        placed = np.full((height, width), np.nan, dtype=np.float32)
        placed[rows, columns] = values
        return placed

    def _seen(self, length: int) -> tuple[slice, np.ndarray]:
        """Of an axis of an image: the pixels whose centres lie in the crop, and these centres in the crop's pixels."""
        centres = (np.arange(length) + 0.5) * (self.image_size / length) - self.offset
        inside = np.flatnonzero((centres >= 0) & (centres < self.crop_size))
        if not inside.size:  # an image of a pixel or two, whose centres all fall beside a narrow crop
            return slice(0, 0), centres[:0]
        return slice(int(inside[0]), int(inside[-1]) + 1), centres[inside]


class ImageSource:
    """The images a user gave, in any accepted form: counted, checked, and handed out in batches.

    Parameters
    ----------
    images : path, folder, PIL image, iterable of paths or PIL images, or (N, 3, H, W) array or tensor of floats

    Raises
    ------
    ValueError, TypeError
        None of these, a mixture, no image, or an array of the wrong shape or dtype.
    FileNotFoundError
        A path does not exist.
    """

    def __init__(self, images: Any) -> None:
        self._items: list[Any] | torch.Tensor
        if is_tensor(images) or isinstance(images, np.ndarray):
            self._items = _as_tensor(images)
        elif isinstance(images, Image.Image):
            self._items = [images]
        elif isinstance(images, (str, os.PathLike)) or not isinstance(images, Iterable):
            self._items = list_images(images)
        else:
            several = list(images)
            pictures = [isinstance(image, Image.Image) for image in several]
            if any(pictures) and not all(pictures):
                stray = several[pictures.index(False)]
                raise TypeError(f"images: expected PIL images only or paths only, got {type(stray).__name__} too")
            self._items = several if any(pictures) else list_images(several)

    def __len__(self) -> int:
        return len(self._items)

    def batches(self, size: int) -> Iterator[Any]:
        """Lists of paths or PIL images, or parts of the tensor, of at most `size` images."""
        for start in range(0, len(self), size):
            yield self._items[start : start + size]


def _decoded(image: Image.Image) -> Image.Image:
    try:
        return as_rgb(image)
    except (OSError, SyntaxError) as error:  # Pillow reads the pixels of a file when they are first asked for
        raise ValueError(f"images: expected PIL images that can be decoded, got one that cannot ({error})") from error


def _as_mask(mask: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    check_dense(mask, "mask")
    pixels = to_numpy(mask) if is_tensor(mask) else np.asarray(mask)
    if pixels.dtype != bool:
        raise TypeError(f"mask: expected dtype bool, got {pixels.dtype}")
    if pixels.ndim != 2 or 0 in pixels.shape or shape not in (None, pixels.shape):
        raise ValueError(f"mask: expected shape {shape or '(H, W)'}, got {pixels.shape}")
    return pixels


def as_batch(pixels: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) images as a float batch (N, 3, H, W) in [0, 1], laid out channels last as they are."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)


def _as_tensor(images: Array) -> torch.Tensor:
    kind = dtype_name(images)
    if kind.startswith(("int", "uint", "bool")):
        raise TypeError(
            f"images: expected floats in [0, 1], got {kind}; divide 8-bit images by 255, or "
            "give a frame (H, W, 3) as PIL.Image.fromarray(frame)"
        )
    images = as_float_array(images, "images", (4,))
    if images.shape[1] != 3:
        raise ValueError(f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}")
    # torch refuses negative strides, and warns of memory it may not write.
    return images if is_tensor(images) else torch.from_numpy(np.require(images, requirements=["C", "W"]))
