"""What PatchCore does with patch features: joins, scales and projects them, turns distances into scores and maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import kernels

_ROWS = 8192  # patches handled at once where a pass over all of them needs scratch memory


def join_layers(maps: list[torch.Tensor]) -> torch.Tensor:
    """Layers (N, C_i, h_i, w_i) brought bilinearly to the finest grid and joined along the channels."""
    size = max((tuple(x.shape[2:]) for x in maps), key=lambda shape: shape[0] * shape[1])
    return torch.cat([x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear") for x in maps], 1)


def patches_per_image(found: int, n_images: int, limit: int | None) -> int:
    if limit is None:
        return found
    if limit < n_images:
        raise ValueError(f"max_patches: expected at least one for each of the {n_images} images, got {limit}")
    return min(found, limit // n_images)


def standardize(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale each channel in place to zero mean and unit variance; returns the mean and the deviation that did it."""
    blocks = [patches[i : i + _ROWS] for i in range(0, len(patches), _ROWS)]
    mean = sum((block.sum(axis=0, dtype=np.float64) for block in blocks), np.zeros(patches.shape[1])) / len(patches)
    squares = sum((((block - mean) ** 2).sum(axis=0) for block in blocks), np.zeros(patches.shape[1]))
    std = np.sqrt(squares / len(patches))
    std[std == 0] = 1.0  # a channel that never varies says nothing of scale
    scale = mean.astype(np.float32), std.astype(np.float32)
    for block in blocks:
        block -= scale[0]
        block /= scale[1]
    return scale


def project(patches: np.ndarray, random_state: int) -> np.ndarray:
    """The points among which the coreset is chosen: the patches under a sparse random projection.

    Where the Johnson-Lindenstrauss bound asks for no fewer dimensions than there are, the patches are the points:
    exact distances cost less than approximate ones.
    """
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    dimensions = int(johnson_lindenstrauss_min_dim(len(patches), eps=0.9)) if len(patches) > 1 else patches.shape[1]
    if dimensions >= patches.shape[1]:
        return patches
    projection = SparseRandomProjection(eps=0.9, dense_output=True, random_state=random_state).fit(patches)
    points = np.zeros((len(patches), projection.n_components_), np.float32)
    for start in range(0, len(patches), _ROWS):
        points[start : start + _ROWS] = projection.transform(patches[start : start + _ROWS])
    return points


def reweight(distance: float, patch: np.ndarray, support: np.ndarray) -> float:
    """The paper's eq. 7: `distance` times one less the softmax weight of the nearest bank entry.

    Parameters
    ----------
    distance : float
        Of the image's farthest patch to its nearest bank entry.
    patch : numpy.ndarray, (C,)
        That patch.
    support : numpy.ndarray, (b, C)
        The bank entries nearest to that entry, itself among them.

    Returns
    -------
    float
        A float32 value.
    """
    to_support = np.sqrt(((support.astype(np.float64) - patch.astype(np.float64)) ** 2).sum(axis=1))
    # The entry need not be the first of its own neighbourhood, where it has duplicates: its distance is given.
    top = to_support.max()  # the exponentials stay at most one
    weight = 1.0 - np.exp(distance - top) / np.exp(to_support - top).sum()
    return float(np.float32(max(weight, 0.0) * distance))


class MapMaker:
    """Patch scores (h, w) to an anomaly map (size, size): bilinear upsampling, then a Gaussian.

    Both are linear and separable: the map is ``R @ scores @ S.T``, with R (size, h) the matrix of the upsampling times
    that of the blur, made once, in float64. Equals ``scipy.ndimage.gaussian_filter(upsampled, sigma)`` (mode
    ``"reflect"``, cut off at 4 sigma) at a hundredth of its cost. On a host R is sparse: a product of dense matrices
    would take as long and wake a library's threads, which spin on while the next stage needs the cores.

    Parameters
    ----------
    size : int
        Side of the map, pixels.
    sigma : float
        Of the Gaussian, pixels; 0 for none.
    """

    def __init__(self, size: int, sigma: float) -> None:
        self.size, self.sigma = size, sigma
        self._operators: dict[tuple[int, torch.device | None], Any] = {}

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(h, w) -> (size, size) float32."""
        rows, columns = (self._operator(n, None) for n in scores.shape)
        blended = rows @ scores.astype(np.float64)
        return np.ascontiguousarray((columns @ np.ascontiguousarray(blended.T)).T, dtype=np.float32)

    def of_batch(self, scores: torch.Tensor) -> torch.Tensor:
        """(N, h, w) -> (N, size, size) float32, on their device."""
        rows, columns = (self._operator(n, scores.device) for n in scores.shape[1:])
        return (rows @ scores.double() @ columns.T).float()

    def _operator(self, length: int, device: torch.device | None) -> Any:
        """R for an axis of that length: sparse for arrays, dense for tensors on `device`."""
        if (length, device) not in self._operators:
            from scipy.ndimage import gaussian_filter1d
            from scipy.sparse import csr_array

            impulses = np.eye(length)[:, :, None]  # along the axis, one a channel
            # The reference is exact in float64, and this matrix is made once.
            operator = kernels.bilinear_upsample(impulses, (self.size, 1), backend="reference")[:, :, 0].T
            if self.sigma > 0:
                operator = gaussian_filter1d(operator, self.sigma, axis=0, mode="reflect", truncate=4.0)
            made = csr_array(operator) if device is None else torch.from_numpy(operator.copy()).to(device)
            self._operators[length, device] = made
        return self._operators[length, device]
