"""`KnnIndex`: a bank prepared once, searched often, grown without preparing all of it again."""

from __future__ import annotations

import contextlib
import os
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays
from ..dispatch import Operation
from . import index_file

if TYPE_CHECKING:
    import torch

    from ..arrays import Array

OPERATION = Operation("knn", host=("cpu", "reference"), cuda=("gpu", "cpu", "reference"))


class KnnIndex:
    """A bank of vectors prepared once for many exact searches.

    A bank that grows is kept in parts: `add` prepares the new vectors alone and merges parts of like size, so that
    N vectors added one by one are prepared O(log N) times each and a search visits O(log N) parts.

    Beside the bank the host's backend keeps about 210 + D bytes a vector (274 + D from 320 channels on; D more once
    queries without structure came), a GPU's about 2 D + 4, and from its first search on the host's keeps 1.5 MiB at
    most and D + k KiB for each thread. A search on a GPU sets aside 256 MiB at most beyond its result, or
    32 N + 24 D bytes where that is more.

    Several threads may search while one adds: each search is of the vectors before or after. Threads that add take
    turns by a lock of their own.

    On a GPU the second search with the same numbers of queries and neighbours captures a CUDA graph, which later ones
    replay; `warmup` captures it at once. Each part of the bank keeps the graphs of the four kinds of search used last,
    each with device memory of its own, 40 MiB at most; a search that needs more has no graph. A search inside a CUDA
    graph that the caller captures becomes part of that graph, every replay of which reads the index: keep the index for
    as long as the graph. It also keeps what `add` replaces and `reset` removes, where such a graph reads that. An index
    in several parts cannot be searched there.

    Parameters
    ----------
    bank : array or tensor, (N, D), optional
        The vectors to search; float16, bfloat16, float32 or float64. Kept by reference where the backend can.
    dim : int, optional
        D of an index that starts empty; not needed beside `bank`.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`. Chosen by the first vectors' device, then kept.

    Attributes
    ----------
    dim : int
        D, the number of channels.
    ntotal : int
        N, the number of vectors; also ``len(index)``.

    Raises
    ------
    ValueError, TypeError
        `bank` has the wrong rank or dtype, an empty axis or non-finite values; neither `bank` nor `dim` is given.
    RuntimeError
        `backend` names one that cannot serve here.
    """

    def __init__(self, bank: Array | None = None, *, dim: int | None = None, backend: str = "auto") -> None:
        if bank is None and dim is None:
            raise ValueError("bank: expected an array (N, D), or dim for an index that starts empty; got neither")
        OPERATION.check_backend(backend)
        self._backend = backend
        self._module: ModuleType | None = None
        self._device: str | torch.device | None = None  # see `_place`
        self._parts: tuple[Any, ...] = ()  # replaced whole, and read once a call: another thread may add meanwhile
        self._in_graphs: list[Any] = []  # parts no more, which CUDA graphs of the caller's still read
        if dim is not None:
            self.dim = arrays.check_int(dim, "dim", 1)
        if bank is not None:
            channels = int(arrays.as_float_array(bank, "bank", (2,)).shape[1])
            if dim is not None and channels != self.dim:
                raise ValueError(f"dim: expected {channels}, the channels of the bank, got {dim}")
            self.dim = channels
            self._append(bank, "bank", keep=True)

    @property
    def ntotal(self) -> int:
        """Vectors in the index."""
        return sum(_rows(part.bank) for part in self._parts)

    def __len__(self) -> int:
        return self.ntotal

    @property
    def bank(self) -> Array:
        """The vectors, (N, D), in the order they were added; a copy where they lie in several parts.

        Raises
        ------
        ValueError
            The index is empty.
        """
        return _bank(self._parts)

    def add(self, points: Array) -> None:
        """Append a copy of vectors; they take the indices from `ntotal` on.

        Parameters
        ----------
        points : array or tensor, (M, D)
            Any of the bank's dtypes, on the bank's device (with a backend of host arrays, its device type).

        Raises
        ------
        ValueError, TypeError
            Wrong rank, channel count or device, an empty axis, a non-finite value. The index is then unchanged.
        """
        self._append(points, "points", keep=False)

    def reset(self) -> None:
        """Remove all vectors."""
        self._replace(())

    def search(self, query: Array, k: int = 1, *, squared: bool = False) -> tuple[Array, Array]:
        """The `k` nearest vectors of every query, nearest first, ties by lowest index.

        Parameters
        ----------
        query : array or tensor, (Q, D)
            Any of the bank's dtypes, on the bank's device (with a backend of host arrays, its device type).
        k : int
            Neighbours, 1 to N.
        squared : bool
            Return squared distances, as FAISS does for its L2 metric; infinity where float32 cannot hold them.

        Returns
        -------
        distances : (Q, k) float32
            Euclidean.
        indices : (Q, k) int64
            In the order of adding.

        Raises
        ------
        ValueError, TypeError
            Wrong rank, channel count or device of `query`, a non-finite value, k beyond the bank, an empty index, or a
            `squared` that is no bool. On a GPU a query with such a value, or with squared distances beyond float64's
            range, gets distances NaN and indices -1: raising would wait for the device.
        RuntimeError
            The caller captures a CUDA graph, and the bank is in several parts.
        """
        query = self.check_vectors(query, "query")
        squared = arrays.check_bool(squared, "squared")
        parts = self._parts
        if not parts:
            raise ValueError("query: the index is empty; add vectors before searching")
        k = arrays.check_int(k, "k", 1, sum(_rows(part.bank) for part in parts))
        template, query = query, _native(self._module, query, "query")
        with arrays.device_of(query):
            if len(parts) > 1 and arrays.device_type(query) == "cuda":
                _check_no_capture(len(parts))
            found = [part.search(query, min(k, _rows(part.bank)), squared) for part in parts]
        distances, indices = found[0] if len(found) == 1 else _merge(query, [part.bank for part in parts], found, k)
        return arrays.like((distances, indices), template)

    def warmup(self, query: Array, k: int = 1, *, squared: bool = False) -> bool:
        """Pay for the first search now: compile what searches like this one need.

        On a GPU this captures their CUDA graph. Call it before other threads use the device: a thread that waits for
        the whole device (`torch.cuda.synchronize`) or draws random numbers on it meanwhile gets an error or ends the
        capture, and searches then launch kernels one by one. If another thread is capturing a CUDA graph of its own,
        that capture fails. Without `warmup` all this holds for the second search, which captures then. Vectors added
        later are not covered.

        Parameters
        ----------
        query, k, squared
            As `search` takes them; the values do not matter on a GPU, and must be finite on a host.

        Returns
        -------
        bool
            Whether CUDA graphs wait for the searches.

        Raises
        ------
        ValueError, TypeError
            As `search`.
        RuntimeError
            A CUDA graph is being captured on the current stream, which to capture another would end; or as `search`.
        """
        query = self.check_vectors(query, "query")
        self.search(query, k, squared=squared)
        if not hasattr(self._module.Index, "warmup"):  # type: ignore[union-attr]
            return False
        with arrays.device_of(query):
            captured = [part.warmup(query, min(k, _rows(part.bank)), squared) for part in self._parts]
        return all(captured)

    def write(self, path: str | os.PathLike) -> None:
        """Save the vectors as one NPY file, written whole or not at all, and behind them what the backend prepared.

        NumPy and other readers of NPY see the vectors alone. With the ``cpu`` backend the codes follow them, those of
        the whole bank: an index in several parts is prepared once more for it.

        Parameters
        ----------
        path : path
            The file; ``.npy`` is not appended.

        Raises
        ------
        ValueError
            The index is empty.
        OSError
            The file cannot be written.
        """
        parts = self._parts
        bank = arrays.to_numpy(_bank(parts))
        save = None
        if hasattr(self._module.Index, "open"):  # type: ignore[union-attr]
            part = parts[0] if len(parts) == 1 else self._module.Index(bank)  # type: ignore[union-attr]
            save = part.save
        index_file.write(path, bank, save)

    @classmethod
    def read(cls, path: str | os.PathLike, *, mmap: bool = False, backend: str = "auto") -> KnnIndex:
        """An index over the vectors that `write` saved.

        Parameters
        ----------
        path : path
        mmap : bool
            Map the file instead of reading it: vectors and codes stay on disk and pages are loaded as searches need
            them. Nothing is prepared, and the vectors are not checked. Only the checksum of those codes that keep a
            search within bounds is verified (34 bytes a vector); without `mmap` all checksums are, the vectors' too.
        backend : str
            As in the constructor.

        Returns
        -------
        KnnIndex

        Raises
        ------
        ValueError
            The file is no NPY file of numbers (N, D), or cut short; the codes were written by a newer version, have
            changed since, or are another bank's.
        FileNotFoundError
            There is no such file.
        """
        bank, prepared = index_file.read(path, mmap)
        module = OPERATION.resolve(backend, "cpu")
        if prepared is None or not hasattr(module.Index, "open"):
            return cls(bank, backend=backend)
        try:
            bank = arrays.as_float_array(bank, "bank", (2,))
            part = module.Index.open(bank, prepared, verify=not mmap)
        except (TypeError, ValueError) as error:
            raise index_file.refused(path, error) from error
        index = cls(dim=bank.shape[1], backend=backend)
        index._module, index._device = module, "cpu"
        index._parts = (part,)
        return index

    def __reduce__(self) -> tuple:
        name = self._module.__name__.rpartition(".")[2] if self._module else self._backend
        parts = self._parts
        return _rebuild, (_bank(parts) if parts else None, self.dim, name)

    def _append(self, points: Array, name: str, *, keep: bool) -> None:
        """Add vectors; with `keep` the index may hold on to the caller's array, else it copies."""
        points = self.check_vectors(points, name)
        with arrays.device_of(points):
            module = self._module or OPERATION.resolve(self._backend, arrays.device_type(points))
        place = _place(module, points)
        points = _native(module, points, name)
        parts = self._parts
        kept = len(parts)
        while kept and _rows(parts[kept - 1].bank) < 2 * len(points):
            kept -= 1
            points = _concatenate([*_banks(parts[kept : kept + 1]), points])
        if not keep and kept == len(parts):  # what was put together is a copy already
            points = points.clone() if arrays.is_tensor(points) else points.copy()  # type: ignore[union-attr]
        with arrays.device_of(points):
            part = module.Index(points)
        self._module, self._device = module, place
        self._replace((*parts[:kept], part))

    def _replace(self, parts: tuple[Any, ...]) -> None:
        self._in_graphs += [part for part in self._parts if getattr(part, "in_graphs", False) and part not in parts]
        self._parts = parts

    def check_vectors(self, x: Array, name: str) -> Array:
        """`x` (M, D) as an array of floats that lies where the bank does; its values are not read."""
        x = arrays.as_float_array(x, name, (2,), meta=self._module is not None)  # whose device is compared
        if x.shape[1] != self.dim:
            raise ValueError(f"{name}: expected {self.dim} channels as in the bank, got shape {tuple(x.shape)}")
        if self._module is not None and _place(self._module, x) != self._device:
            raise ValueError(f"{name}: expected device {self._device} as the bank, got {_place(self._module, x)}")
        return x


