"""Peaks of an anomaly map and their square neighbourhoods: where pseudo-labels come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import arrays
from ..dispatch import Operation, checks_finite

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("peaks", host=("cpu", "numba", "reference"), cuda=("gpu", "cpu", "reference"))


def local_maxima(anomaly_map: Array, percentile: float = 99.0, *, backend: str = "auto") -> Array:
    """Pixels equal to the maximum of their 3x3 window and at or above the map's `percentile`.

    The window is clipped at the border. Every pixel of a plateau is a peak. The percentile is
    ``numpy.percentile(anomaly_map, percentile)`` (linear interpolation) of each map on its own, in float64.

    Parameters
    ----------
    anomaly_map : array or tensor, (H, W) or (B, H, W)
        Any range, higher is more anomalous; float16, bfloat16, float32 or float64.
    percentile : float
        In [0, 100], default 99.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    array or tensor of bool
        The shape, kind and device of `anomaly_map`.

    Raises
    ------
    ValueError, TypeError
        Wrong rank or dtype, empty axis, non-finite value, percentile out of range, unknown backend. On a GPU a map with
        such a value has no peaks: raising would wait for the device.
    RuntimeError
        `backend` names one that cannot serve here.
    """
    anomaly_map = arrays.as_float_array(anomaly_map, "anomaly_map", (2, 3), meta=True)
    percentile = arrays.check_float(percentile, "percentile", 0.0, 100.0)
    if arrays.is_tensor(anomaly_map):
        from .. import torch_ops

        return torch_ops.local_maxima(anomaly_map, percentile, backend)
    return run_local_maxima(anomaly_map, percentile, backend)


def run_local_maxima(anomaly_map: Array, percentile: float, backend: str) -> Array:
    """`local_maxima` after validation of all but the values; the torch operator calls it too."""
    on_host = arrays.device_type(anomaly_map) == "cpu"
    if on_host and not checks_finite(OPERATION.resolve(backend, "cpu")):
        arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")
    batch = anomaly_map if anomaly_map.ndim == 3 else anomaly_map[None]
    try:
        peaks = OPERATION.run("local_maxima", {"anomaly_map": batch}, backend, percentile=percentile)
    except arrays.NonFiniteError as error:  # on the way from a device to a backend of host arrays
        raise error if anomaly_map.ndim == 3 else ValueError(error.without_batch) from None
    except ValueError:
        if on_host:
            arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")  # says where
        raise
    return peaks.reshape(anomaly_map.shape)


def dilate(mask: Any, radius: int, *, backend: str = "auto") -> Array:
    """Grow a mask by a square of Chebyshev radius `radius`, clipped at the border.

    Parameters
    ----------
    mask : array or tensor of bool, (H, W) or (B, H, W)
    radius : int
        Pixels, 0 (no growth) or more; the square's side is 2 * radius + 1.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    array or tensor of bool
        The shape, kind and device of `mask`.

    Raises
    ------
    ValueError, TypeError
        `mask` is not boolean, has the wrong rank or an empty axis; negative radius; unknown backend.
    RuntimeError
        `backend` names one that cannot serve here.
    """
    arrays.check_dense(mask, "mask", meta=True)
    if not arrays.is_tensor(mask):
        mask = arrays.as_array(mask, "mask")
    if arrays.dtype_name(mask) != "bool":
        raise TypeError(f"mask: expected dtype bool, got {arrays.dtype_name(mask)}")
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"mask: expected 2 or 3 dimensions, none empty, got shape {tuple(mask.shape)}")
    radius = arrays.check_int(radius, "radius", 0)
    if arrays.is_tensor(mask):
        from .. import torch_ops

        return torch_ops.dilate(mask, radius, backend)
    return run_dilate(mask, radius, backend)


def run_dilate(mask: Array, radius: int, backend: str) -> Array:
    """`dilate` after validation; the torch operator calls it too."""
    batch = mask if mask.ndim == 3 else mask[None]
    # A square wider than twice the image reaches everything; the cap keeps window arithmetic small.
    radius = min(radius, max(mask.shape[-2:]))
    return OPERATION.run("dilate", {"mask": batch}, backend, radius=radius).reshape(mask.shape)
