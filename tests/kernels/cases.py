"""Dtypes, inputs like those of real use, and what the ends of a range owe, for the tests of every operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import TTT4AS

DTYPES = ("float16", "bfloat16", "float32", "float64")
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}  # relative to the largest value


def tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
    """`x` as a host tensor of the named dtype."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def smooth_map(rng: np.random.Generator, height: int, width: int, peaks: int = 3) -> np.ndarray:
    """An anomaly map like a detector's: a smooth background and a few bumps."""
    from scipy import ndimage

    anomaly_map = ndimage.gaussian_filter(rng.random((height, width)), max(height, width) / 40)
    rows, cols = np.mgrid[:height, :width]
    for _ in range(peaks):
        row, col = rng.integers(height), rng.integers(width)
        size = rng.uniform(0.03, 0.1) * max(height, width) + 0.5
        anomaly_map += rng.uniform(0.3, 1) * np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (2 * size**2))
    return anomaly_map.astype(np.float32)


def structured_features(rng: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    """Feature maps like a network's: non-negative, correlated across channels and neighbours, decaying spectrum."""
    from scipy import ndimage

    rank = min(channels, 24)
    basis = rng.standard_normal((channels, rank)) / np.arange(1, rank + 1)
    maps = ndimage.gaussian_filter(rng.standard_normal((rank, height, width)), (0, 1, 1))
    noise = 0.05 * rng.standard_normal((channels, height, width))
    return np.maximum(np.tensordot(basis, maps, 1) + noise + 0.1, 0).astype(np.float32)


def assert_range(preset: str, name: str, low: float, high: float | None) -> None:
    """The option takes both ends of its range (`high` None: there is none), and nothing beyond them."""
    for end, outwards in ((low, -1), (high, 1)):
        if end is not None:
            assert TTT4AS(preset, **{name: end}).get_params()[name] == end
            with pytest.raises(ValueError, match=f"^{name}: expected an? "):
                TTT4AS(preset, **{name: end + outwards * (1 if isinstance(end, int) else 1e-9)})
