"""When a number may be printed: a backend is held to the reference on the very input it was timed on.

Each check returns a `Verdict`; a runner prints no speed-up of one that has not passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CLOSE = 1e-4  # masks may differ only where |decision| is below this
DENSE_PIXELS = 320 * 320
"""Pixels of the largest map whose dense features the reference can hold; of larger ones some rows are checked."""
_ROWS = 24


@dataclass(frozen=True)
class Verdict:
    """Whether an output agrees with the reference, and by how much it misses.

    Attributes
    ----------
    passed : bool
    detail : str
        What was compared and the largest difference.
    """

    passed: bool
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", bool(self.passed))  # comparisons of arrays give NumPy's

    def __bool__(self) -> bool:
        return self.passed


def check_segment(
    anomaly_map: np.ndarray,
    features: np.ndarray,
    mask: Any,
    decision: Any,
    labels: Any,
    seed: int = 0,
    n_nominal: int = 100,
) -> Verdict:
    """One image's segmentation against the method stated densely in float64, with its SVM solved to 1e-8.

    Labels must be the same; masks may differ where ``|decision| < 1e-4`` and where the decision itself is within the
    accuracy that the default tolerance (a duality gap of 1e-4) buys. Large maps: on 24 rows, drawn by `seed`.
    """
    from ttt4as_fast import kernels
    from ttt4as_fast.kernels.segment import nominal_candidates, reference

    labels, mask, decision = (np.asarray(x) for x in (labels, mask, decision))
    height, width = anomaly_map.shape
    candidates, limit = nominal_candidates((height, width), n_nominal)
    expected = reference.pseudo_label(anomaly_map, 99.0, 5, candidates, limit)[0].ravel()
    wrong = int((labels.ravel() != expected).sum())
    if wrong:
        return Verdict(False, f"{wrong} pseudo-labels differ from the reference's")
    deep = features.astype(np.float64)
    places = np.flatnonzero(expected)
    samples = kernels.bilinear_sample(deep, (height, width), places // width, places % width, backend="reference")
    svm = kernels.fit_linear_svm(samples, expected[places], tol=1e-8, max_iter=100_000, backend="reference")
    rows = np.arange(height)
    if height * width > DENSE_PIXELS:
        rows = np.sort(np.random.default_rng(seed).choice(height, min(_ROWS, height), replace=False))
    truth = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        line = kernels.bilinear_sample(
            deep, (height, width), np.full(width, row), np.arange(width), backend="reference"
        )
        truth[i] = line @ svm.coef + svm.intercept
    # A gap of 1e-4 leaves |w - w*|^2 <= 2 * gap * objective: what that can do to a decision, at the largest feature.
    objective = _objective(samples, expected[places], svm.coef, svm.intercept, 1e-3)
    reach = np.sqrt(2e-4 * objective) * float(np.sqrt((deep**2).sum(axis=0).max() + 1))
    miss = float(np.abs(decision[rows] - truth).max())
    flipped = (mask[rows] != (truth > 0)) & (np.abs(truth) > max(CLOSE, miss))
    passed = miss <= reach + CLOSE and not flipped.any() and bool((mask == (decision > 0)).all())
    where = "all pixels" if len(rows) == height else f"{len(rows)} of {height} rows"
    share = float((mask[rows] != (truth > 0)).mean())
    return Verdict(passed, f"decision within {miss:.1e} on {where}, masks differ on {share:.1e} of them")


def check_mask(mask: np.ndarray, reference: np.ndarray, most: float = 0.02) -> Verdict:
    """Two masks that need not be the same to the bit: the share of pixels on which they differ."""
    share = float((np.asarray(mask) != np.asarray(reference)).mean())
    return Verdict(share <= most, f"masks differ on {share:.1e} of the pixels")


def check_svm(
    X: np.ndarray, y: np.ndarray, coef: Any, intercept: float, C: float, optimum: float, most: float = 1e-4
) -> Verdict:
    """The objective, in float64, against the optimum: at most `most` above it, relatively."""
    excess = _objective(X, y, np.asarray(coef, np.float64), float(intercept), C) / optimum - 1
    return Verdict(excess <= most, f"objective {excess:+.1e} of the optimum")


def svm_optimum(X: np.ndarray, y: np.ndarray, C: float) -> float:
    """The least objective that any solver here finds: scikit-learn's and the package's, both at 1e-8, in float64."""
    from ttt4as_fast import kernels

    found = []
    for backend in ("reference", "auto"):
        svm = kernels.fit_linear_svm(X.astype(np.float64), y, C=C, tol=1e-8, max_iter=100_000, backend=backend)
        found.append(_objective(X, y, svm.coef, svm.intercept, C))
    return min(found)


def _objective(X: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, C: float) -> float:
    from ttt4as_fast.kernels.linear_svm.reference import objective

    return objective(X, y, w, b, C, "squared_hinge")


def check_knn(
    query: np.ndarray, bank: np.ndarray, distances: Any, indices: Any, n_rows: int = 64, seed: int = 0
) -> Verdict:
    """Distances within 1e-5, relatively, of float64 brute force, and the neighbours those of it up to ties.

    On `n_rows` queries drawn by `seed`.
    """
    distances, indices = np.asarray(distances, np.float64), np.asarray(indices)
    k = distances.shape[1]
    rows = np.sort(np.random.default_rng(seed).choice(len(query), min(n_rows, len(query)), replace=False))
    exact_bank = bank.astype(np.float64)
    worst, wrong = 0.0, 0
    for row in rows:
        exact = np.sqrt(((exact_bank - query[row].astype(np.float64)) ** 2).sum(axis=1))
        nearest = np.sort(np.partition(exact, k - 1)[:k])
        worst = max(worst, float((np.abs(distances[row] - nearest) / np.maximum(nearest, 1e-12)).max()))
        wrong += int((exact[indices[row]] > nearest * (1 + 1e-6) + 1e-9).sum())
    passed = worst <= 1e-5 and not wrong
    return Verdict(passed, f"distances within {worst:.1e}, {wrong} other neighbours, on {len(rows)} queries")


def check_coreset(picks: Any, reference: np.ndarray) -> Verdict:
    """The picks in their order against plain greedy's, as many as that was run for; equal distances may swap."""
    picks = np.asarray(picks)[: len(reference)]
    wrong = int((picks != reference).sum())
    return Verdict(wrong == 0, f"{wrong} of the first {len(reference)} picks differ from plain greedy's")


def check_equal(found: Any, reference: Any, tolerance: float = 0.0) -> Verdict:
    """The largest difference of two arrays, relative to the largest value of the reference."""
    found, reference = np.asarray(found), np.asarray(reference)
    if found.shape != reference.shape:
        return Verdict(False, f"shape {found.shape} instead of {reference.shape}")
    if reference.dtype == bool:
        wrong = int((found != reference).sum())
        return Verdict(wrong == 0, f"{wrong} pixels differ")
    miss = float(np.abs(found.astype(np.float64) - reference).max() / max(np.abs(reference).max(), 1e-30))
    return Verdict(miss <= tolerance, f"within {miss:.1e} of the largest value")
