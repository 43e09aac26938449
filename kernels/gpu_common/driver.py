"""What CuPy does not offer of the CUDA driver: descriptions of tensors of which hardware copies boxes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch

TENSOR_MAP = np.dtype([("opaque", np.uint64, 16)])
"""The driver's ``CUtensorMap``."""
_FLOAT16, _SWIZZLE_128B, _L2_256B = 6, 3, 3  # of the driver's enumerations


def tensor_map(x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """Boxes of a float16 tensor for copies to shared memory, swizzled by 128 bytes; zeros where there is nothing.

    Parameters
    ----------
    x : tensor, float16
        Its address is what counts.
    shape, strides, box : sequence of int
        Of the dimensions from the innermost on; strides in bytes, without the innermost.

    Returns
    -------
    array, (1,) of `TENSOR_MAP`
        To be passed to a kernel by value.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    room = np.zeros(TENSOR_MAP.itemsize + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    found = room[start : start + TENSOR_MAP.itemsize].view(TENSOR_MAP)
    rank = len(shape)
    code = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(found.ctypes.data), ctypes.c_int(_FLOAT16), ctypes.c_uint32(rank),
        ctypes.c_void_p(x.data_ptr()), (ctypes.c_uint64 * rank)(*shape), (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank), ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B), ctypes.c_int(_L2_256B), ctypes.c_int(0),
    )  # fmt: skip
    if code:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {code} for {shape}, strides {strides}, box {box}")
    return found


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
