"""The scikit-learn estimators: scikit-learn's own checks and tests, and agreement across data sets and options."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.svm import LinearSVC as Original
from sklearn.utils.estimator_checks import parametrize_with_checks

import ttt4as_fast as ttt
from ttt4as_fast import kernels
from ttt4as_fast.integrations.sklearn import ExactKNeighborsTransformer
from ttt4as_fast.kernels.linear_svm.reference import objective


@parametrize_with_checks(
    # The equivalence of weights and repeated samples is checked to 1e-7: it takes a tolerance to match.
    [
        ttt.LinearSVC(tol=1e-14, dual=False),
        ttt.LinearSVC(tol=1e-14, loss="hinge"),
        ExactKNeighborsTransformer(n_neighbors=2),
    ],
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


DATA = {
    "iris": load_iris,
    "wine": load_wine,
    "cancer": load_breast_cancer,
    "digits": load_digits,
    "sparse-ish": lambda return_X_y: make_classification(300, 60, n_informative=8, flip_y=0.1, random_state=1),
    "wide": lambda return_X_y: make_classification(60, 400, random_state=2),
}


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("data", DATA)
def test_agrees_with_scikit_learn(data, class_weight, C, loss):
    X, y = DATA[data](return_X_y=True)
    X = scale(X[:600])
    y = y[:600]
    options = {"C": C, "loss": loss, "class_weight": class_weight, "max_iter": 1_000_000}
    ours = ttt.LinearSVC(tol=1e-6, **options).fit(X, y)
    theirs = Original(tol=1e-7, random_state=0, dual=True, **options).fit(X, y)
    assert ours.coef_.shape == theirs.coef_.shape and ours.coef_.dtype == theirs.coef_.dtype
    if class_weight is None:
        for i, coef in enumerate(ours.coef_):
            signs = np.where(y == ours.classes_[i if len(ours.coef_) > 1 else 1], 1.0, -1.0)
            got = objective(X, signs, coef, ours.intercept_[i], C, loss)
            want = objective(X, signs, theirs.coef_[i], theirs.intercept_[i], C, loss)
            assert abs(got - want) <= 1e-5 * want
    assert np.mean(ours.predict(X) == theirs.predict(X)) > 0.99
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": "l1", "dual": False},
        {"fit_intercept": False},
        {"intercept_scaling": 5.0},
        {"multi_class": "crammer_singer"},
        {"verbose": 1},
    ],
    ids=str,
)
def test_what_is_not_accelerated_is_scikit_learns(options):
    X, y = load_iris(return_X_y=True)
    ours = ttt.LinearSVC(random_state=0, max_iter=100_000, **options).fit(X, y)
    theirs = Original(random_state=0, max_iter=100_000, **options).fit(X, y)
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)
    assert np.isnan(ours.gap_)


def test_sparse_input_is_scikit_learns():
    X, y = load_iris(return_X_y=True)
    ours = ttt.LinearSVC(random_state=0, max_iter=100_000).fit(sparse.csr_matrix(X), y)
    theirs = Original(random_state=0, max_iter=100_000).fit(sparse.csr_matrix(X), y)
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)


def test_sparse_frames_are_scikit_learns():
    pandas = pytest.importorskip("pandas")
    X, y = load_iris(return_X_y=True)
    frame = pandas.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(X))
    ours, theirs = (kind(random_state=0, max_iter=100_000).fit(frame, y) for kind in (ttt.LinearSVC, Original))
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)


def test_sample_weight_of_zero_is_absence():
    X, y = load_wine(return_X_y=True)
    X = scale(X)
    weight = np.ones(len(y))
    weight[::3] = 0
    a = ttt.LinearSVC(tol=1e-8).fit(X, y, sample_weight=weight)
    b = ttt.LinearSVC(tol=1e-8).fit(X[weight > 0], y[weight > 0])
    np.testing.assert_array_equal(a.coef_, b.coef_)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_class_without_weight_is_scikit_learns(bad):
    X, y = make_classification(60, 5, random_state=0)
    weight = np.where(y == 1, 1.0, bad)
    ours, theirs = (kind(random_state=0).fit(X, y, sample_weight=weight) for kind in (ttt.LinearSVC, Original))
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)
    assert np.isnan(ours.gap_)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_class_weight_of_nothing_is_scikit_learns(n_classes):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < n_classes], y[y < n_classes]
    options = {"class_weight": {0: 0}, "random_state": 0, "max_iter": 100_000}
    ours, theirs = (kind(**options).fit(X, y) for kind in (ttt.LinearSVC, Original))
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)
    assert np.isnan(ours.gap_)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_class_weight_that_is_none_is_named(bad):
    X, y = make_classification(60, 5, random_state=0)
    for options in ({}, {"fit_intercept": False}):  # ours and what is passed on
        with pytest.raises(ValueError, match=rf"class_weight\[1\]: expected a number in \[0, inf\), got {bad}"):
            ttt.LinearSVC(class_weight={1: bad}, **options).fit(X, y)


def test_no_iterations_are_scikit_learns():
    X, y = make_classification(60, 5, random_state=0)
    models = []
    for kind in (ttt.LinearSVC, Original):
        with pytest.warns(ConvergenceWarning, match="increase the number of iterations"):
            models.append(kind(max_iter=0, random_state=0).fit(X, y))
    np.testing.assert_array_equal(models[0].coef_, models[1].coef_)


def test_too_few_iterations_warn():
    X, y = make_classification(200, 50, flip_y=0.3, random_state=0)
    with pytest.warns(ConvergenceWarning, match="LinearSVC stopped after max_iter=1") as told:
        ttt.LinearSVC(C=1e3, tol=1e-12, max_iter=1).fit(X, y)
    assert told[0].filename == __file__


def test_iterations_are_those_of_the_class_that_took_most():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((300, 5)), rng.integers(0, 2, 300)
    X[:100] += 50
    y[:100] = 2
    options = {"C": 10.0, "loss": "hinge", "tol": 1e-4, "max_iter": 100_000}
    each = [kernels.fit_linear_svm(X, y == label, **options).n_iter for label in range(3)]
    assert min(each) < max(each) == ttt.LinearSVC(**options).fit(X, y).n_iter_


def test_lives_in_scikit_learns_world():
    X, y = load_breast_cancer(return_X_y=True)
    search = GridSearchCV(make_pipeline(StandardScaler(), ttt.LinearSVC()), {"linearsvc__C": [1e-3, 1e-1]}, cv=3)
    assert search.fit(X, y).best_score_ > 0.95
    model = search.best_estimator_
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    assert clone(ttt.LinearSVC(C=3)).get_params()["C"] == 3


SWAP = """
import sys, types, pytest, ttt4as_fast
import sklearn.svm.tests.test_sparse as sparse_tests, sklearn.svm.tests.test_svm as tests
# test_linear_svm_convergence_warnings is left out: it counts liblinear's iterations and quotes its message.
NAMES = ("test_linearsvc", "test_dense_liblinear", "test_sparse_liblinear", "test_liblinear_set_coef", "test_lsvc",
         "test_crammer_singer", "test_weight", "test_auto_weight", "test_bad_input")
