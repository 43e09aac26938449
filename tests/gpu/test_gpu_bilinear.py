"""Bilinear upsampling and sampling on the device against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from ..kernels.cases import DTYPES, TOLERANCE

SHAPES = [
    ((1, 1, 1, 1), (1, 1)),
    ((2, 3, 1, 1), (7, 5)),
    ((1, 5, 7, 3), (1, 1)),
    ((2, 13, 17, 19), (61, 97)),
    ((1, 3, 31, 29), (11, 7)),  # smaller than the features
    ((1, 67, 5, 1), (34, 33)),
    ((1, 2, 1, 70), (3, 301)),
    ((1, 130, 4, 4), (4, 4)),
]


def close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(1.0, float(want.abs().max()))
    assert torch.allclose(got.double().cpu(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_upsample(device, rng, shape, size, dtype, last):
    x = torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    got = kernels.bilinear_upsample(x.to(device), size, backend="gpu")
    close(got, kernels.bilinear_upsample(x, size, backend="reference"), dtype)
    if not x.is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_upsample_of_a_strided_view(device, rng):
    x = torch.from_numpy(rng.standard_normal((9, 12, 14)).astype(np.float32))
    want = kernels.bilinear_upsample(x[::2, 1::2, ::3], (20, 23), backend="reference")
    close(kernels.bilinear_upsample(x.to(device)[::2, 1::2, ::3], (20, 23), backend="gpu"), want, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_sample(device, rng, shape, size, dtype):
    x = torch.from_numpy(rng.standard_normal(shape[1:])).to(getattr(torch, dtype))
    rows, cols = torch.from_numpy(rng.integers(size[0], size=21)), torch.from_numpy(rng.integers(size[1], size=21))
    got = kernels.bilinear_sample(x.to(device), size, rows.to(device), cols.to(device), backend="gpu")
    want = kernels.bilinear_sample(x, size, rows, cols, backend="reference")
    close(got, want, "float64" if dtype == "float64" else "float32")


def test_sample_of_nothing_and_off_the_grid(device):
    from ttt4as_fast.kernels.bilinear import gpu

    x = torch.ones((3, 4, 4), device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert gpu.sample(x, none, none, 8, 8).shape == (0, 3)
    rows = torch.tensor([0, -1, 8, 3, 3], device=device)
    cols = torch.tensor([0, 0, 0, 9, 3], device=device)
    assert torch.isnan(gpu.sample(x, rows, cols, 8, 8)).any(1).tolist() == [False, True, True, True, False]


def test_more_blocks_than_a_grid_axis_holds(device, monkeypatch, rng):
    """Batches beyond 65,535 blocks go in parts; here the limit is lowered, the arithmetic the same."""
    from ttt4as_fast.kernels.bilinear import gpu

    monkeypatch.setattr(gpu, "GRID_LIMIT", 2)
    monkeypatch.setattr(gpu, "upsample_blocks", lambda channels, width, last: (2, 16))
    x = torch.from_numpy(rng.standard_normal((5, 7, 3, 4)).astype(np.float32))
    want = kernels.bilinear_upsample(x, (9, 20), backend="reference")
    close(gpu.upsample(x.to(device), 9, 20), want, "float32")


def test_the_other_axes_of_a_grid_are_short(monkeypatch):
    """However many the channels and columns: only the first axis takes more than 65,535 blocks."""
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.bilinear import gpu

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(gpu, "upsample_kernel", Kernel())
    monkeypatch.setattr(gpu, "sample_kernel", Kernel())
    wide = torch.zeros((1, 128, 1, 2), dtype=torch.float16).to(memory_format=torch.channels_last)
    deep = torch.zeros((1, 1, 1), dtype=torch.float16).expand(64 * 65_536, 1, 1)
    gpu.upsample(wide, 1, 8 * 65_536)
    one = torch.zeros(1, dtype=torch.int64)
    gpu.sample(deep, one, one, 1, 1)
    assert [grid[0] for grid in grids] == [65_536, 65_536]
    assert all(size <= 65_535 for grid in grids for size in grid[1:])
