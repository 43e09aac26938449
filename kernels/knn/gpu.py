"""Exact nearest neighbours in Triton: float16 tensor cores propose, float64 differences decide.

1. Every vector is centred on the bank's mean (distances do not change, norms shrink), scaled by a power of two and
   rounded to float16; the norm of what rounding lost is kept.
2. A matrix product on tensor cores gives approximate squared distances. Of every `GROUP` consecutive bank vectors only
   the least and the second least survive, in registers: the (Q, N) matrix never exists.
3. By Cauchy and Schwarz, |q.b - q'.b'| <= |q - q'| |b'| + |q| |b - b'|: no approximation is off by more than a bound
   known for each query. Whatever the bound cannot exclude is measured by direct differences in float64: one row of a
   group, or all of it where its second best qualifies too. The result is exact whatever the data; hard data costs time.

float16 carries three more bits than bfloat16 at the same rate, which leaves fewer rows to measure.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from ..gpu_common.capability import triton_unavailable as unavailable
from ..gpu_common.memory import chunks, in_chunks

__all__ = ["ARRAYS", "Index", "unavailable"]

ARRAYS = "torch"
GROUP = 32
"""Bank vectors that share a minimum; their place fits the 5 low bits of a packed distance."""
MAX_K = 64
"""Neighbours up to which the list of a query stays in registers; more are searched exhaustively."""
SCRATCH_BYTES = 256 << 20
"""Default bound on the scratch of a search."""
TILES = {8: (128, 128, 64, 8, 3), 9: (128, 256, 64, 8, 3), 10: (128, 128, 64, 8, 4)}
"""Compute capability, major -> queries, bank vectors and channels of a tile, warps, pipeline stages."""
REFINE_OPTIONS = {"num_warps": 4, "maxnreg": 128}
"""Without a bound of its own ptxas spills a few bytes of `refine_kernel` to fit one more block on a multiprocessor."""


def read_gemm_from(path: Path) -> dict[tuple[int, int], int]:
    """The table of a ``gemm_from.json``: compute capability -> queries * bank vectors; the file says what it is."""
    pairs = json.loads(path.read_text("utf-8"))["pairs"]
    return {(int(name.split(".")[0]), int(name.split(".")[1])): int(least) for name, least in pairs.items()}


GEMM_FROM = read_gemm_from(Path(__file__).with_name("gemm_from.json"))
"""Compute capability -> queries * bank vectors from which cuBLAS and a minimum over its product beat the fused kernel.

An architecture that is not listed always takes the fused kernel.
"""

_LAST = tl.constexpr(0x7FFFFFFF)
_PAD = 64  # channels of the float16 copies are padded to a multiple of this


@triton.jit
def prepare_kernel(
    x_ptr, centre_ptr, low_ptr, facts_ptr, dim, padded, x_n, x_d, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One vector: centred, scaled to [-1, 1], rounded to float16; reads it twice, writes 2 bytes a channel and 4 facts.

    facts: squared norm, norm of the rounded vector, norm of the rounding error, scale.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    largest = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, dim, BLOCK_D):
        d = first + channel
        x = tl.load(x_ptr + row * x_n + d.to(tl.int64) * x_d, mask=d < dim, other=0).to(tl.float64)
        c = tl.load(centre_ptr + d, mask=d < dim, other=0)
        largest = tl.maximum(largest, tl.abs(x - c))
    # The power of two above the largest magnitude, from the exponent of its float32.
    peak = tl.max(largest, axis=0).to(tl.float32)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    whole = tl.zeros((BLOCK_D,), tl.float64)
    kept = tl.zeros((BLOCK_D,), tl.float64)
    lost = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, padded, BLOCK_D):
        d = first + channel
        x = tl.load(x_ptr + row * x_n + d.to(tl.int64) * x_d, mask=d < dim, other=0).to(tl.float64)
        x -= tl.load(centre_ptr + d, mask=d < dim, other=0)
        low = (x / scale).to(tl.float32).to(tl.float16)
        tl.store(low_ptr + row * padded + d, low, mask=d < padded)
        rounded = low.to(tl.float64) * scale
        whole += x * x
        kept += rounded * rounded
        lost += (x - rounded) * (x - rounded)
    facts = facts_ptr + row * 4
    tl.store(facts, tl.sum(whole, axis=0))
    tl.store(facts + 1, tl.sqrt(tl.sum(kept, axis=0)))
    tl.store(facts + 2, tl.sqrt(tl.sum(lost, axis=0)))
    tl.store(facts + 3, scale)


@triton.jit
def _pack(distance, column):
    """Distances as integers in the same order, the column's place in its group in the low bits."""
    bits = distance.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered & -32) | (column & 31)


