"""What peak picking and dilation compute, with SciPy's filters."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def local_maxima(anomaly_map: np.ndarray, percentile: float) -> np.ndarray:
    """(B, H, W) -> (B, H, W) bool. float64 throughout, so that `tau` never rounds onto a pixel's value."""
    peaks = np.empty(anomaly_map.shape, bool)
    for i, values in enumerate(anomaly_map.astype(np.float64)):
        tau = np.percentile(values, percentile)
        highest = ndimage.maximum_filter(values, size=3, mode="constant", cval=-np.inf)
        peaks[i] = (values == highest) & (values >= tau)
    return peaks


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1."""
    side = 2 * radius + 1
    return np.stack([ndimage.maximum_filter(one, size=side, mode="constant", cval=0) for one in mask])
