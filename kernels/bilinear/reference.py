"""What bilinear upsampling computes, in plain NumPy and float64."""

from __future__ import annotations

import numpy as np

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def taps(out_size: int, in_size: int, positions: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and weight of the upper one for each output position along an axis.

    Half-pixel centres: output pixel i looks at input coordinate (i + 1/2) * in/out - 1/2, clamped to the first and
    last pixel centre, so an edge repeats.
    """
    positions = np.arange(out_size) if positions is None else positions
    centre = np.clip((positions + 0.5) * (in_size / out_size) - 0.5, 0, in_size - 1)
    lower = np.floor(centre).astype(np.int64)
    upper = np.minimum(lower + 1, in_size - 1)
    return lower, upper, centre - lower


def upsample(features: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., h, w) -> (..., height, width), in the dtype of `features`."""
    x = features.astype(np.float64)
    lower, upper, weight = taps(height, x.shape[-2])
    x = x[..., lower, :] * (1 - weight)[:, None] + x[..., upper, :] * weight[:, None]
    lower, upper, weight = taps(width, x.shape[-1])
    x = x[..., lower] * (1 - weight) + x[..., upper] * weight
    return x.astype(features.dtype)


def sample(features: np.ndarray, rows: np.ndarray, cols: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, h, w) and N pixels of the (height, width) grid -> (N, C), float32 or better."""
    x = features.astype(np.float64)
    top, bottom, dy = taps(height, x.shape[1], rows)
    left, right, dx = taps(width, x.shape[2], cols)
    upper = x[:, top, left] * (1 - dx) + x[:, top, right] * dx
    lower = x[:, bottom, left] * (1 - dx) + x[:, bottom, right] * dx
    return (upper * (1 - dy) + lower * dy).T.astype(np.result_type(features.dtype, np.float32))
