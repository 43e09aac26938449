"""Percentile, local maxima and dilation as fused CUDA kernels, one block a map, without synchronisation."""

from __future__ import annotations

import numpy as np
import torch

from ..gpu_common import cuda
from ..gpu_common.capability import cuda_source_unavailable as unavailable

__all__ = ["ARRAYS", "dilate", "local_maxima", "unavailable"]

ARRAYS = "torch"
_FILE = "peaks/peaks.cu"


def local_maxima(anomaly_map: torch.Tensor, percentile: float) -> torch.Tensor:
    """(B, H, W) -> (B, H, W) bool. A map with a non-finite value has no peaks: raising would wait for the device."""
    batch, height, width = check_size(anomaly_map, "anomaly_map")
    maps = anomaly_map.contiguous()
    if maps.dtype != torch.float64:
        maps = maps.float()
    kernel = "local_maxima_f64" if maps.dtype == torch.float64 else "local_maxima_f32"
    peaks = torch.empty(maps.shape, dtype=torch.bool, device=maps.device)
    size = (np.int32(height), np.int32(width))
    cuda.launch(maps.device, _FILE, kernel, batch, cuda.THREADS, maps, peaks, *size, np.float64(percentile))
    return peaks


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1."""
    batch, height, width = check_size(mask, "mask")
    out = torch.empty(mask.shape, dtype=torch.bool, device=mask.device)
    scratch = torch.empty(batch * 2 * height * -(-width // 32), dtype=torch.int32, device=mask.device)
    scalars = (np.int32(height), np.int32(width), np.int32(radius))
    cuda.launch(mask.device, _FILE, "dilate", batch, cuda.THREADS, mask.contiguous(), out, scratch, *scalars)
    return out


def check_size(maps: torch.Tensor, name: str) -> tuple[int, int, int]:
    """(B, H, W) of maps that 32-bit indices can address, which a block lets run a little past the end of the map."""
    batch, height, width = maps.shape
    if height * width > 2**30:
        raise ValueError(f"{name}: expected at most 2**30 pixels, got {height} x {width}")
    return batch, height, width
