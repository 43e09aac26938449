"""The linear SVM: the reference against liblinear's other solver and L-BFGS, every backend against the reference."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from ttt4as_fast import kernels
from ttt4as_fast.kernels.linear_svm.reference import objective, relative_gap

from .cases import DTYPES, structured_features, tensor

OPERATION = "linear_svm"
LOSSES = ("squared_hinge", "hinge")


def problem(rng: np.random.Generator, n: int, d: int, overlap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    X = rng.standard_normal((n, d)) * rng.uniform(0.2, 2, d) + rng.uniform(0, 1, d)
    y = np.where(X @ rng.standard_normal(d) + overlap * rng.standard_normal(n) > 0, 1, -1)
    y[:2] = 1, -1
    return X.astype(np.float32), y


def liblinear(X, y, C, loss, weight=None, tol=1e-8):
    model = LinearSVC(C=C, loss=loss, dual=True, tol=tol, max_iter=200_000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(X.astype(np.float64), y, sample_weight=weight)
    return model.coef_[0], model.intercept_[0]


@pytest.mark.parametrize(("name", "label", "C", "close"), [("digits", 0, 1.0, 1.001), ("wine", 1, 100.0, 1.03)])
def test_hinge_goes_on_from_what_it_has(name, label, C, close):
    """Unscaled data in float32: the working set stops short of `tol`, and coordinate descent must not start afresh."""
    data = load_digits() if name == "digits" else load_wine()
    X = (data.data * (16 if name == "digits" else 1)).astype(np.float32)
    y = np.where(data.target == label, 1.0, -1.0)
    got = kernels.fit_linear_svm(X, y, C=C, loss="hinge", backend="auto")
    best = kernels.fit_linear_svm(X.astype(np.float64), y, C=C, loss="hinge", tol=1e-5, max_iter=20_000, backend="auto")
    reached, optimum = (objective(X.astype(np.float64), y, one.coef, one.intercept, C, "hinge") for one in (got, best))
    assert reached <= close * optimum


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 5), (40, 7), (31, 200), (500, 23)])
def test_reaches_the_optimum(backend, rng, n, d, C, loss):
    X, y = problem(rng, n, d)
    got = kernels.fit_linear_svm(X, y, C, loss, tol=1e-7, max_iter=100_000, backend=backend)
    want = objective(X, y, *liblinear(X, y, C, loss), C, loss)
    assert got.converged
    assert objective(X, y, got.coef, got.intercept, C, loss) <= want * (1 + 1e-6)
    assert np.isnan(got.gap) or got.gap <= 1e-7


def test_the_reference_gap_of_nothing_learned(rng):
    X, y = rng.standard_normal((20, 3)), np.repeat([1.0, -1.0], [14, 6])
    want = 2 * 0.1 * (np.sum((X.T @ y) ** 2) + y.sum() ** 2) / 20
    assert relative_gap(X, y, np.zeros(3), 0.0, 0.1) == pytest.approx(want)


@pytest.mark.parametrize("loss", LOSSES)
def test_default_tolerance_keeps_its_word(backend, rng, loss):
    X, y = problem(rng, 300, 50)
    got = kernels.fit_linear_svm(X, y, C=1.0, loss=loss, max_iter=2**63 - 1, backend=backend)
    best = objective(X, y, *liblinear(X, y, 1.0, loss), 1.0, loss)
    assert best * (1 - 1e-9) <= objective(X, y, got.coef, got.intercept, 1.0, loss) <= best * (1 + 1e-4)


def test_reaches_the_optimum_of_another_library(backend, rng):
    """L-BFGS on the squared hinge knows nothing of liblinear."""
    X, y = problem(rng, 120, 9)
    X64, C = X.astype(np.float64), 0.05

    def value(v):
        margin = np.maximum(0, 1 - y * (X64 @ v[:-1] + v[-1]))
        gradient = v - 2 * C * np.append(X64.T @ (y * margin), (y * margin).sum())
        return 0.5 * v @ v + C * (margin**2).sum(), gradient

    best = minimize(value, np.zeros(10), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-12})
    got = kernels.fit_linear_svm(X, y, C, tol=1e-9, max_iter=100_000, backend=backend)
    np.testing.assert_allclose(np.append(got.coef, got.intercept), best.x, rtol=1e-3, atol=1e-5)
    assert objective(X, y, got.coef, got.intercept, C, "squared_hinge") <= best.fun * (1 + 1e-6)


def test_structured_features_and_few_positives(backend, rng):
    X = structured_features(rng, 128, 24, 24).reshape(128, -1).T
    y = np.where(np.arange(len(X)) % 37 == 0, 1, -1)
    got = kernels.fit_linear_svm(X, y, tol=1e-6, backend=backend)
    want = objective(X, y, *liblinear(X, y, 1e-3, "squared_hinge"), 1e-3, "squared_hinge")
    assert got.converged
    assert objective(X, y, got.coef, got.intercept, 1e-3, "squared_hinge") <= want * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_sample_weight(backend, rng, loss):
    X, y = problem(rng, 80, 6)
    weight = rng.choice([0.0, 0.5, 2.0], 80)
    weight[:2] = 1
    got = kernels.fit_linear_svm(X, y, 0.3, loss, 1e-7, 100_000, sample_weight=weight, backend=backend)
    want = objective(X, y, *liblinear(X, y, 0.3, loss, weight), 0.3, loss, weight)
    assert objective(X, y, got.coef, got.intercept, 0.3, loss, weight) <= want * (1 + 1e-6)


def test_weight_two_is_a_sample_twice(backend, rng):
    X, y = problem(rng, 50, 5)
    twice = kernels.fit_linear_svm(np.vstack([X, X[:9]]), np.append(y, y[:9]), 0.1, tol=1e-9, backend=backend)
    weighted = kernels.fit_linear_svm(
        X, y, 0.1, tol=1e-9, sample_weight=np.where(np.arange(50) < 9, 2.0, 1.0), backend=backend
    )
    np.testing.assert_allclose(weighted.coef, twice.coef, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [(0, 1), ("good", "scratch"), (False, True), (-1.5, 2.5)], ids=str)
def test_the_larger_label_is_positive(backend, rng, labels):
    X, y = problem(rng, 60, 4)
    want = kernels.fit_linear_svm(X, y, backend=backend)
    got = kernels.fit_linear_svm(X, np.array(labels)[(y + 1) // 2], backend=backend)
    np.testing.assert_array_equal(got.coef, want.coef)
    assert got.intercept == want.intercept


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_kind(backend, rng, dtype):
    X, y = problem(rng, 70, 8)
    X = tensor(X, dtype)
    got = kernels.fit_linear_svm(X, torch.from_numpy(y), 0.1, tol=1e-6, backend=backend)
    assert isinstance(got.coef, torch.Tensor)
    exact = X.double().numpy()
    want = objective(exact, y, *liblinear(exact, y, 0.1, "squared_hinge"), 0.1, "squared_hinge")
    assert objective(exact, y, got.coef.double().numpy(), got.intercept, 0.1, "squared_hinge") <= want * (1 + 1e-5)


def test_layout_and_repetition_change_nothing(backend, rng):
    X, y = problem(rng, 64, 33)
    want = kernels.fit_linear_svm(X, y, backend=backend)
    for same in (X, np.asfortranarray(X), np.repeat(X, 2, 1)[:, ::2], X[::-1][::-1]):
        got = kernels.fit_linear_svm(same, y, backend=backend)
        np.testing.assert_array_equal(got.coef, want.coef)
        assert got.intercept == want.intercept


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("C", [1.0, 100.0])
@pytest.mark.parametrize("n", [2, 10])
def test_constant_columns_and_equal_samples(backend, n, C, loss):
    """No direction separates the classes: every margin is equal, and nothing divides by zero."""
    got = kernels.fit_linear_svm(np.ones((n, 3), np.float32), [0, 1] * (n // 2), C, loss, backend=backend)
    np.testing.assert_allclose([*got.coef, got.intercept], 0, atol=1e-6)


def test_hinge_of_a_large_weight_keeps_its_word(backend, rng):
    """What a margin misses costs C times as much: the tolerance of margins has to follow C."""
    X, y, C = rng.standard_normal((6, 50)), np.array([1, -1, 1, -1, 1, 1]), 1e4
    alpha = np.linalg.solve((X @ X.T + 1) * np.outer(y, y), np.ones(6))  # every sample a support vector, margins met
    got = kernels.fit_linear_svm(X, y, C, "hinge", max_iter=20_000, backend=backend)
    assert (alpha > 0).all() and got.converged
    assert objective(X, y, got.coef, got.intercept, C, "hinge") <= 0.5 * alpha.sum() * (1 + 1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_max_iter_is_owned_up_to(backend, rng, loss):
    X, y = problem(rng, 400, 60, overlap=5)
    got = kernels.fit_linear_svm(X, y, 1e3, loss, tol=1e-12, max_iter=1, backend=backend)
    assert not got.converged
    assert np.isfinite(got.coef).all()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"X": np.ones(3)}, ValueError, "X: expected 2 dimensions"),
        ({"X": np.array([[1.0], [np.nan], [0.0]])}, ValueError, "X: expected finite values, got nan at (1, 0)"),
        ({"y": [0, 1]}, ValueError, "y: expected shape (3,)"),
        ({"y": [0, 0, 0]}, ValueError, "y: expected two classes, got 1"),
        ({"y": [0, 1, 2]}, ValueError, "y: expected two classes, got 3"),
        ({"y": [0, 1, np.nan]}, ValueError, "y: expected finite values"),
        ({"C": 0}, ValueError, "C: expected a number in (0, inf), got 0"),
        ({"tol": np.inf}, ValueError, "tol: expected a number in (0, inf), got inf"),
        ({"C": "1"}, TypeError, "C: expected"),
        ({"loss": "log"}, ValueError, "loss: expected one of 'squared_hinge', 'hinge', got 'log'"),
        ({"tol": 0}, ValueError, "tol"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"sample_weight": [1, 1]}, ValueError, "sample_weight: expected shape (3,)"),
        ({"sample_weight": [1, -1, 1]}, ValueError, "sample_weight: expected values >= 0, got -1"),
        ({"sample_weight": [1, np.nan, 1]}, ValueError, "sample_weight: expected finite"),
        ({"sample_weight": [1, 0, 0]}, ValueError, "sample_weight: expected a positive weight in each class"),
    ],
)
def test_bad_input_is_named(backend, change, error, says):
    arguments = {"X": np.array([[0.0], [1.0], [2.0]]), "y": [0, 1, 1], "backend": backend, **change}
    with pytest.raises(error) as caught:
        kernels.fit_linear_svm(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize("loss", kernels.linear_svm.LOSSES)
@pytest.mark.parametrize(
    ("C", "scale", "converged"),
    [(1e-300, 1, True), (1, 1e-200, True), (1e300, 1, False), (1, 1e100, False), (1, 1e200, False)],
)
def test_the_reference_returns_where_squares_leave_the_range(C, scale, converged, loss):
    X = np.random.default_rng(0).standard_normal((30, 4)) * scale
    got = kernels.fit_linear_svm(X, np.arange(30) % 2, C=C, loss=loss, backend="reference")
    assert got.converged == converged and np.isfinite([*got.coef, got.intercept]).all()
