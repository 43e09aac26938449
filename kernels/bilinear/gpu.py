"""Bilinear upsampling in Triton: dense, and at given pixels only; NCHW and channels-last without a copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_common import FUSED
from ..gpu_common.capability import triton_unavailable as unavailable
from ..gpu_common.geometry import axis
from ..gpu_common.memory import chunks
from ..gpu_common.units import blocks, power_of_two

__all__ = ["ARRAYS", "sample", "unavailable", "upsample"]

ARRAYS = "torch"
GRID_LIMIT = 65535
"""Blocks along any axis of a grid but the first."""


@triton.jit
def upsample_kernel(
    x_ptr, y_ptr, row_start_ptr, row_weight_ptr, col_lower_ptr, col_weight_ptr,
    channels, h, w, width, x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """All output rows between two input rows, for a block of channels and columns.

    The two input rows are interpolated along x once and blended for every output row between them, so that loads (which
    hit L1) stay few beside stores. Moves h*w + H*W elements a channel; 8 operations an element: bandwidth is the floor.
    """
    # One axis of the grid for all but images: the others end at 65,535 blocks.
    row = tl.program_id(0) % h
    block = tl.program_id(0) // h
    blocks_w = tl.cdiv(width, BLOCK_W)
    # One axis holds both, the contiguous one inside: with two axes, Triton 3.6 distributes loads that it cannot prove
    # contiguous along the first, and every row passes through shared memory to be stored along the second.
    element = tl.arange(0, BLOCK_C * BLOCK_W)
    channel = (block // blocks_w) * BLOCK_C + (element % BLOCK_C if CHANNELS_LAST else element // BLOCK_W)
    col = (block % blocks_w) * BLOCK_W + (element // BLOCK_C if CHANNELS_LAST else element % BLOCK_W)
    batch = tl.program_id(1).to(tl.int64)
    mask = (channel < channels) & (col < width)

    left = tl.load(col_lower_ptr + col, mask=mask, other=0)
    right = tl.minimum(left + 1, w - 1)
    dx = tl.load(col_weight_ptr + col, mask=mask, other=0)
    below = tl.minimum(row + 1, h - 1)
    plane = x_ptr + batch * x_b + channel.to(tl.int64) * x_c
    upper = plane + row.to(tl.int64) * x_h
    lower = plane + below.to(tl.int64) * x_h
    left, right = left.to(tl.int64) * x_w, right.to(tl.int64) * x_w
    a = tl.load(upper + left, mask=mask, other=0).to(dx.dtype)
    b = tl.load(upper + right, mask=mask, other=0).to(dx.dtype)
    c = tl.load(lower + left, mask=mask, other=0).to(dx.dtype)
    d = tl.load(lower + right, mask=mask, other=0).to(dx.dtype)
    top = a * (1 - dx) + b * dx
    bottom = c * (1 - dx) + d * dx
    out = y_ptr + batch * y_b + channel.to(tl.int64) * y_c + col.to(tl.int64) * y_w
    first = tl.load(row_start_ptr + row)
    last = tl.load(row_start_ptr + row + 1)
    out += first.to(tl.int64) * y_h
    for y in range(first, last):
        dy = tl.load(row_weight_ptr + y)
        value = top * (1 - dy) + bottom * dy
        # Streamed: lines that are written whole and not read here need not wait in the L2 for others.
        tl.store(out, value.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")
        out += y_h


@triton.jit
def sample_kernel(
    x_ptr, y_ptr, row_ptr, col_ptr, row_lower_ptr, row_weight_ptr, col_lower_ptr, col_weight_ptr,
    n, channels, h, w, height, width, x_c, x_h, x_w,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of pixels by a block of channels: four reads and one write an element. A pixel off the grid gives NaN."""
    blocks_n = tl.cdiv(n, BLOCK_N)
    sample = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = (tl.program_id(0) // blocks_n) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = sample < n
    row = tl.load(row_ptr + sample, mask=exists, other=0)
    col = tl.load(col_ptr + sample, mask=exists, other=0)
    inside = exists & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    top = tl.load(row_lower_ptr + row, mask=inside, other=0)
    left = tl.load(col_lower_ptr + col, mask=inside, other=0)
    nan = float("nan")
    dy = tl.load(row_weight_ptr + row, mask=inside, other=nan)[:, None]
    dx = tl.load(col_weight_ptr + col, mask=inside, other=nan)[:, None]
    bottom = tl.minimum(top + 1, h - 1)
    right = tl.minimum(left + 1, w - 1)
    mask = inside[:, None] & (channel < channels)[None, :]
    plane = x_ptr + channel.to(tl.int64)[None, :] * x_c
    top_row, bottom_row = top.to(tl.int64) * x_h, bottom.to(tl.int64) * x_h
    left, right = left.to(tl.int64) * x_w, right.to(tl.int64) * x_w
    a = tl.load(plane + (top_row + left)[:, None], mask=mask, other=0).to(dx.dtype)
    b = tl.load(plane + (top_row + right)[:, None], mask=mask, other=0).to(dx.dtype)
    c = tl.load(plane + (bottom_row + left)[:, None], mask=mask, other=0).to(dx.dtype)
    d = tl.load(plane + (bottom_row + right)[:, None], mask=mask, other=0).to(dx.dtype)
    value = (a * (1 - dx) + b * dx) * (1 - dy) + (c * (1 - dx) + d * dx) * dy
    out = y_ptr + sample.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out, value, mask=exists[:, None] & (channel < channels)[None, :])


