"""The proposals of the nearest-neighbour search on compute capability 9.0: launches ``propose.cu``."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..dispatch import warn_once
from ..gpu_common import cuda, driver
from ..gpu_common.capability import not_while_capturing, processors, reason_of
from ..gpu_common.units import blocks
from .gpu_kernels import GROUP

BANK = 128
"""Bank vectors of a tile."""
QUERIES = (56, 88, 104, 120, 136)
"""Queries of a tile, multiples of 8: each is a kernel of its own, which takes a second to compile once."""
THREADS = 384
OPTIONS = ("-arch=sm_90a",)
"""The compiler's: instructions that no other architecture has are in no other's name."""


def usable(device: torch.device) -> bool:
    """Whether the kernel can serve tensors on `device`; where it should and cannot, a warning says why."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    with torch.cuda.device(device):
        if cuda.unavailable("cuda"):
            return False
        reason = _probe(torch.cuda.current_device())
    if reason is not None:
        warn_once(f"knn: {reason}; Triton proposes, which takes a little longer")
    return reason is None


def propose(
    low: torch.Tensor,
    bank_low: torch.Tensor,
    facts: torch.Tensor,
    norm: torch.Tensor,
    least: torch.Tensor,
    second: torch.Tensor,
    third: torch.Tensor | None = None,
) -> None:
    """Write the two least of each group, (Q, n_groups) each, as `gpu_kernels.propose_kernel` does; or the three least.

    `bank_low` lies in memory of a multiple of 128 rows, zeros past its end.
    """
    (n_query, padded), n_bank, n_groups = low.shape, len(bank_low), least.shape[1]
    queries, kept = queries_of(n_query), 2 if third is None else 3
    tiles = blocks(n_query, queries) * blocks(n_bank, BANK)
    cuda.launch(
        low.device, "knn/propose.cu", "propose", min(processors(low.device), tiles), THREADS,
        query_boxes(low, queries), bank_boxes(bank_low), facts, norm, least, second, third,
        *(np.int32(i) for i in (n_query, n_bank, padded, n_groups)),
        shared_bytes=shared_bytes(queries, kept), prelude=prelude(queries, kept), options=OPTIONS,
    )  # fmt: skip


def queries_of(n_query: int) -> int:
    """Queries of a tile where there are so many: little of the last tile is empty."""
    balanced = blocks(n_query, blocks(n_query, QUERIES[-1]))
    return next(queries for queries in QUERIES if queries >= balanced)


def shared_bytes(queries: int, kept: int) -> int:
    """Dynamic shared memory of a block, for its stages; the rest of 227 KiB is the kernel's own."""
    return 226 * 1024 - (24 + 32 * kept) * queries


@functools.cache
def prelude(queries: int, kept: int) -> str:
    """What ``propose.cu`` needs defined to keep the `kept` least of a group: the product's text names its registers."""
    count = queries // 2
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    registers = ", ".join(f"%{i}" for i in range(count))
    product = (
        f"{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0; wgmma.mma_async.sync.aligned.m64n{queries}k16"
        f".f32.f16.f16 {{{registers}}}, %{count}, %{count + 1}, add, 1, 1, 0, 0; }}"
    )
    sizes = f"#define QUERIES {queries}\n#define KEPT {kept}\n#define SHARED_BYTES {shared_bytes(queries, kept)}\n"
    return f'{sizes}#define PRODUCT "{product}"\n#define SUMS {sums}\n'


def query_boxes(low: torch.Tensor, queries: int) -> np.ndarray:
    """Boxes of `queries` rows by 64 channels."""
    n, padded = low.shape
    return driver.tensor_map(low, (padded, n), (2 * padded,), (64, queries))


def bank_boxes(low: torch.Tensor) -> np.ndarray:
    """Boxes of `BANK` rows by 64 channels, in the order of groups.

    A row's number counts, from its last bit: two of a pair, four groups, eight pairs, blocks of 64. In a box the pairs
    of a group lie together, 16 rows for a warp.
    """
    n, padded = low.shape
    row = 2 * padded
    shape = (padded, 2, 8, 4, 2 * blocks(n, 128))
    return driver.tensor_map(low, shape, (row, 8 * row, 2 * row, 64 * row), (64, 2, 8, 4, BANK // 64))


@functools.cache
def _probe(device: int) -> str | None:
    """Why the kernel does not run on the current device, number `device` (the key of the cache); None if it does.

    Both are tried, of two and of three rows of a group: a search, which may be captured, has no time to.
    """
    not_while_capturing()
    try:
        return wrong_of(torch.zeros((BANK, 64), dtype=torch.float16, device="cuda"))
    except Exception as error:  # whatever NVRTC, the driver or CuPy has to say
        return reason_of(error, "CuPy")


def wrong_of(low: torch.Tensor) -> str | None:
    """What is wrong with proposals among `BANK` rows of zeros; None: nothing."""
    facts = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64, device=low.device)
    norm = torch.ones(BANK, dtype=torch.float32, device=low.device)  # whatever torch's default is
    one, groups = 0x3F800000, BANK // GROUP  # the bits of 1.0, each distance; in the low ones the places 0, 1 and 2
    for kept in (2, 3):
        found = torch.zeros((kept, 1, groups), dtype=torch.int32, device=low.device)
        propose(low[:1], low, facts, norm, *found)
        if found.tolist() != [[[one + place] * groups] for place in range(kept)]:
            return f"propose.cu ran here with a wrong result, {kept} rows of a group"
    return None
