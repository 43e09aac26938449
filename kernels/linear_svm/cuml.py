"""The SVM by cuML's `LinearSVC`: L-BFGS on the device, for comparison and where our own solver cannot run.

What cuML minimises has to be checked, not believed. Its source up to 2025 (``cpp/src/glm/qn/``: ``glm_svm.cuh``,
``glm_base.cuh``, ``qn_solvers.cuh``, ``qn_util.cuh``) says:

- The squared hinge is ``t * t``, its derivative that of ``t * t / 2``. The gradient vanishes at the optimum for C / 2,
  while the line search (Armijo, backtracking) compares values for C: it stops where the two disagree, at neither
  optimum, and reports convergence. Replaying that algorithm in float32 on Gaussian samples (90 x 40 and 600 x 64,
  C 1e-3) it ended 1.8 % and 0.08 % above the optimum however small `tol`, and within 1e-5 when asked for 2 C, whose
  gradient vanishes where it should; for C from 0.1 on both ended within 2e-4, at a `tol` of 1e-8. cuML itself has
  not been run here.
- With sample weights the loss is divided by their sum and its gradient by their number: they agree where the mean
  weight is 1, which is why `_train` moves the mean into C.
- The penalised intercept is a column of ones in a copy of `X`; the objective is divided by n, `tol` bounds half the
  squared norm of its gradient, relatively, and a tenth of it the change of its value over ten iterations.

`fit` therefore tries C and 2 C, keeps the solution whose objective - computed here, in float64 - is lower, tightens
`tol` until the duality gap of that one is small enough, and reports the gap and whether it was. A gap that stays above
`tol` is said (``converged=False``), never hidden. The capability probe fits four points: cuML imports without a GPU.

References
----------
cuML, ``cuml.svm.LinearSVC``: ``penalized_intercept=True`` is scikit-learn's ``intercept_scaling=1``; the input is
copied unless it is column-major.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch

from ..gpu_common.capability import no_cuda, not_while_capturing, reason_of
from . import LinearSVMResult

ARRAYS = "torch"
_TIGHTEST = 1e-9


def unavailable(device: str) -> str | None:
    """cuML imports without a GPU but cannot fit there: usable means that it has just fitted something."""
    if device != "cuda":
        return "it takes CUDA tensors, these arrays are on the host"
    return no_cuda() or _probe(torch.cuda.current_device())


@functools.cache
def _probe(device: int) -> str | None:
    """Why cuML does not fit on the current device, number `device` (the key of the cache); None if it does."""
    try:
        import cuml  # noqa: F401
    except Exception as error:  # a RAPIDS library that misses its driver raises what it likes
        return f"cuML is not usable ({type(error).__name__}: {error}); pip install 'ttt4as_fast[cuml]'"
    not_while_capturing()
    try:
        X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [2.0, 2.0]], device="cuda")
        coef, _, _ = _train(
            X, np.array([-1.0, 1.0, -1.0, 1.0]), None, C=1.0, loss="squared_hinge", tol=1e-4, max_iter=100
        )
        return None if bool(np.isfinite(coef).all()) else "cuML fitted a non-finite SVM here"
    except Exception as error:
        return reason_of(error, "cuML")


def fit(
    X: torch.Tensor,
    y: np.ndarray,
    *,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    sample_weight: np.ndarray | None = None,
) -> LinearSVMResult:
    """(n, d) samples and their signs -> the solution; `coef` is a float64 tensor on the device.

    For the hinge cuML gives no dual variables: the gap is NaN and convergence is that of its iterations.

    Raises
    ------
    ValueError
        `X` holds a non-finite value, or products of its rows overflow float32.
    """
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X: expected finite values")
    samples = X.double()
    best: tuple[float, float, np.ndarray, float, int] | None = None
    inner = tol
    while True:
        for factor in (1.0, 2.0) if loss == "squared_hinge" else (1.0,):
            coef, intercept, n_iter = _train(X, y, sample_weight, C=factor * C, loss=loss, tol=inner, max_iter=max_iter)
            primal, gap = objective(samples, y, coef, intercept, C, loss, sample_weight)
            if best is None or primal < best[0] or math.isnan(best[0]):
                best = (primal, gap, coef, intercept, n_iter)
        assert best is not None
        primal, gap, coef, intercept, n_iter = best
        if not math.isfinite(primal):
            raise ValueError("X: expected finite values whose products, times C, stay within float32's range")
        done = gap <= tol if loss == "squared_hinge" else inner < tol
        if done or inner <= _TIGHTEST or n_iter >= max_iter:
            converged = gap <= tol if loss == "squared_hinge" else n_iter < max_iter
            return LinearSVMResult(torch.from_numpy(coef).to(X.device), intercept, n_iter, gap, converged)
        inner = max(_TIGHTEST, inner * 1e-2)


def objective(
    samples: torch.Tensor,
    y: np.ndarray,
    coef: np.ndarray,
    intercept: float,
    C: float,
    loss: str,
    sample_weight: np.ndarray | None = None,
) -> tuple[float, float]:
    """The primal objective of `fit_linear_svm` in float64 and, for the squared hinge, the relative duality gap."""
    w = torch.from_numpy(np.append(coef, intercept)).to(samples)
    sign = torch.from_numpy(y).to(samples)
    scale = C * (torch.ones_like(sign) if sample_weight is None else torch.from_numpy(sample_weight).to(samples))
    margin = (1 - sign * (samples @ w[:-1] + w[-1])).clamp_min(0)
    if loss == "hinge":
        return float(0.5 * w @ w + scale @ margin), float("nan")
    primal = 0.5 * w @ w + scale @ margin**2
    alpha = 2 * scale * margin
    force = torch.cat(((alpha * sign) @ samples, (alpha @ sign)[None]))
    # sum of alpha^2 / (4 C s) is sum of C s margin^2
    dual = alpha.sum() - 0.5 * force @ force - scale @ margin**2
    return float(primal), float((primal - dual) / primal) if float(primal) > 0 else 0.0


def _train(
    X: torch.Tensor, y: np.ndarray, sample_weight: np.ndarray | None, **options: Any
) -> tuple[np.ndarray, float, int]:
    from cuml.svm import LinearSVC

    column_major = X.float().t().contiguous().t()
    weight = None
    if sample_weight is not None:
        mean = float(sample_weight.mean())
        weight, options["C"] = (sample_weight / mean).astype(np.float32), options["C"] * mean
    model = LinearSVC(penalized_intercept=True, fit_intercept=True, output_type="numpy", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: the gap decides
        torch.cuda.current_stream(X.device).synchronize()  # cuML reads on a stream of its own
        model.fit(column_major, (y > 0).astype(np.float32), sample_weight=weight)
    n_iter = getattr(model, "n_iter_", 0)
    return (
        np.asarray(model.coef_, np.float64).ravel(),
        float(np.asarray(model.intercept_).ravel()[0]),
        int(np.max(np.asarray(n_iter))),
    )
