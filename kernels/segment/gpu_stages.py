"""The stages of `segment` around the solver, in Triton: basis, low-resolution decision, upsampling with threshold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_common import FUSED
from ..gpu_common.layout import layout
from ..gpu_common.svm import Samples
from ..gpu_common.units import blocks, power_of_two

NON_FINITE: tl.constexpr = tl.constexpr(4)
"""The status of an image with a non-finite value."""
BASIS_PROGRAMS = 16
"""Programs that share an image's basis vectors, for each block of channels."""


@triton.jit
def basis_kernel(
    x_ptr, basis_ptr, points_ptr, cells_ptr, counts_ptr, status_ptr,
    row_lower_ptr, row_weight_ptr, col_lower_ptr, col_weight_ptr,
    channels, h, w, width, rows, limit, x_b, x_c, x_p,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Basis vectors of each image: features upsampled at its nominal pixels, then those of the cells it uses.

    Reads 4 C values a point and C a cell, writes C each; rows past the last are left unwritten. The programs share the
    rows that there are, which only the device knows: one for each that there might be would mostly start and end.
    """
    image = tl.program_id(2).to(tl.int64)
    n_points = tl.load(counts_ptr + image * 3)
    m = n_points + tl.load(counts_ptr + image * 3 + 2)
    if tl.load(status_ptr + image) != 0:
        m = 0
    for block in range(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = row < m
        is_point = row < n_points
        pixel = tl.load(points_ptr + image * limit + row, mask=is_point, other=0)
        cell = tl.load(cells_ptr + image * h * w + row - n_points, mask=exists & (row >= n_points), other=0)
        y = pixel // width
        x = pixel % width
        top = tl.where(is_point, tl.load(row_lower_ptr + y), cell // w)
        left = tl.where(is_point, tl.load(col_lower_ptr + x), cell % w)
        dy = tl.where(is_point, tl.load(row_weight_ptr + y), 0.0)[:, None]
        dx = tl.where(is_point, tl.load(col_weight_ptr + x), 0.0)[:, None]
        bottom = tl.minimum(top + 1, h - 1)
        right = tl.minimum(left + 1, w - 1)
        mask = exists[:, None] & (channel < channels)[None, :]
        plane = x_ptr + image * x_b + channel[None, :].to(tl.int64) * x_c
        top_row, bottom_row = top.to(tl.int64) * w, bottom.to(tl.int64) * w
        a = tl.load(plane + ((top_row + left) * x_p)[:, None], mask=mask, other=0).to(tl.float32)
        b = tl.load(plane + ((top_row + right) * x_p)[:, None], mask=mask & (dx > 0), other=0).to(tl.float32)
        c = tl.load(plane + ((bottom_row + left) * x_p)[:, None], mask=mask & (dy > 0), other=0).to(tl.float32)
        d = tl.load(plane + ((bottom_row + right) * x_p)[:, None], mask=mask & (dx > 0) & (dy > 0), other=0)
        value = (a * (1 - dx) + b * dx) * (1 - dy) + (c * (1 - dx) + d.to(tl.float32) * dx) * dy
        out = basis_ptr + (image * rows + row[:, None]) * channels + channel[None, :]
        tl.store(out, value, mask=mask)


@triton.jit
def decision_kernel(
    x_ptr, weights_ptr, report_ptr, status_ptr, low_ptr, channels, cells, x_b, x_c, x_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Decision in each cell of the feature grid, w . F + b; every feature is read once: no non-finite one can hide.

    Moves C * h * w elements an image: bandwidth is the floor.
    """
    image = tl.program_id(1).to(tl.int64)
    status = tl.load(status_ptr + image)
    if (status == 0) | (status == 3):
        cell = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        exists = cell < cells
        place = x_ptr + image * x_b + cell.to(tl.int64) * x_p
        total = tl.zeros((BLOCK_P,), tl.float32)
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            weight = tl.load(weights_ptr + image * channels + channel, mask=channel < channels, other=0)
            if CHANNELS_LAST:
                x = tl.load(
                    place[:, None] + channel[None, :].to(tl.int64) * x_c,
                    mask=exists[:, None] & (channel < channels)[None, :], other=0,
                )  # fmt: skip
                total += tl.sum(x.to(tl.float32) * weight[None, :], axis=1)
            else:
                x = tl.load(
                    place[None, :] + channel[:, None].to(tl.int64) * x_c,
                    mask=exists[None, :] & (channel < channels)[:, None], other=0,
                )  # fmt: skip
                total += tl.sum(x.to(tl.float32) * weight[:, None], axis=0)
        total += tl.load(report_ptr + image * 3 + 2).to(tl.float32)
        tl.store(low_ptr + image * cells + cell, total, mask=exists)
        # NaN and infinity survive a sum: infinities that cancel leave NaN.
        bad = tl.max(tl.where(exists & ~(tl.abs(total) < float("inf")), 1, 0), axis=0)
        tl.atomic_max(status_ptr + image, NON_FINITE, mask=bad > 0)


@triton.jit
def upsample_threshold_kernel(
    low_ptr, status_ptr, decision_ptr, mask_ptr, code_ptr,
    row_lower_ptr, row_weight_ptr, col_lower_ptr, col_weight_ptr, h, w, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """The decision upsampled and thresholded in one pass, and the status as a code: h * w floats to 5 bytes a pixel.

    An image that was not trained gets zeros, one with a non-finite value NaN; neither has a pixel in the mask.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < height * width
    status = tl.load(status_ptr + image)
    code = tl.full((BLOCK,), 0, tl.int32) + status
    trained = exists & ((code == 0) | (code == 3))
    row = tl.where(exists, pixel // width, 0)
    col = tl.where(exists, pixel % width, 0)
    top = tl.load(row_lower_ptr + row)
    left = tl.load(col_lower_ptr + col)
    dy = tl.load(row_weight_ptr + row)
    dx = tl.load(col_weight_ptr + col)
    bottom = tl.minimum(top + 1, h - 1)
    right = tl.minimum(left + 1, w - 1)
    low = low_ptr + image * h * w
    a = tl.load(low + top * w + left, mask=trained, other=0)
    b = tl.load(low + top * w + right, mask=trained, other=0)
    c = tl.load(low + bottom * w + left, mask=trained, other=0)
    d = tl.load(low + bottom * w + right, mask=trained, other=0)
    value = (a * (1 - dx) + b * dx) * (1 - dy) + (c * (1 - dx) + d * dx) * dy
    value = tl.where(status == NON_FINITE, float("nan"), value)
    out = image * height * width + pixel
    tl.store(decision_ptr + out, value, mask=exists)
    tl.store(mask_ptr + out, value > 0, mask=exists)
    if tl.program_id(0) == 0:
        tl.store(code_ptr + image, status.to(tl.int8))


def strides(features: torch.Tensor) -> tuple[int, int, int]:
    """Elements between images, channels and cells of `dense` features; the stride of an axis of 1 may be any."""
    _, channels, h, w = features.shape
    by_channel, by_cell = (1, channels) if layout(features) == torch.channels_last else (h * w, 1)
    return channels * h * w, by_channel, by_cell


def basis(
    features: torch.Tensor,
    points: torch.Tensor,
    counts: torch.Tensor,
    status: torch.Tensor,
    samples: Samples,
    rows: int,
) -> torch.Tensor:
    """(B, rows, C) float32: points first, then cells."""
    batch, channels, h, w = features.shape
    out = torch.empty((batch, rows, channels), dtype=torch.float32, device=features.device)
    block_m, block_c = 16, 64
    basis_kernel[(min(BASIS_PROGRAMS, blocks(rows, block_m)), blocks(channels, block_c), batch)](
        features, out, points, samples.cells, counts, status,
        samples.rows.lower, samples.rows.weight, samples.cols.lower, samples.cols.weight,
        channels, h, w, samples.size[1], rows, points.shape[1], *strides(features), BLOCK_M=block_m, BLOCK_C=block_c,
        **FUSED,
    )  # fmt: skip
    return out


def decision(features: torch.Tensor, weights: torch.Tensor, report: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """(B, h, w) float32, unwritten where no SVM was trained; sets status 4 where a feature is not finite."""
    batch, channels, h, w = features.shape
    low = torch.empty((batch, h, w), dtype=torch.float32, device=features.device)
    block_p, block_c = decision_blocks(channels)
    decision_kernel[(blocks(h * w, block_p), batch)](
        features, weights, report, status, low, channels, h * w, *strides(features),
        BLOCK_P=block_p, BLOCK_C=block_c, CHANNELS_LAST=layout(features) == torch.channels_last, **FUSED,
    )  # fmt: skip
    return low


def decision_blocks(channels: int) -> tuple[int, int]:
    """Cells and channels of a program of `decision_kernel`: many reads in flight, for one image has few programs."""
    return 16, min(256, power_of_two(channels))


def upsample_threshold(
    low: torch.Tensor,
    status: torch.Tensor,
    samples: Samples,
    mask: torch.Tensor,
    decision: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """(B, h, w) -> `mask` bool and `decision` float32, both (B, H, W) and contiguous; (B,) -> `codes` int8."""
    batch, h, w = low.shape
    height, width = samples.size
    block = 1024
    upsample_threshold_kernel[(blocks(height * width, block), batch)](
        low, status, decision, mask, codes,
        samples.rows.lower, samples.rows.weight, samples.cols.lower, samples.cols.weight,
        h, w, height, width, BLOCK=block, **FUSED,
    )  # fmt: skip
