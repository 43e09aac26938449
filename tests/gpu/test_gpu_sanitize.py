"""Every kernel once, on small sizes that leave blocks partly empty: what compute-sanitizer runs beside a GPU.

``python -m benchmarks.gpu`` runs this file under memcheck and racecheck, each tensor in an allocation of its own; CUDA
graphs need an allocator that keeps memory, so nothing here captures one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from ..kernels.cases import smooth_map, structured_features


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=atol)


def test_bilinear(device, rng):
    x = torch.from_numpy(rng.standard_normal((3, 5, 7)).astype(np.float32))
    last = x[None].contiguous(memory_format=torch.channels_last)
    pixels = torch.tensor([0, 3, 10])
    for features in (x, last):
        close(
            kernels.bilinear_upsample(features.to(device), (11, 13), backend="gpu"),
            kernels.bilinear_upsample(features, (11, 13), backend="reference"),
        )
    close(
        kernels.bilinear_sample(x.to(device), (11, 13), pixels.to(device), pixels.to(device), backend="gpu"),
        kernels.bilinear_sample(x, (11, 13), pixels, pixels, backend="reference"),
    )


@pytest.mark.parametrize("way", ["_propose", "_propose_gemm", "_propose_hopper"])
@pytest.mark.parametrize(("triton", "dim"), [(False, 21), (False, 24), (True, 21)], ids=["cuda", "wide", "triton"])
def test_knn(device, rng, monkeypatch, way, triton, dim):
    """By each way to propose; refined in CUDA where CuPy is there, number by number and 16 bytes at a time, and in
    Triton. The first query has its neighbours in one group.
    """
    from ttt4as_fast.kernels.knn import gpu

    if triton:
        monkeypatch.setattr(gpu.Index, "_fits_cuda", lambda self: False)
    bank = torch.from_numpy(rng.standard_normal((133, dim)).astype(np.float32))
    query = torch.from_numpy(rng.standard_normal((3, dim)).astype(np.float32))
    bank[[0, 1, 8, 9, 16, 17]] = query[0] + 0.1 * torch.from_numpy(rng.standard_normal((6, dim)).astype(np.float32))
    k = 5
    distances = torch.empty((3, k), dtype=torch.float32, device=device)
    indices = torch.empty((3, k), dtype=torch.int64, device=device)
    if way == "_propose_hopper" and not gpu.hopper.usable(device):
        pytest.skip("not of compute capability 9.0, or no CuPy")
    index = gpu.Index(bank.to(device))
    index._search(query.to(device), k, distances, indices, getattr(index, way))
    want, order = kernels.nearest_neighbors(query, bank, k, backend="reference")
    close(distances, want)
    assert torch.equal(indices.cpu(), order)


def test_coreset(device, rng):
    points = torch.from_numpy(rng.integers(-3, 4, (45, 7)).astype(np.float32))
    got = kernels.k_center_greedy(points.to(device), 5, backend="gpu")
    assert torch.equal(got.cpu(), kernels.k_center_greedy(points, 5, backend="reference"))


@pytest.mark.usefixtures("cuda_source")
def test_peaks(device, rng):
    x = torch.from_numpy(rng.standard_normal((2, 19, 37)).astype(np.float32))
    peaks = kernels.local_maxima(x.to(device), 90.0, backend="gpu")
    assert torch.equal(peaks.cpu(), kernels.local_maxima(x, 90.0, backend="reference"))
    grown = kernels.dilate(peaks, 2, backend="gpu")
    assert torch.equal(grown.cpu(), kernels.dilate(peaks.cpu(), 2, backend="reference"))


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("n_nominal", [9, 300], ids=["points", "cells"])
def test_segment(device, rng, n_nominal):
    """Labels, basis, Gram matrix, solver, decision and mask: with nominal samples as basis vectors, and without."""
    maps = torch.from_numpy(np.stack([smooth_map(rng, 21, 35) for _ in range(2)]))
    features = torch.from_numpy(np.stack([structured_features(rng, 5, 6, 7) for _ in range(2)]))
    options = {"n_nominal": n_nominal, "neighbor_radius": 2, "tol": 1e-6}
    got = kernels.segment(maps.to(device), features.to(device), backend="gpu", **options)
    want = kernels.segment(maps, features, backend="reference", **options)
    assert torch.equal(got.pseudo_labels.cpu(), want.pseudo_labels) and got.status == want.status
    close(got.decision_map, want.decision_map, 1e-3 * max(1.0, float(want.decision_map.abs().max())))


@pytest.mark.usefixtures("cuda_source")
def test_svm(device, rng):
    """The solver without a Gram matrix in shared memory is the large problem's; this is the small one's."""
    X, y = rng.standard_normal((37, 6)).astype(np.float32), np.where(rng.random(37) < 0.4, 1, -1)
    y[:2] = 1, -1
    fitted = kernels.fit_linear_svm(torch.from_numpy(X).to(device), y, C=0.1, backend="gpu")
    assert fitted.converged
    best = kernels.fit_linear_svm(X, y, C=0.1, tol=1e-8, backend="reference")
    close(fitted.coef.double(), torch.from_numpy(best.coef), 1e-3)
