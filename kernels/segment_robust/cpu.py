"""The robust preset fused in C++: see kernels/cpp/include/ttt4as/robust.hpp.

Reads the map three times and the features twice: samples are mixed where they lie, and the decision is made on the
features' own grid. A batch is spread over threads, a single image is given all of them. The SVM is solved
to `tol` and, where that is possible, well below it (see `segment_robust`).
"""

from __future__ import annotations

import numpy as np

from .. import native
from . import OPTION_NAMES, RobustOptions

ARRAYS = "numpy"
CHECKS_FINITE = True


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def segment(
    anomaly_map: np.ndarray, features: np.ndarray, *, skip: np.ndarray | None, options: RobustOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8."""
    values = {name: getattr(options, name) for name in OPTION_NAMES if name != "image_threshold"}
    for name in ("n_core", "n_background"):  # no more samples than pixels
        values[name] = min(values[name], anomaly_map[0].size)
    return native.segment_batch(native.core().segment_robust, anomaly_map, features, skip, **values)
