"""How good scores, maps and masks are: exact, in NumPy, in memory that does not grow beyond the maps themselves.

Conventions for the cases that a definition leaves open, here and in every table made from here:

- a ranking (AUROC, AU-PRO) that lacks one of its two classes is NaN, and so is a mean over nothing;
- precision is 0 where nothing is predicted, recall 0 where nothing is marked, F1 and IoU 0 where nothing overlaps;
- ties count half (AUROC) or are passed in one straight step (AU-PRO), so no result depends on the order of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from .kernels.arrays import as_float_array, check_dense, check_finite, check_float, is_tensor, to_numpy

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a defective score is above a nominal one, ties counting half.

    Parameters
    ----------
    scores : array-like of float, shape (N,)
        Higher is worse.
    labels : array-like of bool or {0, 1}, shape (N,)

    Returns
    -------
    float
        In [0, 1]; NaN if one of the classes is absent.

    Raises
    ------
    ValueError
        Lengths differ, a score is not finite or a label is neither 0 nor 1.
    """
    values = _as_scores(scores, "scores")
    marks = as_labels(labels, len(values))
    return _ranking_area([(values, marks)], values[marks], None, 1.0)


def pixel_auroc(maps: Sequence[np.ndarray] | np.ndarray, masks: Sequence[np.ndarray] | np.ndarray) -> float:
    """AUROC over all pixels of all images, exact; see `auroc`.

    Scratch memory: the scores of the marked pixels and one image.

    Parameters
    ----------
    maps : array of float, shape (N, H, W), or N arrays (H, W) of any sizes
        Anomaly maps, higher is worse.
    masks : array of bool, or N of them, of the shapes of `maps`
        Ground truth.

    Returns
    -------
    float
        In [0, 1]; NaN if no pixel or every pixel is marked.

    Raises
    ------
    ValueError
        Shapes differ, a map holds a non-finite value or a mask values other than 0 and 1.
    """
    pairs = as_pairs(maps, masks)
    marked = _concatenate([psi[mask] for psi, mask in pairs])
    return _ranking_area(pairs, marked, None, 1.0)


def aupro(
    maps: Sequence[np.ndarray] | np.ndarray, masks: Sequence[np.ndarray] | np.ndarray, max_fpr: float = 0.3
) -> float:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate; exact.

    At each threshold the overlap of a defect region is the share of it that scores at least as much, and the per-region
    overlap is the mean over the regions of all images, which are 8-connected. The false-positive rate is taken over the
    unmarked pixels of all images. The curve has a point at every distinct score and is linear between them.

    Scratch memory: one copy of the scores of all images.

    Parameters
    ----------
    maps, masks
        As for `pixel_auroc`.
    max_fpr : float in (0, 1], default 0.3

    Returns
    -------
    float
        In [0, 1]; NaN if no pixel or every pixel is marked.

    Raises
    ------
    ValueError
        As `pixel_auroc`, or `max_fpr` out of range.

    References
    ----------
    Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129 (2021), section 4.3.
    """
    max_fpr = check_float(max_fpr, "max_fpr", 0.0, 1.0, open_low=True)
    pairs = as_pairs(maps, masks)
    scores, weights = [], []
    for psi, mask in pairs:
        regions, n_regions = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        if n_regions:
            inside = regions[mask]
            scores.append(psi[mask])
            weights.append(1.0 / np.bincount(inside)[inside])
    return _ranking_area(pairs, _concatenate(scores), _concatenate(weights), max_fpr)


def _ranking_area(
    pairs: list[tuple[np.ndarray, np.ndarray]], marked: np.ndarray, weights: np.ndarray | None, max_fpr: float
) -> float:
    """Mean weighted recall of `marked` over the false-positive rates of the other pixels from 0 to `max_fpr`.

    Every nominal pixel widens the curve by 1 / n. With s its score, the curve is at R(> s) before the pixels that tie
    with it and at R(>= s) after them; the trapezoid over the tie is their mean. So the curve need not be built: R at
    each nominal score is enough.
    """
    n_nominal = sum(mask.size - int(np.count_nonzero(mask)) for _, mask in pairs)
    if not n_nominal or not marked.size:
        return float("nan")
    order = np.argsort(marked, kind="stable")
    marked = marked[order]
    # above[i]: total weight of marked[i:]
    above = np.zeros(marked.size + 1)
    above[:-1] = np.arange(marked.size, 0, -1) if weights is None else np.cumsum(weights[order][::-1])[::-1]

    n_wanted, limit = max_fpr * n_nominal, -np.inf
    if max_fpr < 1.0:
        limit = _largest([psi[~mask] for psi, mask in pairs], int(np.ceil(n_wanted)))
    area, n_above, n_ties = 0.0, 0, 0
    for psi, mask in pairs:
        scores = psi[~mask]
        n_ties += int(np.count_nonzero(scores == limit))
        scores = np.sort(scores[scores > limit])
        n_above += scores.size
        befores = above[np.searchsorted(marked, scores, side="right")]
        afters = above[np.searchsorted(marked, scores, side="left")]
        area += 0.5 * (float(befores.sum()) + float(afters.sum()))
    if n_ties:
        # The pixels at the limit enter in part: the straight step over their tie is cut where the rate is reached.
        before = float(above[np.searchsorted(marked, limit, side="right")])
        after = float(above[np.searchsorted(marked, limit, side="left")])
        n_left = n_wanted - n_above
        area += n_left * (before + 0.5 * (after - before) * n_left / n_ties)
    return area / (float(above[0]) * n_wanted)


def _largest(parts: list[np.ndarray], rank: int) -> float:
    """The `rank`-th largest of all values, 1 for the maximum."""
    values = np.concatenate(parts)
    values.partition(values.size - rank)
    return values[values.size - rank]


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class Counts(NamedTuple):
    """Pixels of one image: predicted and marked, predicted, marked, all."""

    n_overlap: int
    n_predicted: int
    n_marked: int
    n_pixels: int

    @property
    def f1(self) -> float:
        """F1 of the image's mask, 0 where nothing overlaps."""
        return _ratio(2 * self.n_overlap, self.n_predicted + self.n_marked)


