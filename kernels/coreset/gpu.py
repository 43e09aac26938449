"""Greedy k-center in Triton: one pass over the points a pick, the pick itself never leaves the device.

Where many picks are made of long vectors, the pass is over sketches of the points, 128 bytes each, and a point is read
only where its sketch cannot prove that the new pick is no nearer to it than a pick before: the same picks to the bit. A
sketch is the point's coordinates along a few strong directions and the length of all that they leave. Distances of
sketches are never above those of points (Cauchy and Schwarz, for the lengths).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..gpu_common import FUSED
from ..gpu_common.capability import processors
from ..gpu_common.capability import triton_unavailable as unavailable
from ..gpu_common.memory import chunks
from ..gpu_common.units import blocks, power_of_two, unit_of

__all__ = ["ARRAYS", "greedy", "unavailable"]

ARRAYS = "torch"
_REPORT_EVERY = 1024
_BLOCK_D = 64
_REGISTERS = 65536  # of a multiprocessor
_SKETCH = 32  # numbers of a sketch
_SKETCH_FROM = (256, 4 * _SKETCH)  # picks and channels from which sketches pay for themselves
_BLOCK_S = 64  # sketches that a program looks at at a time
_SAMPLE = 4096  # points whose strong directions are looked for


@triton.jit(do_not_specialize=["step"])
def pick_kernel(
    x_ptr, sketch_ptr, margin_ptr, list_ptr, nearest_ptr, picks_ptr, far_ptr, far_row_ptr, previous_ptr,
    previous_row_ptr, step, n, dim, x_n, x_d,
    UNIT: tl.constexpr, PROGRAMS: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SKETCH: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Settle pick number `step`, measure all points against it, leave each program's farthest point for the next.

    Every program settles the pick for itself from what the programs of the launch before left, in the same order, so
    one launch a pick does. Moves N * D values and 8 bytes a point; 3 operations a value: bandwidth is the floor. With
    sketches of SKETCH numbers (0: without) it moves those, lists the points that they cannot exclude, and moves the
    values of these. `dim` and `x_n` count in `UNIT`s: what they are multiples of decides how wide loads are.
    """
    dim *= UNIT
    x_n = tl.cast(x_n, tl.int64) * UNIT
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
    first_slot, slots, stride = program * BLOCK_N, n, PROGRAMS * BLOCK_N
    if SKETCH:
        column = tl.arange(0, SKETCH)
        centre_sketch = tl.load(sketch_ptr + pick * SKETCH + column[None, :])
        margin = tl.load(margin_ptr)
        list_ptr += program * tl.cdiv(n, PROGRAMS * BLOCK_S) * BLOCK_S
        left = tl.full((BLOCK_S,), -2, nearest_ptr.dtype.element_ty)  # the farthest of those that are excluded
        left_row = tl.full((BLOCK_S,), 0x7FFFFFFF, tl.int32)
        first_slot, slots, stride = 0, 0, BLOCK_N
        for first in range(program * BLOCK_S, n, PROGRAMS * BLOCK_S):
            row = first + tl.arange(0, BLOCK_S)
            exists = row < n
            nearest = tl.load(nearest_ptr + row, mask=exists, other=-2)
            apart = tl.load(
                sketch_ptr + row.to(tl.int64)[:, None] * SKETCH + column[None, :], mask=exists[:, None], other=0
            ) - centre_sketch  # fmt: skip
            # More than 1 % is left for the rounding of both sums; `sketches_of` says what the margin is for. NaN
            # excludes nothing.
            excluded = tl.sum(apart * apart, axis=1) > nearest.to(tl.float32) * (1 + 2.0**-6) + margin
            listed = (exists & ~excluded).to(tl.int32)
            tl.store(list_ptr + slots + tl.cumsum(listed, axis=0) - 1, row, mask=listed > 0)
            slots += tl.sum(listed, axis=0)
            farther = exists & excluded & (nearest > left)
            left_row = tl.where(farther, row, left_row)
            left = tl.where(farther, nearest, left)
        tl.debug_barrier()  # the list is read by other threads than wrote it
    best = tl.full((BLOCK_N,), -2, nearest_ptr.dtype.element_ty)
    best_row = tl.full((BLOCK_N,), 0x7FFFFFFF, tl.int32)
    for first in range(first_slot, slots, stride):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < slots
        if SKETCH:
            row = tl.load(list_ptr + row, mask=exists, other=0)
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
    if SKETCH:
        farthest = tl.maximum(farthest, tl.max(left, axis=0))
    farthest_row = tl.min(tl.where(best == farthest, best_row, 0x7FFFFFFF), axis=0)
    if SKETCH:
        farthest_row = tl.minimum(farthest_row, tl.min(tl.where(left == farthest, left_row, 0x7FFFFFFF), axis=0))
    tl.store(far_ptr + program, farthest)
    tl.store(far_row_ptr + program, farthest_row)


