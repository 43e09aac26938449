"""FAISS-style objects over `kernels.KnnIndex`: swap the object in code for FAISS, or for PatchCore's `FaissNN`."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels

if TYPE_CHECKING:
    from ..kernels.arrays import Array

__all__ = ["FaissNN", "IndexFlatL2"]


@contextlib.contextmanager
def _renaming(**names: str) -> Iterator[None]:
    """Errors about arguments of what is called within name those that it was given from: ``names[called] = given``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, text = str(error).partition(": ")
        if name not in names:
            raise
        raise type(error)(names[name] + colon + text) from error


class IndexFlatL2:
    """`faiss.IndexFlatL2` by exact search: the same calls, squared distances, and -1 where there are too few vectors.

    Of FAISS's methods it has `add`, `search`, `reset` and `train`. An empty `add` or query, which FAISS takes, raises;
    a missing distance, the largest float32 in FAISS, is infinity; files are those of `KnnIndex`.

    Parameters
    ----------
    d : int
        Channels of every vector.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Attributes
    ----------
    d : int
    ntotal : int
        Vectors added.
    is_trained : bool
        Always true: there is nothing to train.

    Examples
    --------
    >>> index = IndexFlatL2(2)
    >>> index.add(np.array([[0, 0], [3, 4]], np.float32))
    >>> index.search(np.array([[3, 0]], np.float32), 2)
    (array([[ 9., 16.]], dtype=float32), array([[0, 1]]))
    """

    is_trained = True

    @_renaming(dim="d")
    def __init__(self, d: int, *, backend: str = "auto") -> None:
        self._index = kernels.KnnIndex(dim=d, backend=backend)
        self.d = self._index.dim

    @property
    def ntotal(self) -> int:
        """Vectors added so far."""
        return self._index.ntotal

    def train(self, x: Array) -> None:
        """Nothing: a flat index has nothing to learn."""

    @_renaming(points="x")
    def add(self, x: Array) -> None:
        """Append a copy of vectors, (n, d); see `KnnIndex.add`."""
        self._index.add(x)

    @_renaming(query="x")
    def search(self, x: Array, k: int) -> tuple[Array, Array]:
        """Squared distances (n, k) float32, infinity where missing, and indices (n, k) int64, -1 where missing.

        Parameters
        ----------
        x : array or tensor, (n, d)
        k : int
            Neighbours; beyond `ntotal` the rest is missing.

        Raises
        ------
        ValueError, TypeError
            As `KnnIndex.search`, but for k beyond the bank.
        """
        available = min(kernels.arrays.check_int(k, "k", 1), self.ntotal)
        if available == k:
            return self._index.search(x, k, squared=True)
        x = self._index.check_vectors(x, "x")
        if not available:
            kernels.arrays.check_finite(kernels.arrays.to_numpy(x), "x")
            distances, indices = np.empty((len(x), 0), np.float32), np.empty((len(x), 0), np.int64)
        else:
            found = self._index.search(x, available, squared=True)
            distances, indices = (kernels.arrays.to_numpy(part) for part in found)
        missing = ((0, 0), (0, k - available))
        return kernels.arrays.like(
            (
                np.pad(distances, missing, constant_values=np.float32(np.inf)),
                np.pad(indices, missing, constant_values=-1),
            ),
            x,
        )

    def reset(self) -> None:
        """Remove all vectors."""
        self._index.reset()

    def __copy__(self) -> IndexFlatL2:
        """An index of its own, as FAISS copies: what is added to one is not in the other."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _index=copy.copy(self._index))
        return other

    def write(self, path: str | os.PathLike) -> None:
        """Save the vectors as an NPY file, and what was prepared behind them; see `KnnIndex.write`."""
        self._index.write(path)

    @classmethod
    def read(cls, path: str | os.PathLike, *, mmap: bool = False, backend: str = "auto") -> IndexFlatL2:
        """The index that `write` saved; see `KnnIndex.read`."""
        index = cls.__new__(cls)
        index._index = kernels.KnnIndex.read(path, mmap=mmap, backend=backend)
        index.d = index._index.dim
        return index


def _index_over(features: Array, name: str) -> IndexFlatL2:
    features = kernels.arrays.as_float_array(features, name, (2,))
    index = IndexFlatL2(features.shape[1])
    with _renaming(x=name):
        index.add(features)
    return index


class FaissNN:
    """The nearest-neighbour object of the original PatchCore code (``patchcore.common.FaissNN``), on `KnnIndex`.

    Swap it in as ``PatchCore(...).load(..., nn_method=FaissNN())``. Arguments are taken for compatibility: the backend
    follows the device of the features, and threads are set as everywhere in this package.

    Parameters
    ----------
    on_gpu : bool
    num_workers : int
    """

    def __init__(self, on_gpu: bool = False, num_workers: int = 4) -> None:
        self.on_gpu = on_gpu
        self.num_workers = num_workers
        self.search_index: IndexFlatL2 | None = None

    def fit(self, features: np.ndarray) -> None:
        """Search `features`, (N, D), from now on; where they are refused, what was searched before."""
        self.search_index = _index_over(features, "features")

    def run(
        self, n_nearest_neighbours: int, query_features: np.ndarray, index_features: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances and indices (Q, k) among the fitted features, or among `index_features` where given.

        Raises
        ------
        ValueError
            Nothing was fitted and no `index_features` are given.
        """
        if index_features is not None:
            index = _index_over(index_features, "index_features")
        elif self.search_index is None:
            raise ValueError("index_features: expected features to search, got None and nothing was fitted")
        else:
            index = self.search_index
        with _renaming(x="query_features", k="n_nearest_neighbours"):
            return index.search(query_features, n_nearest_neighbours)

    def save(self, filename: str | os.PathLike) -> None:
        """Save the fitted features."""
        if self.search_index is None:
            raise ValueError("filename: nothing was fitted, so there is nothing to save")
        self.search_index.write(filename)

    @_renaming(path="filename")
    def load(self, filename: str | os.PathLike) -> None:
        """Load what `save` wrote."""
        self.search_index = IndexFlatL2.read(filename)

    def reset_index(self) -> None:
        """Forget the fitted features."""
        self.search_index = None
