"""Peaks and dilation compiled by Numba, for installations without the C++ core.

A map is read once: a sample of its values tells a bound below the percentile, and one pass over all pixels keeps those
above it, a few in a hundred. The percentile is selected among them, and only they are compared with their neighbours.
Sparse masks are dilated by painting squares, dense ones by joining shifted copies: log2 of the square's side of them.

Compiled code is cached on disk: the first call ever takes seconds. Where nothing may be written, so does that of every
process.
Images of a batch go to threads of their own, outside the GIL: Numba's own parallel layer is not used, because not every
layer of it survives a fork or two callers at once.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from .. import native

ARRAYS = "numpy"
_SAMPLE = 1024  # values that bracket a percentile
_STRETCH = 128  # values that are compared at once
_PARALLEL = 1 << 18  # pixels of a batch below which starting threads costs more than it brings
_SPARSE = 1 / 8  # rows of squares painted for each pixel of the map; from here on joining shifted copies is cheaper


def unavailable(device: str) -> str | None:
    """Usable where Numba compiles; tensors on a device make the trip to the host and back."""
    try:
        numba.njit(lambda x: x + 1)(1)
    except Exception as error:  # whatever stops the compiler is the reason
        return f"Numba cannot compile here ({error})"
    return None


def local_maxima(anomaly_map: np.ndarray, percentile: float) -> np.ndarray:
    """(B, H, W) -> (B, H, W) bool. Beside the result, 8 bytes a pixel of each map under work."""
    dtype = np.float64 if anomaly_map.dtype.itemsize > 4 else np.float32
    maps = np.ascontiguousarray(anomaly_map, dtype)
    result = np.zeros(maps.shape, np.bool_)

    def mark(i: int) -> None:
        places, tau = _above_percentile(maps[i].reshape(-1), percentile)
        _mark_peaks(maps[i], places, tau, result[i])

    _each(maps, mark)
    return result


def _above_percentile(values: np.ndarray, percentile: float) -> tuple[np.ndarray, float]:
    """Places of a map's values that include all from its percentile on, and that percentile."""
    place = (values.size - 1) * (percentile / 100)
    rank = min(math.floor(place), values.size - 1)
    places = _collect(values, values.dtype.type(_below_rank(values, rank)))
    skipped = values.size - len(places)
    if skipped > rank:  # the sample misled: once in ten thousand maps
        places, skipped = np.arange(values.size), 0
    last = min(rank + 1, values.size - 1) - skipped
    ordered = np.partition(values[places], (rank - skipped, last))
    return places, _between(float(ordered[rank - skipped]), float(ordered[last]), place - rank)


def _below_rank(values: np.ndarray, rank: int) -> float:
    """A value that most likely has fewer than `rank` values below it: four standard deviations of a sample's rank."""
    share = rank / values.size
    first = math.floor((share - 4 * math.sqrt(share * (1 - share) / _SAMPLE) - 2 / _SAMPLE) * _SAMPLE)
    if first < 0 or values.size <= 4 * _SAMPLE:
        return -math.inf
    return float(np.partition(values[_sample_places(values.size)], first)[first])


@functools.lru_cache(maxsize=8)
def _sample_places(size: int) -> np.ndarray:
    """One place from each of equal stretches, wandering, so that no period of the map is met."""
    edges = np.arange(_SAMPLE + 1) * size // _SAMPLE
    wander = np.arange(_SAMPLE) * 2654435761 % 2**32 / 2**32
    return edges[:-1] + (wander * np.diff(edges)).astype(np.int64)


