"""Bilinear upsampling of feature maps: the whole grid, or only the pixels that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays
from ..dispatch import Operation

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("bilinear", host=("cpu", "reference"), cuda=("gpu", "cpu", "reference"), finite=False)


def bilinear_upsample(features: Array, size: int | tuple[int, int], *, backend: str = "auto") -> Array:
    """Upsample a feature map to `size` with half-pixel centres and clamped edges.

    Equals ``torch.nn.functional.interpolate(features, size, mode="bilinear", align_corners=False)``.

    Parameters
    ----------
    features : array or tensor, (C, h, w) or (B, C, h, w)
        float16, bfloat16, float32 or float64, contiguous or not, channels-last included.
    size : int or (int, int)
        (H, W) of the result, pixels; smaller than (h, w) is allowed and not antialiased.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    array or tensor, (C, H, W) or (B, C, H, W)
        The dtype, kind and device of `features` (NumPy has no bfloat16). A batch of tensors whose channels lie last in
        memory comes back so, as from torch.

    Raises
    ------
    ValueError, TypeError
        Wrong rank, empty axis, non-numeric dtype, bad size or unknown backend.
    RuntimeError
        `backend` names one that cannot serve here.

    Notes
    -----
    Moves B*C*(h*w + H*W) elements and does 8 operations an output element: bandwidth is the floor. Non-finite values
    propagate, as in torch: a check would cost a pass over the features.
    """
    features = arrays.as_float_array(features, "features", (3, 4), meta=True)
    height, width = arrays.check_size(size)
    if arrays.is_tensor(features):
        from .. import torch_ops

        return torch_ops.bilinear_upsample(features, height, width, backend)
    return OPERATION.run("upsample", {"features": features}, backend, height=height, width=width)


def bilinear_sample(
    features: Array, size: int | tuple[int, int], rows: Any, cols: Any, *, backend: str = "auto"
) -> Array:
    """Values of ``bilinear_upsample(features, size)`` at the pixels ``(rows[i], cols[i])``, without the rest of it.

    Parameters
    ----------
    features : array or tensor, (C, h, w)
        float16, bfloat16, float32 or float64.
    size : int or (int, int)
        (H, W) of the grid that `rows` and `cols` index, pixels.
    rows, cols : integer arrays or tensors, (N,)
        Pixel coordinates in [0, H) and [0, W); N may be 0.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    array or tensor, (N, C)
        float32 (float64 for float64 features), the kind and device of `features`.

    Raises
    ------
    ValueError, TypeError
        Wrong rank or dtype, a coordinate outside the grid, or `rows` and `cols` of different lengths. Of features on a
        GPU such a coordinate gives NaN: raising would wait for the device.
    RuntimeError
        `backend` names one that cannot serve here.

    Notes
    -----
    Reads at most 4*N*C elements and writes N*C: the dense (C, H, W) tensor is never built.
    """
    features = arrays.as_float_array(features, "features", (3,), meta=True)
    height, width = arrays.check_size(size)
    rows = _coordinates(rows, "rows", features)
    cols = _coordinates(cols, "cols", features)
    if rows.shape != cols.shape:
        raise ValueError(f"cols: expected as many as rows ({rows.shape[0]}), got {cols.shape[0]}")
    if arrays.is_tensor(features):
        from .. import torch_ops

        return torch_ops.bilinear_sample(features, height, width, rows, cols, backend)
    return run_sample(features, height, width, rows, cols, backend)


def run_sample(features: Array, height: int, width: int, rows: Array, cols: Array, backend: str) -> Array:
    """`bilinear_sample` after validation of all but the values; the torch operator calls it too."""
    for name, values, limit in (("rows", rows, height), ("cols", cols, width)):
        if arrays.device_type(values) == "cpu" and len(values) and not (0 <= values.min() and values.max() < limit):
            raise ValueError(f"{name}: expected pixels in [0, {limit}), got {int(values.min())} to {int(values.max())}")
    return OPERATION.run(
        "sample", {"features": features, "rows": rows, "cols": cols}, backend, height=height, width=width
    )


def _coordinates(values: Any, name: str, features: Array) -> Array:
    """`values` as 1-D int64 of the kind and device of `features`."""
    arrays.check_dense(values, name, meta=arrays.device_type(features) == "meta")
    if arrays.is_tensor(values) and arrays.is_tensor(features):
        import torch

        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {values.dtype}")
        values = values.to(device=features.device, dtype=torch.int64)
    else:
        values = arrays.to_numpy(values) if arrays.is_tensor(values) else arrays.as_array(values, name)
        if values.size and values.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers, got {values.dtype}")
        values = arrays.like(values.astype(np.int64), features)
    if values.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(values.shape)}")
    return values
