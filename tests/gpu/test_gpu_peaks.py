"""Percentile, peaks and dilation on the device against the reference: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from ..kernels.cases import DTYPES

pytestmark = pytest.mark.usefixtures("cuda_source")
SHAPES = [(1, 1, 1), (2, 1, 7), (1, 33, 31), (3, 13, 64), (1, 65, 97)]


@pytest.mark.parametrize("plateaus", [False, True], ids=["distinct", "plateaus"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_local_maxima(device, rng, shape, dtype, plateaus):
    values = rng.standard_normal(shape)
    x = torch.from_numpy(np.round(2 * values) / 2 if plateaus else values * 1e3).to(getattr(torch, dtype))
    for percentile in (0.0, 37.5, 99.0, 100.0):
        got = kernels.local_maxima(x.to(device), percentile, backend="gpu")
        assert torch.equal(got.cpu(), kernels.local_maxima(x, percentile, backend="reference")), percentile


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_percentile_over_every_magnitude(device, rng, dtype):
    """Keys spread over all exponents, and over none: as many passes as it takes."""
    wide = rng.standard_normal((1, 20, 30)) * 10.0 ** rng.integers(-30, 30, (1, 20, 30))
    constant = np.full((1, 20, 30), -0.0)
    near = 1 + np.finfo(dtype).eps * rng.integers(0, 3, (1, 20, 30))
    x = torch.from_numpy(np.concatenate([wide, constant, near]).astype(dtype))
    for percentile in (1.0, 50.0, 99.9):
        got = kernels.local_maxima(x.to(device), percentile, backend="gpu")
        assert torch.equal(got.cpu(), kernels.local_maxima(x, percentile, backend="reference"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", [0.0, 7.0], ids=["at the bottom", "saturated"])
def test_a_plateau_larger_than_the_shortlist(device, rng, level, dtype):
    """More pixels share the highest place than a block can list: it passes over the map instead."""
    values = rng.random((1, 80, 90)).astype(dtype)
    values[0, 5:, :] = level  # 6750 of 7200, where 4096 fit
    x = torch.from_numpy(values)
    for percentile in (99.6, 99.9, 100.0):  # few enough above it for a block of 32 threads too
        got = kernels.local_maxima(x.to(device), percentile, backend="gpu")
        assert torch.equal(got.cpu(), kernels.local_maxima(x, percentile, backend="reference")), percentile


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_subnormal_numbers_are_numbers(device, rng, dtype):
    """Tails of a blur: below the least normal number, which a compiler may be told to take for 0."""
    least = np.finfo(dtype).smallest_subnormal
    x = torch.from_numpy((least * rng.integers(-500, 500, (1, 23, 30))).astype(dtype))
    assert x.unique().numel() > 200
    for percentile in (1.0, 50.0, 99.0):
        got = kernels.local_maxima(x.to(device), percentile, backend="gpu")
        assert torch.equal(got.cpu(), kernels.local_maxima(x, percentile, backend="reference"))


def test_a_map_that_is_not_finite_has_no_peaks_and_spares_the_others(device, rng):
    from ttt4as_fast.kernels.peaks import gpu

    x = torch.from_numpy(rng.standard_normal((3, 9, 9)))
    want = gpu.local_maxima(x.to(device), 90.0).cpu()
    x[1, 4, 4] = float("nan")
    got = gpu.local_maxima(x.to(device), 90.0).cpu()
    assert not got[1].any() and torch.equal(got[[0, 2]], want[[0, 2]]) and want[1].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dilate(device, rng, shape):
    mask = torch.from_numpy(rng.random(shape) < 0.003)
    mask[-1, -1, -1] = mask[0, 0, 0] = True  # growth that starts at a border has one side only
    for radius in (0, 1, 2, 4, 5, 13, 14, 40, 200):
        got = kernels.dilate(mask.to(device), radius, backend="gpu")
        assert torch.equal(got.cpu(), kernels.dilate(mask, radius, backend="reference")), radius


@pytest.mark.interpret
def test_a_map_whose_places_would_overflow_is_refused(device):
    """32 bits count its pixels, but not with what a block adds to them."""
    from ttt4as_fast.kernels.peaks import gpu

    pixel = torch.zeros((1, 1, 1), device=device)
    assert gpu.check_size(pixel.expand(1, 2**15, 2**15), "mask") == (1, 2**15, 2**15)
    large = pixel.expand(1, 2**15 + 1, 2**15)
    with pytest.raises(ValueError, match=r"anomaly_map: expected at most 2\*\*30 pixels, got 32769 x 32768"):
        gpu.local_maxima(large, 99.0)
    with pytest.raises(ValueError, match=r"mask: expected at most 2\*\*30 pixels, got 32769 x 32768"):
        gpu.dilate(pixel.bool().expand(large.shape), 1)


def test_no_result_depends_on_the_order_of_threads(rng):
    from ttt4as_fast.kernels.gpu_common import cuda

    from . import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    x = np.round(rng.standard_normal((2, 30, 41)) * 3).astype(np.float32)
    results, peaks = [], cuda.Unit("peaks/peaks.cu")
    for threads, backwards in ((32, False), (96, True)):
        out = torch.zeros(x.shape, dtype=torch.bool)
        arguments = (torch.from_numpy(x), out, np.int32(30), np.int32(41), np.float64(95.0))
        emulator.Emulator(threads, backwards)(peaks, "local_maxima_f32", 2, 1024, 0, arguments)
        grown = torch.zeros_like(out)
        scratch = torch.zeros(2 * 2 * 30 * 2, dtype=torch.int32)
        arguments = (out, grown, scratch, np.int32(30), np.int32(41), np.int32(3))
        emulator.Emulator(threads, backwards)(peaks, "dilate", 2, 1024, 0, arguments)
        results.append((out, grown))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0], kernels.local_maxima(torch.from_numpy(x), 95.0, backend="reference"))
    with pytest.raises(AssertionError, match="a tensor or a NumPy value"):
        cuda.addresses((1,))


@pytest.mark.interpret
def test_the_emulator_notices_threads_that_part(tmp_path, monkeypatch):
    """A barrier that half of a block meets would hang a GPU; here it is an error, like a missing argument."""
    from ttt4as_fast.kernels.gpu_common import cuda

    from . import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "split.cu").write_text(
        'extern "C" __global__ void split(int* x) {\n    if (threadIdx.x < 16) __syncthreads();\n    x[0] = 1;\n}\n'
    )
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path)
    cuda.source.cache_clear()
    launch = emulator.Emulator()
    with pytest.raises(AssertionError, match="different barriers"):
        launch(cuda.Unit("split.cu"), "split", 1, 64, 0, (torch.zeros(1, dtype=torch.int32),))
    with pytest.raises(AssertionError, match="number of arguments"):
        launch(cuda.Unit("split.cu"), "split", 1, 64, 0, ())
    cuda.source.cache_clear()
