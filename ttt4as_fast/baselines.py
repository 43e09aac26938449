"""The other ways to make a mask of an anomaly map: thresholds from nominal images, from the map itself, from the truth.

Everything marks where the map is *above* its threshold. Thresholds from nominal images come from `NominalStatistics`,
which a detector keeps from its validation images; `otsu_mask` sees only the map; `oracle_threshold` sees the ground
truth and says what no single threshold can pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .kernels.arrays import as_float_array, check_bool, check_finite, check_float, check_option, like, to_numpy
from .kernels.segment_robust import nominal_level
from .metrics import as_pairs

if TYPE_CHECKING:
    from .kernels.arrays import Array

OBJECTIVES = ("image_f1", "pooled_f1")
TAIL = 0.25
"""The share of the nominal scores, the highest, whose excess says how the tail goes on."""
_GRID = 1024  # thresholds looked at in one round of the oracle's search


@dataclass(frozen=True)
class NominalStatistics:
    """What is known of a detector's output on nominal validation images; make it with `from_maps`.

    Attributes
    ----------
    mean, std : numpy.ndarray of float32, shape (H, W)
        Of each pixel over the images; the standard deviation is that of the population (divides by N).
    maxima : numpy.ndarray of float32, shape (N,)
        The largest value of each map.
    scores : numpy.ndarray of float32, shape (N,)
        The image scores.
    level : float or None
        The score that one nominal pixel in a thousand passes, for ``TTT4AS(preset="robust", nominal_level=...)``. None
        in statistics saved before it was known.
    """

    mean: np.ndarray
    std: np.ndarray
    maxima: np.ndarray
    scores: np.ndarray
    level: float | None = None

    @classmethod
    def from_maps(cls, maps: Array, scores: Array) -> NominalStatistics:
        """Statistics of the maps and image scores of nominal images.

        Parameters
        ----------
        maps : array or tensor of float, shape (N, H, W)
        scores : array or tensor of float, shape (N,)

        Returns
        -------
        NominalStatistics

        Raises
        ------
        ValueError
            Wrong rank, lengths that differ, or a value that is not finite in float32.
        """
        stack = to_numpy(as_float_array(maps, "maps", (3,)))
        values = to_numpy(as_float_array(scores, "scores", (1,)))
        for name, x in (("maps", stack), ("scores", values)):
            check_finite(x, name)
            if max(x.max(), -x.min()) > np.finfo(np.float32).max:  # as which they are kept
                raise ValueError(f"{name}: expected values within float32, got {x.min():g} to {x.max():g}")
        if len(stack) != len(values):
            raise ValueError(f"scores: expected one a map, {len(stack)}, got {len(values)}")
        # Two passes in float64, one map at a time: exact enough for any range, without a float64 copy of the maps.
        mean = sum((psi.astype(np.float64) for psi in stack), np.zeros(stack.shape[1:])) / len(stack)
        variance = sum(((psi - mean) ** 2 for psi in stack), np.zeros(stack.shape[1:])) / len(stack)
        return cls(
            mean.astype(np.float32),
            np.sqrt(variance).astype(np.float32),
            stack.max(axis=(1, 2)).astype(np.float32),
            values.astype(np.float32),
            float(np.float32(nominal_level(stack))),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics by name, for saving; `from_arrays` takes them back."""
        found = {"mean": self.mean, "std": self.std, "maxima": self.maxima, "scores": self.scores}
        return found if self.level is None else {**found, "level": np.array([self.level], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> NominalStatistics:
        """The statistics that `arrays` gave.

        Raises
        ------
        ValueError
            An array is missing, or the shapes do not belong together.
        """
        missing = [name for name in ("mean", "std", "maxima", "scores") if name not in arrays]
        if missing:
            raise ValueError(f"arrays: expected mean, std, maxima and scores, got none named {', '.join(missing)}")
        mean, std = (np.asarray(arrays[name], dtype=np.float32) for name in ("mean", "std"))
        maxima, scores = (np.asarray(arrays[name], dtype=np.float32) for name in ("maxima", "scores"))
        if (
            mean.ndim != 2
            or mean.shape != std.shape
            or maxima.ndim != 1
            or maxima.shape != scores.shape
            or not maxima.size
        ):
            raise ValueError(
                "arrays: expected mean and std (H, W) and maxima and scores (N,), "
                f"got {mean.shape}, {std.shape}, {maxima.shape}, {scores.shape}"
            )
        level = np.asarray(arrays["level"], np.float32) if "level" in arrays else None
        if level is not None and level.shape != (1,):
            raise ValueError(f"arrays: expected level of shape (1,), got {level.shape}")
        return cls(mean, std, maxima, scores, None if level is None else float(level[0]))

    def mean_std_threshold(self, k: float = 3.0) -> np.ndarray:
        """``mean + k * std`` of each pixel: float32 (H, W). `k` is any number >= 0."""
        return self.mean + np.float32(check_float(k, "k", 0.0)) * self.std

    def max_threshold(self) -> float:
        """The largest value that any nominal map holds."""
        return float(self.maxima.max())

    def quantile_threshold(self, q: float = 0.95) -> float:
        """The `q`-quantile (in [0, 1], linear interpolation) of the maxima of the nominal maps."""
        return float(np.float32(np.quantile(self.maxima.astype(np.float64), check_float(q, "q", 0.0, 1.0))))

    def image_threshold(self, false_alarm_rate: float = 0.01, *, extrapolate: bool = False) -> float:
        """The smallest image score that at most a share `false_alarm_rate` of the nominal images reaches.

        An image is an alarm if its score is at least the threshold. With N images the share moves in steps of 1 / N:
        below 1 / N no image may be an alarm, and the threshold is the next float32 above their largest score. N images
        cannot vouch for a rate much below 1 / N: of 32 images with a threshold for 1 %, new ones pass it three times as
        often (`extrapolate` is for that).

        Parameters
        ----------
        false_alarm_rate : float in [0, 1), default 0.01
        extrapolate : bool, default False
            Take the upper quarter of the scores for the beginning of an exponential tail and follow it to the rate:
            the score from which the tail is counted, plus the mean excess over it times log(share of the tail / rate).
            A normal tail falls faster, so that the rate is kept rather than used up. Without effect where there are
            fewer than 4 scores, or where the rate is 0 or not within the tail.

        Returns
        -------
        float
            A float32 value.

        References
        ----------
        Pickands, "Statistical inference using extreme order statistics", Annals of Statistics 3 (1975): the
        generalised Pareto tail, here of shape 0, which few scores cannot tell from others.
        """
        rate = check_float(false_alarm_rate, "false_alarm_rate", 0.0, 1.0)
        extrapolate = check_bool(extrapolate, "extrapolate")
        if rate == 1.0:
            raise ValueError("false_alarm_rate: expected a number in [0, 1), got 1.0")
        descending = np.sort(self.scores)[::-1]
        n_tail = max(2, round(TAIL * len(descending)))
        if extrapolate and len(descending) >= 4 and 0 < rate < n_tail / len(descending):
            start, tail = float(descending[n_tail]), descending[:n_tail].astype(np.float64)
            threshold = start + float(np.mean(tail - start)) * np.log(n_tail / len(descending) / rate)
            return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
        n_allowed = int(rate * len(descending) + 1e-9)  # 0.29 * 100 is 28.999...: it allows 29
        return float(np.nextafter(descending[n_allowed], np.float32(np.inf)))


def mean_std_mask(maps: Array, stats: NominalStatistics, k: float = 3.0) -> Array:
    """Pixels above ``mean + k * std`` of the same pixel in nominal maps: the paper's THR.

    Parameters
    ----------
    maps : array or tensor of float, shape (H, W) or (N, H, W)
    stats : NominalStatistics
        Of maps of the same (H, W).
    k : float >= 0, default 3.0

    Returns
    -------
    array or tensor of bool, shape of `maps`
        Of the kind and on the device of `maps`.

    Raises
    ------
    ValueError
        Wrong rank or size, or a non-finite value.
    """
    values = _as_maps(maps)
    if values.shape[-2:] != stats.mean.shape:
        raise ValueError(f"maps: expected (H, W) as in stats, {stats.mean.shape}, got shape {tuple(values.shape)}")
    return like(values > stats.mean_std_threshold(k), maps)


def max_nominal_mask(maps: Array, stats: NominalStatistics) -> Array:
    """Pixels above the largest value of any nominal map; parameters as for `mean_std_mask`."""
    return like(_as_maps(maps) > stats.max_threshold(), maps)


def quantile_nominal_mask(maps: Array, stats: NominalStatistics, q: float = 0.95) -> Array:
    """Pixels above the `q`-quantile of the nominal maps' maxima; parameters as for `mean_std_mask`."""
    return like(_as_maps(maps) > stats.quantile_threshold(q), maps)


def otsu_mask(maps: Array) -> Array:
    """Pixels above Otsu's threshold of the map itself (256 bins): something is marked unless the map is constant.

    The threshold is scikit-image's; where its arithmetic fails, on maps of a few neighbouring floats or near either end
    of their range, it is that of the map scaled to [0, 1].

    Parameters
    ----------
    maps : array or tensor of float, shape (H, W) or (N, H, W)

    Returns
    -------
    array or tensor of bool, shape of `maps`

    Raises
    ------
    ImportError
        scikit-image is not installed.
    ValueError
        Wrong rank, or a non-finite value.

    References
    ----------
    Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979);
    `skimage.filters.threshold_otsu`.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError("otsu_mask needs scikit-image: pip install scikit-image") from error
    values = _as_maps(maps)
    stack = values.reshape(-1, *values.shape[-2:])
    masks = np.empty(stack.shape, dtype=bool)
    for mask, psi in zip(masks, stack, strict=True):
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                mask[:] = psi > threshold_otsu(psi)
        except (ValueError, FloatingPointError):
            unit = _unit(psi)
            mask[:] = unit > threshold_otsu(unit)
    return like(masks.reshape(values.shape), maps)


def _unit(psi: np.ndarray) -> np.ndarray:
    """A map that is not constant from 0 to 1, in float64."""
    _, exponent = np.frexp(np.abs(psi).max().astype(np.float64))
    scaled = np.ldexp(psi.astype(np.float64), -exponent - 1)  # differences neither vanish nor overflow
    low, high = scaled.min(), scaled.max()
    return (scaled - low) / (high - low)


def oracle_threshold(
    maps: Sequence[np.ndarray] | np.ndarray, masks: Sequence[np.ndarray] | np.ndarray, objective: str = "image_f1"
) -> tuple[float, float]:
    """The single threshold that is best for the ground truth, and the F1 it reaches, which no other passes. Exact.

    Parameters
    ----------
    maps : array of float, shape (N, H, W), or N arrays (H, W) of any sizes
        Anomaly maps.
    masks : array of bool, or N of them, of the shapes of `maps`
        Ground truth.
    objective : {"image_f1", "pooled_f1"}, default "image_f1"
        The mean F1 over the images with a marked pixel, or the F1 of the pixels of all images taken together.

    Returns
    -------
    threshold, f1 : float, float
        ``map > threshold`` is the mask. NaN, NaN if no pixel is marked.

    Raises
    ------
    ValueError
        As `ttt4as_fast.metrics.pixel_auroc`, an unknown `objective`, or maps of several dtypes: a threshold between two
        values of one may not exist in the other.

    Notes
    -----
    Branch and bound. As the threshold falls past a pixel, F1 rises only if the pixel is marked, so the best threshold
    is just below the score of some marked pixel. Between two thresholds F1 is at most what the overlap at the lower and
    the false positives at the upper one give; intervals whose bound is under the best value found are dropped, the rest
    is split again. Scratch memory: a sorted copy of the maps.
    """
    check_option(objective, "objective", OBJECTIVES)
    pairs = as_pairs(maps, masks)
    if len(dtypes := sorted({psi.dtype.name for psi, _ in pairs})) > 1:
        raise ValueError(f"maps: expected arrays of one dtype, got {' and '.join(dtypes)}")
    if objective == "image_f1":
        curves = [_F1Curve(psi[mask], psi[~mask]) for psi, mask in pairs if mask.any()]
    else:
        marked, nominal = ([psi[m if inside else ~m] for psi, m in pairs] for inside in (True, False))
        curves = [_F1Curve(np.concatenate(marked), np.concatenate(nominal))] if any(p.size for p in marked) else []
    if not curves:
        return float("nan"), float("nan")
    candidates = np.unique(np.concatenate([curve.marked for curve in curves]))[::-1]
    best, best_f1 = 0, -1.0
    blocks = [(0, len(candidates))]
    while blocks:
        grid = _grid(blocks)
        counts = [curve.at(candidates[grid]) for curve in curves]
        f1 = _mean_f1(curves, counts, slice(None), slice(None))
        place = int(np.argmax(f1))
        if f1[place] > best_f1:
            best, best_f1 = int(grid[place]), float(f1[place])
        bound = _mean_f1(curves, counts, slice(1, None), slice(None, -1))
        # Neighbours on the grid that belong to different blocks have candidates between them that are decided already.
        ends = {stop - 1 for _, stop in blocks}
        gaps = zip(grid[:-1].tolist(), grid[1:].tolist(), (bound > best_f1).tolist(), strict=True)
        blocks = [(i + 1, j) for i, j, open_ in gaps if open_ and j - i > 1 and i not in ends]
    threshold = candidates[best]
    return float(np.nextafter(threshold, threshold.dtype.type(-np.inf))), best_f1


def _grid(blocks: list[tuple[int, int]]) -> np.ndarray:
    """Ascending places within `blocks`: both ends of each, and at least one more, in proportion to its length."""
    total = sum(stop - start for start, stop in blocks)
    places = []
    for start, stop in blocks:
        length = stop - start
        n_places = min(length, max(3, _GRID * length // total))
        places.append(start + np.unique(np.linspace(0, length - 1, n_places).astype(np.intp)))
    return np.concatenate(places)


class _F1Curve:
    """F1 of one image (or of all of them together) as a function of the threshold."""

    def __init__(self, marked: np.ndarray, nominal: np.ndarray) -> None:
        self.marked, self.nominal = np.sort(marked), np.sort(nominal)

    def at(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Marked and unmarked pixels that score at least each of `thresholds`."""
        n_overlap = self.marked.size - np.searchsorted(self.marked, thresholds, side="left")
        n_false = self.nominal.size - np.searchsorted(self.nominal, thresholds, side="left")
        return n_overlap, n_false


def _mean_f1(
    curves: list[_F1Curve], counts: list[tuple[np.ndarray, np.ndarray]], overlap_at: slice, false_at: slice
) -> np.ndarray:
    """Mean F1 with the overlap of some thresholds and the false positives of others."""
    parts = (
        2 * overlap[overlap_at] / (overlap[overlap_at] + false[false_at] + curve.marked.size)
        for curve, (overlap, false) in zip(curves, counts, strict=True)
    )
    return sum(parts, np.zeros(())) / len(curves)


def _as_maps(maps: Array) -> np.ndarray:
    values = to_numpy(as_float_array(maps, "maps", (2, 3)))
    check_finite(values, "maps")
    # float16 would round a threshold to its own grid: a value of 2 is above 1.9999.
    return values.astype(np.float32) if values.dtype == np.float16 else values
