"""Exact nearest neighbours under the Euclidean distance: PatchCore's search of its memory bank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import arrays
from ..dispatch import Operation

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("knn", host=("reference",), cuda=("reference",))


class KnnIndex:
    """A bank of vectors prepared once for many exact searches.

    Parameters
    ----------
    bank : array or tensor, (N, D)
        The vectors to search; float16, bfloat16, float32 or float64. Kept by reference where the backend can.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`. Chosen once, for the device of `bank`.

    Attributes
    ----------
    dim : int
        D, the number of channels. ``len(index)`` is N.

    Raises
    ------
    ValueError, TypeError
        `bank` has the wrong rank or dtype, an empty axis or non-finite values.
    """

    def __init__(self, bank: Array, *, backend: str = "auto") -> None:
        bank = arrays.as_float_array(bank, "bank", (2,))
        self._device = arrays.device_type(bank)
        self._module = OPERATION.resolve(backend, self._device)
        self._size, self.dim = (int(n) for n in bank.shape)
        if self._module.ARRAYS == "numpy":
            bank = arrays.to_numpy(bank)
            arrays.check_finite(bank, "bank")
        self._index = self._module.Index(bank)

    def __reduce__(self) -> tuple:
        return _rebuild, (self._index.bank, self._module.__name__.rpartition(".")[2])

    def __len__(self) -> int:
        return self._size

    def search(self, query: Array, k: int = 1) -> tuple[Array, Array]:
        """The `k` nearest bank vectors of every query, nearest first, ties by lowest index.

        Parameters
        ----------
        query : array or tensor, (Q, D)
            Any of the bank's dtypes, on the bank's device type.
        k : int
            Neighbours, 1 to N.

        Returns
        -------
        distances : (Q, k) float32
            Euclidean, not squared.
        indices : (Q, k) int64
            Rows of the bank.

        Raises
        ------
        ValueError, TypeError
            Wrong rank, channel count or device of `query`, a non-finite value, or k beyond the bank.
        """
        query = arrays.as_float_array(query, "query", (2,))
        if query.shape[1] != self.dim:
            raise ValueError(f"query: expected {self.dim} channels as in the bank, got shape {tuple(query.shape)}")
        if arrays.device_type(query) != self._device:
            raise ValueError(f"query: expected device {self._device} as the bank, got {arrays.device_type(query)}")
        k = arrays.check_int(k, "k", 1, self._size)
        template = query
        if self._module.ARRAYS == "numpy":
            query = arrays.to_numpy(query)
            arrays.check_finite(query, "query")
        return arrays.like(self._index.search(query, k), template)


def _rebuild(bank: Array, backend: str) -> KnnIndex:
    """An unpickled index: the backend that it had, else the fastest usable here."""
    usable = OPERATION.why_not(backend, arrays.device_type(bank)) is None
    return KnnIndex(bank, backend=backend if usable else "auto")


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
        Wrong ranks, different channel counts or devices, a non-finite value, k > N, unknown backend.

    References
    ----------
    Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022 (PatchCore).
    """
    if arrays.is_tensor(query) and arrays.is_tensor(bank):
        query = arrays.as_float_array(query, "query", (2,))
        bank = arrays.as_float_array(bank, "bank", (2,))
        if query.shape[1] != bank.shape[1]:
            raise ValueError(f"query: expected {bank.shape[1]} channels as in bank, got shape {tuple(query.shape)}")
        if query.device != bank.device:
            raise ValueError(f"query: expected device {bank.device} as bank, got {query.device}")
        k = arrays.check_int(k, "k", 1, bank.shape[0])
        from .. import torch_ops

        return torch_ops.nearest_neighbors(query, bank, k, backend)
    return KnnIndex(bank, backend=backend).search(query, k)
