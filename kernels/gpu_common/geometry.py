"""Interpolation tables: what `bilinear.reference.taps` says, computed once on the host and kept on the device.

Every kernel reads the same tables, so no two of them can disagree about a weight, and no device arithmetic can round a
pixel into the wrong cell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..bilinear.reference import taps
from .tables import table


class Axis(NamedTuple):
    """One axis of a bilinear upsampling, `size` pixels over `cells` cells. Tensors are read-only."""

    lower: torch.Tensor
    """(size,) int32: the lower of the two cells a pixel looks at; the upper one is ``min(lower + 1, cells - 1)``."""
    weight: torch.Tensor
    """(size,) float32 or float64: weight of the upper one."""
    start: torch.Tensor
    """(cells + 1,) int32: pixels with ``lower == i`` are ``start[i]`` to ``start[i + 1] - 1``."""


def axis(size: int, cells: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Axis:
    """The tables of an axis of `size` output pixels and `cells` input cells, on `device`."""

    def make() -> Axis:
        lower, _, weight = taps(size, cells)
        start = np.searchsorted(lower, np.arange(cells + 1))
        return Axis(
            torch.from_numpy(lower.astype(np.int32)).to(device),
            torch.from_numpy(weight).to(device=device, dtype=dtype),
            torch.from_numpy(start.astype(np.int32)).to(device),
        )

    return table(("axis", size, cells, dtype), device, make)
