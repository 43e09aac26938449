"""The operations as torch operators ``ttt4as::*``: one opaque node each under `torch.compile` and `torch.export`.

Those whose results are tensors: `fit_linear_svm` returns numbers of Python too, a `KnnIndex` is an object of Python.

Imported on the first torch tensor, never before. Each operator has one implementation for CPU and CUDA (the backend is
chosen inside) and a fake that states the shapes and dtypes of what comes back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import bilinear, coreset, knn, peaks
from .dispatch import Operation
from .segment import OPERATION as SEGMENT
from .segment import OPTION_NAMES, SegmentOptions, known_options, run_batch
from .segment_robust import OPERATION as ROBUST
from .segment_robust import OPTION_NAMES as ROBUST_NAMES
from .segment_robust import RobustOptions
from .segment_robust import run_batch as run_robust_batch

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = torch.library.Library("ttt4as", "DEF")


# Unsafe for the CUDA graphs of ``torch.compile(mode="reduce-overhead")``: tables made on the first call outlive it, a
# search prepares its bank with a look at the host, a fallback goes there, and `segment` replays a graph of its own.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)


def _define(schema: str, implementation: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    # None has a derivative, and a buffer that is kept must not keep its inputs' history.
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, torch.no_grad()(implementation), key)
    torch.library.register_fake(f"ttt4as::{name}", fake, lib=_LIBRARY)


def _upsample(features: Tensor, height: int, width: int, backend: str) -> Tensor:
    result = bilinear.OPERATION.run("upsample", {"features": features}, backend, height=height, width=width)
    # Dtype and layout are what the fake promises, whatever the backend gave.
    layout = _layout(features)
    # `to` takes a tensor of one column for either layout, and leaves it as it is.
    return result.to(features.dtype, memory_format=layout).contiguous(memory_format=layout)


def _layout(features: Tensor) -> torch.memory_format:
    """Channels-last stays channels-last, as with `torch.nn.functional.interpolate`; all else comes back contiguous."""
    last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not features.is_contiguous() else torch.contiguous_format


def _upsample_fake(features: Tensor, height: int, width: int, backend: str) -> Tensor:
    result = features.new_empty((*features.shape[:-2], height, width))
    return result.to(memory_format=_layout(features))


def _sample(features: Tensor, height: int, width: int, rows: Tensor, cols: Tensor, backend: str) -> Tensor:
    return bilinear.run_sample(features, height, width, rows, cols, backend)


def _sample_fake(features: Tensor, height: int, width: int, rows: Tensor, cols: Tensor, backend: str) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty((rows.shape[0], features.shape[0]), dtype=dtype)


def _nearest(query: Tensor, bank: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return knn.KnnIndex(bank, backend=backend).search(query, k)


def _nearest_fake(query: Tensor, bank: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def _k_center_fake(points: Tensor, n_samples: int, start: int, backend: str) -> Tensor:
    return points.new_empty((n_samples,), dtype=torch.int64)


def _local_maxima(anomaly_map: Tensor, percentile: float, backend: str) -> Tensor:
    return peaks.run_local_maxima(anomaly_map, percentile, backend)


def _dilate(mask: Tensor, radius: int, backend: str) -> Tensor:
    return peaks.run_dilate(mask, radius, backend)


_robust_options = functools.lru_cache(maxsize=64, typed=True)(RobustOptions)  # as `known_options`


def _segment(
    anomaly_map: Tensor, features: Tensor, score: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *values, backend = options
    return run_batch(anomaly_map, features, score, known_options(*values), backend)


def _segment_fake(
    anomaly_map: Tensor, features: Tensor, score: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(dtype: torch.dtype) -> Tensor:
        return anomaly_map.new_empty(anomaly_map.shape, dtype=dtype)

    codes = anomaly_map.new_empty((anomaly_map.shape[0],), dtype=torch.int8)
    return empty(torch.bool), empty(torch.float32), empty(torch.int8), codes


def _segment_robust(
    anomaly_map: Tensor, features: Tensor, score: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *values, backend = options
    return run_robust_batch(anomaly_map, features, score, _robust_options(*values), backend)


_define("bilinear_upsample(Tensor features, int height, int width, str backend) -> Tensor", _upsample, _upsample_fake)
_define(
    "bilinear_sample(Tensor features, int height, int width, Tensor rows, Tensor cols, str backend) -> Tensor",
    _sample,
    _sample_fake,
)
_define("nearest_neighbors(Tensor query, Tensor bank, int k, str backend) -> (Tensor, Tensor)", _nearest, _nearest_fake)
_define(
    "k_center_greedy(Tensor points, int n_samples, int start, str backend) -> Tensor",
    coreset.run_greedy,
    _k_center_fake,
)
_define(
    "local_maxima(Tensor anomaly_map, float percentile, str backend) -> Tensor",
    _local_maxima,
    lambda anomaly_map, percentile, backend: anomaly_map.new_empty(anomaly_map.shape, dtype=torch.bool),
)
_define("dilate(Tensor mask, int radius, str backend) -> Tensor", _dilate, lambda mask, *_: mask.new_empty(mask.shape))
_define(
    "segment(Tensor anomaly_map, Tensor features, Tensor? score, float percentile, int neighbor_radius, int n_nominal, "
    "float C, str loss, str nominal_sampling, int random_state, float? image_threshold, float tol, int max_iter, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _segment,
    _segment_fake,
)
_define(
    "segment_robust(Tensor anomaly_map, Tensor features, Tensor? score, float? nominal_level, float nominal_share, "
    "float nominal_weight, float? height, float base_quantile, float core, int n_core, int n_background, "
    "float core_weight, float background_weight, float hard_share, float size_exponent, bool standardize, "
    "bool recentre, float score_weight, float C, str loss, "
    "float? image_threshold, float tol, int max_iter, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _segment_robust,
    _segment_fake,
)


def _checked(name: str, operation: Operation) -> Callable:
    """The operator, which gets a backend that exists: torch would refuse another type in its own words, or take it."""
    operator = getattr(torch.ops.ttt4as, name)

    def call(*inputs: Any) -> Any:
        operation.check_backend(inputs[-1])
        return operator(*inputs)

    return call


bilinear_upsample = _checked("bilinear_upsample", bilinear.OPERATION)
bilinear_sample = _checked("bilinear_sample", bilinear.OPERATION)
nearest_neighbors = _checked("nearest_neighbors", knn.OPERATION)
k_center_greedy = _checked("k_center_greedy", coreset.OPERATION)
local_maxima = _checked("local_maxima", peaks.OPERATION)
dilate = _checked("dilate", peaks.OPERATION)
_checked_segment = _checked("segment", SEGMENT)
_checked_robust = _checked("segment_robust", ROBUST)


def segment(
    anomaly_map: Tensor, features: Tensor, score: Tensor | None, options: SegmentOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ttt4as::segment`` with its options spread in the order of the schema."""
    values = [getattr(options, name) for name in OPTION_NAMES]
    return _checked_segment(anomaly_map, features, score, *values, backend)


def segment_robust(
    anomaly_map: Tensor, features: Tensor, score: Tensor | None, options: RobustOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ttt4as::segment_robust`` with its options spread in the order of the schema."""
    values = [getattr(options, name) for name in ROBUST_NAMES]
    return _checked_robust(anomaly_map, features, score, *values, backend)
