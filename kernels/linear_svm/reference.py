"""The SVM as scikit-learn's liblinear solves it in float64, its tolerance tightened until the duality gap holds."""

from __future__ import annotations

import warnings

import numpy as np

from . import LinearSVMResult

ARRAYS = "numpy"


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
        quadratic = np.where(alpha > 0, alpha * (alpha / (2 * scale)), 0.0).sum()
    v, u = X.T @ (alpha * y), alpha @ y
    dual = alpha.sum() - 0.5 * (v @ v + u * u) - quadratic
    primal = objective(X, y, w, b, C, "squared_hinge", weight)
    return float((primal - dual) / primal) if primal > 0 else 0.0


def _out_of_range(X: np.ndarray, y: np.ndarray, weight: np.ndarray, hinge: bool) -> bool:
    """Whether squares that liblinear forms leave float64's range: it may then stop at once, or never."""
    with np.errstate(over="ignore", invalid="ignore"):
        size, slope = np.einsum("nd,nd->n", X, X).max(), np.abs(X.T @ (weight * y)).max()
    return not np.isfinite(size) if hinge else not (size < 1e60 and slope > 1e-60 and weight.sum() < 1e60)


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
    """Squared hinge: Newton in the primal. Hinge: coordinate descent in the dual.

    liblinear does not return its dual variables, so for the hinge the gap is not known (NaN): it is at most liblinear's
    tolerance, a bound of all projected gradients, times the sum of the weights, and that is what is held to `tol`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    n, hinge = len(y), loss == "hinge"
    max_iter = min(max_iter, 2**31 - 1)  # liblinear's integers
    weight = np.ones(n) if sample_weight is None else sample_weight
    total = C * float(weight.sum())
    augmented, signs = np.column_stack([X.astype(np.float64), np.ones(n)]), y
    if hinge:
        # liblinear stops where the largest and the least projected gradient are near each other, wherever both are: as
        # for two equal samples of opposite labels. One of zeros, which changes nothing, adds a gradient of 0.
        augmented = np.vstack([augmented, np.zeros_like(augmented[:1])])
        signs, weight = np.append(y, 1.0), np.append(weight, 1.0)
    if _out_of_range(augmented, signs, C * weight, hinge):
        coef = np.zeros(X.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            gap = float("nan") if hinge else relative_gap(X, y, coef, 0.0, C, sample_weight)
        return LinearSVMResult(coef, 0.0, 0, gap, gap <= tol)
    inner, tightest = tol, 1e-11 if hinge else 1e-10
    while True:
        inner = max(inner * 1e-3, tightest)
        model = LinearSVC(C=C, loss=loss, dual=hinge, tol=inner, max_iter=max_iter, fit_intercept=False, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(augmented, signs, sample_weight=weight)
        coef, intercept, n_iter = model.coef_[0, :-1], float(model.coef_[0, -1]), int(model.n_iter_)
        spent = n_iter >= max_iter
        if hinge:
            gap = float("nan")
            primal = objective(X, y, coef, intercept, C, loss, sample_weight)
            converged = not spent and inner * total <= tol * primal
        else:
            gap = relative_gap(X, y, coef, intercept, C, sample_weight)
            converged = gap <= tol
        if converged or spent or inner == tightest:
            return LinearSVMResult(coef, intercept, n_iter, gap, converged)
