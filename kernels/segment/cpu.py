"""The whole method fused in C++: see kernels/cpp/include/ttt4as/segmenter.hpp.

Reads the map three times and the features three times, and once more a round of the SVM where its samples touch most of
them; neither samples nor decision are ever upsampled in all channels. A batch is spread over threads, a single image is
given all of them. The SVM is solved to the optimum in single precision, not just to `tol`, where that is cheap: the
decision is then the same within about 1e-5 whatever solves it.
"""

from __future__ import annotations

import numpy as np

from .. import native

ARRAYS = "numpy"
CHECKS_FINITE = True


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def segment(
    anomaly_map: np.ndarray,
    features: np.ndarray,
    *,
    percentile: float,
    neighbor_radius: int,
    candidates: np.ndarray,
    limit: int,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    skip: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8."""
    return native.segment_batch(
        native.core().segment,
        anomaly_map,
        features,
        skip,
        percentile=percentile,
        neighbor_radius=neighbor_radius,
        candidates=candidates,
        limit=limit,
        C=C,
        loss=loss,
        tol=tol,
        max_iter=max_iter,
    )
