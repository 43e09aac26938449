"""Exact nearest neighbours: the reference against SciPy's distances, every backend against the reference."""

from __future__ import annotations

import pickle
import types
import weakref

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from ttt4as_fast import kernels

from .cases import DTYPES, structured_features, tensor

OPERATION = "knn"
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 7, 1),
    (3, 2, 1, 2),
    (17, 101, 13, 9),
    (64, 64, 64, 64),
    (131, 257, 67, 1),
    (7, 1009, 344, 9),
]


def assert_exact(query: np.ndarray, bank: np.ndarray, k: int, distances: np.ndarray, indices: np.ndarray) -> None:
    """Distances within 1e-5 of float64 brute force; where an index differs, its distance ties."""
    exact = cdist(query.astype(np.float64), bank.astype(np.float64))
    want = np.sort(exact, axis=1)[:, :k]
    assert distances.shape == indices.shape == (len(query), k)
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    scale = 1e-5 * want + 1e-30
    assert (np.abs(distances - want) <= scale + 1e-7 * want.max()).all()
    assert (np.abs(np.take_along_axis(exact, indices, 1) - want) <= scale).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize(("n_query", "n_bank", "dim", "k"), SHAPES)
def test_exact(backend, rng, n_query, n_bank, dim, k):
    query = rng.standard_normal((n_query, dim)).astype(np.float32)
    bank = rng.standard_normal((n_bank, dim)).astype(np.float32)
    assert_exact(query, bank, k, *kernels.nearest_neighbors(query, bank, k, backend=backend))


def test_exact_on_structured_features(backend, rng):
    points = structured_features(rng, 96, 40, 40).reshape(96, -1).T
    query, bank = points[:200], points[200:]
    index = kernels.KnnIndex(bank, backend=backend)
    assert (len(index), index.dim) == (1400, 96)
    for k in (1, 9, 64):
        assert_exact(query, bank, k, *index.search(query, k))


def test_far_from_the_origin(backend, rng):
    """|q|^2 - 2 q.b + |b|^2 in float32 would lose these distances entirely."""
    bank = (1000 + rng.standard_normal((300, 32))).astype(np.float32)
    query = bank[:50] + np.float32(1e-3)
    distances, indices = kernels.nearest_neighbors(query, bank, 2, backend=backend)
    assert_exact(query, bank, 2, distances, indices)
    same, where = kernels.nearest_neighbors(bank, bank, backend=backend)
    assert (same == 0).all()
    np.testing.assert_array_equal(where[:, 0], np.arange(300))


def test_ties_take_the_lowest_index(backend):
    bank = np.array([[1.0], [-1.0], [1.0], [3.0]], np.float32)
    distances, indices = kernels.nearest_neighbors(np.zeros((1, 1), np.float32), bank, 4, backend=backend)
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(distances, [[1, 1, 1, 3]])


def test_many_ties_take_the_lowest_index(backend):
    bank = np.tile(np.array([[2.0], [1.0], [3.0]], np.float32), (100, 1))
    _, indices = kernels.nearest_neighbors(np.zeros((1, 1), np.float32), bank, 300, backend=backend)
    np.testing.assert_array_equal(indices[0], np.argsort(bank[:, 0], kind="stable"))