def upsample(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., h, w) -> (..., height, width), in the dtype of `features`; channels-last stays channels-last."""
    x = features if features.ndim == 4 else features.reshape(1, -1, *features.shape[-2:])
    batch, channels, h, w = x.shape
    last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    last = last and not features.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format)
    rows, cols = _axes(x, height, width)
    block_c, block_w = upsample_blocks(channels, width, last)
    programs = h * blocks(channels, block_c) * blocks(width, block_w)
    for first, last_image in chunks(batch, GRID_LIMIT):
        part, out = x[first:last_image], y[first:last_image]
        upsample_kernel[(programs, len(part))](
            part, out, rows.start, rows.weight, cols.lower, cols.weight,
            channels, h, w, width, *x.stride(), *y.stride(),
            BLOCK_C=block_c, BLOCK_W=block_w, CHANNELS_LAST=last, **FUSED,
        )  # fmt: skip
    return y.reshape(*features.shape[:-2], height, width)


def sample(features: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(C, h, w) and N pixels of the (height, width) grid -> (N, C), float32 or better; NaN for a pixel off the grid."""
    channels, h, w = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    y = torch.empty((len(rows), channels), dtype=dtype, device=features.device)
    if len(rows) == 0:
        return y
    row_axis, col_axis = _axes(features, height, width)
    block_n, block_c = 16, min(64, power_of_two(channels))
    sample_kernel[(blocks(len(rows), block_n) * blocks(channels, block_c),)](
        features, y, rows.contiguous(), cols.contiguous(),
        row_axis.lower, row_axis.weight, col_axis.lower, col_axis.weight,
        len(rows), channels, h, w, height, width, *features.stride(), BLOCK_N=block_n, BLOCK_C=block_c,
        **FUSED,
    )  # fmt: skip
    return y


def upsample_blocks(channels: int, width: int, channels_last: bool) -> tuple[int, int]:
    """Channels and columns of a program of `upsample_kernel`: about 1,024 elements, the contiguous axis the longer."""
    if channels_last:
        block_c = min(128, power_of_two(channels))
        return block_c, min(1024 // block_c, power_of_two(width))
    block_w = min(256, power_of_two(width))
    return min(1024 // block_w, power_of_two(channels)), block_w


def _axes(features: torch.Tensor, height: int, width: int) -> tuple:
    dtype = torch.promote_types(features.dtype, torch.float32)
    h, w = features.shape[-2:]
    return axis(height, h, features.device, dtype), axis(width, w, features.device, dtype)
