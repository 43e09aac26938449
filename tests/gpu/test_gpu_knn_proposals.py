"""The ways to propose candidates of the nearest-neighbour search give the same, by themselves and by parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from . import emulator
from .test_gpu_knn import rows_of


class Proposing:
    """A search up to its proposals, of whole numbers, the bank's of mean 0: float16 copies, sums in any order and
    distances are exact, so that every way to propose has the same bits.
    """

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int], device: torch.device) -> None:
        from ttt4as_fast.kernels.knn import gpu

        n_query, n_bank, dim = shape
        query = torch.from_numpy(rng.integers(-3, 4, (n_query, dim)).astype(np.float32))
        half = torch.from_numpy(rng.integers(-3, 4, (n_bank // 2, dim)).astype(np.float32))
        bank = torch.cat((half, -half, torch.zeros(n_bank % 2, dim)))
        self.index = gpu.Index(bank.to(device))
        self.low, self.facts = self.index._prepare(query.to(device), self.index.largest)

    def run(self, propose: Callable[..., None], kept: int = 2, **options: object) -> torch.Tensor:
        """The `kept` least of each group, in order."""
        size = (kept, len(self.low), self.index.n_groups)
        found = torch.full(size, -7, dtype=torch.int32, device=self.low.device)
        propose(self.low, self.facts, *found, **options)
        return found

    def third(self) -> torch.Tensor:
        """The third least of each group."""
        ratio, own = self.facts.float()[:, :2, None].unbind(1)
        product = self.low.double() @ self.index.low.double().T
        distance = (self.index.norm * ratio + own) - product.float()
        row = rows_of(torch.arange(self.index.n_groups)[:, None], torch.arange(32)).to(distance.device)
        padded = torch.nn.functional.pad(distance, (0, row.numel() - distance.shape[1]), value=float("inf"))
        packed = (padded[:, row].view(torch.int32) & ~31) | torch.arange(32, device=row.device, dtype=torch.int32)
        return packed.sort(2).values[..., 2]


@pytest.mark.parametrize("k", [1, 3])
def test_product_in_memory_gives_the_same(device, rng, k):
    from ttt4as_fast.kernels.knn import gpu

    query = torch.from_numpy(rng.standard_normal((5, 12)).astype(np.float32)).to(device)
    index = gpu.Index(torch.from_numpy(rng.standard_normal((101, 12)).astype(np.float32)).to(device))
    found = []
    for propose in (index._propose, index._propose_gemm):
        distances = torch.empty((5, k), dtype=torch.float32, device=device)
        indices = torch.empty((5, k), dtype=torch.int64, device=device)
        index._search(query, k, distances, indices, propose)
        found.append((distances, indices))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 300, 70), (130, 257, 128)], ids=str)
def test_tiles_by_descriptors_give_the_same(device, rng, monkeypatch, shape):
    """On a device it is the loop over tiles, interpreted the kernel of one, that `_propose` runs unless told."""
    from ttt4as_fast.kernels.knn import gpu

    if gpu.TensorDescriptor is None:
        pytest.skip("this Triton has no tensor descriptors")
    if device.type == "cuda" and not gpu.has_descriptors(device):
        pytest.skip("this device has none")
    search, found = Proposing(rng, shape, device), []
    monkeypatch.setattr(gpu, "processors", lambda device: 3)  # so that each has several tiles
    tile = (16, 128, 64, 4, 2) if device.type == "cpu" else None
    for descriptors in (False, True):
        monkeypatch.setattr(gpu, "has_descriptors", lambda device, descriptors=descriptors: descriptors)
        found.append(search.run(search.index._propose, tile=tile))
    assert torch.equal(*found)


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("shape", [(1, 1, 1), (60, 700, 70), (60, 270, 600)], ids=str)
def test_proposals_by_the_hardware_of_hopper_are_the_same(device, rng, monkeypatch, shape):
    """Tiles of several numbers of queries, several of them to each warpgroup, and more channels than stages hold."""
    from ttt4as_fast.kernels.gpu_common import cuda
    from ttt4as_fast.kernels.knn import hopper

    if device.type == "cuda" and not hopper.usable(device):
        pytest.skip("not of compute capability 9.0")
    search = Proposing(rng, shape, device)
    want = search.run(search.index._propose)
    monkeypatch.setattr(hopper, "processors", lambda device: 3)  # so that a block has tiles of other queries in turn
    if device.type == "cpu":
        ways = [(hopper.QUERIES, False), ((56,), True)]  # of 60 queries, one tile and two; threads in both orders
    else:
        ways = [(sizes, False) for sizes in (hopper.QUERIES, *((n,) for n in hopper.QUERIES))]
    for i, (sizes, backwards) in enumerate(ways):
        monkeypatch.setitem(cuda.LAUNCHERS, "cpu", emulator.Emulator(backwards=backwards))
        monkeypatch.setattr(hopper, "QUERIES", sizes)
        for kept in (2, 3) if device.type == "cuda" or shape == (1, 1, 1) else (2 + i,):
            found = search.run(search.index._propose_hopper, kept)
            assert torch.equal(want, found[:2]) and all(torch.equal(search.third(), third) for third in found[2:])


def test_where_the_kernel_for_hopper_does_not_run_a_warning_says_why(monkeypatch):
    hopper = pytest.importorskip("ttt4as_fast.kernels.knn.hopper", reason="torch is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hopper.cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(hopper, "_probe", lambda device: "no such instruction")
    hopper.warn_once.cache_clear()
    with pytest.warns(kernels.BackendWarning, match="knn: no such instruction; Triton proposes"):
        assert not hopper.usable(torch.device("cuda"))


@pytest.mark.usefixtures("cuda_source")
def test_the_kernel_for_hopper_is_tried_with_two_and_with_three_rows_of_a_group(device, monkeypatch):
    from ttt4as_fast.kernels.knn import hopper

    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("not of compute capability 9.0")
    monkeypatch.setattr(hopper, "processors", lambda device: 1)
    rows = torch.zeros((hopper.BANK, 64), dtype=torch.float16, device=device)
    torch.set_default_dtype(torch.float64)  # which is nothing to the kernel
    try:
        assert hopper.wrong_of(rows) is None
    finally:
        torch.set_default_dtype(torch.float32)
    propose = hopper.propose
    for broken in (2, 3):
        monkeypatch.setattr(hopper, "propose", lambda *x, broken=broken: len(x) - 4 == broken or propose(*x))
        assert hopper.wrong_of(rows) == f"propose.cu ran here with a wrong result, {broken} rows of a group"


def test_queries_of_a_tile_leave_little_of_the_last_one_empty():
    hopper = pytest.importorskip("ttt4as_fast.kernels.knn.hopper", reason="torch is not installed")
    assert [hopper.queries_of(n) for n in (1, 56, 57, 136, 137, 784, 1024)] == [56, 56, 88, 136, 88, 136, 136]
    assert all(size % 8 == 0 and f"m64n{size}k16" in hopper.prelude(size, 2) for size in hopper.QUERIES)


@pytest.mark.parametrize("allowed", [False, True])
def test_no_product_in_memory_where_torch_may_sum_in_float16(monkeypatch, allowed):
    from ttt4as_fast.kernels.knn import gpu

    monkeypatch.setattr(gpu, "GEMM_FROM", {(9, 0): 100})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=allowed))
    index = SimpleNamespace(bank=SimpleNamespace(device=torch.device("cuda")), size=10)
    assert gpu.Index.takes_gemm(index, 10) is not allowed