class Swap:
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.name.startswith(NAMES)]
        for module in {item.module for item in items}:
            ours = ttt4as_fast.LinearSVC
            module.LinearSVC = ours
            module.svm = types.SimpleNamespace(**{**vars(module.svm), "LinearSVC": ours})
options = ["-q", "-p", "no:cacheprovider", "-c", sys.argv[1]]
sys.exit(pytest.main([*options, tests.__file__, sparse_tests.__file__], plugins=[Swap()]))
"""


def test_scikit_learns_own_tests_for_linear_svc(tmp_path):
    """scikit-learn's installed test module, with our class in the place of theirs."""
    if importlib.util.find_spec("sklearn.svm.tests.test_svm") is None:
        pytest.skip("this scikit-learn ships without its tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", SWAP, str(tmp_path / "pytest.ini")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
def test_transformer_gives_scikit_learns_graph(mode):
    X = load_digits(return_X_y=True)[0][:400]
    ours = ExactKNeighborsTransformer(mode=mode, n_neighbors=7).fit(X)
    theirs = KNeighborsTransformer(mode=mode, n_neighbors=7, algorithm="brute").fit(X)
    got, want = ours.transform(X[:90]).toarray(), theirs.transform(X[:90]).toarray()
    np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=1e-5, atol=1e-4)
    assert list(ours.get_feature_names_out()[:1]) == ["exactkneighborstransformer0"]


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("3", TypeError)])
def test_transformer_names_a_bad_number_of_neighbours(k, error):
    fitted = ExactKNeighborsTransformer().fit(np.eye(6))
    with pytest.raises(error, match=r"^n_neighbors: expected an integer"):
        fitted.kneighbors(np.eye(6), k)


