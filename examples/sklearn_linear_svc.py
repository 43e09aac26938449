"""scikit-learn code with one line changed: `LinearSVC` from here, in a pipeline and a grid search, beside the original.

python examples/sklearn_linear_svc.py
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC as Original

from ttt4as_fast import LinearSVC  # the line that changes


def search(estimator: Original) -> tuple[GridSearchCV, float]:
    """A five-fold search over C, and the seconds it took."""
    X, y = load_breast_cancer(return_X_y=True)
    grid = GridSearchCV(make_pipeline(StandardScaler(), estimator), {"linearsvc__C": [1e-3, 1e-2, 1e-1, 1]}, cv=5)
    began = time.perf_counter()
    return grid.fit(X, y), time.perf_counter() - began


def main() -> None:
    """Fit both, print what they found."""
    LinearSVC().fit(np.eye(2), [0, 1])  # loads the backend, so that the search alone is timed
    ours, our_seconds = search(LinearSVC())
    theirs, their_seconds = search(Original(random_state=0))
    for name, grid, seconds in (("ttt4as_fast", ours, our_seconds), ("scikit-learn", theirs, their_seconds)):
        best = grid.best_params_["linearsvc__C"]
        print(f"{name:13s} best C {best:g}, accuracy {grid.best_score_:.4f}, {1e3 * seconds:.0f} ms")
    gap = ours.best_estimator_[-1].gap_
    print(f"relative duality gap of the refitted model: {gap:.1e}")


if __name__ == "__main__":
    main()
