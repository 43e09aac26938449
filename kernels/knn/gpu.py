"""Exact nearest neighbours in Triton and CUDA: float16 tensor cores propose, float64 differences decide.

1. Every vector is centred near the bank's mean (distances do not change, norms shrink), scaled by a power of two and
   rounded to float16; the norm of what rounding lost is kept.
2. A matrix product on tensor cores gives approximate squared distances. Of every group of 32 bank vectors only the
   least and the second least survive, in registers: the (Q, N) matrix never exists.
3. By Cauchy and Schwarz, |q.b - q'.b'| <= |q - q'| |b'| + |q| |b - b'|: no approximation is off by more than a bound
   known for each query. Whatever the bound cannot exclude is measured by direct differences in float64: one row of a
   group, or all of it where its second best qualifies too. The result is exact whatever the data; hard data costs time.

float16 carries three more bits than bfloat16 at the same rate, which leaves fewer rows to measure.

Triton has a kernel for each step (`gpu_kernels`). Where CuPy can compile CUDA C++, ``refine.cu`` has the same result
sooner, and on compute capability 9.0 ``propose.cu`` makes the proposals of a small search (`hopper`): the three least
of a group where several neighbours are asked for, so that a group is rarely measured as a whole.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..gpu_common import FUSED, cuda
from ..gpu_common.capability import processors, triton_unavailable
from ..gpu_common.graphs import Graphs
from ..gpu_common.layout import dense
from ..gpu_common.memory import chunks, in_chunks
from ..gpu_common.units import blocks, power_of_two, unit_of
from . import hopper
from .gpu_kernels import (
    BLOCK,
    GROUP,
    prepare_kernel,
    propose_kernel,
    propose_persistent_kernel,
    reduce_product_kernel,
    refine_kernel,
)

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

__all__ = ["ARRAYS", "Index", "unavailable"]

ARRAYS = "torch"
MAX_K = 64
"""Neighbours up to which a kernel keeps the list of a query; more are searched exhaustively."""
SCRATCH_BYTES = 256 << 20
"""Default bound on the scratch of a search."""
REFINE_THREADS = 128
"""Threads of a block of ``refine.cu``, which has one query; a warp measures a row by itself."""
REFINE_SHARED = 16 << 10
"""Bytes of shared memory that such a block takes beside the query."""
GRAPHS = 4
"""CUDA graphs that an index keeps, each for searches of one number of queries and neighbours."""
GRAPH_BYTES = 16 << 20
"""Device memory that a search with a graph may need, queries and result included: the graph holds it as long as it is
kept. With a thousand channels, a search that needs more takes longer than its launches, and gains nothing by a graph.
"""
TILES = {8: (128, 128, 64, 8, 3), 9: (128, 256, 64, 8, 3), 10: (128, 128, 64, 8, 4)}
"""Compute capability, major -> queries, bank vectors and channels of a tile, warps, pipeline stages.

All others take that of 8, which fits the 99 KiB of shared memory that a block has on 8.6, 8.9 and 12.
"""
HOPPER_UNTIL = 2048
"""Queries from which Triton's kernel proposes on compute capability 9.0, too: its larger tiles take less power, which
is what bounds large searches (``knn-crossover`` in benchmarks/results/gpu.json has the times).
"""
MANY_QUERIES = 4096
"""Queries from which `refine_kernel` has one warp for each instead of four: they fill the device, and never wait for
each other.
"""
REFINE_REGISTERS = 128
"""Without a bound of its own ptxas spills a few bytes of `refine_kernel` to fit one more block on a multiprocessor."""


def unavailable(device: str) -> str | None:
    """Why the search cannot serve tensors on `device`; None if it can, with CuPy or without.

    CuPy is tried here because a search, which may be the first, may be captured in a CUDA graph.
    """
    reason = triton_unavailable(device)
    if reason is None:
        cuda.unavailable(device)
    return reason


def read_gemm_from(path: Path) -> dict[tuple[int, int], int]:
    """The table of a ``gemm_from.json``: compute capability -> queries * bank vectors; the file says what it is."""
    pairs = json.loads(path.read_text("utf-8"))["pairs"]
    return {(int(name.split(".")[0]), int(name.split(".")[1])): int(least) for name, least in pairs.items()}


GEMM_FROM = read_gemm_from(Path(__file__).with_name("gemm_from.json"))
"""Compute capability -> queries * bank vectors from which cuBLAS and a minimum over its product beat the fused kernel.

