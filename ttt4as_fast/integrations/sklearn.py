"""scikit-learn: `LinearSVC` over our solver, and exact search as a neighbours transformer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from sklearn.base import _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsTransformer as _KNeighborsTransformer
from sklearn.svm import LinearSVC as _LinearSVC
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .. import kernels

__all__ = ["ExactKNeighborsTransformer", "LinearSVC"]


class LinearSVC(_LinearSVC):
    """`sklearn.svm.LinearSVC`, solved to a stated duality gap by `ttt4as_fast.kernels.fit_linear_svm`.

    Takes every parameter of scikit-learn's class with the same meaning and default, except that `tol` is the relative
    duality gap (primal - dual) / primal at which the solver stops, and that the solution does not depend on `dual` or
    `random_state`: the optimum is unique and the solver deterministic.

    Accelerated: dense `X` with ``penalty="l2"``, ``fit_intercept=True``, ``intercept_scaling=1`` and
    ``multi_class="ovr"``, both losses, two or more classes, `class_weight` and `sample_weight`. Everything else (sparse
    `X`, the l1 penalty, no or a scaled intercept, Crammer-Singer, ``verbose``, ``max_iter=0``, a class that by its
    samples' weights or its own weighs nothing) is passed on to scikit-learn.

    Parameters
    ----------
    penalty, loss, dual, tol, C, multi_class, fit_intercept, intercept_scaling, class_weight, verbose, random_state, \
max_iter
        As in `sklearn.svm.LinearSVC`.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Attributes
    ----------
    coef_ : (1, d) or (n_classes, d) float64
    intercept_ : (1,) or (n_classes,) float64
    classes_ : (n_classes,)
    n_iter_ : int
        The most iterations that any of the binary problems took.
    gap_ : float
        The largest relative duality gap of them; NaN where scikit-learn solved the problem.

    References
    ----------
    Fan et al., LIBLINEAR: A Library for Large Linear Classification, JMLR 2008.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> X, y = make_classification(n_features=4, random_state=0)
    >>> LinearSVC(C=0.1).fit(X, y).score(X, y) > 0.9
    True
    """

    def __init__(
        self,
        penalty: str = "l2",
        loss: str = "squared_hinge",
        *,
        dual: bool | str = "auto",
        tol: float = 1e-4,
        C: float = 1.0,
        multi_class: str = "ovr",
        fit_intercept: bool = True,
        intercept_scaling: float = 1,
        class_weight: dict | str | None = None,
        verbose: int = 0,
        random_state: Any = None,
        max_iter: int = 1000,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            penalty,
            loss,
            dual=dual,
            tol=tol,
            C=C,
            multi_class=multi_class,
            fit_intercept=fit_intercept,
            intercept_scaling=intercept_scaling,
            class_weight=class_weight,
            verbose=verbose,
            random_state=random_state,
            max_iter=max_iter,
        )
        self.backend = backend

    _parameter_constraints: ClassVar[dict] = {**_LinearSVC._parameter_constraints, "backend": [str]}

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LinearSVC:
        """Fit one binary problem for two classes, one a class against the rest for more.

        Parameters
        ----------
        X : array-like or sparse matrix, (n, d)
        y : array-like, (n,)
        sample_weight : array-like, (n,), optional
            Factors of `C`.

        Returns
        -------
        LinearSVC
            Itself.

        Raises
        ------
        ValueError, TypeError
            Invalid input or parameters, as scikit-learn raises it; a class weight that is no finite number >= 0.
        """
        if isinstance(self.class_weight, dict):
            for name, value in self.class_weight.items():  # with others liblinear diverges or never ends
                kernels.arrays.check_float(value, f"class_weight[{name!r}]", 0.0)
        if not self._accelerated(X):
            self.gap_ = float("nan")
            return super().fit(X, y, sample_weight)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], order="C")
        check_classification_targets(y)
        self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "This solver needs samples of at least 2 classes in the data, but the data contains only one class: "
                f"{self.classes_[0]!r}"
            )
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        by_class = None
        if len(np.unique(targets[weight > 0])) == len(self.classes_):
            by_class = self._class_weights(y, None if sample_weight is None else weight)
        if by_class is None or not (by_class > 0).all():
            self.gap_ = float("nan")
            return super().fit(X, y, sample_weight)
        if len(self.classes_) == 2:
            fits = [self._fit_one(X, targets == 1, weight * by_class[targets])]
        else:
            # As liblinear does: a class's weight counts where it is the positive one, the rest weighs 1.
            fits = [
                self._fit_one(X, targets == i, weight * np.where(targets == i, by_class[i], 1.0))
                for i in range(len(self.classes_))
            ]
        self.coef_ = np.stack([np.asarray(one.coef, np.float64) for one in fits])
        self.intercept_ = np.array([one.intercept for one in fits])
        self.n_iter_ = max(one.n_iter for one in fits)
        self.gap_ = max(one.gap for one in fits)
        if not all(one.converged for one in fits):
            warnings.warn(
                f"LinearSVC stopped after max_iter={self.max_iter} at a relative duality gap of {self.gap_:.2g} "
                f"(tol={self.tol:g}); increase max_iter, or scale the data.",
                ConvergenceWarning,
                stacklevel=3,  # beyond scikit-learn's decorator
            )
        return self

    def _class_weights(self, y: np.ndarray, sample_weight: np.ndarray | None) -> np.ndarray:
        """One factor a class; ``"balanced"`` counts samples by their weight where scikit-learn does (1.7 and later)."""
        counted = {}
        if "sample_weight" in inspect.signature(compute_class_weight).parameters:
            counted["sample_weight"] = sample_weight
        return compute_class_weight(self.class_weight, classes=self.classes_, y=y, **counted)

    def _accelerated(self, X: Any) -> bool:
        return (
            self.penalty == "l2"
            and self.fit_intercept
            and self.intercept_scaling == 1
            and self.multi_class == "ovr"
            and not self.verbose
            and self.max_iter > 0
            and not (self.loss == "hinge" and self.dual is False)  # which scikit-learn refuses
            and not sparse.issparse(X)
            and not hasattr(X, "sparse")  # a pandas DataFrame of sparse columns
        )

    def _fit_one(self, X: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> kernels.LinearSVMResult:
        used = weight > 0  # a sample of no weight is a sample that is not there
        if not used.all():
            X, positive, weight = X[used], positive[used], weight[used]
        uniform = len(weight) > 0 and bool((weight == 1).all())
        return kernels.fit_linear_svm(
            X,
            positive,
            C=self.C,
            loss=self.loss,
            tol=self.tol,
            max_iter=self.max_iter,
            sample_weight=None if uniform else weight,
            backend=self.backend,
        )


class ExactKNeighborsTransformer(_KNeighborsTransformer):
    """`sklearn.neighbors.KNeighborsTransformer`, by `ttt4as_fast.kernels.KnnIndex`.

    Gives the sparse neighbour graph that scikit-learn's estimators take with ``metric="precomputed"``. Takes every
    parameter of scikit-learn's class with the same meaning and default.

    Accelerated: dense samples with the Euclidean metric, which is the default. All else is passed on to scikit-learn.

    Parameters
    ----------
    mode, n_neighbors, algorithm, leaf_size, metric, p, metric_params, n_jobs
        As in `sklearn.neighbors.KNeighborsTransformer`. An accelerated search is exact whatever the `algorithm`, and
        has the threads of `set_num_threads`, whatever `leaf_size` and `n_jobs` are.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Attributes
    ----------
    n_samples_fit_ : int
        Samples searched.
    index_ : KnnIndex or None
        The search; None where scikit-learn searches.

    Examples
    --------
    >>> ExactKNeighborsTransformer(n_neighbors=2).fit_transform([[0.0], [1.0], [3.0]]).toarray()
    array([[0., 1., 3.],
           [1., 0., 2.],
           [3., 2., 0.]])
    """

    _parameter_constraints: ClassVar[dict] = _KNeighborsTransformer._parameter_constraints | {"backend": [str]}

    def __init__(
        self,
        *,
        mode: str = "distance",
        n_neighbors: int = 5,
        algorithm: str = "auto",
        leaf_size: int = 30,
        metric: Any = "minkowski",
        p: float = 2,
        metric_params: dict | None = None,
        n_jobs: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            mode=mode,
            n_neighbors=n_neighbors,
            algorithm=algorithm,
            leaf_size=leaf_size,
            metric=metric,
            p=p,
            metric_params=metric_params,
            n_jobs=n_jobs,
        )
        self.backend = backend

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> ExactKNeighborsTransformer:
        """Prepare the search of `X`, (n, d); `y` is ignored."""
        euclidean = self.metric in ("euclidean", "l2") or (self.metric == "minkowski" and self.p == 2)
        if not euclidean or self.metric_params or sparse.issparse(X):
            super().fit(X, y)
            self.index_ = None
            return self
        X = validate_data(self, X, dtype=[np.float32, np.float64], order="C")
        self.index_ = kernels.KnnIndex(X, backend=self.backend)
        self.n_samples_fit_ = self._n_features_out = len(X)
        self.effective_metric_ = "euclidean"
        self.effective_metric_params_: dict[str, Any] = {}
        return self

    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Distances (m, k) float64 and indices (m, k) int64 of the nearest fitted samples, nearest first.

        The distances are rounded to float32, and infinite beyond its range; their order is that of float64.

        Parameters
        ----------
        X : array-like, (m, d), optional
            The fitted samples when absent, of which none is its own neighbour.
        n_neighbors : int, optional
            k, at most the fitted samples, without `X` fewer; `n_neighbors` of the constructor when absent.
        return_distance : bool
            Whether to return the distances too.

        Raises
        ------
        ValueError, TypeError
            Invalid `X` or `n_neighbors`, or more neighbours than samples.
        """
        check_is_fitted(self)
        if self.index_ is None:
            return super().kneighbors(X, n_neighbors, return_distance)
        k = kernels.arrays.check_int(self.n_neighbors if n_neighbors is None else n_neighbors, "n_neighbors", 1)
        fitted = X is None
        if k > self.n_samples_fit_ - fitted:
            raise ValueError(
                f"Expected n_neighbors {'<' if fitted else '<='} n_samples_fit, but n_neighbors = {k}, n_samples_fit = "
                f"{self.n_samples_fit_}"
            )
        if fitted:
            X = self.index_.bank
        else:
            X = validate_data(self, X, dtype=[np.float32, np.float64], order="C", reset=False)
        distances, indices = self.index_.search(X, k + fitted)
        if fitted:
            others = indices != np.arange(len(X))[:, None]
            others[others.all(1), 0] = False  # where a sample has more copies than neighbours: one, as near, goes
            distances, indices = distances[others].reshape(-1, k), indices[others].reshape(-1, k)
        return (distances.astype(np.float64), indices) if return_distance else indices
