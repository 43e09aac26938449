"""Bilinear upsampling by the C++ core: any strides without a copy, the GIL released."""

from __future__ import annotations

import numpy as np

from .. import native

ARRAYS = "numpy"
TAKES_BFLOAT16 = True


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def upsample(features: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., h, w) -> (..., height, width), in the dtype of `features`."""
    return native.core().bilinear_upsample(features, height, width, native.threads())


def sample(features: np.ndarray, rows: np.ndarray, cols: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, h, w) and N pixels of the (height, width) grid -> (N, C), float32 or better."""
    return native.core().bilinear_sample(features, rows, cols, height, width)
