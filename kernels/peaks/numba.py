"""Peaks and dilation compiled by Numba, for installations without the C++ core.

Compiled code is cached on disk; `warmup` compiles or loads it ahead of the first call (seconds the first time ever).
Images of a batch go to threads of their own, outside the GIL: Numba's own parallel layer is not used, because not every
layer of it survives a fork or two callers at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

ARRAYS = "numpy"


def unavailable(device: str) -> str | None:
    """Usable where Numba compiles; tensors on a device make the trip to the host and back."""
    try:
        numba.njit(lambda x: x + 1)(1)
    except Exception as error:  # whatever stops the compiler is the reason
        return f"Numba cannot compile here ({error})"
    return None


def warmup() -> None:
    """Compile, or load from the disk, what the first call of each dtype would wait for."""
    for dtype in (np.float32, np.float64):
        dilate(local_maxima(np.zeros((1, 2, 2), dtype), 99.0), 1)


def local_maxima(anomaly_map: np.ndarray, percentile: float) -> np.ndarray:
    """(B, H, W) -> (B, H, W) bool."""
    dtype = np.float64 if anomaly_map.dtype.itemsize > 4 else np.float32
    maps = np.ascontiguousarray(anomaly_map, dtype)
    result = np.empty(maps.shape, np.bool_)
    place = (maps[0].size - 1) * (percentile / 100)
    rank = min(math.floor(place), maps[0].size - 1)

    def mark(i: int) -> None:
        ordered = np.partition(maps[i], rank, axis=None)
        low = float(ordered[rank])
        high = float(ordered[rank + 1 :].min()) if rank + 1 < ordered.size else low
        _mark_peaks(maps[i], _between(low, high, place - rank), result[i])

    _each(len(maps), mark)
    return result


def _between(low: float, high: float, fraction: float) -> float:
    """Linear interpolation in NumPy's order of operations: the last bit decides where a pixel equals the percentile."""
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1."""
    masks = np.ascontiguousarray(mask)
    result = np.empty(masks.shape, np.bool_)

    def grow(i: int) -> None:
        _dilate(masks[i], radius, np.zeros_like(masks[i]), np.full(masks.shape[2], -1), result[i])

    _each(len(masks), grow)
    return result


def _each(count: int, work: Callable[[int], None]) -> None:
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    workers = min(count, int(limit) if limit.isdigit() and int(limit) else os.cpu_count() or 1)
    if workers == 1:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, range(count)):
            pass


@numba.njit(cache=True, nogil=True)
def _mark_peaks(values: np.ndarray, tau: float, out: np.ndarray) -> None:
    """Peaks of one map, compared with the percentile in float64."""
    height, width = values.shape
    for y in range(height):
        for x in range(width):
            value = values[y, x]
            peak = np.float64(value) >= tau
            if peak:
                for v in range(max(y - 1, 0), min(y + 2, height)):
                    for u in range(max(x - 1, 0), min(x + 2, width)):
                        peak = peak and values[v, u] <= value
            out[y, x] = peak


@numba.njit(cache=True, nogil=True)
def _dilate(mask: np.ndarray, radius: int, row: np.ndarray, reaches: np.ndarray, out: np.ndarray) -> None:
    """Along rows, then along columns: each sweep carries how far the last set pixel still reaches.

    `row` is scratch like `mask`, `reaches` holds -1 for each column; nothing is allocated here.
    """
    height, width = mask.shape
    for y in range(height):
        reach = -1
        for x in range(width):
            reach = radius if mask[y, x] else reach - 1
            row[y, x] = reach >= 0
        reach = -1
        for x in range(width - 1, -1, -1):
            reach = radius if mask[y, x] else reach - 1
            row[y, x] = row[y, x] or reach >= 0
    for y in range(height):
        for x in range(width):
            reaches[x] = radius if row[y, x] else reaches[x] - 1
            out[y, x] = reaches[x] >= 0
    reaches[:] = -1
    for y in range(height - 1, -1, -1):
        for x in range(width):
            reaches[x] = radius if row[y, x] else reaches[x] - 1
            out[y, x] = out[y, x] or reaches[x] >= 0
