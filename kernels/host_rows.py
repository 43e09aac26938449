"""Matrices as the C++ core reads them."""

from __future__ import annotations

import numpy as np


def native_rows(x: np.ndarray) -> np.ndarray:
    """`x` (N, D) as float32 or float64, aligned, with adjacent columns; `x` itself where it is that already.

    float64 stays float64, everything else becomes float32, which holds it exactly.
    """
    dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    rows = x.strides[0] % dtype.itemsize == 0 and x.strides[1] == dtype.itemsize
    if x.dtype == dtype and x.dtype.isnative and x.flags.aligned and rows:
        return x
    return np.require(x, dtype, ("C", "A"))
