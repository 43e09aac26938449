"""The linear SVM of scikit-learn's `LinearSVC`, solved to a stated duality gap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import arrays
from ..dispatch import Operation, checks_finite

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("linear_svm", host=("cpu", "reference"), cuda=("gpu", "cuml", "cpu", "reference"))
LOSSES = ("squared_hinge", "hinge")


class LinearSVMResult(NamedTuple):
    """A fitted binary linear SVM: ``decision = X @ coef + intercept``."""

    coef: Array
    """(d,) float64 (the working precision of the backend for tensors)."""
    intercept: float
    n_iter: int
    """Iterations in the backend's own unit; comparable only within one backend."""
    gap: float
    """(primal - dual) / primal at the returned solution; NaN for the hinge by ``reference`` and ``cuml``."""
    converged: bool
    """Whether the backend's stopping rule was met within `max_iter`."""


def fit_linear_svm(
    X: Array,
    y: Any,
    C: float = 1e-3,
    loss: str = "squared_hinge",
    tol: float = 1e-4,
    max_iter: int = 1000,
    sample_weight: Any = None,
    *,
    backend: str = "auto",
) -> LinearSVMResult:
    """Fit a binary linear SVM: minimise 1/2 (|w|^2 + b^2) + C sum_i s_i L(1 - y_i (w.x_i + b)).

    L(m) is max(0, m)^2 for ``"squared_hinge"`` and max(0, m) for ``"hinge"``. The intercept is penalised, as in
    `sklearn.svm.LinearSVC` with ``intercept_scaling=1``. Deterministic: same input, same bits.

    Parameters
    ----------
    X : array or tensor, (n, d)
        Samples; float16, bfloat16, float32 or float64.
    y : array or tensor, (n,)
        Two distinct labels; the larger one is the positive class. Any orderable dtype.
    C : float
        Weight of the losses, > 0.
    loss : {"squared_hinge", "hinge"}
    tol : float
        Relative duality gap (primal - dual) / primal at which to stop, > 0.
    max_iter : int
        Limit on iterations, >= 1; past it the last iterate is returned with ``converged=False``.
    sample_weight : array or tensor, (n,), optional
        Factors s_i >= 0 of C, not all zero in either class.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    LinearSVMResult

    Raises
    ------
    ValueError, TypeError
        Wrong ranks or lengths, non-finite values, other than two classes, an option out of range, unknown backend.
    RuntimeError
        `backend` names one that cannot serve here.

    Notes
    -----
    Memory beside `X`: by ``cpu`` at most 1.1 times the bytes of `X` in its working precision, 200 MiB, and 300 bytes a
    sample and a feature, of which a thread keeps up to 16 MiB for its next fit; 20,000 samples of 500 features take
    5 MiB. The working precision is float64 for float64, else float32; `X` is copied to it unless it has it, with the
    features of a sample side by side. By ``reference`` about 33 bytes for each value of `X`. By ``gpu`` a copy of `X`
    in float64 (up to 1,024 samples in float32, unless `X` is) and what does not grow with samples times features.

    References
    ----------
    Hsieh et al., A dual coordinate descent method for large-scale linear SVM, ICML 2008.
    """
    X = arrays.as_float_array(X, "X", (2,))
    signs = _signs(y, X.shape[0])
    C = arrays.check_float(C, "C", 0.0, open_low=True)
    loss = arrays.check_option(loss, "loss", LOSSES)
    tol = arrays.check_float(tol, "tol", 0.0, open_low=True)
    max_iter = arrays.check_int(max_iter, "max_iter", 1)
    weight = _weights(sample_weight, signs)
    if arrays.device_type(X) == "cpu" and not checks_finite(OPERATION.resolve(backend, "cpu")):
        arrays.check_finite(arrays.to_numpy(X), "X")
    return OPERATION.run(
        "fit", {"X": X, "y": signs}, backend, C=C, loss=loss, tol=tol, max_iter=max_iter, sample_weight=weight
    )


def _signs(y: Any, n: int) -> np.ndarray:
    """Labels as float64 -1 and +1 on the host."""
    arrays.check_dense(y, "y")
    labels = arrays.to_numpy(y) if arrays.is_tensor(y) else arrays.as_array(y, "y")
    if labels.shape != (n,):
        raise ValueError(f"y: expected shape ({n},) as X has {n} samples, got {labels.shape}")
    if labels.dtype.kind == "f":
        arrays.check_finite(labels, "y")
    numbers = labels.dtype.kind in "biuf"
    try:
        low, high = (labels.min(), labels.max()) if numbers else np.unique(labels)[[0, -1]]
    except TypeError as error:  # a text beside None
        raise TypeError(f"y: expected labels of one kind, which have an order ({error})") from None
    positive = labels == high
    if low == high or not (positive | (labels == low)).all():
        classes = np.unique(labels)
        raise ValueError(f"y: expected two classes, got {len(classes)}: {classes[:5].tolist()}")
    return np.where(positive, 1.0, -1.0)


def _weights(sample_weight: Any, signs: np.ndarray) -> np.ndarray | None:
    """Sample weights as float64 on the host; None stays None."""
    if sample_weight is None:
        return None
    weight = arrays.to_numpy(arrays.as_float_array(sample_weight, "sample_weight", (1,))).astype(np.float64)
    if weight.shape != signs.shape:
        raise ValueError(f"sample_weight: expected shape {signs.shape} as y, got {weight.shape}")
    arrays.check_finite(weight, "sample_weight")
    if weight.min() < 0:
        raise ValueError(f"sample_weight: expected values >= 0, got {weight.min()}")
    if not (weight[signs > 0].any() and weight[signs < 0].any()):
        raise ValueError("sample_weight: expected a positive weight in each class, got a class with none")
    return weight
