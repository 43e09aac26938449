"""Greedy k-center: the reference against a brute-force statement, every backend makes the same choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from ttt4as_fast import kernels

from .cases import DTYPES, structured_features, tensor

OPERATION = "coreset"


def brute_force(points: np.ndarray, n_samples: int, start: int) -> list[int]:
    squared = cdist(points.astype(np.float64), points.astype(np.float64), "sqeuclidean")
    picks = [start]
    while len(picks) < n_samples:
        to_nearest = squared[:, picks].min(axis=1)
        to_nearest[picks] = -1
        picks.append(int(to_nearest.argmax()))
    return picks


@pytest.mark.parametrize(("n", "dim", "picks"), [(1, 1, 1), (2, 3, 2), (37, 1, 37), (211, 13, 50), (400, 67, 40)])
@pytest.mark.parametrize("where", [0.0, 1.0])
def test_greedy_choice(backend, rng, n, dim, picks, where):
    points = rng.standard_normal((n, dim)).astype(np.float32)
    start = int(where * (n - 1))
    got = kernels.k_center_greedy(points, picks, start, backend=backend)
    assert got.dtype == np.int64
    assert got.tolist() == brute_force(points, picks, start)


def test_greedy_choice_on_structured_features(backend, rng):
    points = structured_features(rng, 48, 30, 30).reshape(48, -1).T
    assert kernels.k_center_greedy(points, 90, 7, backend=backend).tolist() == brute_force(points, 90, 7)


def test_far_from_the_origin(backend, rng):
    points = (500 + rng.standard_normal((200, 16))).astype(np.float32)
    assert kernels.k_center_greedy(points, 60, backend=backend).tolist() == brute_force(points, 60, 0)


def test_ties_and_duplicates(backend):
    points = np.repeat(np.array([[0.0, 0], [4, 0], [0, 4]], np.float32), 3, axis=0)
    got = kernels.k_center_greedy(points, 9, 1, backend=backend)
    assert got.tolist() == brute_force(points, 9, 1)
    assert sorted(got.tolist()) == list(range(9))


def test_ties_far_apart_take_the_lowest_index(backend):
    points = np.zeros((200, 1), np.float32)
    points[[100, 150]] = 5
    assert kernels.k_center_greedy(points, 4, backend=backend).tolist() == [0, 100, 1, 2]


def test_squares_beyond_float64(backend):
    points = np.where(np.arange(200) % 2, 1e200, -1e200)[:, None] * np.arange(1, 201)[:, None]
    with np.errstate(over="ignore"):
        picks = kernels.k_center_greedy(points, 200, start=5, backend=backend)
    assert picks[:3].tolist() == [5, 0, 1]  # all are as far as float64 goes: the lowest row
    assert sorted(picks) == list(range(200))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_kind(backend, rng, dtype):
    points = tensor(rng.standard_normal((90, 11)), dtype)
    got = kernels.k_center_greedy(points, 20, backend=backend)
    assert isinstance(got, torch.Tensor)
    assert got.tolist() == brute_force(points.double().numpy(), 20, 0)


def test_layout_changes_nothing(backend, rng):
    points = rng.standard_normal((120, 9)).astype(np.float32)
    want = kernels.k_center_greedy(points, 30, backend=backend)
    np.testing.assert_array_equal(kernels.k_center_greedy(np.asfortranarray(points), 30, backend=backend), want)
    np.testing.assert_array_equal(kernels.k_center_greedy(np.repeat(points, 2, 0)[::2], 30, backend=backend), want)


def test_progress_is_told_to_the_end(backend, rng):
    told: list[tuple[int, int]] = []
    kernels.k_center_greedy(rng.random((300, 4)), 200, progress=lambda *t: told.append(t), backend=backend)
    assert told[-1] == (200, 200)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 1 or backend == "cpu"  # whose parts are longer


def test_an_exception_in_progress_stops_it(backend, rng):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels.k_center_greedy(rng.random((300, 4)), 200, progress=stop, backend=backend)


@pytest.mark.parametrize(
    ("points", "n", "start", "error", "says"),
    [
        (np.ones((4, 2)), 5, 0, ValueError, "n_samples: expected an integer in [1, 4], got 5"),
        (np.ones((4, 2)), 0, 0, ValueError, "n_samples"),
        (np.ones((4, 2)), 2, 4, ValueError, "start: expected an integer in [0, 3], got 4"),
        (np.ones(4), 2, 0, ValueError, "points: expected 2 dimensions"),
        (np.ones((4, 0)), 2, 0, ValueError, "points: expected no empty axis"),
        (np.array([[np.inf], [1.0]]), 2, 0, ValueError, "points: expected finite values"),
        (np.ones((4, 2)), 2.0, 0, TypeError, "n_samples: expected an integer"),
    ],
)
def test_bad_input_is_named(backend, points, n, start, error, says):
    with pytest.raises(error) as caught:
        kernels.k_center_greedy(points, n, start, backend=backend)
    assert says in str(caught.value)


def test_progress_that_cannot_be_called(backend):
    with pytest.raises(TypeError, match=r"^progress: expected a callable"):
        kernels.k_center_greedy(np.eye(3), 2, progress="yes", backend=backend)


def test_progress_of_several_parts(rng, monkeypatch):
    from ttt4as_fast.kernels.coreset import cpu

    if cpu.unavailable("cpu"):
        pytest.skip("the C++ core is not built")
    monkeypatch.setattr(cpu, "_MOST", 64)
    told = []
    kernels.k_center_greedy(rng.random((300, 4)), 200, progress=lambda *t: told.append(t), backend="cpu")
    assert told == [(64, 200), (128, 200), (192, 200), (200, 200)]
