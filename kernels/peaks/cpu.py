"""Peaks and dilation in C++: percentile by selection, one pass for the peaks, batches over threads.

Cost for a map of n pixels: two reads for its range and percentile, one for the peaks, one write: the memory's speed is
the floor. Dilation paints squares around sparse peaks and sweeps dense ones down and up.
"""

from __future__ import annotations

import numpy as np

from .. import native

ARRAYS = "numpy"
CHECKS_FINITE = True


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def local_maxima(anomaly_map: np.ndarray, percentile: float) -> np.ndarray:
    """(B, H, W) -> (B, H, W) bool."""
    return native.core().local_maxima(_floats(anomaly_map), percentile, native.threads())


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1."""
    return native.core().dilate(mask, radius, native.threads())


def _floats(x: np.ndarray) -> np.ndarray:
    """float16 becomes float32, which holds it exactly."""
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)
