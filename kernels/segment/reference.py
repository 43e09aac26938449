"""The method, step by step and dense: the (C, H, W) upsampled features are built, as the paper's recipe does."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import bilinear, linear_svm, peaks
from . import STATUSES

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def pseudo_label(
    anomaly_map: np.ndarray, percentile: float, neighbor_radius: int, candidates: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (H, W) int8 of one map, and the flat indices of the nominal samples in the order they are taken."""
    peak = peaks.local_maxima(anomaly_map, percentile, backend="reference")
    anomalous = peaks.dilate(peak, neighbor_radius, backend="reference").ravel()
    nominal = candidates[~anomalous[candidates]][:limit]
    labels = anomalous.astype(np.int8)
    labels[nominal] = -1
    return labels.reshape(anomaly_map.shape), nominal


def segment_one(
    anomaly_map: np.ndarray,
    features: np.ndarray,
    *,
    percentile: float,
    neighbor_radius: int,
    candidates: np.ndarray,
    limit: int,
    **svm_options: Any,
) -> tuple[np.ndarray, np.ndarray, str]:
    """(H, W) and (C, h, w) -> decision (H, W) float64, labels (H, W) int8, status."""
    labels, nominal = pseudo_label(anomaly_map, percentile, neighbor_radius, candidates, limit)
    anomalous = np.flatnonzero(labels == 1)
    if anomaly_map.min() == anomaly_map.max() or not len(anomalous) or not len(nominal):
        return np.zeros(anomaly_map.shape), labels, "degenerate"
    dense = bilinear.bilinear_upsample(features.astype(np.float64), anomaly_map.shape, backend="reference")
    dense = dense.reshape(len(features), -1).T
    samples = np.concatenate([anomalous, nominal])
    svm = linear_svm.fit_linear_svm(dense[samples], labels.ravel()[samples], backend="reference", **svm_options)
    decision = dense @ svm.coef + svm.intercept
    return decision.reshape(anomaly_map.shape), labels, "ok" if svm.converged else "not_converged"


def segment(
    anomaly_map: np.ndarray, features: np.ndarray, *, skip: np.ndarray | None, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8."""
    decision = np.zeros(anomaly_map.shape, np.float32)
    labels = np.zeros(anomaly_map.shape, np.int8)
    codes = np.full(len(anomaly_map), STATUSES.index("nominal"), np.int8)
    for i in range(len(anomaly_map)):
        if skip is None or not skip[i]:
            decision[i], labels[i], status = segment_one(anomaly_map[i], features[i], **options)
            codes[i] = STATUSES.index(status)
    return decision > 0, decision, labels, codes
