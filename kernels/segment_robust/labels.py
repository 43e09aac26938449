"""Where the robust preset puts its level, and which pixels it learns from: NumPy, float64, step by step.

The level is looked for on a lattice of a quarter of a feature cell, the samples on one of half a cell: finer than what
the detector resolves, and without temporaries of the size of the map.
"""

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
TIED = 1e-12
"""Slopes that differ by this share are equal to within rounding, as all of a ramp are: the lowest height is taken."""
WIDE, SIZE = 0.75, 8.0
"""Above `WIDE` of the height a defect no larger than what the detector resolves covers about `SIZE` feature cells."""
FACTORS = (0.7, 1.3)
"""What the size of the peak may make of a level's height, at least and at most."""
HIGHEST = 0.93
"""The size raises no height beyond this."""
PLACE = 0.25
"""What a place of the lattice of half a feature cell weighs: its share of the cell."""
HARD = 8
"""One in so many nominal pixels is hard: those of the highest score."""
STEPS = np.array([3242174889, 2447445414], np.uint64)
"""2^32 over the plastic number and over its square. Pixels in the order of row * STEPS[0] + column * STEPS[1] modulo
2^32 are spread evenly over the plane however many of them are taken (Roberts, "The unreasonable effectiveness of
quasirandom sequences", 2018)."""
_BINOMIAL = np.array([math.comb(2 * SMOOTHING, k) for k in range(2 * SMOOTHING + 1)]) / 4**SMOOTHING


class Labels(NamedTuple):
    """What the SVM learns from."""

    pixels: np.ndarray
    """int64 (n,): flat indices, all distinct, the anomalous ones first."""
    sides: np.ndarray
    """float64 (n,): 1 or -1."""
    weights: np.ndarray
    """float64 (n,): what each counts for."""
    level: float
    peak: float


def power_of_two(values: np.ndarray) -> float:
    """The power of two that brings the largest magnitude to [1, 2), or as near as float64 can; 1 where all are zero."""
    most = float(np.abs(values).max())
    return math.ldexp(1.0, min(1 - math.frexp(most)[1], 1023)) if most > 0 else 1.0


def level(
    anomaly_map: np.ndarray, cells: tuple[int, int], options: RobustOptions, step: int = 1
) -> tuple[float, float]:
    """(level, peak) of a map (H, W) that is not constant, from every `step`-th row and column and the peak.

    `cells` (h, w) is the grid of the features: the unit in which the peak is wide or narrow.

    Pixels above the level are taken for anomalous.
    """
    peak, lowest = float(anomaly_map.max()), float(anomaly_map.min())
    values = _every(anomaly_map, step)
    base = float(np.quantile(values, options.base_quantile))
    if base >= peak:
        base = lowest
    if math.isinf(1 / (peak - base)):  # their distance is too small to divide by
        return peak, peak
    height = steepest(values, gradient(anomaly_map, step), base, peak) if options.height is None else options.height
    factor = size_factor(values, base, peak, cells[0] * cells[1], options.size_exponent)
    usual_map = options.nominal_level is not None and options.nominal_level >= peak
    if usual_map:  # what is wide in it is texture, not a defect: no reason to lower the level
        factor = max(factor, 1.0)
    own = base + _scaled(height, factor) * (peak - base)
    if options.nominal_level is None or usual_map:
        return own, peak
    usual = max(options.nominal_level, base)
    theirs = usual + _scaled(options.nominal_share, factor) * (peak - usual)
    return (1 - options.nominal_weight) * own + options.nominal_weight * theirs, peak


def steepest(values: np.ndarray, slope: np.ndarray, base: float, peak: float) -> float:
    """The height, 0 at `base` and 1 at `peak`, whose pixels have the largest mean `slope`.

    By the co-area formula the mean gradient over the pixels of a band of heights is the length of its contour over the
    area the band covers: it is large where the region above grows slowest as the level sinks, and collapses where the
    region floods what lies beside the defect.
    """
    height = (values - base) * (1 / (peak - base))
    above = height >= 0
    bins = np.minimum((height[above] * BINS).astype(np.int64), BINS - 1)
    count = _smooth(np.bincount(bins, minlength=BINS).astype(np.float64))
    total = _smooth(np.bincount(bins, weights=slope[above], minlength=BINS))
    centres = (np.arange(BINS) + 0.5) / BINS
    allowed = (centres >= HEIGHTS[0]) & (centres <= HEIGHTS[1])
    mean = np.where(allowed & (count > 0), total / np.maximum(count, np.finfo(np.float64).tiny), -1.0)
    return float(centres[int((mean >= mean.max() * (1 - TIED)).argmax())])


def size_factor(values: np.ndarray, base: float, peak: float, cells: int, exponent: float) -> float:
    """What multiplies the heights of levels: more than 1 for a narrow peak, less for a wide one.

    The map of a defect is wider than the defect by what the detector blurs. Of a narrow peak that is nearly all, and
    the defect lies at its top. A wide one is uneven, and its highest point says little about its edge.
    """
    wide = float(np.mean((values - base) * (1 / (peak - base)) > WIDE)) * cells
    return min(max((SIZE / max(wide, 0.5)) ** exponent, FACTORS[0]), FACTORS[1])


