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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_at_any_scale(device, rng, dtype):
    """Squares beyond the range of float32, or float64, at either end of it."""
    points = torch.from_numpy(rng.standard_normal((30, 3))).to(getattr(torch, dtype))
    want = kernels.k_center_greedy(points.double(), 6, backend="reference")
    for exponent in (500, 990, -500, -900) if dtype == "float64" else (33, 64, 120, -33, -80, -100):
        got = kernels.k_center_greedy((points * 2.0**exponent).to(device), 6, backend="gpu")
        assert torch.equal(got.cpu(), want), exponent


def test_rows_that_lie_far_apart(far_apart):
    assert kernels.k_center_greedy(far_apart, 3, backend="gpu").tolist() == [0, 2, 1]


def test_progress_and_strides(device, rng):
    points = torch.from_numpy(rng.integers(0, 9, (7, 60)).astype(np.float32)).T
    seen = []
    got = kernels.k_center_greedy(
        points.to(device), 9, 2, progress=lambda done, total: seen.append((done, total)), backend="gpu"
    )
    assert seen[0] == (1, 9) and seen[-1] == (9, 9)
    assert torch.equal(got.cpu(), kernels.k_center_greedy(points, 9, 2, backend="reference"))


def test_more_points_than_32_bits_count_are_refused():
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.coreset import gpu

    with pytest.raises(ValueError, match=r"^points: expected at most 2\*\*30 on a GPU, got 1073741825$"):
        gpu.greedy(torch.zeros((1, 1), dtype=torch.float16).expand(2**30 + 1, 1), 1, 0)


def test_not_finite(device):
    from ttt4as_fast.kernels.coreset import gpu

    with pytest.raises(ValueError, match="points: expected finite"):
        gpu.greedy(torch.tensor([[0.0], [float("inf")]], device=device), 1, 0)


class TestSketches:
    """Where they are used (there are bounds on picks and channels), they change no pick."""

    @staticmethod
    def clusters(rng, n: int = 130, dim: int = 70) -> torch.Tensor:
        """Few strong directions, clusters and copies: what sketches exclude, and what they must not."""
        centres = rng.standard_normal((20, 6)) @ rng.standard_normal((6, dim))
        x = centres[rng.integers(0, 20, n)] + 0.3 * rng.standard_normal((n, dim)) + 50
        x[n // 2 :: 7] = x[3]
        return torch.from_numpy(x.astype(np.float32))

    @staticmethod
    def both(points: torch.Tensor, n_samples: int, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
        from ttt4as_fast.kernels.coreset import gpu

        found = []
        for least in ((1, 1), (10**9, 1)):
            monkeypatch.setattr(gpu, "_SKETCH_FROM", least)
            found.append(gpu.greedy(points, n_samples, 1))
        return found[0], found[1]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
    def test_the_picks_are_those_of_a_full_pass(self, device, rng, monkeypatch, dtype):
        points = self.clusters(rng, 330).to(device, getattr(torch, dtype))
        with_sketches, without = self.both(points, 9, monkeypatch)
        assert torch.equal(with_sketches, without)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_the_points_stay_what_they_are(self, device, rng, monkeypatch, dtype):
        """Of float64 the sample was the caller's memory: it was centred there, and the rest of the points was not."""
        from ttt4as_fast.kernels.coreset import gpu

        monkeypatch.setattr(gpu, "_SAMPLE", 20)
        points = self.clusters(rng).to(device, getattr(torch, dtype))
        before = points.clone()
        with_sketches, without = self.both(points, 9, monkeypatch)
        assert torch.equal(points, before) and torch.equal(with_sketches, without)

    @pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 3e37, 1e150])
    def test_at_any_scale(self, device, rng, monkeypatch, scale):
        dtype = torch.float64 if scale > 1e38 else torch.float32
        points = (self.clusters(rng, 40, 33).double() / 60 * scale).to(dtype).to(device)
        with_sketches, without = self.both(points, 5, monkeypatch)
        assert torch.equal(with_sketches, without)

    def test_fewer_directions_than_a_sketch_holds_and_strides(self, device, rng, monkeypatch):
        points = torch.from_numpy(rng.integers(0, 5, (7, 60)).astype(np.float32)).T.to(device)
        with_sketches, without = self.both(points, 9, monkeypatch)
        assert torch.equal(with_sketches, without)
        with_sketches, without = self.both(torch.ones((12, 9), device=device), 12, monkeypatch)
        assert torch.equal(with_sketches, without) and len(set(with_sketches.tolist())) == 12

    def test_no_distance_of_sketches_is_above_that_of_points(self, device, rng):
        """Within the margin; and most of what is no nearer is excluded."""
        from ttt4as_fast.kernels.coreset import gpu

        points = self.clusters(rng, 400, 140).to(device)
        sketches, margin = gpu.sketches_of(points)
        exact = torch.cdist(points.double(), points.double()).square()
        below = torch.cdist(sketches.double(), sketches.double()).square()
        assert (below <= exact * (1 + 2.0**-8) + float(margin)).all()
        assert float(margin) < 1e-5 * float(exact.mean())
        nearest = exact[:, :8].amin(1, keepdim=True)
        excluded, no_nearer = below > nearest * (1 + 2.0**-6) + margin.double(), exact >= nearest
        assert float((excluded & no_nearer).sum() / no_nearer.sum()) > 0.8