@triton.jit
def _two_least(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The least and second least of every 32 columns."""
    groups = tl.reshape(packed, (ROWS, COLS // 32, 32))
    least = tl.min(groups, axis=2)
    rest = tl.where(groups == least[:, :, None], 0x7FFFFFFF, groups)
    return least, tl.min(rest, axis=2)


@triton.jit
def propose_kernel(
    q_ptr, b_ptr, q_scale_ptr, b_scale_ptr, b_norm_ptr, least_ptr, second_ptr, n_query, n_bank, padded, n_groups,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """|b|^2 - 2 q.b of a tile on tensor cores, reduced to the two least of each group before it leaves registers.

    2 Q N D operations; reads Q and N rows of 2 D bytes a tile row and column, writes 8 / GROUP bytes a pair.
    """
    tiles_q = tl.cdiv(n_query, BLOCK_Q)
    tiles_n = tl.cdiv(n_bank, BLOCK_N)
    # Neighbouring programs share rows of the bank: SWIZZLE tiles of queries by all of the bank at a time.
    tile = tl.program_id(0)
    first_q = tile // (SWIZZLE * tiles_n) * SWIZZLE
    height = tl.minimum(tiles_q - first_q, SWIZZLE)
    within = tile % (SWIZZLE * tiles_n)
    row = (first_q + within % height) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tile_n = within // height
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    # A row beyond the last repeats it: loads need no mask, what they give is not stored.
    q = q_ptr + tl.minimum(row, n_query - 1).to(tl.int64)[:, None] * padded + channel[None, :]
    b = b_ptr + tl.minimum(col, n_bank - 1).to(tl.int64)[None, :] * padded + channel[:, None]
    product = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for _ in range(0, padded, BLOCK_D):
        product = tl.dot(tl.load(q), tl.load(b), product)
        q += BLOCK_D
        b += BLOCK_D
    q_scale = tl.load(q_scale_ptr + row, mask=row < n_query, other=0)
    b_scale = tl.load(b_scale_ptr + col, mask=col < n_bank, other=0)
    b_norm = tl.load(b_norm_ptr + col, mask=col < n_bank, other=0)
    distance = b_norm[None, :] - 2 * (product * (q_scale[:, None] * b_scale[None, :]))
    packed = tl.where((col < n_bank)[None, :], _pack(distance, col[None, :]), 0x7FFFFFFF)
    least, second = _two_least(packed, BLOCK_Q, BLOCK_N)
    group = tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    out = row.to(tl.int64)[:, None] * n_groups + group[None, :]
    mask = (row < n_query)[:, None] & (group < n_groups)[None, :]
    tl.store(least_ptr + out, least, mask=mask)
    tl.store(second_ptr + out, second, mask=mask)


@triton.jit
def reduce_product_kernel(
    product_ptr, q_scale_ptr, b_scale_ptr, b_norm_ptr, least_ptr, second_ptr, n_query, n_bank, n_groups,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same two least of each group from a product that cuBLAS left in memory: reads 4 bytes a pair."""
    # One axis for all tiles: the others end at 65,535 blocks, and neither queries nor bank need be fewer.
    tiles_n = tl.cdiv(n_bank, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    row = tl.program_id(0) // tiles_n * BLOCK_Q + tl.arange(0, BLOCK_Q)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < n_query)[:, None] & (col < n_bank)[None, :]
    product = tl.load(product_ptr + row.to(tl.int64)[:, None] * n_bank + col[None, :], mask=mask, other=0)
    q_scale = tl.load(q_scale_ptr + row, mask=row < n_query, other=0)
    b_scale = tl.load(b_scale_ptr + col, mask=col < n_bank, other=0)
    b_norm = tl.load(b_norm_ptr + col, mask=col < n_bank, other=0)
    distance = b_norm[None, :] - 2 * (product * (q_scale[:, None] * b_scale[None, :]))
    packed = tl.where((col < n_bank)[None, :], _pack(distance, col[None, :]), 0x7FFFFFFF)
    least, second = _two_least(packed, BLOCK_Q, BLOCK_N)
    group = tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    out = row.to(tl.int64)[:, None] * n_groups + group[None, :]
    mask = (row < n_query)[:, None] & (group < n_groups)[None, :]
    tl.store(least_ptr + out, least, mask=mask)
    tl.store(second_ptr + out, second, mask=mask)


@triton.jit
def _measure(q_ptr, b_ptr, rows, valid, dim, q_d, b_n, b_d, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Squared distances of one query to COUNT bank rows, in float64; infinite where not valid."""
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((COUNT,), tl.float64)
    for first in range(0, dim, BLOCK_D):
        d = first + channel
        q = tl.load(q_ptr + d.to(tl.int64) * q_d, mask=d < dim, other=0).to(tl.float64)
        b = tl.load(
            b_ptr + rows.to(tl.int64)[:, None] * b_n + (d.to(tl.int64) * b_d)[None, :],
            mask=valid[:, None] & (d < dim)[None, :], other=0,
        ).to(tl.float64)  # fmt: skip
        difference = tl.where((d < dim)[None, :], q[None, :] - b, 0.0)
        total += tl.sum(difference * difference, axis=1)
    return tl.where(valid, total, float("inf"))


@triton.jit
def _limit(worst, offset):
    """The packed distance above which nothing can be nearer than `worst`; the highest if that is unknown."""
    bound = (worst + offset).to(tl.float32)
    bits = bound.to(tl.int32, bitcast=True)
    # Next float up, so that rounding to float32 excludes nothing; then all places of its group.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 1
    limit = tl.where(tl.abs(bound) < float("inf"), ordered | 31, 0x7FFFFFFE)
    return tl.where(offset == offset, limit, -0x7FFFFFFF)  # a query that is not a number: no row is worth a look


@triton.jit
def refine_kernel(
    q_ptr, b_ptr, least_ptr, second_ptr, offset_ptr, distance_ptr, index_ptr, n_bank, dim, n_groups, k,
    q_n, q_d, b_n, b_d,
    LIST: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The exact neighbours of one query: what the bound cannot exclude is measured, nearest first, ties by index.

    Reads 8 bytes a group twice, and D values a row that qualifies (on PatchCore's features, a handful).
    """
    query = tl.program_id(0).to(tl.int64)
    q_ptr += query * q_n
    least_ptr += query * n_groups
    second_ptr += query * n_groups
    offset = tl.load(offset_ptr + query)  # bound on the error, less the query's squared norm
    lane = tl.arange(0, LANES)
    place = tl.arange(0, LIST)

    # Seeds: the k least of LANES strided minima. Any k rows bound the k-th distance from above.
    best = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    best_group = lane
    for first in range(0, n_groups, LANES):
        value = tl.load(least_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        best_group = tl.where(value < best, first + lane, best_group)
        best = tl.minimum(best, value)
    rows = tl.full((LIST,), -1, tl.int32)
    for j in range(k):
        least = tl.min(best, axis=0)
        winner = tl.min(tl.where(best == least, lane, LANES), axis=0)
        group = tl.max(tl.where(lane == winner, best_group, 0), axis=0)
        rows = tl.where((place == j) & (least < 0x7FFFFFFF), group * 32 + (least & 31), rows)
        best = tl.where(lane == winner, 0x7FFFFFFF, best)
    rows = tl.where(rows < n_bank, rows, -1)
    found = _measure(q_ptr, b_ptr, rows, rows >= 0, dim, q_d, b_n, b_d, LIST, BLOCK_D)
    # Places past k never count as the worst.
    found = tl.where(place < k, found, -1.0)
    worst = tl.max(found, axis=0)
    limit = _limit(worst, offset)

    member = tl.arange(0, 32)
    for first in range(0, n_groups, LANES):
        value = tl.load(least_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        second = tl.load(second_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        open_lanes = tl.where(value <= limit, 1, 0)
        while tl.max(open_lanes, axis=0) > 0:
            winner = tl.min(tl.where(open_lanes > 0, lane, LANES), axis=0)
            one = tl.max(tl.where(lane == winner, value & 31, 0), axis=0)
            whole = tl.max(tl.where((lane == winner) & (second <= limit), 1, 0), axis=0)
            candidates = (first + winner) * 32 + member
            valid = (candidates < n_bank) & ((member == one) | (member * 0 + whole > 0))
            known = tl.sum(tl.where(candidates[:, None] == rows[None, :], 1, 0), axis=1)
            valid = valid & (known == 0)
            distances = _measure(q_ptr, b_ptr, candidates, valid, dim, q_d, b_n, b_d, 32, BLOCK_D)
            # Each candidate that beats the worst of the list takes its place.
            near = tl.min(distances, axis=0)
            near_row = tl.min(tl.where(distances == near, candidates, 0x7FFFFFFF), axis=0)
            worst_row = tl.max(tl.where(found == worst, tl.where(rows < 0, 0x7FFFFFFF, rows), -1), axis=0)
            while (near < worst) | ((near == worst) & (near_row < worst_row) & (near < float("inf"))):
                out = tl.min(
                    tl.where((found == worst) & ((rows == worst_row) | (rows < 0)), place, LIST), axis=0
                )  # fmt: skip
                found = tl.where(place == out, near, found)
                rows = tl.where(place == out, near_row, rows)
                distances = tl.where(candidates == near_row, float("inf"), distances)
                worst = tl.max(found, axis=0)
                near = tl.min(distances, axis=0)
                near_row = tl.min(tl.where(distances == near, candidates, 0x7FFFFFFF), axis=0)
                worst_row = tl.max(tl.where(found == worst, tl.where(rows < 0, 0x7FFFFFFF, rows), -1), axis=0)
            limit = _limit(worst, offset)
            open_lanes = tl.where((lane > winner) & (value <= limit), 1, 0)

    found = tl.where(place < k, found, float("inf"))
    left = place < k
    for j in range(k):
        near = tl.min(tl.where(left, found, float("inf")), axis=0)
        near_row = tl.min(tl.where(left & (found == near), rows, 0x7FFFFFFF), axis=0)
        # NaN equals nothing: a query that is not a number gets distance NaN and no neighbour.
        number = near < float("inf")
        tl.store(distance_ptr + query * k + j, tl.where(number, tl.sqrt(near), float("nan")).to(tl.float32))
        tl.store(index_ptr + query * k + j, tl.where(number, near_row, -1).to(tl.int64))
        left = left & (rows != near_row)


class Index:
    """The bank with its float16 copy, norms and rounding errors: 2 bytes a value and 32 a vector on top of it.

    Parameters
    ----------
    bank : tensor, (N, D)
        Kept by reference.
    scratch_bytes : int
        Bound on what a search sets aside beyond its result (at least one block of queries is searched).

    Raises
    ------
    ValueError
        `bank` holds a non-finite value.
    """

    def __init__(self, bank: torch.Tensor, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self.bank = bank
        self.scratch_bytes = scratch_bytes
        self.size, self.dim = bank.shape
        self.padded = triton.cdiv(self.dim, _PAD) * _PAD
        self.centre = torch.zeros(self.dim, dtype=torch.float64, device=bank.device)
        for start, stop in chunks(self.size, 4096):  # no float64 copy of the bank
            self.centre += bank[start:stop].double().sum(0)
        self.centre /= self.size
        self.low, facts = self._prepare(bank)
        if not bool(torch.isfinite(facts).all()):  # a value that is not finite leaves its vector's square neither
            raise ValueError("bank: expected finite values (squares within float64's range)")
        self.norm, self.scale = facts[:, 0].float(), facts[:, 3].float()
        self.largest = facts.amax(0)
        self.n_groups = triton.cdiv(self.size, GROUP)
        # Beyond float32's range the approximation says nothing: search exhaustively.
        self.exhaustive = float(self.largest[0]) > 1e30
        self._part = 1 << 30

    def _prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.empty((len(x), self.padded), dtype=torch.float16, device=x.device)
        facts = torch.empty((len(x), 4), dtype=torch.float64, device=x.device)
        block_d = min(1024, triton.next_power_of_2(self.padded))
        prepare_kernel[(len(x),)](x, self.centre, low, facts, self.dim, self.padded, *x.stride(), BLOCK_D=block_d)
        return low, facts

    def search(self, query: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, D) -> distances (Q, k) float32, indices (Q, k) int64, nearest first, ties by lowest index.

        A query with a non-finite value gets distance NaN and index -1: raising would wait for the device.
        """
        distances = torch.empty((len(query), k), dtype=torch.float32, device=query.device)
        indices = torch.empty((len(query), k), dtype=torch.int64, device=query.device)
        if k > MAX_K or self.exhaustive:
            step, per_query = self._search_exhaustively, 32 * self.size
        else:
            step, per_query = self._search, 8 * self.n_groups + 2 * self.padded + 48
            if self.takes_gemm(len(query)):
                per_query += 4 * self.size

        def work(start: int, stop: int) -> None:
            step(query[start:stop], k, distances[start:stop], indices[start:stop])

        part = max(128 if step == self._search else 1, self.scratch_bytes // per_query)
        self._part = in_chunks(work, len(query), min(part, self._part), "queries")
        return distances, indices

    def takes_gemm(self, n_query: int) -> bool:
        """Whether the table of this device sends a search to cuBLAS and a minimum rather than to the fused kernel."""
        if self.bank.device.type != "cuda":
            return False
        capability = torch.cuda.get_device_capability(self.bank.device)
        return capability in GEMM_FROM and n_query * self.size >= GEMM_FROM[capability]

    def _search(
        self, query: torch.Tensor, k: int, distances: torch.Tensor, indices: torch.Tensor, gemm: bool | None = None
    ) -> None:
        low, facts = self._prepare(query)
        least = torch.empty((len(query), self.n_groups), dtype=torch.int32, device=query.device)
        second = torch.empty_like(least)
        scale = facts[:, 3].float()
        propose = self._propose_gemm if (self.takes_gemm(len(query)) if gemm is None else gemm) else self._propose
        propose(low, scale, least, second)
        offset = self._error_bound(facts) - facts[:, 0]
        list_size = max(2, triton.next_power_of_2(k))
        groups_block = min(256, max(32, triton.next_power_of_2(self.n_groups)))
        refine_kernel[(len(query),)](
            query, self.bank, least, second, offset, distances, indices, self.size, self.dim, self.n_groups, k,
            *query.stride(), *self.bank.stride(),
            LIST=list_size, LANES=groups_block, BLOCK_D=refine_block(list_size, self.bank.dtype),
            **REFINE_OPTIONS,
        )  # fmt: skip

    def _propose(self, low: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, second: torch.Tensor) -> None:
        block_q, block_n, block_d, warps, stages = tile_of(low.device)
        grid = (triton.cdiv(len(low), block_q) * triton.cdiv(self.size, block_n),)
        propose_kernel[grid](
            low, self.low, scale, self.scale, self.norm, least, second, len(low), self.size, self.padded, self.n_groups,
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d, SWIZZLE=8, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _propose_gemm(self, low: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, second: torch.Tensor) -> None:
        if low.is_cuda:
            product = torch.mm(low, self.low.T, out_dtype=torch.float32)
        else:
            product = low.float() @ self.low.float().T
        block_q, block_n = 16, 256
        reduce_product_kernel[(triton.cdiv(len(low), block_q) * triton.cdiv(self.size, block_n),)](
            product, scale, self.scale, self.norm, least, second, len(low), self.size, self.n_groups,
            BLOCK_Q=block_q, BLOCK_N=block_n,
        )  # fmt: skip

    def _error_bound(self, facts: torch.Tensor) -> torch.Tensor:
        """How far the approximate |b|^2 - 2 q.b of a query can be from the true one, for any bank vector."""
        norm, rounded, lost = facts[:, 0].sqrt(), facts[:, 1], facts[:, 2]
        largest = self.largest[0].sqrt()
        rounding = 2 * (lost * self.largest[1] + norm * self.largest[2])
        magnitude = largest**2 + 2 * torch.maximum(norm, rounded) * largest
        # float32 sums of the tensor cores (which truncate), the arithmetic after them, the bits that carry the place
        return rounding + (self.padded * 2.0**-22 + 2.0**-17) * magnitude

    def _search_exhaustively(self, query: torch.Tensor, k: int, distances: torch.Tensor, indices: torch.Tensor) -> None:
        """Every distance in float64 by differences, a block of the bank at a time, and a stable sort."""
        rows = query.double()
        squared = torch.empty((len(query), self.size), dtype=torch.float64, device=query.device)
        block = max(1, self.scratch_bytes // (8 * self.dim * max(1, len(query))))
        for start, stop in chunks(self.size, block):
            bank = self.bank[start:stop].double()
            squared[:, start:stop] = (rows[:, None, :] - bank[None]).square_().sum(2)
        ordered, order = squared.sort(dim=1, stable=True)
        number = torch.isfinite(rows).all(1)[:, None]
        distances.copy_(ordered[:, :k].sqrt().masked_fill(~number, float("nan")))
        indices.copy_(order[:, :k].masked_fill(~number, -1))


def refine_block(list_size: int, dtype: torch.dtype) -> int:
    """Channels that `refine_kernel` reads at a time: as many as stay in registers beside a list of `list_size`."""
    if list_size > 32:
        return 16 if dtype == torch.float64 else 32
    return 32 if dtype == torch.float64 else 64


def tile_of(device: torch.device) -> tuple[int, int, int, int, int]:
    """Tile of `propose_kernel` on `device`: queries, bank vectors, channels, warps, stages."""
    if device.type != "cuda":
        return 32, 64, 64, 4, 1
    major = torch.cuda.get_device_capability(device)[0]
    return TILES[min(max(major, min(TILES)), max(TILES))]
