"""Greedy k-center: the coreset that PatchCore keeps of its nominal features."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import arrays
from ..dispatch import Operation

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("coreset", host=("cpu", "reference"), cuda=("gpu", "cpu", "reference"))


def k_center_greedy(
    points: Array,
    n_samples: int,
    start: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "auto",
) -> Array:
    """Pick `n_samples` points one by one, each the farthest from those picked before (ties: the lowest index).

    Parameters
    ----------
    points : array or tensor, (N, D)
        float16, bfloat16, float32 or float64.
    n_samples : int
        How many to pick, 1 to N. Once every point coincides with a pick, the remaining picks are the lowest
        indices not picked yet.
    start : int
        The first pick, 0 to N - 1.
    progress : callable, optional
        Called as ``progress(done, total)`` now and then, and at the end.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    array or tensor, (n_samples,) int64
        Indices in the order of picking, without repetition; the first is `start`.

    Raises
    ------
    ValueError, TypeError
        Wrong rank or dtype, a non-finite value, `n_samples` or `start` out of range, unknown backend; on a GPU more
        than 2**30 points.
    RuntimeError
        `backend` names one that cannot serve here.

    Notes
    -----
    Plain greedy costs N * n_samples distances and guarantees a covering radius within twice the optimum. Memory beside
    the points: 85 bytes a point on a host, 136 on a GPU.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985. Roth et al., CVPR 2022 (PatchCore).
    """
    points = arrays.as_float_array(points, "points", (2,), meta=True)
    n_samples = arrays.check_int(n_samples, "n_samples", 1, points.shape[0])
    start = arrays.check_int(start, "start", 0, points.shape[0] - 1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable (done, total), got {progress!r}")
    if arrays.is_tensor(points) and progress is None:  # an operator takes no callable
        from .. import torch_ops

        return torch_ops.k_center_greedy(points, n_samples, start, backend)
    return run_greedy(points, n_samples, start, backend, progress)


def run_greedy(
    points: Array, n_samples: int, start: int, backend: str, progress: Callable[[int, int], None] | None = None
) -> Array:
    """`k_center_greedy` after validation of all but the values; the torch operator calls it too."""
    if arrays.device_type(points) == "cpu":
        arrays.check_finite(arrays.to_numpy(points), "points")
    return OPERATION.run("greedy", {"points": points}, backend, n_samples=n_samples, start=start, progress=progress)