def _place(module: ModuleType, x: Array) -> str | torch.device:
    """The device of `x`, to compare with the bank's; its type alone where the backend takes host arrays."""
    where = arrays.device_type(x)
    return where if where == "cpu" or module.ARRAYS == "numpy" else x.device  # type: ignore[union-attr]


def _rows(bank: Array) -> int:
    return int(bank.shape[0])


def _native(module: ModuleType | None, x: Array, name: str) -> Array:
    """`x` as the backend takes it; values are read on the host only."""
    assert module is not None  # an index that holds vectors has one
    if module.ARRAYS == "numpy":
        x = arrays.to_numpy(x)
        arrays.check_finite(x, name)
    return x


def _bank(parts: tuple[Any, ...]) -> Array:
    """The vectors of all parts."""
    if not parts:
        raise ValueError("bank: the index is empty")
    return _concatenate(_banks(parts))


def _banks(parts: tuple[Any, ...]) -> list[Array]:
    """The vectors of each part, to be read on the current stream."""
    for part in parts:
        if hasattr(part, "record_stream"):
            part.record_stream()
    return [part.bank for part in parts]


def _concatenate(banks: list[Array]) -> Array:
    if len(banks) == 1:
        return banks[0]
    if arrays.is_tensor(banks[0]):
        import torch

        return torch.cat(banks)
    return np.concatenate(banks)


