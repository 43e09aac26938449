"""Exact nearest neighbours under the Euclidean distance: PatchCore's search of its memory bank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import arrays
from .index import OPERATION, KnnIndex

if TYPE_CHECKING:
    from ..arrays import Array

__all__ = ["OPERATION", "KnnIndex", "nearest_neighbors"]


def nearest_neighbors(query: Array, bank: Array, k: int = 1, *, backend: str = "auto") -> tuple[Array, Array]:
    """The `k` nearest rows of `bank` for every row of `query`: exact, Euclidean, nearest first, ties by lowest index.

    For many searches of one bank, `KnnIndex` prepares it once.

    Parameters
    ----------
    query : array or tensor, (Q, D)
        float16, bfloat16, float32 or float64.
    bank : array or tensor, (N, D)
        As `query`, on the same device.
    k : int
        Neighbours, 1 to N.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    distances : (Q, k) float32
        Euclidean, not squared.
    indices : (Q, k) int64
        Rows of `bank`.

    Raises
    ------
    ValueError, TypeError
        Wrong ranks, different channel counts or devices, a non-finite value, k > N, unknown backend. On a GPU a query
        with such a value, or with squared distances beyond float64's range, gets distances NaN and indices -1: raising
        would wait for the device.
    RuntimeError
        `backend` names one that cannot serve here.

    References
    ----------
    Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022 (PatchCore).
    """
    if arrays.is_tensor(query) and arrays.is_tensor(bank):
        query = arrays.as_float_array(query, "query", (2,), meta=True)
        bank = arrays.as_float_array(bank, "bank", (2,), meta=True)
        if query.shape[1] != bank.shape[1]:
            raise ValueError(f"query: expected {bank.shape[1]} channels as in bank, got shape {tuple(query.shape)}")
        if query.device != bank.device:
            raise ValueError(f"query: expected device {bank.device} as bank, got {query.device}")
        k = arrays.check_int(k, "k", 1, bank.shape[0])
        from .. import torch_ops

        return torch_ops.nearest_neighbors(query, bank, k, backend)
    return KnnIndex(bank, backend=backend).search(query, k)
