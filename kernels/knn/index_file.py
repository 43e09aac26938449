"""The file of a `KnnIndex`: its vectors as an NPY file, and behind them what the C++ core has prepared of them.

NumPy reads the vectors and stops there, so the file is an NPY file to everyone else; files without the second part are
read too. The second part begins on a multiple of 64 bytes: 64 bytes of a word and the vectors' CRC-32, then the core's
own block (kernels/cpp/src/prepared.hpp) with its version, its lengths and its checksums.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from typing import IO

import numpy as np

from ..files import atomic_path

_ALIGN = 64
_VECTORS = struct.Struct("<8sQ48x")
_WORD = b"ttt4asv1"
Save = Callable[[Callable[[memoryview], object]], None]


def write(path: str | os.PathLike, bank: np.ndarray, save: Save | None) -> None:
    """Write `bank` (N, D), and what `save` hands to its argument; the file is there whole or not at all."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        bank = np.ascontiguousarray(bank)
        np.save(file, bank, allow_pickle=False)
        if save is not None:
            file.write(bytes(-file.tell() % _ALIGN))
            file.write(_VECTORS.pack(_WORD, zlib.crc32(bank.data)))
            save(file.write)


def read(path: str | os.PathLike, mmap: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The bank, and the prepared bytes if the file has them, aligned to 64; both mapped if `mmap`, and not checked.

    Raises
    ------
    ValueError
        No NPY file of numbers, or cut short, or its vectors have changed.
    """
    try:
        with open(path, "rb") as file:  # `numpy.load` would take what is no NPY file for a pickle, and say so
            bank = np.lib.format.open_memmap(path, mode="r") if mmap else np.lib.format.read_array(file)
            file.seek(0)
            _skip_header(file)
            begin = file.tell() + bank.nbytes
            begin += -begin % _ALIGN
            size = os.fstat(file.fileno()).st_size - begin - _VECTORS.size
            if size <= -_VECTORS.size:
                return bank, None
            file.seek(begin)
            begin += _VECTORS.size
            word, checksum = _VECTORS.unpack(file.read(_VECTORS.size).ljust(_VECTORS.size))
            if word != _WORD or size <= 0:
                raise ValueError("other bytes behind the vectors than it writes there")
            if not mmap and zlib.crc32(np.ascontiguousarray(bank).data) != checksum:
                raise ValueError("its vectors have changed since")
            if mmap:
                return bank, np.memmap(file, np.uint8, "r", begin, (size,))
            file.seek(begin)
            room = np.zeros(size + _ALIGN, np.uint8)
            start = -room.ctypes.data % _ALIGN
            prepared = room[start : start + size]
            if file.readinto(prepared.data) != size:
                raise ValueError("it became shorter while it was read")
            return bank, prepared
    except (ValueError, EOFError) as error:
        raise refused(path, error) from error


def refused(path: str | os.PathLike, error: Exception) -> ValueError:
    """The error that says what is wrong with the file."""
    return ValueError(f"path: expected an NPY file of vectors (N, D), as KnnIndex.write makes it, got {path}: {error}")


def _skip_header(file: IO[bytes]) -> None:
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"version {version} of the NPY format")
    header[version](file)
