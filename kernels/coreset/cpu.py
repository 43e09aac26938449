"""Greedy k-center in C++: only distances that could change a minimum are measured, in float64, from differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import native

ARRAYS = "numpy"
_FEWEST, _MOST = 64, 4096  # picks between two reports; fewer the more points there are
_DISTANCES_A_REPORT = 50_000_000


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def greedy(
    points: np.ndarray, n_samples: int, start: int, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """(N, D) -> (n_samples,) int64: each pick is the point farthest from the picks so far.

    The choice is that of squared distances summed in float64 from differences of the float32 or float64 values; the
    points are not copied (float16 and rows whose columns are not adjacent are, once). Beside them it keeps 85 bytes a
    point (with up to 64 columns, D + 21, D rounded up to a multiple of 16). A pick reads N * 64 of these bytes and the
    few hundred points that may be nearer to it than to the picks before.
    """
    selection = native.core().GreedyCoreset(native.rows(points), start, threads=native.threads())
    if progress is None:
        return selection.pick(n_samples)
    step = min(_MOST, max(_FEWEST, _DISTANCES_A_REPORT // len(points)))
    picks = np.empty(n_samples, np.int64)
    for done in range(0, n_samples, step):
        now = min(n_samples, done + step)
        picks[done:now] = selection.pick(now - done)
        progress(now, n_samples)
    return picks
