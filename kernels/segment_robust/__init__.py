"""Test-time training whose labels follow the shape of each peak: masks for defects of any size.

`segment` labels a fixed neighbourhood of the peaks anomalous and draws nominal samples from all the rest, the interior
of a large defect included. Here one level splits the map into two, the SVM learns both sides of it, and its decision
is added to the score's own:

1. **Level.** Where the map falls most steeply is where the edge of the blurred defect lies. The mean gradient of the
   pixels of each height, between the map's background and its peak, is largest at that height: `labels.level`.
2. **Nominal maps**, if known, say up to which score nothing is meant: the level moves half-way to the place that lies
   `nominal_share` of the distance from there to the peak.
3. **Size.** What the detector blurs widens a narrow peak most: its level goes up. A wide peak is uneven: its level
   goes down, by a power (`size_exponent`) of the feature cells that the peak's top covers. Not down where the whole
   map stays below the nominal level: what is wide there is texture.
4. **Labels.** The upper part of what lies above the level (`core`) is anomalous, all below it nominal, on a lattice of
   half a feature cell. Each class weighs a quarter of the places it has there, as many as the cells it covers, up to
   `core_weight` and `background_weight`: large defects much, tiny ones little, and the SVM is as bold as that. It
   learns from few of them, spread evenly over the plane, each with the weight of those it stands for; every second
   nominal one (`hard_share`) is from the eighth of the highest scores, where the classifier errs most.
5. **Features** are standardised by their own mean and deviation in the image, so that C means the same anywhere.
6. **Decision.** The SVM's, moved and scaled such that its two classes have the means 1 and -1 (`recentre`: few
   anomalous samples against many nominal ones push it to one side), plus `score_weight` times the height over the
   level, 1 at the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays
from ..dispatch import Operation
from ..linear_svm import LOSSES
from ..segment import Segmentation, check_finite, gate, run_by

if TYPE_CHECKING:
    from ..arrays import Array

CONSTANT = 1e-5
"""A channel whose deviation is below this share of its root mean square is constant: rounding is not standardised. Nor
is a difference of no more than so many margins between the classes stretched."""

OPERATION = Operation("segment_robust", host=("cpu", "reference"), cuda=("cpu", "reference"))


@dataclass(frozen=True)
class RobustOptions:
    """Options of `segment_robust`, validated on construction; see there."""

    nominal_level: float | None = None
    nominal_share: float = 0.4
    nominal_weight: float = 0.5
    height: float | None = None
    base_quantile: float = 0.25
    core: float = 0.3
    n_core: int = 50
    n_background: int = 150
    core_weight: float = 50.0
    background_weight: float = 400.0
    hard_share: float = 0.5
    size_exponent: float = 0.3
    standardize: bool = True
    recentre: bool = True
    score_weight: float = 1.0
    C: float = 1e-3
    loss: str = "squared_hinge"
    image_threshold: float | None = None
    tol: float = 1e-4
    max_iter: int = 1000

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "nominal_share": arrays.check_float(self.nominal_share, "nominal_share", 0.0, 0.99),
            "nominal_weight": arrays.check_float(self.nominal_weight, "nominal_weight", 0.0, 1.0),
            "base_quantile": arrays.check_float(self.base_quantile, "base_quantile", 0.0, 1.0),
            "core": arrays.check_float(self.core, "core", 0.0, 0.99),
            "n_core": arrays.check_int(self.n_core, "n_core", 1),
            "n_background": arrays.check_int(self.n_background, "n_background", 1),
            "core_weight": arrays.check_float(self.core_weight, "core_weight", 0.0, open_low=True),
            "background_weight": arrays.check_float(self.background_weight, "background_weight", 0.0, open_low=True),
            "hard_share": arrays.check_float(self.hard_share, "hard_share", 0.0, 1.0),
            "size_exponent": arrays.check_float(self.size_exponent, "size_exponent", 0.0, 2.0),
            "recentre": arrays.check_bool(self.recentre, "recentre"),
            "standardize": arrays.check_bool(self.standardize, "standardize"),
            "score_weight": arrays.check_float(self.score_weight, "score_weight", 0.0),
            "C": arrays.check_float(self.C, "C", 0.0, open_low=True),
            "loss": arrays.check_option(self.loss, "loss", LOSSES),
            "tol": arrays.check_float(self.tol, "tol", 0.0, open_low=True),
            "max_iter": arrays.check_int(self.max_iter, "max_iter", 1),
        }
        if self.nominal_level is not None:
            checked["nominal_level"] = arrays.check_float(self.nominal_level, "nominal_level", -math.inf)
        if self.height is not None:
            checked["height"] = arrays.check_float(self.height, "height", 0.01, 0.99)
        if self.image_threshold is not None:
            checked["image_threshold"] = arrays.check_float(self.image_threshold, "image_threshold", -math.inf)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


OPTION_NAMES = tuple(field.name for field in fields(RobustOptions))


def segment_robust(
    anomaly_map: Array, features: Array, *, pred_score: Any = None, backend: str = "auto", **params: Any
) -> Segmentation:
    """Train a linear SVM on both sides of the level where the map falls most steeply; mark what it and the score say.

    Each thread keeps its scratch for the next call: at most ten times the features of the samples of an image and some
    bytes a place of the lattice and a position, which ``ttt4as/robust.hpp`` counts.

    Parameters
    ----------
    anomaly_map : array or tensor, (H, W) or (B, H, W)
        Any range, higher is more anomalous; float16, bfloat16, float32 or float64.
    features : array or tensor, (C, h, w) or (B, C, h, w)
        Frozen backbone features of the same images; any float dtype, any scale.
    pred_score : number or (B,) array, optional
        Image scores that `image_threshold` gates; each map's maximum when absent.
    nominal_level : float, optional
        The score that pixels of nominal images hardly pass (`nominal_level` makes it of validation maps). Without it
        the level comes from the map alone.
    nominal_share : float
        In [0, 0.99], default 0.4: the nominal images' own level lies this share of the way from `nominal_level` to the
        peak.
    nominal_weight : float
        In [0, 1], default 0.5: the weight of that level against the map's own; 0 leaves it out.
    height : float, optional
        In [0.01, 0.99]: the map's own level as a share of the way from the background to the peak, instead of the
        steepest one.
    base_quantile : float
        In [0, 1], default 0.25: the quantile of the map that counts as background. Defects may cover the rest.
    core : float
        In [0, 0.99], default 0.3: anomalous samples lie above this share of the way from the level to the peak. What
        lies between is not used.
    n_core, n_background : int
        Anomalous and nominal samples at most, evenly spread; defaults 50 and 150. The SVM's time grows with them.
    core_weight, background_weight : float
        > 0: what each class counts for in the SVM at most, defaults 50 and 400; a class that has fewer than four times
        as many places on the lattice counts for a quarter of them. Little against much keeps the SVM careful.
    hard_share : float
        In [0, 1], default 0.5: the share of the nominal samples that is taken from the eighth of the highest scores,
        with weights to match; 0 takes all from everywhere alike.
    size_exponent : float
        In [0, 2], default 0.3: the height of both levels is multiplied by this power of 8 over the number of feature
        cells above three quarters of the map's height, within [0.7, 1.3]. 0 leaves the size out.
    standardize : bool
        Standardise each channel by its mean and deviation in the image. Default True.
    recentre : bool
        Move and scale the SVM's decision such that its mean over the anomalous samples is 1 and over the nominal ones
        -1. Default True. It stays as it is where the first mean is not above the second by more than 1e-5, as for
        constant features; a large `C` in float32 may leave more than that open where the two coincide.
    score_weight : float
        >= 0, default 1: what the score counts for in the decision, in units of the SVM's margin at the peak.
    C : float
        SVM loss weight, default 1e-3.
    loss : {"squared_hinge", "hinge"}
    image_threshold : float, optional
        Images whose score is below it are called nominal: an empty mask, no training.
    tol, max_iter : float, int
        Relative duality gap of the SVM, default 1e-4, and its iterations at most, default 1000. Recentring amplifies
        what the gap leaves open, so that ``"cpu"`` goes on to a ten-thousandth of it where it can: masks are then those
        of the optimum, to a pixel or two.
    backend : str
        ``"auto"``, ``"cpu"`` or ``"reference"``. CUDA tensors make the trip to the host and back.

    Returns
    -------
    Segmentation
        As `segment` gives it; ``pseudo_labels`` are the samples used.

    Raises
    ------
    ValueError, TypeError
        Wrong ranks or dtypes, batches or kinds that differ, empty axis, non-finite value, unknown or invalid option.
    RuntimeError
        `backend` names one that cannot serve here.

    References
    ----------
    Test Time Training for Industrial Anomaly Segmentation, CVPR workshops 2024 (training on the image itself).
    Katz, "Image segmentation as an estimation problem", CGIP 1980; Weszka and Rosenfeld, "Histogram modification for
    threshold selection", IEEE Trans. SMC 1979 (thresholds where gradients are large).
    """
    unknown = set(params) - set(OPTION_NAMES)
    if unknown:
        raise TypeError(f"{min(unknown)}: unknown option; segment_robust takes {', '.join(OPTION_NAMES)}")
    return run(anomaly_map, features, pred_score, RobustOptions(**params), backend)


def run(anomaly_map: Array, features: Array, pred_score: Any, options: RobustOptions, backend: str) -> Segmentation:
    """`segment_robust` with its options validated already."""
    return run_by("segment_robust", run_batch, anomaly_map, features, pred_score, options, backend)


def run_batch(
    anomaly_map: Array, features: Array, score: Array | None, options: RobustOptions, backend: str
) -> tuple[Array, Array, Array, Array]:
    """(B, H, W) and (B, C, h, w) through the chosen backend; the torch operator calls it too."""
    check_finite(OPERATION.resolve(backend, arrays.device_type(anomaly_map)), anomaly_map, features, score)
    skip = gate(anomaly_map, score, options.image_threshold)
    skip = None if skip is None else arrays.to_numpy(skip)
    return OPERATION.run(
        "segment", {"anomaly_map": anomaly_map, "features": features}, backend, skip=skip, options=options
    )


def nominal_level(nominal_maps: Array, quantile: float = 0.999) -> float:
    """The score that pixels of nominal images hardly pass: a quantile of all their pixels.

    Parameters
    ----------
    nominal_maps : array or tensor, (N, H, W)
        Anomaly maps of nominal validation images.
    quantile : float
        In [0, 1], default 0.999.

    Returns
    -------
    float
        A float32 value; of float64 maps, which float32 may not tell apart or hold, a float64 one.

    Raises
    ------
    ValueError, TypeError
        Wrong rank or dtype, empty axis, non-finite value.
    """
    maps = arrays.to_numpy(arrays.as_float_array(nominal_maps, "nominal_maps", (3,)))
    arrays.check_finite(maps, "nominal_maps")
    quantile = arrays.check_float(quantile, "quantile", 0.0, 1.0)
    level = np.quantile(maps.astype(np.float64), quantile)
    return float(level if maps.dtype == np.float64 else np.float32(level))
