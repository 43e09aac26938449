"""Every image of a batch trained at once: Gram matrices by ``gram.cu``, the solver in ``svm.cu``, weights in Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from . import FUSED, cuda
from .geometry import Axis
from .units import blocks

GRAM_CAPACITY = 1024
"""Basis vectors of an image up to which its Gram matrix is formed; past it products go through the basis."""
_GRAM, _SOLVER = "gpu_common/gram.cu", "gpu_common/svm.cu"
THREADS = 512
"""Threads of the solver's block, 512 at most."""
_VECTORS, _PAD = 12, 16  # vectors of the solver; each is as long as the basis, padded to a multiple of _PAD
_CELL, _PIXEL = 12, 5  # doubles that the solver keeps of a cell and of a labelled pixel
_RESERVED = 4096  # bytes of shared memory that the solver's reductions use
_GRAM_BLOCKS, _GRAM_THREADS = 64, 512  # an image's, and a block's
_GRAM_SHARED = max(5 * 2 * 32 * 17 * 16, _GRAM_THREADS // 32 * 32 * 33 * 4)
"""Bytes of shared memory that a block of ``gram.cu`` asks for: its stages of float4, or a tile's sums of each warp."""
WEIGHTS_BLOCKS = 64, 32
"""Basis vectors and channels of a program of `weights_kernel`: one image alone should have many programs."""


class Samples(NamedTuple):
    """Labels of a batch of maps and the cells that they look at, as ``segment/label.cu`` leaves them."""

    labels: torch.Tensor
    cells: torch.Tensor
    slot: torch.Tensor
    rows: Axis
    cols: Axis
    size: tuple[int, int]
    """(H, W)"""
    grid: tuple[int, int]
    """(h, w)"""
    own_points: bool


class Trained(NamedTuple):
    """One linear SVM an image."""

    weights: torch.Tensor
    """(B, dim) float32"""
    report: torch.Tensor
    """(B, 3) float64: relative duality gap, iterations, intercept"""


@triton.jit
def weights_kernel(
    basis_ptr, beta_ptr, counts_ptr, status_ptr, weights_ptr, rows, dim, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """w = U^T beta of each image, a block of channels a program; zero for an image that was not trained."""
    image = tl.program_id(1)
    m = tl.load(counts_ptr + image * 3) + tl.load(counts_ptr + image * 3 + 2)
    status = tl.load(status_ptr + image)
    if (status != 0) & (status != 3):
        m = 0
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    basis = basis_ptr + image.to(tl.int64) * rows * dim
    beta = beta_ptr + image.to(tl.int64) * rows
    total = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, m, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        factor = tl.load(beta + row, mask=row < m, other=0)
        u = tl.load(
            basis + row[:, None].to(tl.int64) * dim + channel[None, :],
            mask=(row < m)[:, None] & (channel < dim)[None, :], other=0,
        )  # fmt: skip
        total += tl.sum(u.to(tl.float64) * factor[:, None], axis=0)
    tl.store(weights_ptr + image.to(tl.int64) * dim + channel, total.to(tl.float32), mask=channel < dim)


@dataclass(frozen=True)
class Capacity:
    """What one image may need, fixed by shapes alone, and where it is kept."""

    rows: int
    """Basis vectors at most."""
    dim: int
    size: tuple[int, int] = (0, 0)
    grid: tuple[int, int] = (0, 0)
    shared_limit: int = 48 * 1024

    @property
    def gram(self) -> int:
        """Side of the Gram matrix that is set aside."""
        return -(-min(self.rows, GRAM_CAPACITY) // _PAD) * _PAD

    @property
    def vectors(self) -> int:
        """Doubles of the solver's vectors at most."""
        return _VECTORS * (-(-self.rows // _PAD) * _PAD)

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block asks for: enough for the largest problem, or all there is.

        A problem whose vectors fit half of it has them there, its Gram matrix if that fits the rest, and so on.
        """
        cells, pixels = self.grid[0] * self.grid[1], self.size[0] * self.size[1]
        vectors, gram = 8 * self.vectors, 4 * self.gram**2
        needs = vectors + max(vectors, gram + 8 * (_CELL * cells + _PIXEL * pixels))
        return min(self.shared_limit - _RESERVED, -(-needs // 16) * 16)

    @property
    def scratch(self) -> int:
        """Doubles of scratch of an image, as the solver takes them: even, for it reads two at a time of every image."""
        cells, pixels = self.grid[0] * self.grid[1], self.size[0] * self.size[1]
        used = self.vectors + self.dim + _CELL * cells + _PIXEL * pixels
        return used + used % 2

    @property
    def bytes(self) -> int:
        """Memory of an image while it is trained: basis, Gram matrix, coefficients and scratch."""
        return 4 * self.rows * self.dim + 4 * self.gram**2 + 8 * self.rows + 8 * self.scratch


def train(
    basis: torch.Tensor,
    counts: torch.Tensor,
    status: torch.Tensor,
    capacity: Capacity,
    *,
    C: float,
    loss: str,
    tol: float,
    max_iter: int,
    samples: Samples | None = None,
    signs: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> Trained:
    """Train one SVM an image; no synchronisation, and the same bits for an image in any batch.

    Parameters
    ----------
    basis : tensor, (B, rows, dim) float32
        Points first, then feature cells; rows beyond an image's counts are not read.
    counts : tensor, (B, 3) int32
        Points, labelled pixels and cells of each image.
    status : tensor, (B,) int32
        0: train. Becomes 0 (converged), 3 (not within `max_iter`) or 4 (an overflow or a non-finite value).
    capacity : Capacity
    C, loss, tol, max_iter
        As `fit_linear_svm`.
    samples : Samples, optional
        Labelled pixels; without them the points are all there is.
    signs : tensor, (rows,) int8, optional
        Labels -1 and 1 of the points, -1 by default.
    scales : tensor, (rows,) float64, optional
        Sample weights of the points, 1 by default.

    Returns
    -------
    Trained
    """
    batch, rows, dim = basis.shape
    device = basis.device
    gram = torch.empty((batch, capacity.gram, capacity.gram), dtype=torch.float32, device=device)
    cuda.launch(
        device, _GRAM, "gram", _GRAM_BLOCKS * batch, _GRAM_THREADS,
        basis, gram, counts, status, *(np.int32(i) for i in (rows, dim, capacity.gram, _GRAM_BLOCKS)),
        shared_bytes=_GRAM_SHARED,
    )  # fmt: skip
    beta = torch.empty((batch, rows), dtype=torch.float64, device=device)
    report = torch.empty((batch, 3), dtype=torch.float64, device=device)
    scratch = torch.empty((batch, capacity.scratch), dtype=torch.float64, device=device)
    if samples is None:
        pixels: tuple = (None,) * 7
        size = (0, 0, 0, 0, 1)
    else:
        pixels = (samples.labels, samples.cells, samples.slot)
        for axis in (samples.rows, samples.cols):
            pixels += (axis.weight, axis.start)
        size = (*samples.size, *samples.grid, int(samples.own_points))
    limit = min(max_iter, np.iinfo(np.int32).max)
    integers = (*size, int(loss == "hinge"), limit, capacity.shared_bytes)
    cuda.launch(
        device, _SOLVER, "svm_solve", batch, THREADS,
        gram, basis, counts, signs, scales, *pixels, status, beta, report, scratch, np.int64(capacity.scratch),
        np.int32(capacity.gram), np.int32(rows), np.int32(dim), *(np.int32(i) for i in integers),
        np.float64(C), np.float64(tol), shared_bytes=capacity.shared_bytes,
    )  # fmt: skip
    weights = torch.empty((batch, dim), dtype=torch.float32, device=device)
    block_m, block_c = WEIGHTS_BLOCKS
    weights_kernel[(blocks(dim, block_c), batch)](
        basis, beta, counts, status, weights, rows, dim, BLOCK_M=block_m, BLOCK_C=block_c, **FUSED
    )
    return Trained(weights, report)