def test_products_beyond_float32(backend, rng):
    """Far from the bank and on one side of it, where a dot product is minus infinity in float32."""
    bank = -np.abs(rng.standard_normal((300, 64))).astype(np.float32) * np.float32(1e20)
    query = np.full((9, 64), 1e21, np.float32)
    exact = cdist(query.astype(np.float64), bank.astype(np.float64))
    _, indices = kernels.nearest_neighbors(query, bank, 4, backend=backend)
    np.testing.assert_array_equal(indices, np.argsort(exact, 1, kind="stable")[:, :4])


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_tiny_and_huge_values(backend, rng, scale):
    query = (rng.standard_normal((20, 24)) * scale).astype(np.float32)
    bank = (rng.standard_normal((90, 24)) * scale).astype(np.float32)
    distances, indices = kernels.nearest_neighbors(query, bank, 3, backend=backend)
    exact = cdist(query.astype(np.float64), bank.astype(np.float64))
    np.testing.assert_allclose(distances, np.sort(exact, 1)[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(indices, np.argsort(exact, 1)[:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_kind(backend, rng, dtype):
    query, bank = tensor(rng.standard_normal((11, 19)), dtype), tensor(rng.standard_normal((53, 19)), dtype)
    distances, indices = kernels.nearest_neighbors(query, bank, 4, backend=backend)
    assert isinstance(distances, torch.Tensor)
    assert isinstance(indices, torch.Tensor)
    assert_exact(query.double().numpy(), bank.double().numpy(), 4, distances.numpy(), indices.numpy())


def test_layouts_change_nothing(backend, rng):
    query, bank = rng.standard_normal((30, 21)).astype(np.float32), rng.standard_normal((80, 21)).astype(np.float32)
    want = kernels.nearest_neighbors(query, bank, 3, backend=backend)
    strided = np.repeat(bank, 2, axis=1)[:, ::2]
    for got in (
        kernels.nearest_neighbors(np.asfortranarray(query), np.asfortranarray(bank), 3, backend=backend),
        kernels.nearest_neighbors(query[::-1][::-1], strided, 3, backend=backend),
    ):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_a_query_is_the_same_alone_or_among_others(backend, rng):
    query, bank = rng.standard_normal((70, 33)).astype(np.float32), rng.standard_normal((500, 33)).astype(np.float32)
    index = kernels.KnnIndex(bank, backend=backend)
    distances, indices = index.search(query, 5)
    for i in (0, 1, 37, 69):
        one = index.search(query[i : i + 1], 5)
        np.testing.assert_array_equal(one[0][0], distances[i])
        np.testing.assert_array_equal(one[1][0], indices[i])


@pytest.mark.parametrize(
    ("query", "bank", "k", "error", "says"),
    [
        (np.ones((2, 3)), np.ones((4, 5)), 1, ValueError, "query: expected 5 channels"),
        (np.ones((2, 3)), np.ones((4, 3)), 5, ValueError, "k: expected an integer in [1, 4], got 5"),
        (np.ones((2, 3)), np.ones((4, 3)), 0, ValueError, "k: expected an integer in [1, 4], got 0"),
        (np.ones((2, 3)), np.ones((4, 3)), 1.5, TypeError, "k: expected an integer"),
        (np.ones(3), np.ones((4, 3)), 1, ValueError, "query: expected 2 dimensions"),
        (np.ones((0, 3)), np.ones((4, 3)), 1, ValueError, "query: expected no empty axis"),
        (np.ones((2, 3)), np.ones((0, 3)), 1, ValueError, "bank: expected no empty axis"),
        (np.array([[np.nan, 1]]), np.ones((4, 2)), 1, ValueError, "query: expected finite values, got nan at (0, 0)"),
        (np.ones((1, 2)), np.array([[1, np.inf]]), 1, ValueError, "bank: expected finite values, got inf at (0, 1)"),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
def test_bad_input_is_named(backend, query, bank, k, error, says, as_tensor):
    if as_tensor:
        query, bank = torch.from_numpy(query), torch.from_numpy(bank)
    with pytest.raises(error) as caught:
        kernels.nearest_neighbors(query, bank, k, backend=backend)
    assert says in str(caught.value)


def test_a_tensor_may_be_searched_in_an_array(backend):
    distances, indices = kernels.nearest_neighbors(torch.eye(3), np.eye(3), backend=backend)
    assert isinstance(distances, torch.Tensor) and indices[:, 0].tolist() == [0, 1, 2]


def test_a_query_on_another_device_is_refused(backend):
    index = kernels.KnnIndex(torch.eye(3), backend=backend)
    with pytest.raises(ValueError, match=r"^query: expected device "):
        index.search(torch.eye(3, device="meta"))


def test_a_pickle_keeps_the_backend_and_the_vectors(backend):
    for index in (kernels.KnnIndex(np.eye(3), backend=backend), kernels.KnnIndex(dim=3, backend=backend)):
        back = pickle.loads(pickle.dumps(index))
        assert back._backend == backend and back.dim == 3 and len(back) == len(index)


def test_warmup_on_a_host_searches_once_and_has_no_graph(backend, rng):
    index = kernels.KnnIndex(rng.standard_normal((9, 3)), backend=backend)
    assert index.warmup(rng.standard_normal((2, 3)), 9) is False
    assert index.warmup(torch.ones((2, 3), dtype=torch.int64)) is False
    with pytest.raises(ValueError, match="query: expected 3 channels"):
        index.warmup(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="k: expected an integer in"):
        index.warmup(np.zeros((2, 3)), 10)
    with pytest.raises(ValueError, match="query: the index is empty"):
        kernels.KnnIndex(dim=3, backend=backend).warmup(np.zeros((2, 3)))


def test_what_a_graph_of_the_callers_reads_stays_with_the_index():
    """It is replayed whenever the caller likes, after the parts that it was captured with are replaced."""
    index = kernels.KnnIndex(np.eye(3), backend="reference")
    parts = []
    for change, *points in ((index.add, np.eye(3)), (index.reset,)):
        index._parts[0].in_graphs = True
        parts.append(weakref.ref(index._parts[0]))
        change(*points)
    index.add(np.eye(3))
    parts.append(weakref.ref(index._parts[0]))
    index.reset()
    assert [part() is not None for part in parts] == [True, True, False]
    del index, change
    assert [part() for part in parts] == [None] * 3


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_vectors_on_another_device_than_the_bank_are_refused(monkeypatch, kind):
    """Of two devices, which are made up: a kernel would read addresses of the other. Host arrays come from anywhere."""
    from ttt4as_fast.kernels.knn import index as made

    here, there = (type("Tensor", (torch.Tensor,), {"device": torch.device("cuda", number)}) for number in (0, 1))

    class Index:
        def __init__(self, bank):
            self.bank = bank

        def search(self, query, k, squared):
            return np.zeros((len(query), k), np.float32), np.zeros((len(query), k), np.int64)

    module = types.SimpleNamespace(ARRAYS=kind, Index=Index)
    monkeypatch.setattr(made.OPERATION.__class__, "resolve", lambda self, backend, device: module)
    monkeypatch.setattr(made.arrays, "like", lambda result, template: result)
    index = kernels.KnnIndex(torch.eye(3).as_subclass(here))
    assert index.search(torch.eye(3).as_subclass(here))[1].tolist() == [[0]] * 3
    if kind == "numpy":
        index.search(torch.eye(3).as_subclass(there))
        return
    with pytest.raises(ValueError, match="query: expected device cuda:0 as the bank, got cuda:1"):
        index.search(torch.eye(3).as_subclass(there))
    with pytest.raises(ValueError, match="points: expected device cuda:0 as the bank, got cuda:1"):
        index.add(torch.eye(3).as_subclass(there))
    with pytest.raises(ValueError, match="query: expected device cuda:0 as the bank, got cpu"):
        index.search(np.eye(3))


def test_squared_is_a_bool(backend):
    index = kernels.KnnIndex(3 * np.eye(2), backend=backend)
    assert index.search(np.zeros((1, 2)), squared=np.True_)[0] == 9 and index.search(np.zeros((1, 2)))[0] == 3
    with pytest.raises(TypeError, match="squared: expected a bool, got 'no'"):
        index.search(np.zeros((1, 2)), squared="no")


def test_squares_are_of_no_rounded_root(backend):
    """That of the root of 2 is 1.9999999."""
    bank = np.array([[1, 1], [3, 4], [2, 1], [3e20, 4e20], [1, 1]], np.float32)
    grown = kernels.KnnIndex(bank[:4], backend=backend)
    grown.add(bank[4:])
    assert len(grown._parts) == 2
    for index in (grown, kernels.KnnIndex(bank, backend=backend)):
        distances, indices = index.search(np.zeros((1, 2), np.float32), 5, squared=True)
        assert distances.tolist() == [[2, 2, 5, 25, np.inf]] and indices.tolist() == [[0, 4, 2, 1, 3]]


@pytest.mark.parametrize("noise", [0, 1e-3, 1])
def test_squares_in_the_order_of_distances(backend, rng, noise):
    """With structure in the features and without, and of queries far outside the bank."""
    bank = rng.standard_normal((700, 6)) @ rng.standard_normal((6, 96)) + noise * rng.standard_normal((700, 96))
    query = np.concatenate([bank[:40] + 0.1, 1e4 * rng.standard_normal((40, 96))])
    squares, indices = kernels.KnnIndex(bank, backend=backend).search(query, 7, squared=True)
    distances, order = kernels.nearest_neighbors(query, bank, 7, backend=backend)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(squares, distances.astype(np.float64) ** 2, rtol=2e-7)
    exact = ((query[:, None] - bank[indices]) ** 2).sum(2)
    np.testing.assert_allclose(squares, exact, rtol=6.1e-8)  # half a unit of float32


def test_an_addition_that_fails_leaves_no_trace(backend):
    index = kernels.KnnIndex(dim=2, backend=backend)
    with pytest.raises(ValueError, match="points: expected finite"):
        index.add(np.array([[0.0, np.nan]]))
    assert index._device is None and len(index) == 0
    index.add(np.eye(2))
    assert index.search(np.eye(2), 1)[1].tolist() == [[0], [1]]
