"""The robust preset, step by step and dense: the (C, H, W) upsampled features are built and standardised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .. import bilinear, linear_svm
from ..segment import STATUSES
from . import CONSTANT, RobustOptions
from .labels import label, power_of_two

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def segment_one(
    anomaly_map: np.ndarray, features: np.ndarray, options: RobustOptions
) -> tuple[np.ndarray, np.ndarray, str]:
    """(H, W) and (C, h, w) -> decision (H, W) float64, labels (H, W) int8, status."""
    anomaly_map, features = anomaly_map.astype(np.float64), features.astype(np.float64)
    unit = power_of_two(anomaly_map)  # exact: what follows is the same, and squares of any scores stay in range
    anomaly_map = anomaly_map * unit
    if options.nominal_level is not None:
        most = np.finfo(np.float64).max
        options = replace(options, nominal_level=min(max(options.nominal_level * unit, -most), most))
    labels = np.zeros(anomaly_map.size, np.int8)
    found = label(anomaly_map, features.shape[1:], options)
    if found is None:
        return np.zeros(anomaly_map.shape), labels.reshape(anomaly_map.shape), "degenerate"
    labels[found.pixels] = found.sides
    if options.standardize:
        most = np.abs(features).max((1, 2), keepdims=True)  # squares of enormous or tiny values leave the range
        features = features / np.where(most > 0, most, 1)
        spread = features.std((1, 2), keepdims=True)
        size = np.sqrt((features**2).mean((1, 2), keepdims=True))
        features = (features - features.mean((1, 2), keepdims=True)) / np.where(spread > CONSTANT * size, spread, 1)
    dense = bilinear.bilinear_upsample(features, anomaly_map.shape, backend="reference").reshape(len(features), -1).T
    svm = linear_svm.fit_linear_svm(
        dense[found.pixels],
        found.sides,
        sample_weight=found.weights,
        C=options.C,
        loss=options.loss,
        tol=options.tol,
        max_iter=options.max_iter,
        backend="reference",
    )
    decision = dense @ svm.coef + svm.intercept
    if options.recentre:
        high, low = (
            np.average(decision[found.pixels][some], weights=found.weights[some])
            for some in (found.sides > 0, found.sides < 0)
        )
        if high - low > CONSTANT:
            decision = (2 * decision - high - low) / (high - low)
    decision = decision.reshape(anomaly_map.shape)
    decision += options.score_weight * (anomaly_map - found.level) / (found.peak - found.level)
    return decision, labels.reshape(anomaly_map.shape), "ok" if svm.converged else "not_converged"


def segment(
    anomaly_map: np.ndarray, features: np.ndarray, *, skip: np.ndarray | None, options: RobustOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8."""
    decision = np.zeros(anomaly_map.shape, np.float32)
    labels = np.zeros(anomaly_map.shape, np.int8)
    codes = np.full(len(anomaly_map), STATUSES.index("nominal"), np.int8)
    for i in range(len(anomaly_map)):
        if skip is None or not skip[i]:
            decision[i], labels[i], status = segment_one(anomaly_map[i], features[i], options)
            codes[i] = STATUSES.index(status)
    return decision > 0, decision, labels, codes