def mask_counts(pred_mask: np.ndarray, gt_mask: np.ndarray) -> Counts:
    """The four numbers that every metric of one image's mask follows from.

    Parameters
    ----------
    pred_mask, gt_mask : array of bool or {0, 1}, shape (H, W)

    Returns
    -------
    Counts

    Raises
    ------
    ValueError
        Shapes differ, the rank is not 2 or a value is neither 0 nor 1.
    """
    predicted, marked = as_mask(pred_mask, "pred_mask"), as_mask(gt_mask, "gt_mask")
    if predicted.shape != marked.shape:
        raise ValueError(f"pred_mask: expected the shape of gt_mask, {marked.shape}, got {predicted.shape}")
    count = np.count_nonzero
    return Counts(int(count(predicted & marked)), int(count(predicted)), int(count(marked)), marked.size)


def precision_recall_f1(pred_mask: np.ndarray, gt_mask: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of one mask; each is 0 where its definition divides by nothing.

    Parameters
    ----------
    pred_mask, gt_mask : array of bool or {0, 1}, shape (H, W)

    Returns
    -------
    (float, float, float)
        In [0, 1].

    Raises
    ------
    ValueError
        As `mask_counts`.
    """
    counts = mask_counts(pred_mask, gt_mask)
    return (
        _ratio(counts.n_overlap, counts.n_predicted),
        _ratio(counts.n_overlap, counts.n_marked),
        counts.f1,
    )


def mask_metrics(
    pred_masks: Iterable[np.ndarray], gt_masks: Iterable[np.ndarray], labels: np.ndarray | None = None
) -> dict[str, float]:
    """Every mask metric of a set of images.

    Parameters
    ----------
    pred_masks, gt_masks : N arrays of bool or {0, 1}, shape (H, W) each, of any sizes
    labels : array of bool or {0, 1}, shape (N,), optional
        Which images are defective; by default those whose ground truth marks a pixel.

    Returns
    -------
    dict
        See `summarise_counts`.

    Raises
    ------
    ValueError
        Lengths or shapes differ, or a value is neither 0 nor 1.
    """
    predictions, truths = list(pred_masks), list(gt_masks)
    if len(predictions) != len(truths):
        raise ValueError(f"pred_masks: expected as many as gt_masks, {len(truths)}, got {len(predictions)}")
    return summarise_counts([mask_counts(p, t) for p, t in zip(predictions, truths, strict=True)], labels)


def summarise_counts(counts: Sequence[Counts], labels: np.ndarray | None = None) -> dict[str, float]:
    """`mask_metrics` from the counts of each image.

    Parameters
    ----------
    counts : sequence of Counts, length N
    labels : array of bool or {0, 1}, shape (N,), optional
        Which images are defective; by default those with a marked pixel.

    Returns
    -------
    dict
        All in [0, 1], NaN over an empty set. ``precision``, ``recall``, ``f1``, ``iou``: means over the defective
        images with a marked pixel (a defect may lie outside the crop; such an image is then no part of the means).
        ``pooled_f1``, ``pooled_iou``: from the pixels of all images taken together, nominal ones included.
        ``fpr_pixels_nominal``: share of the pixels of nominal images that are predicted. ``fpr_images_nominal``: share
        of nominal images with a predicted pixel.
    """
    table = np.array(counts, dtype=np.int64).reshape(-1, 4)
    overlap, predicted, marked, pixels = table.T
    defective = marked > 0 if labels is None else as_labels(labels, len(table))
    judged, nominal = defective & (marked > 0), ~defective
    o, p, m = overlap[judged], predicted[judged], marked[judged]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(p > 0, o / p, 0.0)
    both, either = int(overlap.sum()), int((predicted + marked - overlap).sum())
    return {
        "precision": _mean(precision),
        "recall": _mean(o / m),
        "f1": _mean(2 * o / (p + m)),
        "iou": _mean(o / (p + m - o)),
        "pooled_f1": _ratio(2 * both, both + either) if len(table) else float("nan"),
        "pooled_iou": _ratio(both, either) if len(table) else float("nan"),
        "fpr_pixels_nominal": float(predicted[nominal].sum() / pixels[nominal].sum())
        if nominal.any()
        else float("nan"),
        "fpr_images_nominal": _mean(predicted[nominal] > 0),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checks shared with the baselines


def as_mask(mask: np.ndarray, name: str) -> np.ndarray:
    """`mask` as a bool array (H, W), or ValueError."""
    check_dense(mask, name)
    mask = to_numpy(mask) if is_tensor(mask) else np.asarray(mask)
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name}: expected a non-empty mask (H, W), got shape {mask.shape}")
    return _as_bool(mask, name)


def as_labels(labels: np.ndarray, length: int) -> np.ndarray:
    """`labels` as a bool array (length,), or ValueError."""
    check_dense(labels, "labels")
    labels = to_numpy(labels) if is_tensor(labels) else np.asarray(labels)
    if labels.shape != (length,):
        raise ValueError(f"labels: expected shape ({length},), got {labels.shape}")
    return _as_bool(labels, "labels")


def as_pairs(
    maps: Sequence[np.ndarray] | np.ndarray, masks: Sequence[np.ndarray] | np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Anomaly maps and their masks, checked and paired. Views where the input allows."""
    for name, images in (("maps", maps), ("masks", masks)):
        check_dense(images, name)
        if not hasattr(images, "__len__"):
            raise TypeError(f"{name}: expected shape (N, H, W) or N arrays (H, W), got {type(images).__name__}")
        shape = getattr(images, "shape", None)
        if shape is not None and len(shape) != 3:
            raise ValueError(f"{name}: expected shape (N, H, W) or N arrays (H, W), got shape {tuple(shape)}")
    if len(maps) != len(masks):
        raise ValueError(f"masks: expected as many as maps, {len(maps)}, got {len(masks)}")
    pairs = []
    for place, (psi, mask) in enumerate(zip(maps, masks, strict=True)):
        psi = to_numpy(as_float_array(psi, f"maps[{place}]", (2,)))
        check_finite(psi, f"maps[{place}]")
        mask = as_mask(mask, f"masks[{place}]")
        if mask.shape != psi.shape:
            raise ValueError(f"masks[{place}]: expected the shape of its map, {psi.shape}, got {mask.shape}")
        pairs.append((psi, mask))
    return pairs


def _as_scores(scores: np.ndarray, name: str) -> np.ndarray:
    empty = np.size(scores) == 0 if not is_tensor(scores) else scores.numel() == 0  # type: ignore[attr-defined]
    if empty:
        return np.empty(0)
    values = to_numpy(as_float_array(scores, name, (1,)))
    check_finite(values, name)
    return values


def _as_bool(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name}: expected booleans or 0 and 1, got {values.dtype} with other values")
    return values.astype(bool)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0
