"""The SVM on the device: its objective against scikit-learn's at its tightest."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.kernels.linear_svm import reference

CASES = [  # samples, features, C, loss
    (2, 1, 1e-3, "squared_hinge"),
    (7, 3, 1.0, "squared_hinge"),
    (90, 40, 1e-3, "squared_hinge"),
    (40, 100, 10.0, "squared_hinge"),
    (30, 12, 0.1, "hinge"),
]


def problem(rng, n, dim):
    X = (3 * rng.standard_normal((n, dim)) + 1).astype(np.float32)
    y = np.where(rng.random(n) < 0.4, 1, -1)
    y[:2] = 1, -1
    return X, y


def excess(X, y, fitted, C, loss, weight) -> float:
    """How far above the optimum its objective is, relatively."""
    best = reference.fit(X, y, C=C, loss=loss, tol=1e-9, max_iter=1_000_000, sample_weight=weight)
    coef = fitted.coef.double().cpu().numpy()
    got = reference.objective(X, y, coef, fitted.intercept, C, loss, weight)
    return got / reference.objective(X, y, best.coef, best.intercept, C, loss, weight) - 1


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("n", "dim", "C", "loss"), CASES)
def test_batched_solver(device, rng, n, dim, C, loss, weighted):
    X, y = problem(rng, n, dim)
    weight = rng.uniform(0.1, 2, n) if weighted else None
    fitted = kernels.fit_linear_svm(
        torch.from_numpy(X).to(device), y, C=C, loss=loss, sample_weight=weight, backend="gpu"
    )
    assert fitted.converged and fitted.gap <= 1e-4 and fitted.coef.device.type == device.type
    assert excess(X, y, fitted, C, loss, weight) < (1e-4 if loss == "hinge" else 1e-6)


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize(
    ("offset", "C", "loss"),
    [(100, 1.0, "squared_hinge"), (1000, 1e-3, "squared_hinge"), (300, 0.1, "hinge"), (1e4, 1e-3, "squared_hinge")],
)
def test_samples_far_from_zero(device, rng, offset, C, loss):
    """Products of rows, rounded to float32, say little of what tells the rows apart: their gap was below 0."""
    X, y = problem(rng, 30, 12)
    X = X / 3 + np.float32(offset)
    fitted = kernels.fit_linear_svm(torch.from_numpy(X).to(device), y, C=C, loss=loss, backend="gpu")
    assert fitted.converged and -1e-9 < fitted.gap <= 1e-4
    best = kernels.fit_linear_svm(X.astype(np.float64), y, C=C, loss=loss, tol=1e-7, backend="cpu")
    got = reference.objective(X, y, fitted.coef.double().cpu().numpy(), fitted.intercept, C, loss, None)
    assert best.converged
    assert got / reference.objective(X, y, best.coef, best.intercept, C, loss, None) - 1 < 3e-4  # float32 weights


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
def test_a_tolerance_beyond_arithmetic_ends(device, rng, loss):
    X, y = problem(rng, 20, 3)
    fitted = kernels.fit_linear_svm(torch.from_numpy(X).to(device), y, C=0.1, loss=loss, tol=1e-18, backend="gpu")
    assert abs(fitted.gap) < 1e-9 and fitted.n_iter < 200
    assert fitted.converged == (fitted.gap <= 1e-18)


@pytest.mark.usefixtures("cuda_source")
def test_samples_at_any_address(device, rng):
    """Copies of 16 bytes at a time are for addresses that are multiples of it; the result does not depend on it."""
    X, y = problem(rng, 40, 64)
    whole = torch.from_numpy(X).float().to(device)
    shifted = torch.empty(whole.numel() + 1, device=device)[1:].view_as(whole).copy_(whole)
    fitted = [kernels.fit_linear_svm(x, y, C=1e-3, backend="gpu") for x in (whole, shifted)]
    assert shifted.data_ptr() % 16 and torch.equal(fitted[0].coef, fitted[1].coef)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("n", "dim", "C", "loss"), [*CASES, (1500, 7, 1e-3, "squared_hinge"), (300, 5, 1.0, "hinge")])
def test_primal_solver(device, rng, n, dim, C, loss, weighted):
    from ttt4as_fast.kernels.linear_svm import gpu

    X, y = problem(rng, n, dim)
    weight = rng.uniform(0.1, 2, n) if weighted else None
    samples, signs = torch.from_numpy(X).to(device), y.astype(np.float64)
    fit = gpu.fit if n > 1024 else gpu.fit_primal
    fitted = fit(samples, signs, C=C, loss=loss, tol=1e-7, max_iter=1000, sample_weight=weight)
    assert fitted.converged and fitted.coef.dtype == torch.float64
    assert excess(X, y, fitted, C, loss, weight) < 1e-6


@pytest.mark.usefixtures("cuda_source")
def test_limits(device, rng):
    X, y = problem(rng, 30, 4)
    samples = torch.from_numpy(X).to(device)
    early = kernels.fit_linear_svm(samples, y, C=10.0, max_iter=1, backend="gpu")
    assert not early.converged and early.n_iter == 1 and early.gap > 1e-4
    samples[3, 2] = float("nan")
    with pytest.raises(ValueError, match="X: expected finite"):
        kernels.fit_linear_svm(samples, y, backend="gpu")
    with pytest.raises(ValueError, match="X: expected finite"):
        kernels.fit_linear_svm(samples.repeat(40, 1), np.tile(y, 40), backend="gpu")


@pytest.mark.parametrize(("scale", "C"), [(1e150, 1e-3), (1.0, 1e150)])
def test_many_samples_beyond_float64_are_refused(device, rng, scale, C):
    """Products overflow within Newton's step: what came back was not a number, with a gap of 0."""
    from ttt4as_fast.kernels.linear_svm import gpu

    X, y = problem(rng, 1100, 3)
    samples, signs = torch.from_numpy(scale * X.astype(np.float64)).to(device), y.astype(np.float64)
    with pytest.raises(ValueError, match="X: expected finite values whose products, times C, stay within float64's"):
        gpu.fit(samples, signs, C=C, loss="squared_hinge", tol=1e-4, max_iter=1000)


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("n", "dim", "C", "loss"), CASES)
def test_cuml(rng, n, dim, C, loss, weighted):
    """What cuML converges to, by its objective; the C it needs for the squared hinge is `cuml.fit`'s business."""
    from ttt4as_fast.kernels.linear_svm import OPERATION

    reason = OPERATION.why_not("cuml", "cuda")
    if reason:
        pytest.skip(reason)
    X, y = problem(rng, n, dim)
    weight = rng.uniform(0.1, 2, n) if weighted else None
    samples = torch.from_numpy(X).cuda()
    fitted = kernels.fit_linear_svm(samples, y, C=C, loss=loss, sample_weight=weight, backend="cuml")
    assert excess(X, y, fitted, C, loss, weight) < 1e-2


