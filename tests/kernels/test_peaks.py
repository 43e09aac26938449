"""Local maxima and dilation: the reference against scikit-image and a loop, every backend bit for bit the reference."""

from __future__ import annotations

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from skimage import morphology

from ttt4as_fast import kernels
from ttt4as_fast.kernels.peaks import reference

from .cases import DTYPES, smooth_map, tensor

OPERATION = "peaks"
SHAPES = [(1, 1), (1, 17), (19, 1), (2, 2), (3, 3), (31, 37), (224, 224), (127, 64)]


def loop_maxima(values: np.ndarray, percentile: float) -> np.ndarray:
    """The definition, pixel by pixel."""
    tau = np.percentile(values.astype(np.float64), percentile)
    height, width = values.shape
    peaks = np.zeros(values.shape, bool)
    for r in range(height):
        for c in range(width):
            window = values[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
            peaks[r, c] = values[r, c] == window.max() and values[r, c] >= tau
    return peaks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("percentile", [0.0, 50.0, 99.0, 99.5, 100.0])
def test_local_maxima(backend, rng, shape, percentile):
    values = smooth_map(rng, *shape)
    got = kernels.local_maxima(values, percentile, backend=backend)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, loop_maxima(values, percentile))


@pytest.mark.parametrize("percentile", [1.0, 33.3, 90.0, 99.0])
def test_few_levels_make_plateaus(backend, rng, percentile):
    values = rng.integers(0, 4, (23, 29)).astype(np.float32)
    np.testing.assert_array_equal(
        kernels.local_maxima(values, percentile, backend=backend), loop_maxima(values, percentile)
    )


def test_constant_map_is_all_peaks(backend):
    assert kernels.local_maxima(np.full((7, 5), 2.5, np.float32), backend=backend).all()


def test_negative_and_huge_values(backend, rng):
    for scale in (-1.0, 1e30, 1e-30):
        values = (rng.standard_normal((33, 21)) * scale).astype(np.float32)
        np.testing.assert_array_equal(kernels.local_maxima(values, 95, backend=backend), loop_maxima(values, 95))


def test_signed_zeros_are_equal(backend):
    values = np.array([[0.0, -0.0], [-0.0, 0.0]], np.float32)
    assert kernels.local_maxima(values, 100, backend=backend).all()


def test_zeros_of_both_signs_are_of_one_rank(backend):
    """So many equal values that the core finds the percentile by their bits."""
    values = np.zeros((100, 200), np.float32)
    values[:50], values[99, 199] = -0.0, 1
    assert kernels.local_maxima(values, 50, backend=backend).sum() == values.size - 3


def test_a_percentile_between_neighbouring_floats(backend):
    values = np.zeros((1, 11), np.float32)
    values[0, 2], values[0, 8] = 1, np.nextafter(np.float32(1), np.float32(2))
    assert np.flatnonzero(kernels.local_maxima(values, 93, backend=backend)).tolist() == [8]


def test_the_highest_percentile_is_a_plateau(backend):
    values = np.ones((150, 150), np.float32)
    values[0, 0] = 0
    assert kernels.local_maxima(values, 100, backend=backend).sum() == values.size - 1


