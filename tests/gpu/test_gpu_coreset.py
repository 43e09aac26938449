"""Greedy k-center on the device against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

CASES = [(1, 1, 1, 0), (70, 3, 12, 5), (129, 130, 7, 128), (40, 2, 40, 3)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("n", "dim", "n_samples", "start"), CASES)
def test_picks(device, rng, n, dim, n_samples, start, dtype):
    """Small integers: distances are exact in any dtype, and tie often."""
    points = torch.from_numpy(rng.integers(-3, 4, (n, dim))).to(getattr(torch, dtype))
    got = kernels.k_center_greedy(points.to(device), n_samples, start, backend="gpu")
    want = kernels.k_center_greedy(points.double(), n_samples, start, backend="reference")
    assert got.dtype == torch.int64 and torch.equal(got.cpu(), want)
    assert len(set(got.tolist())) == n_samples


def test_covers_as_well_as_the_reference(device, rng):
    points = torch.from_numpy(rng.standard_normal((150, 20)).astype(np.float32))

    def radius(picks: torch.Tensor) -> float:
        return float(torch.cdist(points.double(), points[picks.cpu()].double()).amin(1).max())

    got = kernels.k_center_greedy(points.to(device), 15, backend="gpu")
    want = kernels.k_center_greedy(points, 15, backend="reference")
    assert radius(got) == pytest.approx(radius(want), rel=1e-6)


def test_progress_and_strides(device, rng):
    points = torch.from_numpy(rng.integers(0, 9, (7, 60)).astype(np.float32)).T
    seen = []
    got = kernels.k_center_greedy(
        points.to(device), 9, 2, progress=lambda done, total: seen.append((done, total)), backend="gpu"
    )
    assert seen[0] == (1, 9) and seen[-1] == (9, 9)
    assert torch.equal(got.cpu(), kernels.k_center_greedy(points, 9, 2, backend="reference"))


def test_not_finite(device):
    from ttt4as_fast.kernels.coreset import gpu

    with pytest.raises(ValueError, match="points: expected finite"):
        gpu.greedy(torch.tensor([[0.0], [float("inf")]], device=device), 1, 0)
