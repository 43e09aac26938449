"""Test-time training, whole: anomaly map and features in, binary mask out (design: peaks, labels, SVM, decision)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays
from ..dispatch import Operation, checks_finite
from ..linear_svm import LOSSES

if TYPE_CHECKING:
    from types import ModuleType

    from ..arrays import Array

OPERATION = Operation("segment", host=("cpu", "reference"), cuda=("gpu", "cpu", "reference"))
SAMPLINGS = ("grid", "random")
STATUSES = ("ok", "nominal", "degenerate", "not_converged", "non_finite")
"""What `Segmentation.status_code` indexes. The last exists on a GPU alone, where raising at once would wait for it."""


@dataclass(frozen=True)
class Segmentation:
    """What test-time training makes of one anomaly map, or of a batch of them."""

    pred_mask: Array
    """bool, (H, W) or (B, H, W): where the decision is positive."""
    decision_map: Array
    """float32, as `pred_mask`: signed SVM decision; 0 everywhere where no SVM was trained."""
    pseudo_labels: Array
    """int8, as `pred_mask`: 1 anomalous, -1 nominal, 0 not used for training."""
    status_code: Array
    """int8, () or (B,): index into `STATUSES`; reading `status` instead waits for a GPU."""

    @property
    def status(self) -> str | list[str]:
        """``"ok"``, ``"nominal"``, ``"degenerate"`` or ``"not_converged"``; a list of B for a batch.

        Raises
        ------
        ValueError
            An image on a GPU held a non-finite value (or features whose products overflow float32). On the host
            `segment` itself raises; on a GPU it does not wait to see, gives that image an empty mask, a decision of NaN
            and the code 4, and leaves the others as they are.
        """
        codes = self.status_code.tolist()
        bad = [
            i for i, code in enumerate(codes if isinstance(codes, list) else [codes]) if STATUSES[code] == "non_finite"
        ]
        if bad:
            raise ValueError(f"anomaly_map, features: expected finite values, got others in image {bad} of the batch")
        return [STATUSES[code] for code in codes] if isinstance(codes, list) else STATUSES[codes]


@dataclass(frozen=True)
class SegmentOptions:
    """Options of `segment`, validated on construction; see there."""

    percentile: float = 99.0
    neighbor_radius: int = 5
    n_nominal: int = 100
    C: float = 1e-3
    loss: str = "squared_hinge"
    nominal_sampling: str = "grid"
    random_state: int = 0
    image_threshold: float | None = None
    tol: float = 1e-4
    max_iter: int = 1000

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "percentile": arrays.check_float(self.percentile, "percentile", 0.0, 100.0),
            "neighbor_radius": arrays.check_int(self.neighbor_radius, "neighbor_radius", 0),
            "n_nominal": arrays.check_int(self.n_nominal, "n_nominal", 1),
            "C": arrays.check_float(self.C, "C", 0.0, open_low=True),
            "loss": arrays.check_option(self.loss, "loss", LOSSES),
            "nominal_sampling": arrays.check_option(self.nominal_sampling, "nominal_sampling", SAMPLINGS),
            "random_state": arrays.check_int(self.random_state, "random_state", 0),
            "tol": arrays.check_float(self.tol, "tol", 0.0, open_low=True),
            "max_iter": arrays.check_int(self.max_iter, "max_iter", 1),
        }
        if self.image_threshold is not None:
            checked["image_threshold"] = arrays.check_float(self.image_threshold, "image_threshold", -math.inf)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


OPTION_NAMES = tuple(field.name for field in fields(SegmentOptions))


def segment(
    anomaly_map: Array, features: Array, *, pred_score: Any = None, backend: str = "auto", **params: Any
) -> Segmentation:
    """Train a linear SVM on the test image itself and mark the pixels that it calls anomalous.

    Peaks of the anomaly map at or above its `percentile`, dilated by `neighbor_radius`, are pseudo-labelled anomalous;
    a uniform grid of about `n_nominal` other pixels nominal. The SVM is trained on the bilinearly upsampled features
    at those pixels, and its decision on all of them is the mask. The upsampled (C, H, W) tensor is never built.

    Parameters
    ----------
    anomaly_map : array or tensor, (H, W) or (B, H, W)
        Any range, higher is more anomalous; float16, bfloat16, float32 or float64.
    features : array or tensor, (C, h, w) or (B, C, h, w)
        Frozen backbone features of the same images; any float dtype, contiguous or channels-last (decisions of the two
        layouts may differ in the last bits).
        ``anomaly_map[None]`` makes the score the only feature.
    pred_score : number or (B,) array, optional
        Image scores that `image_threshold` gates; each map's maximum when absent.
    percentile : float
        In [0, 100], default 99: the least score of a peak.
    neighbor_radius : int
        Chebyshev radius of the dilation, pixels, default 5.
    n_nominal : int
        Nominal samples aimed at, default 100.
    C : float
        SVM loss weight, default 1e-3.
    loss : {"squared_hinge", "hinge"}
    nominal_sampling : {"grid", "random"}
        ``"random"`` draws `n_nominal` pixels without replacement, by the same permutation for every image.
    random_state : int
        Seed of ``"random"``.
    image_threshold : float, optional
        Images whose score is below it are called nominal: an empty mask, no training.
    tol : float
        Relative duality gap of the SVM, default 1e-4.
    max_iter : int
        Iterations of the SVM solver, default 1000.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Returns
    -------
    Segmentation
        Kind and device of `anomaly_map`; deterministic, and for an image the same alone or in any batch.

    Raises
    ------
    ValueError, TypeError
        Wrong ranks or dtypes, batches or kinds that differ, empty axis, non-finite value, unknown or invalid option.

    References
    ----------
    Test Time Training for Industrial Anomaly Segmentation, CVPR workshops 2024.
    """
    unknown = set(params) - set(OPTION_NAMES)
    if unknown:
        raise TypeError(f"{min(unknown)}: unknown option; segment takes {', '.join(OPTION_NAMES)}")
    return run(anomaly_map, features, pred_score, SegmentOptions(**params), backend)


def run(anomaly_map: Array, features: Array, pred_score: Any, options: SegmentOptions, backend: str) -> Segmentation:
    """`segment` with its options validated already."""
    anomaly_map, features, score, single = check_inputs(anomaly_map, features, pred_score)
    if arrays.is_tensor(anomaly_map):
        from .. import torch_ops

        mask, decision, labels, codes = torch_ops.segment(anomaly_map, features, score, options, backend)
    else:
        mask, decision, labels, codes = run_batch(anomaly_map, features, score, options, backend)
    if single:
        mask, decision, labels, codes = mask[0], decision[0], labels[0], codes[0]
    return Segmentation(mask, decision, labels, codes)


def check_inputs(anomaly_map: Any, features: Any, pred_score: Any) -> tuple[Array, Array, Array | None, bool]:
    """(B, H, W), (B, C, h, w) and (B,) or None of one kind on one device, and whether a single image was given."""
    anomaly_map = arrays.as_float_array(anomaly_map, "anomaly_map", (2, 3))
    features = arrays.as_float_array(features, "features", (anomaly_map.ndim + 1,))
    if arrays.is_tensor(anomaly_map) != arrays.is_tensor(features):
        raise TypeError("features: expected the kind of anomaly_map (both NumPy arrays or both torch tensors)")
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
    try:
        score = pred_score if arrays.is_tensor(pred_score) else np.array(pred_score, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"pred_score: expected a number or one an image, got {pred_score!r}") from None
    if arrays.is_tensor(score) != arrays.is_tensor(anomaly_map):
        import torch

        score = arrays.to_numpy(score) if arrays.is_tensor(score) else torch.from_numpy(score)
    score = score.reshape(1) if score.ndim == 0 else score
    if tuple(score.shape) != (anomaly_map.shape[0],):
        raise ValueError(f"pred_score: expected one score an image ({anomaly_map.shape[0]}), got {tuple(score.shape)}")
    return score


def run_batch(
    anomaly_map: Array, features: Array, score: Array | None, options: SegmentOptions, backend: str
) -> tuple[Array, Array, Array, Array]:
    """(B, H, W) and (B, C, h, w) through the chosen backend; the torch operator calls it too."""
    if arrays.device_type(anomaly_map) == "cpu":
        check_finite(OPERATION.resolve(backend, "cpu"), anomaly_map, features, score)
    return OPERATION.run(
        "segment",
        {"anomaly_map": anomaly_map, "features": features},
        backend,
        **_backend_options(anomaly_map, score, options),
    )


def check_finite(backend: ModuleType, anomaly_map: Array, features: Array, score: Array | None) -> None:
    """Raises as `arrays.check_finite` does, for what the backend does not check itself."""
    if not checks_finite(backend):
        arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")
        arrays.check_finite(arrays.to_numpy(features), "features")
    if score is not None and not np.isfinite(arrays.to_numpy(score)).all():
        arrays.check_finite(arrays.to_numpy(anomaly_map), "anomaly_map")  # whose maximum it may be
        arrays.check_finite(arrays.to_numpy(score), "pred_score")


def warmup(anomaly_map: Array, features: Array, pred_score: Any, options: SegmentOptions, backend: str) -> bool:
    """Prepare for calls with inputs of these shapes, dtypes and layouts; `TTT4AS.warmup` is the public door.

    Returns
    -------
    bool
        Whether a CUDA graph now waits for them.
    """
    anomaly_map, features, score, _ = check_inputs(anomaly_map, features, pred_score)
    module = OPERATION.resolve(backend, arrays.device_type(anomaly_map))
    if arrays.device_type(anomaly_map) != "cuda" or not hasattr(module, "warmup"):
        run_batch(anomaly_map, features, score, options, backend)
        return False
    return module.warmup(anomaly_map, features, **_backend_options(anomaly_map, score, options))


def _backend_options(anomaly_map: Array, score: Array | None, options: SegmentOptions) -> dict[str, Any]:
    """What a backend's ``segment`` takes beside the batch."""
    candidates, limit = nominal_candidates(
        anomaly_map.shape[1:], options.n_nominal, options.nominal_sampling, options.random_state
    )
    return {
        "skip": gate(anomaly_map, score, options.image_threshold),
        "candidates": candidates,
        "limit": limit,
        "percentile": options.percentile,
        "neighbor_radius": options.neighbor_radius,
        "C": options.C,
        "loss": options.loss,
        "tol": options.tol,
        "max_iter": options.max_iter,
    }


def gate(anomaly_map: Array, score: Array | None, image_threshold: float | None) -> Array | None:
    """(B,) bool, on the device of `anomaly_map`: images below the image threshold. None if there is no gate."""
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