def test_neighbours_that_float32_cannot_part(backend):
    """A float64 map keeps its own precision."""
    values = np.full((5, 5), 1.0)
    values[2, 2] += 1e-12
    got = kernels.local_maxima(values, 100, backend=backend)
    assert got.sum() == 1
    assert got[2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_kind(backend, rng, dtype):
    values = tensor(smooth_map(rng, 41, 43), dtype)
    got = kernels.local_maxima(values, 97, backend=backend)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.bool
    np.testing.assert_array_equal(got.numpy(), loop_maxima(values.double().numpy(), 97))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("radius", [0, 1, 5, 8, 300])
def test_dilate(backend, rng, shape, radius):
    mask = rng.random(shape) < 0.02
    mask.flat[0] = True
    got = kernels.dilate(mask, radius, backend=backend)
    assert got.dtype == bool
    side = 2 * min(radius, max(shape)) + 1
    np.testing.assert_array_equal(got, morphology.dilation(mask, np.ones((side, side), bool)))


def test_dilate_nothing(backend):
    assert not kernels.dilate(np.zeros((9, 11), bool), 3, backend=backend).any()


def test_batch_and_layout_change_nothing(backend, rng):
    maps = np.stack([smooth_map(rng, 45, 39) for _ in range(4)])
    peaks = kernels.local_maxima(maps, backend=backend)
    grown = kernels.dilate(peaks, 4, backend=backend)
    strided = np.repeat(maps, 2, 2)[:, :, ::2]
    np.testing.assert_array_equal(kernels.local_maxima(strided, backend=backend), peaks)
    np.testing.assert_array_equal(kernels.local_maxima(np.asfortranarray(maps), backend=backend), peaks)
    np.testing.assert_array_equal(kernels.dilate(np.asfortranarray(peaks), 4, backend=backend), grown)
    for i, one in enumerate(maps):
        np.testing.assert_array_equal(kernels.local_maxima(one, backend=backend), peaks[i])
        np.testing.assert_array_equal(kernels.dilate(peaks[i], 4, backend=backend), grown[i])


def test_batches_that_are_worth_threads(backend, rng):
    maps = np.stack([smooth_map(rng, 301, 305) for _ in range(3)])
    peaks = kernels.local_maxima(maps, 98.0, backend=backend)
    grown = kernels.dilate(maps > 0.5, 7, backend=backend)
    for i, one in enumerate(maps):
        np.testing.assert_array_equal(peaks[i], kernels.local_maxima(one, 98.0, backend="reference"))
        np.testing.assert_array_equal(grown[i], kernels.dilate(one > 0.5, 7, backend="reference"))


@pytest.mark.parametrize(
    ("environment", "processors", "in_torch", "pools"),
    [("", 3, 4, [3]), ("2", 3, 4, [2]), ("", 3, 2, [2]), ("1", 3, 4, []), ("", 1, 4, []), ("", 3, 1, [])],
)
def test_numba_heeds_the_limits_on_threads(monkeypatch, environment, processors, in_torch, pools):
    file, made = kernels.peaks.OPERATION.module("numba"), []

    def pool(workers):
        made.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: in_torch)
    monkeypatch.setattr(file, "ThreadPoolExecutor", pool)
    kernels.dilate(np.zeros((3, 512, 512), bool), 1, backend="numba")
    assert made == pools


@pytest.mark.parametrize(
    ("values", "percentile", "error", "says"),
    [
        (np.ones(4), 99, ValueError, "anomaly_map: expected 2 or 3 dimensions"),
        (np.ones((0, 4)), 99, ValueError, "anomaly_map: expected no empty axis"),
        (np.array([[1, np.nan]]), 99, ValueError, "anomaly_map: expected finite values, got nan at (0, 1)"),
        (np.ones((2, 2)), 101, ValueError, "percentile: expected a number in [0, 100], got 101"),
        (np.ones((2, 2)), float("nan"), ValueError, "percentile"),
        (np.ones((2, 2)), "high", TypeError, "percentile"),
    ],
)
def test_bad_maps_are_named(backend, values, percentile, error, says):
    with pytest.raises(error) as caught:
        kernels.local_maxima(values, percentile, backend=backend)
    assert says in str(caught.value)


def test_a_value_on_a_device_is_where_the_caller_finds_it(monkeypatch):
    monkeypatch.setattr(kernels.arrays, "device_type", lambda x: "cuda")
    values = torch.zeros((1, 4, 5))
    values[0, 2, 3] = torch.nan
    for given, where in ((values, "(0, 2, 3)"), (values[0], "(2, 3)")):
        with pytest.raises(ValueError, match=re.escape(f"anomaly_map: expected finite values, got nan at {where} (")):
            kernels.local_maxima(given, backend="reference")


@pytest.mark.parametrize(
    ("mask", "radius", "error", "says"),
    [
        (np.ones((2, 2)), 1, TypeError, "mask: expected dtype bool"),
        (np.ones(4, bool), 1, ValueError, "mask: expected 2 or 3 dimensions"),
        (np.ones((2, 2), bool), -1, ValueError, "radius: expected an integer >= 0, got -1"),
        (np.ones((2, 2), bool), 1.0, TypeError, "radius"),
    ],
)
def test_bad_masks_are_named(backend, mask, radius, error, says):
    with pytest.raises(error) as caught:
        kernels.dilate(mask, radius, backend=backend)
    assert says in str(caught.value)


def test_numba_serves_where_nothing_may_be_written(monkeypatch, rng):
    from numba.core.caching import FunctionCache

    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])  # as with a read-only package and home
    spec = importlib.util.find_spec("ttt4as_fast.kernels.peaks.numba")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    maps = smooth_map(rng, 31, 37)[None]
    peaks = module.local_maxima(maps, 90.0)
    np.testing.assert_array_equal(peaks, reference.local_maxima(maps, 90.0))
    np.testing.assert_array_equal(module.dilate(peaks, 2), reference.dilate(peaks, 2))
