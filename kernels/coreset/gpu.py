"""Greedy k-center in Triton: one pass over the points a pick, the pick itself never leaves the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..gpu_common.capability import triton_unavailable as unavailable
from ..gpu_common.units import unit_of

__all__ = ["ARRAYS", "greedy", "unavailable"]

ARRAYS = "torch"
_REPORT_EVERY = 1024
_BLOCK_D = 64
OPTIONS = {"num_warps": 4, "maxnreg": 96}
_PROGRAMS_PER_SM = 5  # that 96 registers a thread leave room for


@triton.jit(do_not_specialize=["step"])
def pick_kernel(
    x_ptr, nearest_ptr, picks_ptr, far_ptr, far_row_ptr, previous_ptr, previous_row_ptr, step, n, dim, x_n, x_d,
    UNIT: tl.constexpr, PROGRAMS: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Settle pick number `step`, measure all points against it, leave each program's farthest point for the next.

    Every program settles the pick for itself from what the programs of the launch before left, in the same order, so
    one launch a pick does. Moves N * D values and 8 bytes a point; 3 operations a value: bandwidth is the floor.
    `dim` and `x_n` count in `UNIT`s: what they are multiples of decides how wide loads are.
    """
    dim *= UNIT
    x_n *= UNIT
    program = tl.program_id(0)
    if step == 0:
        pick = tl.load(picks_ptr)
    else:
        span = tl.arange(0, SPAN)
        far = tl.load(previous_ptr + span, mask=span < PROGRAMS, other=-2)
        row = tl.load(previous_row_ptr + span, mask=span < PROGRAMS, other=0x7FFFFFFF)
        pick = tl.min(tl.where(far == tl.max(far, axis=0), row, 0x7FFFFFFF), axis=0).to(tl.int64)
        if program == 0:
            tl.store(picks_ptr + step, pick)
    channel = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_N,), -2, nearest_ptr.dtype.element_ty)
    best_row = tl.full((BLOCK_N,), 0x7FFFFFFF, tl.int32)
    for first in range(program * BLOCK_N, n, PROGRAMS * BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < n
        nearest = tl.load(nearest_ptr + row, mask=exists, other=-2)  # on its way while the distance is summed
        total = tl.zeros((BLOCK_N, BLOCK_D), nearest_ptr.dtype.element_ty)
        for start in range(0, dim, BLOCK_D):
            d = start + channel
            # In two dimensions, as the points, and of fewer channels than there are threads: Triton then lets each
            # thread read those that it needs. More of them pass through shared memory, behind two barriers.
            centre = tl.load(
                x_ptr + pick * x_n + (d.to(tl.int64) * x_d)[None, :], mask=(d < dim)[None, :], other=0
            ).to(total.dtype)  # fmt: skip
            x = tl.load(
                x_ptr + row.to(tl.int64)[:, None] * x_n + (d.to(tl.int64) * x_d)[None, :],
                mask=exists[:, None] & (d < dim)[None, :], other=0,
            ).to(total.dtype)  # fmt: skip
            difference = tl.where((d < dim)[None, :], x - centre, 0.0)
            total += difference * difference
        distance = tl.sum(total, axis=1)
        nearest = tl.minimum(nearest, distance)
        nearest = tl.where(row == pick, -1.0, nearest)  # below any distance: a duplicate never brings a pick back
        tl.store(nearest_ptr + row, nearest, mask=exists)
        farther = exists & (nearest > best)  # rows grow, so that the lowest of equals stays
        best_row = tl.where(farther, row, best_row)
        best = tl.where(farther, nearest, best)
    farthest = tl.max(best, axis=0)
    tl.store(far_ptr + program, farthest)
    tl.store(far_row_ptr + program, tl.min(tl.where(best == farthest, best_row, 0x7FFFFFFF), axis=0))


def greedy(
    points: torch.Tensor, n_samples: int, start: int, progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """(N, D) -> (n_samples,) int64: each pick is the point farthest from the picks so far.

    Distances are float32 (float64 for float64 points): two points whose distances differ by less than their rounding
    may change places, which leaves the covering radius what it is.

    Raises
    ------
    ValueError
        `points` holds a non-finite value.
    """
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points: expected finite values")
    n, dim = points.shape
    device = points.device
    dtype = torch.promote_types(points.dtype, torch.float32)
    block_n = block_n_of(dtype)
    programs = min(triton.cdiv(n, block_n), _programs(device))
    nearest = torch.full((n,), float("inf"), dtype=dtype, device=device)
    picks = torch.full((n_samples,), start, dtype=torch.int64, device=device)
    # In turn, and cut once: a slice a launch would cost the host what the launch does.
    far = torch.empty((2, programs), dtype=dtype, device=device).unbind()
    far_row = torch.empty((2, programs), dtype=torch.int32, device=device).unbind()
    unit, (row_stride, stride) = unit_of(dim, points.stride(0)), points.stride()
    for step in range(n_samples):
        now, before = step % 2, (step + 1) % 2
        pick_kernel[(programs,)](
            points, nearest, picks, far[now], far_row[now], far[before], far_row[before], step, n, dim // unit,
            row_stride // unit, stride, UNIT=unit, PROGRAMS=programs, SPAN=triton.next_power_of_2(programs),
            BLOCK_N=block_n, BLOCK_D=min(_BLOCK_D, triton.next_power_of_2(dim)), **OPTIONS,
        )  # fmt: skip
        if progress is not None and (step % _REPORT_EVERY == 0 or step == n_samples - 1):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # launches run ahead of the work
            progress(step + 1, n_samples)
    return picks


def block_n_of(dtype: torch.dtype) -> int:
    """Points of a tile: as many as stay in registers."""
    return 16 if dtype == torch.float64 else 32


def _programs(device: torch.device) -> int:
    """Programs of a launch: all the device runs at once, so that each keeps its place in the points."""
    if device.type != "cuda":
        return 3
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
