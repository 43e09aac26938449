"""The robust preset without the dense features: sampled where labelled, classified on their own grid, then upsampled.

Sampling, the SVM and the upsampling are the public operations, each by its fastest backend. Sums over channels are
NumPy's own loops, not BLAS: their order does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from .. import bilinear, linear_svm, native
from ..segment import STATUSES
from . import CONSTANT, RobustOptions
from .labels import label

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Usable where the core is built, which serves its parts; tensors on a device go to the host and back."""
    return native.why_not()


def segment(
    anomaly_map: np.ndarray, features: np.ndarray, *, skip: np.ndarray | None, options: RobustOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8.

    Cost of an image: six passes over the map and five over the features; scratch 12 bytes a pixel of the map, 4 C bytes
    a sample and 12 C bytes a feature cell.
    """
    decision = np.zeros(anomaly_map.shape, np.float32)
    labels = np.zeros(anomaly_map.shape, np.int8)
    codes = np.full(len(anomaly_map), STATUSES.index("nominal"), np.int8)
    for i in range(len(anomaly_map)):
        if skip is None or not skip[i]:
            status = _segment_one(anomaly_map[i], features[i], options, decision[i], labels[i])
            codes[i] = STATUSES.index(status)
    return decision > 0, decision, labels, codes


def _segment_one(
    anomaly_map: np.ndarray, features: np.ndarray, options: RobustOptions, decision: np.ndarray, labels: np.ndarray
) -> str:
    """Fills `decision` and `labels` (H, W), both zero before; returns the status."""
    height, width = anomaly_map.shape
    found = label(anomaly_map, features.shape[1:], options)
    if found is None:
        return "degenerate"
    samples = np.concatenate([found.anomalous, found.nominal])
    sides = np.ones(len(samples))
    sides[len(found.anomalous) :] = -1
    labels.ravel()[samples] = sides

    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float32)
    # A sample reads all channels of four cells: one pass to lay them side by side costs less than the misses.
    channels_last = np.ascontiguousarray(features.transpose(1, 2, 0)).transpose(2, 0, 1)
    sampled = bilinear.bilinear_sample(channels_last, (height, width), samples // width, samples % width)
    flat = features.reshape(len(features), -1).astype(np.float64)  # once: three sums over it follow
    centre, scale = np.zeros(len(flat)), np.ones(len(flat))
    if options.standardize:
        centre = flat.mean(1)
        square = np.einsum("cp,cp->c", flat, flat) / flat.shape[1]
        spread = np.sqrt(np.maximum(square - centre**2, 0))
        scale = 1 / np.where(spread > CONSTANT * np.sqrt(square), spread, 1)
        sampled -= centre.astype(sampled.dtype)
        sampled *= scale.astype(sampled.dtype)
    svm = linear_svm.fit_linear_svm(
        sampled, sides, C=options.C, loss=options.loss, tol=options.tol, max_iter=options.max_iter
    )
    coef, intercept = np.asarray(svm.coef, np.float64), svm.intercept
    if options.recentre:
        coef, intercept = _recentred(coef, intercept, sampled, len(found.anomalous))
    # A linear classifier commutes with bilinear interpolation, and standardising folds into it.
    weights = coef * scale
    cells = np.einsum("c,cp->p", weights, flat) + (intercept - np.einsum("c,c->", weights, centre))
    cells = cells.astype(np.float32).reshape(1, *features.shape[1:])
    decision[...] = bilinear.bilinear_upsample(cells, (height, width))[0]
    decision += (anomaly_map.astype(np.float32) - np.float32(found.level)) * np.float32(
        options.score_weight / (found.peak - found.level)
    )
    return "ok" if svm.converged else "not_converged"


def _recentred(coef: np.ndarray, intercept: float, sampled: np.ndarray, n_anomalous: int) -> tuple[np.ndarray, float]:
    """The classifier whose mean over the anomalous samples, which come first, is 1, and over the others -1."""
    high, low = (
        float(np.einsum("c,c->", coef, part.mean(0))) + intercept
        for part in (sampled[:n_anomalous], sampled[n_anomalous:])
    )
    if high - low <= CONSTANT:  # constant features: there is nothing to scale
        return coef, intercept
    return coef * (2 / (high - low)), (2 * intercept - high - low) / (high - low)
