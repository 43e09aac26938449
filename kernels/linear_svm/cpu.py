"""The linear SVM in C++: exact on a working set where support vectors are few, Newton's method where they are many.

Samples keep their precision: float32 is multiplied in float32 with sums in float64, and what is returned is checked in
float64. Cost: one read of X for each of 5 to 25 rounds and n_sv^2 * d / 2 multiply-adds by the working set, two
reads of the violating samples for each conjugate gradient step by Newton's method. kernels/cpp/src/svm_solver.hpp has
the rule that chooses.
"""

from __future__ import annotations

import numpy as np

from .. import arrays, native
from . import LinearSVMResult

ARRAYS = "numpy"
CHECKS_FINITE = True


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


def fit(
    X: np.ndarray,
    y: np.ndarray,
    *,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    sample_weight: np.ndarray | None = None,
    initial: np.ndarray | None = None,
) -> LinearSVMResult:
    """``n_iter`` counts working set rounds, Newton steps or epochs. `initial`: coef and intercept to start from."""
    X = X.astype(np.promote_types(X.dtype, np.float32), copy=False)
    most = min(max_iter, 2**31 - 1)
    try:
        coef, intercept, n_iter, gap, converged, *_ = native.core().fit_linear_svm(
            X, y, C, loss, tol, most, sample_weight, initial, native.threads()
        )
    except ValueError:
        arrays.check_finite(X, "X")  # says where
        raise
    return LinearSVMResult(coef, intercept, n_iter, gap, converged)