An architecture that is not listed always takes the fused kernel.
"""

_PAD = 64  # channels of the float16 copies are padded to a multiple of this


class Index:
    """The bank with its float16 copy, norms and rounding errors: 2 bytes a value and 4 a vector on top of it.

    Parameters
    ----------
    bank : tensor, (N, D)
        Kept by reference.
    scratch_bytes : int
        Bound on what a search sets aside beyond its result (at least one block of queries is searched).

    Attributes
    ----------
    in_graphs : bool
        Whether a CUDA graph of the caller's reads it: nobody says when the last replay is over.

    Raises
    ------
    ValueError
        `bank` holds a non-finite value.
    """

    def __init__(self, bank: torch.Tensor, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self.bank = bank
        self.scratch_bytes = scratch_bytes
        self.in_graphs = False
        self._hopper = hopper.usable(bank.device)  # tried here, where no CUDA graph is being captured
        self._streams: set[int] = set()  # that its memory is known to be read on
        self.size, self.dim = bank.shape
        self.padded = blocks(self.dim, _PAD) * _PAD
        total = torch.zeros(self.dim, dtype=torch.float64, device=bank.device)
        for start, stop in chunks(self.size, 4096):  # no float64 copy of the bank
            total += bank[start:stop].double().sum(0)
        # Any centre will do, if it is that of bank and queries to the bit.
        self.centre = (total / self.size).clamp_(-1e30, 1e30).float()
        peak = torch.zeros((), dtype=torch.float64, device=bank.device)
        for start, stop in chunks(self.size, 4096):
            peak = torch.maximum(peak, (bank[start:stop].double() - self.centre.double()).abs().amax())
        exponent = math.frexp(float(peak))[1]  # of the power of two above the largest magnitude
        self.exponent = min(max(exponent, -100), 100)
        self.low, facts = self._prepare(bank)
        if not bool(torch.isfinite(facts[:, 0]).all()):  # one such value spoils its vector's square
            raise ValueError("bank: expected finite values (squares within float64's range)")
        self.norm = (facts[:, 0] / 4.0**self.exponent).float()
        self.largest = facts.amax(0)
        self.n_groups = blocks(self.size, BLOCK) * (BLOCK // GROUP)
        # Beyond float32's range the approximation says nothing: search exhaustively.
        self.exhaustive = float(self.largest[0]) > 1e30
        self._part = 1 << 30
        self._described = None  # the descriptor of `low` for the tiles used last
        self._graphs = Graphs("KnnIndex.search", GRAPHS)
        self.record_stream()

    def record_stream(self) -> None:
        """Tell torch that the current stream reads the index: its memory is not reused before that stream is done."""
        if not self.bank.is_cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            self.in_graphs = True
            return
        stream = torch.cuda.current_stream(self.bank.device)
        if stream.cuda_stream not in self._streams:  # the allocator remembers it for as long as the tensors live
            for x in (self.bank, self.low, self.centre, self.norm, self.largest):
                x.record_stream(stream)
            self._streams.add(stream.cuda_stream)

    def _prepare(self, x: torch.Tensor, largest: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """float16 copy and facts of the bank; of queries, where the `largest` facts of the bank are given."""
        n, device = x.shape[0], x.device
        rows = n if largest is not None else blocks(n, BLOCK) * BLOCK  # `hopper.propose` reads whole blocks of a bank
        low = torch.empty((rows, self.padded), dtype=torch.float16, device=device)
        low[n:] = 0
        low = low[:n]
        facts = torch.empty((n, 4), dtype=torch.float64, device=device)
        block_d = min(1024, power_of_two(self.padded))
        x_n, x_d = _strides(x)
        unit = unit_of(self.dim, x_n)
        prepare_kernel[(n,)](
            x, self.centre, low, facts, facts if largest is None else largest, self.exponent,
            self.dim // unit, self.padded, x_n // unit, x_d,
            UNIT=unit, QUERY=largest is not None, BLOCK_D=block_d, WHOLE=self.padded <= block_d,
            num_warps=prepare_warps(x.dtype), **FUSED,
        )  # fmt: skip
        return low, facts

    def search(self, query: torch.Tensor, k: int, squared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, D) -> distances (Q, k) float32, indices (Q, k) int64, nearest first, ties by lowest index.

        Distances are Euclidean, or their squares, infinite beyond float32. A query with a non-finite value, or with
        squared distances beyond float64's range, gets distance NaN and index -1: raising would wait for the device.

        A small search replays a CUDA graph where it comes again (`gpu_common.graphs`).
        """
        self.record_stream()
        if not self._has_graph(query, k):
            return self._launch(query, k, squared)
        query = dense(query)
        if torch.cuda.is_current_stream_capturing():
            return self._launch(query, k, squared)
        work = functools.partial(self._launch, k=k, squared=squared)
        distances, indices = self._graphs.run((k, squared), work, (query,))
        return distances, indices

    def warmup(self, query: torch.Tensor, k: int, squared: bool = False) -> bool:
        """Capture the graph of such a search; False where it has none."""
        self.record_stream()
        work = functools.partial(self._launch, k=k, squared=squared)
        return self._has_graph(query, k) and self._graphs.capture((k, squared), work, (dense(query),))

    def _has_graph(self, query: torch.Tensor, k: int) -> bool:
        n = query.shape[0]
        if not query.is_cuda or k > MAX_K or self.exhaustive or self.takes_gemm(n):  # cuBLAS has scratch of its own
            return False
        moved = query.element_size() * self.dim + 12 * k
        return n * (self._scratch_per_query(n) + moved) <= min(GRAPH_BYTES, self.scratch_bytes)

    def _scratch_per_query(self, n_query: int) -> int:
        least = 12 if self._hopper else 8  # a part has few enough queries for it, though the search may not
        return least * self.n_groups + 2 * self.padded + 32 + (4 * self.size if self.takes_gemm(n_query) else 0)

    def _scratch_exhaustively(self) -> int:
        return 32 * self.size + 24 * self.dim  # a query's, with as many differences as that leaves room for

    def _launch(self, query: torch.Tensor, k: int, squared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if k > MAX_K or self.exhaustive:
            step = functools.partial(self._search_exhaustively, squared=squared)
            return self._in_parts(step, query, k, 1, self._scratch_exhaustively())
        step = functools.partial(self._search, squared=squared)
        return self._in_parts(step, query, k, 128, self._scratch_per_query(query.shape[0]))

    def _in_parts(
        self, step: Callable[..., None], query: torch.Tensor, k: int, least: int, per_query: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``step(query, k, distances, indices)`` of as many queries at a time as memory has room for, but `least`."""
        n = query.shape[0]
        distances = torch.empty((n, k), dtype=torch.float32, device=query.device)
        indices = torch.empty((n, k), dtype=torch.int64, device=query.device)

        def work(start: int, stop: int) -> None:
            step(query[start:stop], k, distances[start:stop], indices[start:stop])

        part = min(max(least, self.scratch_bytes // per_query), self._part)
        fitted = in_chunks(work, n, part, "queries")
        if fitted < part:
            self._part = fitted
        return distances, indices

    def takes_gemm(self, n_query: int) -> bool:
        """Whether the table of this device sends a search to cuBLAS and a minimum rather than to the fused kernel."""
        if not GEMM_FROM or self.bank.device.type != "cuda":
            return False
        # Where sums in float16 are allowed, torch refuses a float32 product of float16; their error has no bound here.
        # Nor has that of what autocast makes of a product.
        if torch.backends.cuda.matmul.allow_fp16_accumulation or torch.is_autocast_enabled("cuda"):
            return False
        capability = torch.cuda.get_device_capability(self.bank.device)
        return capability in GEMM_FROM and n_query * self.size >= GEMM_FROM[capability]

    def _search(
        self,
        query: torch.Tensor,
        k: int,
        distances: torch.Tensor,
        indices: torch.Tensor,
        propose: Callable[..., None] | None = None,
        squared: bool = False,
    ) -> None:
        low, facts = self._prepare(query, self.largest)
        propose = self._way_to_propose(len(query)) if propose is None else propose
        kept = 3 if propose == self._propose_hopper and k > 1 else 2  # two of several neighbours may be in one group
        size = (len(query), self.n_groups)
        groups = [torch.empty(size, dtype=torch.int32, device=query.device) for _ in range(kept)]
        propose(low, facts, *groups)
        refine = self._refine_cuda if self._fits_cuda() else self._refine_triton
        refine(query, k, (low, facts, *groups), distances, indices, squared)

    def _fits_cuda(self) -> bool:
        """Whether ``refine.cu`` runs on the device and can keep a query in shared memory."""
        device = self.bank.device
        if cuda.unavailable(device.type) is not None:
            return False
        return self._query_bytes() <= cuda.shared_memory_limit(device) - REFINE_SHARED

    def _query_bytes(self) -> int:
        """Shared memory for a query in float64, filled up as ``refine.cu`` says, and for it in another type."""
        return (8 + self.bank.element_size()) * blocks(self.dim, 512) * 512

    def _refine_cuda(
        self,
        query: torch.Tensor,
        k: int,
        proposed: tuple[torch.Tensor, ...],
        distances: torch.Tensor,
        indices: torch.Tensor,
        squared: bool = False,
    ) -> None:
        low, facts, least, second, *third = proposed
        (q_n, q_d), (b_n, b_d) = _strides(query), _strides(self.bank)
        size = self.bank.element_size()

        def vectorized(x: torch.Tensor, step: int, stride: int) -> bool:
            return stride == 1 and not any(n % 16 for n in (x.data_ptr(), step * size, self.dim * size))

        wide = vectorized(self.bank, b_n, b_d)
        same = wide and query.dtype == self.bank.dtype and vectorized(query, q_n, q_d)
        kind = len(_KINDS) if same else _KINDS.index(query.dtype)
        cuda.launch(
            self.bank.device, "knn/refine.cu", "refine", len(query), REFINE_THREADS,
            _span(query), _span(self.bank), low, self.low, self.norm, least, second, *(third or (None,)), facts,
            distances, indices,
            *(np.int32(x) for x in (kind, self.size, self.dim, self.padded, self.n_groups, k, squared)),
            *(np.int64(x) for x in (q_n, q_d, b_n, b_d)),
            shared_bytes=self._query_bytes(), prelude=refine_prelude(self.bank.dtype, wide),
        )  # fmt: skip

    def _refine_triton(
        self,
        query: torch.Tensor,
        k: int,
        proposed: tuple[torch.Tensor, ...],
        distances: torch.Tensor,
        indices: torch.Tensor,
        squared: bool = False,
    ) -> None:
        _, facts, least, second, *_ = proposed
        list_size = max(2, power_of_two(k))
        warps = refine_warps(len(query), list_size)
        (q_n, q_d), (b_n, b_d) = _strides(query), _strides(self.bank)
        unit = unit_of(self.dim, q_n, b_n)
        refine_kernel[(len(query),)](
            query, self.bank, least, second, facts, distances, indices, self.size, self.dim // unit, self.n_groups, k,
            q_n // unit, q_d, b_n // unit, b_d, UNIT=unit, LIST=list_size, SQUARED=squared,
            **refine_blocks(list_size, self.n_groups, self.dim, self.bank.dtype, warps),
            num_warps=warps, maxnreg=REFINE_REGISTERS, **FUSED,
        )  # fmt: skip

    def _way_to_propose(self, n_query: int) -> Callable[..., None]:
        if self.takes_gemm(n_query):
            return self._propose_gemm
        if self._hopper and n_query < HOPPER_UNTIL:
            return self._propose_hopper
        return self._propose

    def _propose_hopper(
        self,
        low: torch.Tensor,
        facts: torch.Tensor,
        least: torch.Tensor,
        second: torch.Tensor,
        third: torch.Tensor | None = None,
    ) -> None:
        hopper.propose(low, self.low, facts, self.norm, least, second, third)

    def _propose(
        self,
        low: torch.Tensor,
        facts: torch.Tensor,
        least: torch.Tensor,
        second: torch.Tensor,
        tile: tuple[int, int, int, int, int] | None = None,
    ) -> None:
        block_q, block_n, block_d, warps, stages = tile_of(low.device) if tile is None else tile
        n = low.shape[0]
        tiles = blocks(n, block_q) * blocks(self.size, block_n)
        blocking = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "BLOCK_D": block_d, "SWIZZLE": 8, **FUSED}
        rest = (facts, self.norm, least, second, n, self.size, self.padded, self.n_groups)
        if has_descriptors(low.device):
            q = TensorDescriptor.from_tensor(low, [block_q, block_d])
            b = self._described
            if b is None or b.block_shape != [block_n, block_d]:
                b = self._described = TensorDescriptor.from_tensor(self.low, [block_n, block_d])
            programs = processors(low.device)  # one each: its tile fills a multiprocessor
            propose_persistent_kernel[(min(programs, tiles),)](
                q, b, *rest, **blocking, PROGRAMS=programs, num_warps=warps, num_stages=stages
            )
        else:
            propose_kernel[(tiles,)](low, self.low, *rest, **blocking, num_warps=warps, num_stages=stages)

    def _propose_gemm(self, low: torch.Tensor, facts: torch.Tensor, least: torch.Tensor, second: torch.Tensor) -> None:
        if low.is_cuda:
            product = torch.mm(low, self.low.T, out_dtype=torch.float32)
        else:
            product = low.float() @ self.low.float().T
        block_q, block_n = 16, 256
        reduce_product_kernel[(blocks(len(low), block_q) * blocks(self.size, block_n),)](
            product, facts, self.norm, least, second, len(low), self.size, self.n_groups,
            BLOCK_Q=block_q, BLOCK_N=block_n, **FUSED,
        )  # fmt: skip

    def _search_exhaustively(
        self, query: torch.Tensor, k: int, distances: torch.Tensor, indices: torch.Tensor, squared: bool
    ) -> None:
        """Every distance in float64 by differences, a block of the bank at a time, and a stable sort.

        Blocks are of one size, the last overlaps the one before: torch chooses the order of a sum by it, and copies of
        a row must tie.
        """
        rows = query.double()
        squares = torch.empty((len(query), self.size), dtype=torch.float64, device=query.device)
        room = max(self.scratch_bytes, self._scratch_exhaustively() * len(query)) - rows.nbytes - squares.nbytes
        # A row of the bank, its differences from all queries, and their sums.
        block = min(self.size, max(1, room // (8 * (self.dim + len(query) * (self.dim + 1)))))
        for start, stop in chunks(self.size, block):
            start = stop - block if stop == self.size else start
            bank = self.bank[start:stop].double()
            squares[:, start:stop] = (rows[:, None, :] - bank[None]).square_().sum(2)
        ordered, order = squares.sort(dim=1, stable=True)
        number = torch.isfinite(ordered[:, :k])
        nearest = ordered[:, :k] if squared else ordered[:, :k].sqrt()
        distances.copy_(nearest.masked_fill(~number, float("nan")))
        indices.copy_(order[:, :k].masked_fill(~number, -1))


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a matrix. A single row counts as contiguous: its first stride has no meaning."""
    return (x.shape[1] if len(x) == 1 else x.stride(0)), x.stride(1)


_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # numbered as in refine.cu
_REFINED = {  # the type in refine.cu, its numbers in 16 bytes, blocks that share a multiprocessor
    torch.float16: ("F16", 8, 7),
    torch.bfloat16: ("BF16", 8, 7),
    torch.float32: ("F32", 4, 7),
    torch.float64: ("F64", 2, 5),
}
_REFINED_SINGLE = (1, 5)  # where rows cannot be read 16 bytes at a time


def refine_prelude(dtype: torch.dtype, vectorized: bool) -> str:
    """What ``refine.cu`` needs defined for a bank of `dtype`, whose rows are read 16 bytes at a time (`vectorized`) or
    number by number: each is a kernel of its own, which is compiled when it is first used.
    """
    kind, *rest = _REFINED[dtype]
    width, most_blocks = rest if vectorized else _REFINED_SINGLE
    return f"#define TYPE {kind}\n#define WIDTH {width}\n#define BLOCKS {most_blocks}\n"


def _span(x: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a matrix, whose strides say what is where."""
    if x.is_contiguous():
        return x
    return x.as_strided((1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)),), (1,))


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether tiles are copied by hardware from a tensor's description: from compute capability 9 on."""
    if TensorDescriptor is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def prepare_warps(dtype: torch.dtype) -> int:
    """Warps that `prepare_kernel` has for each vector: of float64, one would not have registers enough."""
    return 4 if dtype == torch.float64 else 1


def refine_warps(n_query: int, list_size: int) -> int:
    """Warps that `refine_kernel` has for each query."""
    return 1 if n_query >= MANY_QUERIES and list_size <= 16 else 4  # a longer list leaves too few registers to one


def refine_blocks(list_size: int, n_groups: int, dim: int, dtype: torch.dtype, warps: int) -> dict[str, int]:
    """Block sizes of `refine_kernel`: groups that it looks at at once; channels that it reads at once of a list, of a
    group and of one row, as many as registers hold; and how many such reads are in flight (measured on an H200).
    """
    elements = (128 if dtype == torch.float64 else 256) * warps
    most = power_of_two(dim)
    return {
        "LANES": min(128 if warps == 1 else 256, max(32, power_of_two(n_groups))),
        "BLOCK_L": min(most, elements // list_size),
        "BLOCK_G": min(most, elements // GROUP),
        "BLOCK_1": min(most, 128 * warps),
        "AT_ONCE": 2 if warps == 4 and list_size == 2 else 4,
    }


@functools.cache
def tile_of(device: torch.device) -> tuple[int, int, int, int, int]:
    """Tile of `propose_kernel` on `device`: queries, bank vectors, channels, warps, stages."""
    if device.type != "cuda":
        return 32, 128, 64, 4, 1
    return TILES.get(torch.cuda.get_device_capability(device)[0], TILES[8])