_TIED_AT_ONCE = 64
"""Queries whose candidates are measured again together: scratch of this many times parts times k vectors in float64."""


def _check_no_capture(n_parts: int) -> None:
    """Raise where the current stream is being captured, before anything ends that: to merge parts is to wait."""
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"query: the index is in {n_parts} parts, and to merge what they find waits for the device, which no CUDA "
            "graph can hold; capture a search of KnnIndex(index.bank), which is in one"
        )


def _merge(query: Array, banks: list[Array], found: list[tuple[Array, Array]], k: int) -> tuple[Array, Array]:
    """The k nearest of what the parts found, each in the order of float64 and ties by lowest index.

    Distances that are the same in float32 may differ in float64: where a query has such, its candidates are
    measured again. On a device that waits for it.
    """
    starts = [0, *accumulate(map(_rows, banks[:-1]))]
    distances = _beside([distance for distance, _ in found])
    # -1 stays -1: on a GPU a query that is not finite has no neighbours.
    indices = _beside([index + start * (index >= 0) for (_, index), start in zip(found, starts, strict=True)])
    order = _order(distances)
    each = arrays.like(np.arange(_rows(query))[:, None], query)
    nearest = distances[each, order[:, : k + 1]]
    tied = np.flatnonzero(arrays.to_numpy((nearest[:, 1:] == nearest[:, :-1]).any(1)))
    for start in range(0, len(tied), _TIED_AT_ONCE):
        rows = arrays.like(tied[start : start + _TIED_AT_ONCE], query)
        points = [bank[index[rows]] for bank, (_, index) in zip(banks, found, strict=True)]
        order[rows] = _order(((_double(_beside(points)) - _double(query[rows])[:, None]) ** 2).sum(-1))
    order = order[:, :k]
    return distances[each, order], indices[each, order]


def _beside(blocks: list[Array]) -> Array:
    """Blocks (Q, n, ...) joined along their second axis."""
    if arrays.is_tensor(blocks[0]):
        import torch

        return torch.cat(blocks, 1)
    return np.concatenate(blocks, 1)


def _order(x: Array) -> Array:
    """The places that sort each row of `x`, stably."""
    if arrays.is_tensor(x):
        return x.argsort(dim=1, stable=True)  # type: ignore[call-arg]
    return np.argsort(x, axis=1, kind="stable")  # type: ignore[arg-type]


def _double(x: Array) -> Array:
    return x.double() if arrays.is_tensor(x) else x.astype(np.float64)  # type: ignore[union-attr]


def _rebuild(bank: Array | None, dim: int, backend: str) -> KnnIndex:
    """An unpickled index: with the backend that it had, else the fastest usable here."""
    with contextlib.nullcontext() if bank is None else arrays.device_of(bank):
        device = "cpu" if bank is None else arrays.device_type(bank)
        known = backend in OPERATION.backends and OPERATION.why_not(backend, device) is None
    return KnnIndex(bank, dim=dim, backend=backend if known else "auto")