def test_cuml_objective(rng):
    """The arithmetic around cuML needs no cuML: objective and gap as the reference states them."""
    from ttt4as_fast.kernels.linear_svm import cuml

    X, y = problem(rng, 20, 3)
    coef, weight = 0.1 * rng.standard_normal(3), rng.uniform(0.1, 2, 20)
    for loss in ("squared_hinge", "hinge"):
        primal, gap = cuml.objective(torch.from_numpy(X).double(), y.astype(float), coef, 0.3, 0.5, loss, weight)
        assert primal == pytest.approx(reference.objective(X, y, coef, 0.3, 0.5, loss, weight), rel=1e-12)
    _, gap = cuml.objective(torch.from_numpy(X).double(), y.astype(float), coef, 0.3, 0.5, "squared_hinge", weight)
    assert gap == pytest.approx(reference.relative_gap(X, y, coef, 0.3, 0.5, weight), rel=1e-9)


def test_cuml_is_tried_not_imported():
    from ttt4as_fast.kernels.linear_svm import cuml

    assert "host" in cuml.unavailable("cpu")
    if not torch.cuda.is_available():
        assert "no usable CUDA device" in cuml.unavailable("cuda")


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
def test_what_cuml_overflows_is_refused(rng, monkeypatch, loss):
    from ttt4as_fast.kernels.linear_svm import cuml

    X, y = problem(rng, 20, 3)
    monkeypatch.setattr(cuml, "_train", lambda *args, **options: (np.full(3, np.nan), 0.0, 5))
    with pytest.raises(ValueError, match="X: expected finite values whose products, times C, stay within float32's"):
        cuml.fit(torch.from_numpy(X), y.astype(np.float64), C=1.0, loss=loss, tol=1e-4, max_iter=100)


def test_where_one_weight_of_the_loss_overflows_cuml_the_other_is_kept(rng, monkeypatch):
    from ttt4as_fast.kernels.linear_svm import cuml

    X, y = problem(rng, 20, 3)
    best = reference.fit(X, y, C=1.0, loss="squared_hinge", tol=1e-9, max_iter=10_000)
    for broken in (1.0, 2.0):
        coef = {broken: np.full(3, np.nan), 3 - broken: best.coef}
        monkeypatch.setattr(cuml, "_train", lambda *_, C, coef=coef, **options: (coef[C], best.intercept, 5))
        fitted = cuml.fit(torch.from_numpy(X), y.astype(float), C=1.0, loss="squared_hinge", tol=1e-4, max_iter=100)
        assert fitted.converged and np.array_equal(fitted.coef, best.coef)


class TestWhetherCumlFits:
    @pytest.fixture
    def cuml(self, monkeypatch):
        """The probe, with nothing remembered, where torch takes its four points on the host."""
        from ttt4as_fast.kernels.linear_svm import cuml

        make = torch.tensor
        monkeypatch.setitem(sys.modules, "cuml", SimpleNamespace())
        monkeypatch.setattr(torch, "tensor", lambda data, device: make(data))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuml, "no_cuda", lambda: None)
        monkeypatch.setattr(cuml, "_probe", functools.cache(cuml._probe.__wrapped__))
        monkeypatch.setattr(cuml, "_train", lambda *args, **options: (np.ones(2), 0.0, 1))
        return cuml

    def test_a_lack_of_memory_is_not_remembered(self, cuml, monkeypatch):
        def no_memory(*args, **options):
            raise MemoryError("std::bad_alloc: out_of_memory: CUDA error: cudaErrorMemoryAllocation out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(cuml, "_train", no_memory)
            with pytest.raises(torch.OutOfMemoryError):
                cuml.unavailable("cuda")
        assert cuml.unavailable("cuda") is None

    def test_it_is_not_tried_within_a_capture(self, cuml, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="once before capturing"):
                cuml.unavailable("cuda")
        assert cuml.unavailable("cuda") is None

    def test_it_is_tried_on_each_device(self, cuml, monkeypatch):
        assert cuml.unavailable("cuda") is None
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(cuml, "_train", lambda *args, **options: (np.full(2, np.nan), 0.0, 1))
        assert cuml.unavailable("cuda") == "cuML fitted a non-finite SVM here"
