"""What a backend of `segment` gets: inputs that are checked, gated images, and the pixels that may become nominal."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays
from ..dispatch import checks_finite

if TYPE_CHECKING:
    from types import ModuleType

    from ..arrays import Array


def check_inputs(anomaly_map: Any, features: Any, pred_score: Any) -> tuple[Array, Array, Array | None, bool]:
    """(B, H, W), (B, C, h, w) and (B,) or None of one kind on one device, and whether a single image was given."""
    anomaly_map = arrays.as_float_array(anomaly_map, "anomaly_map", (2, 3), meta=True)
    features = arrays.as_float_array(features, "features", (anomaly_map.ndim + 1,), meta=True)
    if arrays.is_tensor(anomaly_map) != arrays.is_tensor(features):
        kinds = [type(x).__name__ for x in (anomaly_map, features)]
        raise TypeError(f"features: expected the kind of anomaly_map ({kinds[0]}), got {kinds[1]}")
    if arrays.is_tensor(features) and features.device != anomaly_map.device:
        raise ValueError(f"features: expected device {anomaly_map.device} as anomaly_map, got {features.device}")
    single = anomaly_map.ndim == 2
    if single:
        anomaly_map, features = anomaly_map[None], features[None]
    if features.shape[0] != anomaly_map.shape[0]:
        raise ValueError(
            f"features: expected a batch of {anomaly_map.shape[0]} as anomaly_map, got shape {tuple(features.shape)}"
        )
    return anomaly_map, features, _scores(pred_score, anomaly_map), single


def _scores(pred_score: Any, anomaly_map: Array) -> Array | None:
    """`pred_score` as (B,) and of the kind of `anomaly_map`, on the device where it was; None stays None."""
    if pred_score is None:
        return None
    score = arrays.as_float_array(pred_score, "pred_score", (0, 1), meta=arrays.device_type(anomaly_map) == "meta")
    if arrays.is_tensor(score) != arrays.is_tensor(anomaly_map):
        import torch

        score = arrays.to_numpy(score) if arrays.is_tensor(score) else torch.from_numpy(np.array(score))
    score = score.reshape(1) if score.ndim == 0 else score
    if tuple(score.shape) != (anomaly_map.shape[0],):
        raise ValueError(f"pred_score: expected one score an image ({anomaly_map.shape[0]}), got {tuple(score.shape)}")
    return score


def check_finite(backend: ModuleType, anomaly_map: Array, features: Array, score: Array | None) -> None:
    """Raises as `arrays.check_finite` does, for what the backend does not check itself."""
    if not checks_finite(backend):
        arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")
        arrays.check_finite(arrays.to_numpy(features), "features")
    if score is not None and not np.isfinite(arrays.to_numpy(score)).all():
        arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")  # whose maximum it may be
        arrays.check_finite(arrays.to_numpy(score), "pred_score")


def gate(anomaly_map: Array, score: Array | None, image_threshold: float | None) -> Array | None:
    """(B,) bool, on the device of `anomaly_map`: images below the image threshold. None if there is no gate.

    Raises
    ------
    ValueError
        A score on the host is not finite: beside a map on a device nobody else looks at it.
    """
    if score is not None and arrays.device_type(score) == "cpu" != arrays.device_type(anomaly_map):
        arrays.check_finite(arrays.to_numpy(score), "pred_score")
    if image_threshold is None:
        return None
    if score is None:
        flat = anomaly_map.reshape(anomaly_map.shape[0], -1)
        score = flat.amax(1) if arrays.is_tensor(flat) else flat.max(1)  # type: ignore[union-attr]
    score = score.double() if arrays.is_tensor(score) else score.astype(np.float64)  # type: ignore[union-attr]
    below = score < image_threshold
    return _to_device_of(below, anomaly_map) if arrays.is_tensor(below) else below


def _to_device_of(flags: Any, anomaly_map: Any) -> Any:
    """A tensor on the device of another, without waiting for what that device is doing."""
    import torch

    if flags.device == anomaly_map.device:
        return flags
    if anomaly_map.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(  # a replay would read the host's memory again, whatever lies there by then
            f"pred_score: expected a tensor on {anomaly_map.device} while its stream is captured, got {flags.device}"
        )
    return flags.to(anomaly_map.device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def nominal_candidates(
    shape: tuple[int, int], n_nominal: int, sampling: str = "grid", random_state: int = 0
) -> tuple[np.ndarray, int]:
    """Pixels that may become nominal samples, in the order they are taken, and how many are taken at most.

    Parameters
    ----------
    shape : (int, int)
        (H, W) of the anomaly map.
    n_nominal : int
        Samples aimed at. The grid's step is ``max(1, floor(sqrt(H * W / n_nominal)))`` and starts at half of it.
    sampling : {"grid", "random"}
    random_state : int
        Seed of the permutation that ``"random"`` follows.

    Returns
    -------
    candidates : (M,) int64
        Flat indices, read-only. Anomalous ones among them are passed over.
    limit : int
        The number of candidates to accept: all of a grid, `n_nominal` of a permutation.
    """
    height, width = shape
    if sampling == "grid":
        step = max(1, math.isqrt(height * width // n_nominal))
        rows, cols = np.arange(step // 2, height, step), np.arange(step // 2, width, step)
        candidates = (rows[:, None] * width + cols).ravel().astype(np.int64)
        limit = len(candidates)
    else:
        candidates = np.random.default_rng(random_state).permutation(height * width).astype(np.int64)
        limit = n_nominal
    candidates.setflags(write=False)
    return candidates, limit
