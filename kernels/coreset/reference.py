"""What greedy k-center computes: one pass over all points a pick, direct differences, float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ARRAYS = "numpy"
_REPORT_EVERY = 64


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def greedy(
    points: np.ndarray, n_samples: int, start: int, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """(N, D) -> (n_samples,) int64: each pick is the point farthest from the picks so far."""
    x = points.astype(np.float64)
    nearest = np.full(len(x), np.inf)
    picks = np.empty(n_samples, np.int64)
    pick = start
    for i in range(n_samples):
        picks[i] = pick
        nearest = np.minimum(nearest, ((x - x[pick]) ** 2).sum(axis=1))
        nearest[pick] = -1.0  # below any distance, so that duplicates never bring a pick back
        pick = int(np.argmax(nearest))
        if progress is not None and (i % _REPORT_EVERY == 0 or i == n_samples - 1):
            progress(i + 1, n_samples)
    return picks
