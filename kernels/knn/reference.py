"""What exact nearest-neighbour search computes: every distance, in float64, and a stable sort."""

from __future__ import annotations

import numpy as np

ARRAYS = "numpy"
_CHUNK = 64  # queries at a time, so that the distance block stays small beside the bank


def unavailable(device: str) -> str | None:
    """Always usable; tensors on a device make the trip to the host and back."""
    return None


class Index:
    """Brute force over the rows of `bank` (N, D)."""

    def __init__(self, bank: np.ndarray) -> None:
        self.bank = bank
        self.exact = bank.astype(np.float64)
        self.norms = np.einsum("nd,nd->n", self.exact, self.exact)

    def search(self, query: np.ndarray, k: int, squared: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) -> distances (Q, k) float32, indices (Q, k) int64, nearest first, ties by lowest index.

        Distances are Euclidean, or their squares, infinite beyond float32. The expansion |q|^2 - 2 q.b + |b|^2 in
        float64 proposes, differences decide: the expansion loses the small distances of vectors far from the
        origin, so all that it cannot tell from the k-th are measured directly.
        """
        distances = np.empty((len(query), k), np.float32)
        indices = np.empty((len(query), k), np.int64)
        for start in range(0, len(query), _CHUNK):
            rows = query[start : start + _CHUNK].astype(np.float64)
            norms = np.einsum("qd,qd->q", rows, rows)
            proposed = norms[:, None] - 2 * rows @ self.exact.T + self.norms
            error = 8 * self.bank.shape[1] * np.finfo(np.float64).eps * (norms + self.norms.max())
            limit = np.partition(proposed, k - 1, axis=1)[:, k - 1] + 2 * error
            for i, row in enumerate(rows):
                near = np.flatnonzero(proposed[i] <= limit[i])
                squares = ((self.exact[near] - row) ** 2).sum(axis=1)
                order = np.argsort(squares, kind="stable")[:k]
                with np.errstate(over="ignore"):
                    distances[start + i] = squares[order] if squared else np.sqrt(squares[order])
                indices[start + i] = near[order]
        return distances, indices
