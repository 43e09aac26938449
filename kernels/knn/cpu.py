"""Exact nearest neighbours in C++: byte codes rule pairs out by a proven bound, differences in float64 decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import native

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    return native.why_not()


class Index:
    """A bank (N, D) with its codes; see kernels/cpp/include/ttt4as/knn.hpp.

    float32 and float64 banks with adjacent columns are kept by reference, memory-mapped ones too; others are copied.
    Codes take about 210 + D bytes a vector (274 + D from 320 channels on; D as the next multiple of 64), made in one
    pass over the bank, and D more once a search met queries without structure. A search reads N * 64 bytes for every
    eight queries and does 64 N multiply-adds of bytes a query; where 8 of 16 queries, evenly spread, find no
    structure to use, all of them read N * D bytes for every 32 and do D N multiply-adds each. Their time is the floor.
    """

    def __init__(self, bank: np.ndarray) -> None:
        self.bank = bank
        self._index: Any = native.core().KnnIndex(native.rows(bank), threads=native.threads())

    @classmethod
    def open(cls, bank: np.ndarray, prepared: np.ndarray, verify: bool) -> Index:
        """The index over `bank` that `save` wrote, `prepared` (bytes, aligned to 64) being read in place.

        ValueError where they do not belong together, where the bytes are of another version or have changed; with
        `verify` all of them are checked, else only what keeps a search within bounds.
        """
        index = cls.__new__(cls)
        index.bank = bank
        index._index = native.core().KnnIndex.open(native.rows(bank), prepared, verify)
        return index

    def save(self, write: Callable[[memoryview], object]) -> None:
        """Hand what was prepared to `write`, piece by piece."""
        self._index.save(write)

    def search(self, query: np.ndarray, k: int, squared: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) -> distances (Q, k) float32, indices (Q, k) int64, nearest first, ties by lowest index.

        Distances are Euclidean, or their squares, infinite beyond float32.
        """
        return self._index.search(native.rows(query), k, threads=native.threads(), squared=squared)

    @property
    def nbytes(self) -> int:
        """Bytes held beside the bank."""
        return self._index.nbytes

    @property
    def counts(self) -> dict[str, int]:
        """Pairs that each stage of the searches so far has seen, and queries without structure."""
        return self._index.counts
