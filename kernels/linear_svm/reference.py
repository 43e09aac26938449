"""The SVM as scikit-learn's liblinear solves it in float64, its tolerance tightened until the duality gap holds."""

from __future__ import annotations

import warnings

import numpy as np

from . import LinearSVMResult

ARRAYS = "numpy"
_TIGHTEST = 1e-10


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


def objective(
    X: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, C: float, loss: str, weight: np.ndarray | None = None
) -> float:
    """The primal objective, in float64."""
    margin = np.maximum(0.0, 1.0 - y * (X.astype(np.float64) @ w + b))
    losses = margin**2 if loss == "squared_hinge" else margin
    return float(0.5 * (w @ w + b * b) + C * (losses if weight is None else weight * losses).sum())


def relative_gap(
    X: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, C: float, weight: np.ndarray | None = None
) -> float:
    """(primal - dual) / primal for the squared hinge, whose primal point gives a dual one: alpha = 2 C s max(0, m)."""
    X = X.astype(np.float64)
    scale = 2 * C * (np.ones(len(y)) if weight is None else weight)
    alpha = scale * np.maximum(0.0, 1.0 - y * (X @ w + b))
    with np.errstate(divide="ignore", invalid="ignore"):
        quadratic = np.where(alpha > 0, alpha**2 / (2 * scale), 0.0).sum()
    v, u = X.T @ (alpha * y), alpha @ y
    dual = alpha.sum() - 0.5 * (v @ v + u * u) - quadratic
    primal = objective(X, y, w, b, C, "squared_hinge", weight)
    return float((primal - dual) / primal) if primal > 0 else 0.0


def fit(
    X: np.ndarray,
    y: np.ndarray,
    *,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    sample_weight: np.ndarray | None = None,
) -> LinearSVMResult:
    """Squared hinge: Newton in the primal. Hinge: liblinear's dual, at a tolerance 1000 times below `tol`.

    liblinear does not return its dual variables, so for the hinge the gap is not known (NaN) and convergence is
    liblinear's own word.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    X = X.astype(np.float64)
    max_iter = min(max_iter, 2**31 - 1)  # liblinear's integers
    inner = tol
    while True:
        inner = max(inner * 1e-3, _TIGHTEST)
        model = LinearSVC(C=C, loss=loss, dual=loss == "hinge", tol=inner, max_iter=max_iter, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X, y, sample_weight=sample_weight)
        coef, intercept, n_iter = model.coef_[0], float(model.intercept_[0]), int(model.n_iter_)
        if loss == "hinge":
            return LinearSVMResult(coef, intercept, n_iter, float("nan"), n_iter < max_iter)
        gap = relative_gap(X, y, coef, intercept, C, sample_weight)
        if gap <= tol or n_iter >= max_iter or inner == _TIGHTEST:
            return LinearSVMResult(coef, intercept, n_iter, gap, gap <= tol)