def _scaled(height: float, factor: float) -> float:
    return min(height * factor, max(height, HIGHEST))


def gradient(anomaly_map: np.ndarray, step: int) -> np.ndarray:
    """The gradient's magnitude at every `step`-th pixel, by differences between its neighbours, one-sided at borders.

    Along an axis of one pixel it is 0.
    """
    height, width = anomaly_map.shape
    rows, cols = np.arange(step // 2, height, step), np.arange(step // 2, width, step)
    squares = np.zeros((len(rows), len(cols)))
    for axis, places, lines in (
        (0, rows, anomaly_map[:, step // 2 :: step]),
        (1, cols, anomaly_map[step // 2 :: step]),
    ):
        before, after = np.maximum(places - 1, 0), np.minimum(places + 1, lines.shape[axis] - 1)
        run = np.maximum(after - before, 1)
        difference = lines.take(after, axis).astype(np.float64) - lines.take(before, axis)
        squares += (difference / (run[:, None] if axis == 0 else run)) ** 2
    return np.sqrt(squares)


def _every(anomaly_map: np.ndarray, step: int) -> np.ndarray:
    """Every `step`-th row and column, from half a step on, in float64."""
    return anomaly_map[step // 2 :: step, step // 2 :: step].astype(np.float64)


def _smooth(histogram: np.ndarray) -> np.ndarray:
    return np.convolve(histogram, _BINOMIAL)[SMOOTHING:-SMOOTHING]


def label(anomaly_map: np.ndarray, cells: tuple[int, int], options: RobustOptions) -> Labels | None:
    """Samples of a map (H, W) of any float dtype over features of `cells` (h, w).

    None where no level lies below the peak: the map is constant, or to within rounding.
    """
    if anomaly_map.min() == anomaly_map.max():
        return None
    spacing = max(1, round(min(anomaly_map.shape[0] / cells[0], anomaly_map.shape[1] / cells[1]) / 2))
    threshold, peak = level(anomaly_map, cells, options, max(1, spacing // 2))
    if not threshold < peak or math.isinf(1 / (peak - threshold)):
        return None
    core = threshold + options.core * (peak - threshold)

    def lattice(step: int, anomalous: bool) -> np.ndarray:
        values = _every(anomaly_map, step)
        return np.argwhere((values > core) | (values == peak) if anomalous else values <= threshold)

    def pixels(places: np.ndarray, step: int) -> np.ndarray:
        return np.ravel_multi_index(tuple((places * step + step // 2).T), anomaly_map.shape)

    step, places = spacing, lattice(spacing, True)
    while len(places) < ENOUGH and step > 1:
        step //= 2
        places = lattice(step, True)
    anomalous = pixels(spread(places, options.n_core), step)
    weights = [np.full(len(anomalous), min(PLACE * len(places), options.core_weight) / len(anomalous))]

    step, places = spacing, lattice(spacing, False)
    if not len(places):
        step, places = 1, lattice(1, False)
    scores = anomaly_map.ravel()[pixels(places, step)]
    parts = [(part, spread(part, n)) for part, n in strata(places, scores, options.n_background, options.hard_share)]
    stood_for = sum(len(part) for part, kept in parts if len(kept))
    for part, kept in parts:
        each = min(PLACE * len(places), options.background_weight) * len(part) / (stood_for * max(len(kept), 1))
        weights.append(np.full(len(kept), each))
    nominal = np.concatenate([pixels(kept, step) for _, kept in parts])
    sides = np.repeat([1.0, -1.0], [len(anomalous), len(nominal)])
    return Labels(np.concatenate([anomalous, nominal]), sides, np.concatenate(weights), threshold, peak)


def strata(places: np.ndarray, scores: np.ndarray, limit: int, hard_share: float) -> list[tuple[np.ndarray, int]]:
    """The nominal `places` (n, 2) as parts, each with how many samples are taken of it, `limit` together.

    Where there are more places than that, those of the highest scores are a part of their own, of which a larger share
    is taken: near the edge of a defect, or where something looks like one, is where the classifier errs.
    """
    n_hard, n_top = int(hard_share * limit), len(scores) // HARD
    if len(scores) <= limit or not n_hard or not n_top:
        return [(places, limit)]
    hard = scores >= np.partition(scores, -n_top)[-n_top]
    n_hard = min(int(hard.sum()), max(n_hard, limit - int((~hard).sum())))
    return [(places[hard], n_hard), (places[~hard], limit - n_hard)]


def spread(places: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the lattice places (n, 2), evenly spread over the plane, in the order given."""
    if len(places) <= limit:
        return places
    order = (places.astype(np.uint64) * STEPS).sum(1) % 2**32
    return places[np.sort(np.argsort(order, kind="stable")[:limit])]
