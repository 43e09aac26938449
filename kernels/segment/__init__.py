"""Test-time training, whole: anomaly map and features in, binary mask out (design: peaks, labels, SVM, decision)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .. import arrays
from ..dispatch import Operation
from ..linear_svm import LOSSES
from .inputs import check_finite, check_inputs, gate, nominal_candidates

if TYPE_CHECKING:
    from ..arrays import Array

OPERATION = Operation("segment", host=("cpu", "reference"), cuda=("gpu", "cpu", "reference"))
SAMPLINGS = ("grid", "random")
STATUSES = ("ok", "nominal", "degenerate", "not_converged", "non_finite")
"""What `Segmentation.status_code` indexes. The last exists on a GPU alone, where raising at once would wait for it."""


@dataclass(frozen=True)
class Segmentation:
    """What test-time training makes of one anomaly map, or of a batch of them.

    Attributes
    ----------
    pred_mask : bool, (H, W) or (B, H, W)
        Where the decision is positive.
    decision_map : float32, as `pred_mask`
        The SVM's signed decision; 0 everywhere where none was trained.
    pseudo_labels : int8, as `pred_mask`
        1 anomalous, -1 nominal, 0 not used for training.
    status_code : int8, () or (B,)
        Index into `STATUSES`; reading `status` instead waits for a GPU.
    """

    pred_mask: Array
    decision_map: Array
    pseudo_labels: Array
    status_code: Array

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
        single = not isinstance(codes, list)
        found = [STATUSES[code] for code in ([codes] if single else codes)]
        bad = [i for i, status in enumerate(found) if status == "non_finite"]
        if bad:
            where = "" if single else f" in image {bad} of the batch"
            raise ValueError(f"anomaly_map, features: expected finite values, got others{where}")
        return found[0] if single else found


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

    On a GPU the second call with the same shapes, dtypes, layouts and options captures a CUDA graph, which later ones
    replay. Those used last are kept: at most eight, which hold 2 GiB of device memory in all, each its inputs, outputs
    and scratch. A batch that needs more has none, and where memory runs out graphs go before work is done in smaller
    parts. A call sets aside 2 GiB at most beyond its results. ``TTT4AS_CUDA_GRAPHS=0`` turns graphs off.

    On a host each thread keeps its scratch for the next call: at most twice the features of an image (seven times with
    the hinge) and some bytes a pixel and a position, which ``ttt4as/segmenter.hpp`` counts.

    Parameters
    ----------
    anomaly_map : array or tensor, (H, W) or (B, H, W)
        Any range, higher is more anomalous; float16, bfloat16, float32 or float64.
    features : array or tensor, (C, h, w) or (B, C, h, w)
        Frozen backbone features of the same images; any float dtype, contiguous or channels-last (decisions of the two
        layouts may differ in the last bits).
        ``x[None]`` makes the score x the only feature; standardise it first, see `ttt4as_fast.TTT4AS`.
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
    RuntimeError
        `backend` names one that cannot serve here.

    References
    ----------
    Test Time Training for Industrial Anomaly Segmentation, CVPR workshops 2024.
    """
    unknown = set(params) - set(OPTION_NAMES)
    if unknown:
        raise TypeError(f"{min(unknown)}: unknown option; segment takes {', '.join(OPTION_NAMES)}")
    try:
        options = SegmentOptions(**params) if arrays.is_compiling() else known_options(**params)
    except TypeError:  # not hashable, or of a wrong type, which is said
        options = SegmentOptions(**params)
    return run(anomaly_map, features, pred_score, options, backend)


@functools.lru_cache(maxsize=64, typed=True)
def known_options(*values: Any, **named: Any) -> SegmentOptions:
    """Checked once for equal values: most calls differ in their arrays alone. They have to be hashable."""
    return SegmentOptions(*values, **named)


def run(anomaly_map: Array, features: Array, pred_score: Any, options: SegmentOptions, backend: str) -> Segmentation:
    """`segment` with its options validated already."""
    return run_by("segment", run_batch, anomaly_map, features, pred_score, options, backend)


def run_by(
    operator: str, batch: Callable, anomaly_map: Array, features: Array, pred_score: Any, options: Any, backend: str
) -> Segmentation:
    """One image or a batch through an operator of `torch_ops`, or as arrays through `batch`."""
    anomaly_map, features, score, single = check_inputs(anomaly_map, features, pred_score)
    if arrays.is_tensor(anomaly_map):
        from .. import torch_ops

        batch = getattr(torch_ops, operator)
    try:
        mask, decision, labels, codes = batch(anomaly_map, features, score, options, backend)
    except arrays.NonFiniteError as error:
        if single:
            raise ValueError(error.without_batch) from None
        raise
    if single:
        mask, decision, labels, codes = mask[0], decision[0], labels[0], codes[0]
    return Segmentation(mask, decision, labels, codes)


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


def warmup(anomaly_map: Array, features: Array, pred_score: Any, options: SegmentOptions, backend: str) -> bool:
    """Prepare for calls with inputs of these shapes, dtypes and layouts; `TTT4AS.warmup` is the public door.

    Returns
    -------
    bool
        Whether a CUDA graph now waits for them.
    """
    anomaly_map, features, score, _ = check_inputs(anomaly_map, features, pred_score)
    with arrays.device_of(anomaly_map):
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