def greedy(
    points: torch.Tensor, n_samples: int, start: int, progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """(N, D) -> (n_samples,) int64: each pick is the point farthest from the picks so far.

    Distances are float32 (float64 for float64 points): two points whose distances differ by less than their rounding
    may change places, which leaves the covering radius what it is. Points whose squares may leave the range of these
    are scaled, as a copy.

    Raises
    ------
    ValueError
        `points` holds a non-finite value, or more than 2**30 rows: 32-bit numbers would not hold the step past the end.
    """
    if len(points) > 2**30:
        raise ValueError(f"points: expected at most 2**30 on a GPU, got {len(points)}")
    dtype = torch.promote_types(points.dtype, torch.float32)
    points = _scaled(points, dtype)
    n, dim = points.shape
    device = points.device
    block_n = block_n_of(dtype)
    options = options_of(dtype)
    programs = min(blocks(n, block_n), _programs(device, options))
    nearest = torch.full((n,), float("inf"), dtype=dtype, device=device)
    picks = torch.full((n_samples,), start, dtype=torch.int64, device=device)
    # Two buffers in turn, sliced once: a slice at each launch would cost the host as much as the launch.
    far = torch.empty((2, programs), dtype=dtype, device=device).unbind()
    far_row = torch.empty((2, programs), dtype=torch.int32, device=device).unbind()
    unit, (row_stride, stride) = unit_of(dim, points.stride(0)), points.stride()
    sketch, margin, listed, columns = nearest, nearest, picks, 0  # without sketches the kernel reads none of these
    if n_samples >= _SKETCH_FROM[0] and dim >= _SKETCH_FROM[1]:
        sketch, margin = sketches_of(points)
        columns = _SKETCH
        slots = blocks(n, programs * _BLOCK_S) * _BLOCK_S
        listed = torch.empty(programs * slots, dtype=torch.int32, device=device)
    block_d = min(_BLOCK_D, power_of_two(dim))
    constants = (unit, programs, power_of_two(programs), block_n, block_d, columns, _BLOCK_S)
    again: list[Callable | None] = [None, None]
    for step in range(n_samples):
        now, before = step % 2, (step + 1) % 2
        arguments = (
            points, sketch, margin, listed, nearest, picks, far[now], far_row[now], far[before], far_row[before],
            step, n, dim // unit, row_stride // unit, stride, *constants,
        )  # fmt: skip
        launch = again[now]
        if launch is not None:
            launch(*arguments)
        else:
            # From now on the compiled kernel is launched directly: to let Triton look at all arguments again would
            # cost the host more than a pass over the sketches takes.
            compiled = pick_kernel[(programs,)](*arguments, **options, **FUSED)
            again[now] = None if compiled is None else compiled[(programs, 1, 1)]  # None: it is interpreted
        if progress is not None and (step % _REPORT_EVERY == 0 or step == n_samples - 1):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # launches run ahead of the work
            progress(step + 1, n_samples)
    return picks


def _scaled(points: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`points`, times a power of two where squares of their differences might be lost in `dtype`: the same picks."""
    largest = float(torch.linalg.vector_norm(points, float("inf")))  # not finite where a value is not; no copy
    if not math.isfinite(largest):
        raise ValueError("points: expected finite values")
    exponent = math.frexp(largest)[1]
    top = math.frexp(torch.finfo(dtype).max)[1]
    if abs(exponent) <= top // 4:
        return points
    most = top * 3 // 4  # a power that the dtype has; what it leaves is in the middle of the range
    return points * 2.0 ** -min(max(exponent, -most), most)


def sketches_of(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) -> sketches (N, _SKETCH) float32, and what rounding may have added to a squared distance of two, (1,).

    Any orthonormal directions would do: those of a few steps of subspace iteration exclude the most. A sketch is off by
    less than 2**-19 of the longest vector, and (s + e)**2 <= (1 + 2**-8) s**2 + 257 e**2.
    """
    n, device = len(points), points.device
    sample = points[:: max(1, n // _SAMPLE)][:_SAMPLE].double()
    centre = sample.mean(0)
    sample = sample - centre  # float64 points would be the caller's own
    sample /= sample.abs().amax().clamp_min(1e-300)
    directions = torch.linalg.qr(sample[: _SKETCH - 1].T).Q
    for _ in range(4):
        directions = torch.linalg.qr(sample.T @ (sample @ directions)).Q
    found = torch.zeros((n, _SKETCH), dtype=torch.float32, device=device)
    longest = torch.zeros((), dtype=torch.float64, device=device)
    for start, stop in chunks(n, _SAMPLE):  # no float64 copy of the points
        x = points[start:stop].double() - centre
        along = x @ directions
        squared = x.square().sum(1)
        found[start:stop, : along.shape[1]] = along
        found[start:stop, -1] = (squared - along.square().sum(1)).clamp_min_(0).sqrt_()
        longest = torch.maximum(longest, squared.amax())
    return found, (257 * 2.0**-36 * longest).float().reshape(1)


def block_n_of(dtype: torch.dtype) -> int:
    """Points of a tile: as many as stay in registers."""
    return 16 if dtype == torch.float64 else 32


def options_of(dtype: torch.dtype) -> dict[str, int]:
    """Options of a launch: the fewest registers a thread that spill nothing."""
    return {"num_warps": 4, "maxnreg": 128 if dtype == torch.float64 else 96}


def _programs(device: torch.device, options: dict[str, int]) -> int:
    """Programs of a launch: all the device runs at once, so that each keeps its place in the points."""
    if device.type != "cuda":
        return 3
    resident = _REGISTERS // (32 * options["num_warps"] * options["maxnreg"])
    return resident * processors(device)
