"""Bilinear upsampling by the C++ core: any strides without a copy, the GIL released."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ..dispatch import native_core

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Usable where the core is built; tensors on a device make the trip to the host and back."""
    core = native_core()
    return core if isinstance(core, str) else None


def upsample(features: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., h, w) -> (..., height, width), in the dtype of `features`."""
    return _core().bilinear_upsample(features, height, width)


def sample(features: np.ndarray, rows: np.ndarray, cols: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, h, w) and N pixels of the (height, width) grid -> (N, C), float32 or better."""
    return _core().bilinear_sample(features, rows, cols, height, width)


def _core() -> ModuleType:
    core = native_core()
    if isinstance(core, str):
        raise RuntimeError(core)
    return core
