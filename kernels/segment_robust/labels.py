"""Where the robust preset puts its level, and which pixels it learns from. NumPy, float64: every backend uses it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from . import RobustOptions

BINS = 24
"""Heights told apart between the background and the peak."""
SMOOTHING = 8
"""Bins to each side that a binomial kernel reaches: a standard deviation of 2 bins, 0.083 of the way."""
HEIGHTS = (0.2, 0.75)
"""The steepest level is looked for between these: below lies the background's texture, above the peak's flat top."""
ENOUGH = 8
"""The lattice is made finer until it has as many anomalous samples, or is the pixel grid."""
_BINOMIAL = np.array([math.comb(2 * SMOOTHING, k) for k in range(2 * SMOOTHING + 1)]) / 4**SMOOTHING


class Labels(NamedTuple):
    """What the SVM learns from."""

    anomalous: np.ndarray
    """int64: flat indices, in raster order."""
    nominal: np.ndarray
    level: float
    peak: float


def level(anomaly_map: np.ndarray, options: RobustOptions) -> tuple[float, float]:
    """(level, peak) of a map (H, W) float64 that is not constant: pixels above the level are taken for anomalous."""
    peak = float(anomaly_map.max())
    base = float(np.quantile(anomaly_map, options.base_quantile))
    if base >= peak:
        base = float(anomaly_map.min())
    height = steepest(anomaly_map, base, peak) if options.height is None else options.height
    own = base + height * (peak - base)
    if options.nominal_level is None or options.nominal_level >= peak:
        return own, peak
    usual = max(options.nominal_level, base)
    theirs = usual + options.nominal_share * (peak - usual)
    return (1 - options.nominal_weight) * own + options.nominal_weight * theirs, peak


def steepest(anomaly_map: np.ndarray, base: float, peak: float) -> float:
    """The height, 0 at `base` and 1 at `peak`, whose pixels have the largest mean gradient.

    By the co-area formula the mean gradient over the pixels of a band of heights is the length of its contour over the
    area the band covers: it is large where the region above grows slowest as the level sinks, and collapses where the
    region floods what lies beside the defect.
    """
    height = (anomaly_map - base) * (1 / (peak - base))
    above = height >= 0
    bins = np.minimum((height[above] * BINS).astype(np.int64), BINS - 1)
    count = _smooth(np.bincount(bins, minlength=BINS).astype(np.float64))
    slope = _smooth(np.bincount(bins, weights=gradient(anomaly_map)[above], minlength=BINS))
    centres = (np.arange(BINS) + 0.5) / BINS
    allowed = (centres >= HEIGHTS[0]) & (centres <= HEIGHTS[1])
    mean = np.where(allowed & (count > 0), slope / np.maximum(count, np.finfo(np.float64).tiny), -1.0)
    return float(centres[int(mean.argmax())])


def gradient(anomaly_map: np.ndarray) -> np.ndarray:
    """Magnitude of the gradient by central differences, one-sided at the edges, 0 along an axis of one pixel."""
    squares = np.zeros_like(anomaly_map)
    for axis in (0, 1):
        values = np.moveaxis(anomaly_map, axis, 0)
        if len(values) < 2:
            continue
        target = np.moveaxis(squares, axis, 0)
        target[1:-1] += (0.5 * (values[2:] - values[:-2])) ** 2
        target[0] += (values[1] - values[0]) ** 2
        target[-1] += (values[-1] - values[-2]) ** 2
    return np.sqrt(squares)


def _smooth(histogram: np.ndarray) -> np.ndarray:
    return np.convolve(histogram, _BINOMIAL)[SMOOTHING:-SMOOTHING]


def label(anomaly_map: np.ndarray, cells: tuple[int, int], options: RobustOptions) -> Labels | None:
    """Samples of a map (H, W) float64 over features of `cells` (h, w); None for a constant map."""
    if anomaly_map.min() == anomaly_map.max():
        return None
    threshold, peak = level(anomaly_map, options)
    core = threshold + options.core * (peak - threshold)
    spacing = max(1, round(min(anomaly_map.shape[0] / cells[0], anomaly_map.shape[1] / cells[1]) / 2))
    nominal = _lattice(anomaly_map <= threshold, spacing)
    if not len(nominal):
        nominal = _lattice(anomaly_map <= threshold, 1)
    highest = (anomaly_map > core) | (anomaly_map == peak)
    anomalous = _lattice(highest, spacing)
    while len(anomalous) < ENOUGH and spacing > 1:
        spacing //= 2
        anomalous = _lattice(highest, spacing)
    return Labels(_spread(anomalous, options.n_core), _spread(nominal, options.n_background), threshold, peak)


def _lattice(mask: np.ndarray, spacing: int) -> np.ndarray:
    """Flat indices of the pixels of `mask` on every `spacing`-th row and column."""
    start = spacing // 2
    rows, cols = np.nonzero(mask[start::spacing, start::spacing])
    return (rows * spacing + start) * mask.shape[1] + cols * spacing + start


def _spread(indices: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of them, evenly spread over their order."""
    if len(indices) <= limit:
        return indices
    last = max(limit - 1, 1)  # of one sample, the first
    return indices[(np.arange(limit) * (len(indices) - 1) * 2 + last) // (2 * last)]
