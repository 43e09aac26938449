"""A large nearest-neighbour search in parts: while proposals are made for one, the part before is measured.

Proposals are bound by tensor cores, measures by memory. A persistent program of `propose_persistent_kernel` takes a
multiprocessor for itself, unless its threads are held to `REGISTERS`: then the registers of one block of ``refine.cu``
are left, and of two memory for far more. Proposals have a stream beside the caller's, whose blocks come first, so that
measures take what room there is, and all of a multiprocessor that has no tile left.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ..gpu_common.memory import chunks
from ..gpu_common.streams import Beside
from ..gpu_common.units import blocks

if TYPE_CHECKING:
    from .gpu import Index

PARTS: dict[tuple[int, int], int] = {}
"""Compute capability -> queries of a part at least. An architecture that is not listed searches in one part; none is,
for none has been measured yet (``knn-pipelined`` of ``python -m benchmarks.gpu`` does so).
"""
REGISTERS = 224
"""Of a thread of the proposals: of 65,536, those of eight warps leave four warps 64 each. Triton 3.6 needs no more."""
BLOCKS = 8
"""Blocks of ``refine.cu`` that share a multiprocessor where no proposals run: with these its threads have 64."""
TILE = 128
"""Queries of a tile of the proposals: parts are multiples of it."""


def part_of(device: torch.device, n_query: int) -> int | None:
    """Queries of a part, all parts as equal as tiles allow; None where the search is not pipelined."""
    least = PARTS.get(torch.cuda.get_device_capability(device)) if PARTS and device.type == "cuda" else None
    if least is None or n_query < 2 * least:
        return None
    return blocks(blocks(n_query, n_query // least), TILE) * TILE


def search(
    index: Index, query: torch.Tensor, k: int, distances: torch.Tensor, indices: torch.Tensor, part: int
) -> None:
    """The neighbours of (Q, D) into (Q, k), `part` queries at a time; scratch is that of a search in one."""
    proposed, ready = [], []
    with Beside(query.device) as beside:
        for start, stop in chunks(len(query), part):
            low, facts = index._prepare(query[start:stop], index.largest)
            least, second = index._groups(stop - start, 2)
            proposed.append((low, facts, least, second))
            launch = functools.partial(index._propose, low, facts, least, second, registers=REGISTERS)
            ready.append(beside.launch(launch))
        for i, (start, stop) in enumerate(chunks(len(query), part)):
            beside.wait_for(ready[i])
            found = distances[start:stop], indices[start:stop]
            index._refine_cuda(query[start:stop], k, proposed[i], *found, beside=True)