def _between(low: float, high: float, fraction: float) -> float:
    """Linear interpolation in NumPy's order of operations: the last bit decides where a pixel equals the percentile."""
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1."""
    masks = np.ascontiguousarray(mask)
    result = np.zeros(masks.shape, np.bool_)
    height, width = masks.shape[1:]

    def grow(i: int) -> None:
        side = 2 * radius + 1
        if np.count_nonzero(masks[i]) * side <= _SPARSE * height * width:
            _paint(np.flatnonzero(masks[i]), radius, result[i])
        else:
            line, tall = np.zeros(width + side - 1, np.uint8), np.zeros((height + side - 1, width), np.uint8)
            _join(masks[i].view(np.uint8), side, line, tall, result[i].view(np.uint8))

    _each(masks, grow)
    return result


def _each(images: np.ndarray, work: Callable[[int], None]) -> None:
    """Call `work` with the place of every image, on threads where there is work for several."""
    count = len(images)
    workers = min(count, native.within_torch(_most_threads()))
    if workers == 1 or images.size < _PARALLEL:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, range(count)):
            pass


def _most_threads() -> int:
    """What OMP_NUM_THREADS says, else the processors that this process may use."""
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if limit.isdigit() and int(limit):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collect(values: np.ndarray, least: float) -> np.ndarray:
    """Places of the values that are not below `least`, in order; `least` is of the values' dtype."""
    counts = np.zeros(-(-values.size // _STRETCH), np.int32)
    places = np.zeros(_count(values, least, counts), np.int64)
    _gather(values, least, counts, places)
    return places


def _can_cache() -> bool:
    """Whether Numba finds a folder for compiled code: beside this file, or in the user's cache."""
    try:
        numba.njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


_CACHE = _can_cache()

# Compiled code allocates nothing: scratch is handed to it.


@numba.njit(cache=_CACHE, nogil=True)
def _count(values: np.ndarray, least: float, counts: np.ndarray) -> int:
    """How many values of each stretch are not below `least`, in vectors; returns their sum."""
    total = 0
    for s in range(counts.size):
        count = np.int32(0)
        for value in values[s * _STRETCH : (s + 1) * _STRETCH]:
            count += np.int32(value >= least)
        counts[s] = count
        total += counts[s]
    return total


@numba.njit(cache=_CACHE, nogil=True)
def _gather(values: np.ndarray, least: float, counts: np.ndarray, places: np.ndarray) -> None:
    """The places of what `_count` counted."""
    found = 0
    for s in range(counts.size):
        end = found + counts[s]
        i = s * _STRETCH
        while found < end:
            if values[i] >= least:
                places[found] = i
                found += 1
            i += 1


@numba.njit(cache=_CACHE, nogil=True)
def _mark_peaks(values: np.ndarray, places: np.ndarray, tau: float, out: np.ndarray) -> None:
    """Peaks of one map among `places`, compared with the percentile in float64."""
    height, width = values.shape
    for place in places:
        y, x = place // width, place % width
        value = values[y, x]
        peak = np.float64(value) >= tau
        if peak:
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    peak = peak and values[v, u] <= value
        out[y, x] = peak


@numba.njit(cache=_CACHE, nogil=True)
def _paint(places: np.ndarray, radius: int, out: np.ndarray) -> None:
    """A square around each place; they rise, so that of two in a row the second adds what the first did not reach."""
    height, width = out.shape
    row, end = -1, 0
    for place in places:
        y, x = place // width, place % width
        begin = max(x - radius, 0)
        if y == row:
            begin = max(begin, end)
        row, end = y, min(x + radius + 1, width)
        for v in range(max(y - radius, 0), min(y + radius + 1, height)):
            for u in range(begin, end):
                out[v, u] = True


@numba.njit(cache=_CACHE, nogil=True)
def _join(mask: np.ndarray, side: int, line: np.ndarray, tall: np.ndarray, out: np.ndarray) -> None:
    """Windows of `side` along rows, then along columns. A window twice as wide is two of those made so far."""
    height, width = mask.shape
    radius = side // 2
    for y in range(height):
        line[:] = 0
        line[radius : radius + width] = mask[y]
        done = 1
        while done < side:
            shift = min(done, side - done)
            for x in range(line.size - shift):
                line[x] |= line[x + shift]
            done += shift
        tall[radius + y] = line[:width]
    done = 1
    while done < side:
        shift = min(done, side - done)
        for y in range(tall.shape[0] - shift):
            for x in range(width):
                tall[y, x] |= tall[y + shift, x]
        done += shift
    out[:] = tall[:height]