def test_transformer_takes_every_parameter():
    ours, theirs = (cls().get_params() for cls in (ExactKNeighborsTransformer, KNeighborsTransformer))
    assert ours.pop("backend") == "auto" and ours == theirs


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
def test_neighbours_of_the_fitted_samples_leave_out_each_itself(mode):
    X = np.concatenate([load_digits(return_X_y=True)[0][:200].astype(np.float32), np.full((9, 64), 3, np.float32)])
    ours = ExactKNeighborsTransformer(n_neighbors=4, n_jobs=2).fit(X)
    theirs = KNeighborsTransformer(n_neighbors=4, algorithm="brute").fit(X)
    distances, indices = ours.kneighbors()
    want, _ = theirs.kneighbors()
    np.testing.assert_allclose(distances, want, rtol=1e-5, atol=1e-3)
    assert indices.shape == (209, 4) and not (indices == np.arange(209)[:, None]).any()
    assert (distances[200:] == 0).all() and (indices[200:] >= 200).all()  # more copies than neighbours
    got = ours.kneighbors_graph(n_neighbors=3, mode=mode)
    assert got.shape == (209, 209) and (got.diagonal() == 0).all()
    np.testing.assert_allclose(got.data, theirs.kneighbors_graph(n_neighbors=3, mode=mode).data, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="Expected n_neighbors < n_samples_fit, but n_neighbors = 209"):
        ours.kneighbors(n_neighbors=209)


@pytest.mark.parametrize(
    ("options", "accelerated"),
    [
        ({"metric": "euclidean"}, True),
        ({"metric": "l2", "algorithm": "kd_tree", "leaf_size": 9}, True),
        ({"metric": "minkowski", "p": 2}, True),
        ({"p": 1}, False),
        ({"metric": "manhattan"}, False),
        ({"metric_params": {"w": np.arange(1.0, 65)}}, False),
        ({"metric": lambda a, b: abs(a - b).max()}, False),
    ],
)
def test_what_the_transformer_cannot_accelerate_is_scikit_learns(options, accelerated):
    X = load_digits(return_X_y=True)[0][:120]
    ours = ExactKNeighborsTransformer(n_neighbors=3).set_params(**options).fit(X[:100])
    theirs = KNeighborsTransformer(n_neighbors=3, **options).fit(X[:100])
    assert (ours.index_ is not None) == accelerated
    for found, want in zip(ours.kneighbors(X[100:]), theirs.kneighbors(X[100:]), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(ours.transform(X).toarray(), theirs.transform(X).toarray(), rtol=1e-5, atol=1e-5)


def test_transformer_hands_sparse_samples_on():
    X = sparse.csr_array(sparse.random(40, 30, density=0.2, random_state=0))
    ours, theirs = (cls(n_neighbors=3).fit(X) for cls in (ExactKNeighborsTransformer, KNeighborsTransformer))
    assert ours.index_ is None
    np.testing.assert_array_equal(ours.transform(X).toarray(), theirs.transform(X).toarray())


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_a_fit_that_fails_keeps_the_samples_before(metric):
    X = load_digits(return_X_y=True)[0][:60]
    ours = ExactKNeighborsTransformer(n_neighbors=3).fit(X)
    want = ours.kneighbors(X)
    with pytest.raises(ValueError, match="NaN"):
        ours.set_params(metric=metric).fit(np.full_like(X, np.nan))
    for found, before in zip(ours.kneighbors(X), want, strict=True):
        np.testing.assert_array_equal(found, before)
    with pytest.raises(NotFittedError):
        ExactKNeighborsTransformer().kneighbors(X)


def test_transformer_serves_precomputed_estimators():
    X, y = load_iris(return_X_y=True)
    chain = make_pipeline(ExactKNeighborsTransformer(n_neighbors=5), KNeighborsClassifier(5, metric="precomputed"))
    assert chain.fit(X, y).score(X, y) == KNeighborsClassifier(5).fit(X, y).score(X, y)


def test_balanced_classes_see_the_samples_weights():
    pytest.importorskip("sklearn", "1.7")  # before, they did not
    X, y = load_wine(return_X_y=True)
    X = scale(X)
    weight = np.where(y == 0, 5.0, np.linspace(0.5, 2, len(y)))
    options = {"class_weight": "balanced", "C": 0.01, "max_iter": 1_000_000}
    ours = ttt.LinearSVC(tol=1e-6, **options).fit(X, y, weight)
    theirs = Original(tol=1e-7, random_state=0, **options).fit(X, y, weight)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=0.01)
