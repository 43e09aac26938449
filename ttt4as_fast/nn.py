"""Test-time training as a `torch.nn.Module`: buffers only, one opaque node under `torch.compile` and `torch.export`.

The operations it and PatchCore are made of stand in for these torch idioms, on host and CUDA tensors alike:

==================================================================  ===========================================
torch                                                               ttt4as_fast.kernels
==================================================================  ===========================================
``F.interpolate(f, size, mode="bilinear", align_corners=False)``    ``bilinear_upsample(f, size)``
the same, then ``[:, rows, cols].T``                                ``bilinear_sample(f, size, rows, cols)``
``torch.cdist(q, bank).topk(k, largest=False)``                     ``nearest_neighbors(q, bank, k)``
``(F.max_pool2d(m, 3, 1, 1) == m) & (m >= m.quantile(0.99))``       ``local_maxima(m, 99.0)``
``F.max_pool2d(mask.float(), 2 * r + 1, 1, r) > 0``                 ``dilate(mask, r)``
==================================================================  ===========================================

None of ours has a derivative: what they return is cut off from the gradients of what they were given.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from .kernels import torch_ops
from .kernels.arrays import check_dense, check_float
from .kernels.segment_robust import RobustOptions
from .segmenter import TTT4AS as _Segmenter

__all__ = ["TTT4AS"]

_NO_GATE = torch.finfo(torch.float64).min  # finite, so that the difference of a score to it is too


class TTT4AS(torch.nn.Module):
    """`ttt4as_fast.TTT4AS` for a PyTorch model: anomaly map and feature map in, mask out.

    Parameters
    ----------
    preset : str
        As in `ttt4as_fast.TTT4AS`.
    image_threshold : float, optional
        Images whose score is below it get an empty mask. A buffer: it travels with the state dict, and stays float64
        whatever the module is cast to; a value that is not finite is not loaded.
    **options
        The other arguments of `ttt4as_fast.TTT4AS`.

    Raises
    ------
    ValueError, TypeError
        An option is unknown or out of range.

    Examples
    --------
    >>> module = TTT4AS(neighbor_radius=3)
    >>> mask = module(torch.rand(2, 64, 64), torch.rand(2, 16, 8, 8))
    >>> mask.shape, mask.dtype
    (torch.Size([2, 64, 64]), torch.bool)
    """

    image_threshold: torch.Tensor

    def __init__(self, preset: str = "paper", *, image_threshold: float | None = None, **options: Any) -> None:
        super().__init__()
        segmenter = _Segmenter(preset, **options)
        # The gate is at zero of what `forward` hands over: half of the scores less half of the threshold.
        self._options = replace(segmenter.options, image_threshold=0.0)
        self._backend = segmenter.backend
        threshold = _NO_GATE if image_threshold is None else check_float(image_threshold, "image_threshold", _NO_GATE)
        self.register_buffer("image_threshold", torch.tensor(threshold, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> TTT4AS:
        """As `torch.nn.Module` moves and casts, but for the threshold, which a narrower type would round."""
        threshold = self.image_threshold
        super()._apply(fn, recurse)
        if self.image_threshold.dtype != torch.float64:
            self.image_threshold = threshold.to(self.image_threshold.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As `torch.nn.Module` loads, but for a threshold that no score could be held to."""
        threshold = state_dict.get(f"{prefix}image_threshold")
        if isinstance(threshold, torch.Tensor) and not threshold.is_meta and not threshold.isfinite().all():
            raise ValueError(f"{prefix}image_threshold: expected a finite number, got {threshold.tolist()}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The constructor's arguments, as they stand, for `print`."""
        threshold: Any = self.image_threshold
        if not threshold.is_meta:
            threshold = None if threshold == _NO_GATE else float(threshold)
        preset = "robust" if isinstance(self._options, RobustOptions) else "paper"
        shown = {"preset": preset, **asdict(self._options), "image_threshold": threshold, "backend": self._backend}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self, anomaly_map: torch.Tensor, features: torch.Tensor, pred_score: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Masks of a batch.

        Parameters
        ----------
        anomaly_map : (B, H, W) or (B, 1, H, W) tensor
            Higher is more anomalous; any float dtype.
        features : (B, C, h, w) tensor
            Frozen features of the same images, on the same device.
        pred_score : (B,) tensor, optional
            Image scores for the gate; each map's maximum when absent.

        Returns
        -------
        tensor of bool
            The shape of `anomaly_map`.

        Raises
        ------
        ValueError, TypeError
            Shapes that do not fit, a non-finite value, or what is no tensor.
        """
        given: dict[str, Any] = {"anomaly_map": anomaly_map, "features": features}
        if pred_score is not None:
            given["pred_score"] = pred_score
        for name, x in given.items():
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            if x.is_complex():
                raise TypeError(f"{name}: expected a tensor of real numbers, got {x.dtype}")
            check_dense(x, name, meta=anomaly_map.device.type == "meta")
            if 0 in x.shape:
                raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
        if features.device != anomaly_map.device:
            raise ValueError(f"features: expected device {anomaly_map.device} as anomaly_map, got {features.device}")
        maps = anomaly_map.squeeze(1) if anomaly_map.ndim == 4 else anomaly_map
        if maps.ndim != 3 or features.ndim != 4 or features.shape[0] != maps.shape[0]:
            raise ValueError(
                "anomaly_map: expected (B, H, W) or (B, 1, H, W) beside features (B, C, h, w), got "
                f"{tuple(anomaly_map.shape)} and {tuple(features.shape)}"
            )
        score = maps.flatten(1).amax(1) if pred_score is None else pred_score
        if score.shape != maps.shape[:1]:
            raise ValueError(f"pred_score: expected shape ({maps.shape[0]},), got {tuple(score.shape)}")
        # The operator's gate is a number; a buffer's value is not. Of halves, whose difference does not overflow.
        above = score.double() / 2 - self.image_threshold / 2
        if isinstance(self._options, RobustOptions):
            mask, _, _, _ = torch_ops.segment_robust(maps, features, above, self._options, self._backend)
        else:
            mask, _, _, _ = torch_ops.segment(maps, features, above, self._options, self._backend)
        return mask.reshape(anomaly_map.shape)
