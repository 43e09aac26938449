"""What `PatchCore` says of images, and the time it spent on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .kernels.arrays import to_numpy

STAGES = ("decode", "backbone", "knn", "map")


@dataclass(frozen=True)
class Prediction:
    """What `PatchCore.predict` says of N images; arrays for files and arrays, tensors on their device for tensors.

    Attributes
    ----------
    anomaly_map : (N, crop_size, crop_size) float32
        Higher is more anomalous; 0 is a patch of the memory bank.
    pred_score : (N,) float32
        The image score.
    features : (N, C, h, w) float32
        The backbone's layers joined on the finest grid, as they are: neither averaged over neighbours nor standardised.
        `TTT4AS` trains on them.
    milliseconds : dict
        Time spent on all N images: ``decode`` (reading, resizing, cropping), ``backbone``, ``knn`` (search and image
        score) and ``map`` (upsampling and blur).
    """

    anomaly_map: Any
    pred_score: Any
    features: Any
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class ImagePrediction:
    """What `PatchCore.predict_iter` says of one image file: NumPy arrays, without the leading axis of `Prediction`.

    Attributes
    ----------
    path : pathlib.Path
    size : (int, int)
        Height and width of the file's image in pixels, before resizing.
    anomaly_map, pred_score, features, milliseconds
        As in `Prediction`; the milliseconds are this image's share of its batch.
    """

    path: Path
    size: tuple[int, int]
    anomaly_map: np.ndarray
    pred_score: float
    features: np.ndarray
    milliseconds: dict[str, float]


def stacked(rows: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """As `torch.stack`, on the host without waking torch's threads, which would spin on while others need the cores."""
    if device.type == "cpu":
        return torch.from_numpy(np.stack([to_numpy(row) for row in rows]))
    return torch.stack(rows)


class Clock:
    """Adds the milliseconds since the last stop to a stage, with the device's work done."""

    def __init__(self, device: torch.device, spent: dict[str, float]) -> None:
        self.device, self.spent = device, spent
        self.start()

    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # a wait for all streams may break a capture
        now = time.perf_counter()
        self.spent[stage] += 1e3 * (now - self.begin)
        self.begin = now
