"""The SVM on the device: the batched solver of ``gpu_common/svm.cu``, and Newton over the samples of a large problem.

Up to `GRAM_CAPACITY` samples the solver works with their Gram matrix in one block. More samples are better served by
all of the device: Newton's method with conjugate gradients in the primal, in float64, a few passes over `X` a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ..gpu_common.capability import cuda_source_unavailable as unavailable
from ..gpu_common.cuda import shared_memory_limit
from ..gpu_common.svm import GRAM_CAPACITY, Capacity, train
from . import LinearSVMResult

__all__ = ["ARRAYS", "fit", "unavailable"]

ARRAYS = "torch"
_CG_LIMIT, _SEARCH_LIMIT, _SMOOTHING = 400, 40, 0.25


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
    """(n, d) samples and their signs -> the solution; `coef` is a float32 (large n: float64) tensor on the device.

    Raises
    ------
    ValueError
        `X` holds a non-finite value, or products of its rows overflow float32 (large n: float64).
    """
    if len(X) > GRAM_CAPACITY:
        return fit_primal(X, y, C=C, loss=loss, tol=tol, max_iter=max_iter, sample_weight=sample_weight)
    device = X.device
    n, dim = X.shape
    counts = torch.tensor([[n, 0, 0]], dtype=torch.int32, device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    signs = torch.from_numpy(y.astype(np.int8)).to(device)
    scales = None if sample_weight is None else torch.from_numpy(sample_weight).to(device)
    capacity = Capacity(n, dim, shared_limit=shared_memory_limit(device))
    basis = X.float().contiguous()[None]
    trained = train(
        basis, counts, status, capacity, C=C, loss=loss, tol=tol, max_iter=max_iter, signs=signs, scales=scales
    )
    code = int(status)
    if code == 4:
        raise ValueError("X: expected finite values whose products stay within float32's range")
    gap, n_iter, intercept = trained.report[0].tolist()
    return LinearSVMResult(trained.weights[0], intercept, int(n_iter), gap, code == 0)


def fit_primal(
    X: torch.Tensor,
    y: np.ndarray,
    *,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    sample_weight: np.ndarray | None = None,
) -> LinearSVMResult:
    """`fit` for many samples: the same Newton steps over (w, b) in float64, the gap checked on the host.

    Holds a float64 copy of `X`, n * d * 8 bytes.
    """
    samples = X.double()
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("X: expected finite values")
    sign = torch.from_numpy(y).to(samples)
    scale = torch.ones_like(sign) if sample_weight is None else torch.from_numpy(sample_weight).to(samples)
    hinge = loss == "hinge"
    w = samples.new_zeros(samples.shape[1] + 1)  # the intercept last
    mu, gap, n_iter = 1.0, float("inf"), 0

    def decide(v: torch.Tensor) -> torch.Tensor:
        return samples @ v[:-1] + v[-1]

    def gather(a: torch.Tensor) -> torch.Tensor:
        return torch.cat((a @ samples, a.sum()[None]))

    while True:
        slope = scale * (C / mu if hinge else 2 * C)
        cap = scale * C if hinge else torch.full_like(scale, float("inf"))
        f = decide(w)
        margin = 1 - sign * f
        alpha, curvature = _derivatives(margin, slope, cap)
        conjugate = torch.where(slope > 0, alpha**2 / (2 * slope), 0).sum()
        force = gather(alpha * sign)
        smooth = 0.5 * w @ w + (alpha * margin).sum() - conjugate
        smooth_dual = alpha.sum() - 0.5 * force @ force - conjugate
        primal = 0.5 * w @ w + C * (scale * margin.clamp_min(0)).sum() if hinge else smooth
        dual = smooth_dual + conjugate if hinge else smooth_dual
        values = torch.stack((primal, dual, smooth, smooth_dual)).tolist()
        if math.isnan(values[0]):
            raise ValueError("X: expected finite values whose products, times C, stay within float64's range")
        gap = (values[0] - values[1]) / values[0] if values[0] > 0 else 0.0
        if gap <= tol or n_iter >= max_iter:
            return LinearSVMResult(w[:-1], float(w[-1]), n_iter, gap, gap <= tol)
        n_iter += 1
        if hinge and values[2] - values[3] <= _SMOOTHING * tol * values[2]:
            mu *= _SMOOTHING
            continue

        def operator(v: torch.Tensor, curvature: torch.Tensor = curvature) -> torch.Tensor:
            return v + gather(curvature * decide(v))

        step = _direction(force - w, operator, 0.1 if n_iter < 12 else 0.01)
        change = decide(step)
        w = w + _line_search(w, step, sign, f, change, slope, cap) * step


def _derivatives(margin: torch.Tensor, slope: torch.Tensor, cap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second derivative of each loss, a Huber-smoothed hinge or, without a cap, the squared one."""
    return (
        torch.minimum((slope * margin).clamp_min(0), cap),
        torch.where((margin > 0) & (slope * margin < cap), slope, 0),
    )


def _direction(residual: torch.Tensor, operator: Callable[[torch.Tensor], torch.Tensor], eta: float) -> torch.Tensor:
    """Conjugate gradients until the residual has shrunk by `eta`."""
    x, r, p = torch.zeros_like(residual), residual, residual
    rho = float(r @ r)
    enough = eta * eta * rho
    for _ in range(_CG_LIMIT):
        if rho <= enough:
            break
        q = operator(p)
        a = rho / float(p @ q)
        x, r = x + a * p, r - a * q
        rho, previous = float(r @ r), rho
        p = r + rho / previous * p
    return x


def _line_search(
    w: torch.Tensor,
    step: torch.Tensor,
    sign: torch.Tensor,
    f: torch.Tensor,
    change: torch.Tensor,
    slope: torch.Tensor,
    cap: torch.Tensor,
) -> float:
    """Where the objective along `step` is least: its derivative is piecewise linear, Newton within a bracket.

    `f` are the decisions at `w`, `change` those of `step`; `slope` and `cap` are the losses'.
    """
    linear, quadratic = float(w @ step), float(step @ step)

    def along(t: float) -> tuple[float, float]:
        margin = 1 - sign * (f + t * change)
        alpha, curvature = _derivatives(margin, slope, cap)
        sums = torch.stack((-(alpha * sign * change).sum(), (curvature * change**2).sum())).tolist()
        return linear + t * quadratic + sums[0], quadratic + sums[1]

    start = abs(along(0.0)[0])
    low, high, t = 0.0, float("inf"), 1.0
    for _ in range(_SEARCH_LIMIT):
        gradient, curvature = along(t)
        if abs(gradient) <= 0.01 * start:
            break
        low, high = (low, t) if gradient > 0 else (t, high)
        following = t - gradient / curvature
        if not low < following < high:
            following = 0.5 * (low + high) if high < float("inf") else 2 * t
        t = following
    return t
