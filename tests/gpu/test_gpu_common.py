"""What the GPU backends share and a host can show: tables that are kept, work that goes on where memory ran out."""

from __future__ import annotations

import re
import weakref

import pytest
import torch

CPU = torch.device("cpu")


def test_tables_are_made_once_and_the_oldest_goes(monkeypatch):
    from ttt4as_fast.kernels.gpu_common import tables

    monkeypatch.setattr(tables, "CAPACITY", 2)
    monkeypatch.setattr(tables, "_RECENT", type(tables._RECENT)())
    made = []

    def get(key):
        return tables.table(key, CPU, lambda: made.append(key) or torch.zeros(1))

    first = get("a")
    get("b")
    assert get("a") is first
    get("c")  # b is the least recently used
    assert get("a") is first and get("b") is not None
    assert made == ["a", "b", "c", "b"] and len(tables._RECENT) == 2


def test_no_table_goes_while_a_graph_is_captured(monkeypatch):
    """Dropping one may mean to wait for the device, which would break the capture off."""
    from ttt4as_fast.kernels.gpu_common import tables

    monkeypatch.setattr(tables, "CAPACITY", 1)
    monkeypatch.setattr(tables, "_RECENT", type(tables._RECENT)())
    with tables.DEVICE_MUST_NOT_WAIT:
        for key in "abc":
            tables.table(key, CPU, lambda: torch.zeros(1))
        assert len(tables._RECENT) == 3
    tables.table("c", CPU, lambda: torch.zeros(1))
    assert list(tables._RECENT) == [("c", CPU)]


def test_axis_is_of_size_cells_and_dtype():
    from ttt4as_fast.kernels.gpu_common.geometry import axis

    one = axis(9, 4, CPU)
    assert axis(9, 4, CPU) is one and axis(9, 4, CPU, torch.float64).weight.dtype == torch.float64
    assert (one.lower.tolist(), one.start.tolist()) == ([0, 0, 0, 1, 1, 1, 2, 2, 3], [0, 3, 6, 8, 9])


def test_what_a_failed_part_held_is_free_before_the_next():
    """Out of memory: the tensors of the attempt must not still be there when the smaller one asks."""
    from ttt4as_fast.kernels.dispatch import BackendWarning
    from ttt4as_fast.kernels.gpu_common.memory import in_chunks

    alive, done = [], []

    def work(start, stop):
        assert all(reference() is None for reference in alive)
        scratch = torch.zeros(stop - start)
        alive.append(weakref.ref(scratch))
        if stop - start > 2:
            raise torch.OutOfMemoryError("too much")
        done.append((start, stop))

    with pytest.warns(BackendWarning, match="going on with 4 things or fewer") as warned:
        assert in_chunks(work, 7, 7, "things") == 2
    assert done == [(0, 2), (2, 4), (4, 6), (6, 7)] and len(warned) == 1
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(lambda start, stop: (_ for _ in ()).throw(torch.OutOfMemoryError()), 1, 1, "things")


def test_memory_goes_back_to_the_device_once_no_graph_is_captured(monkeypatch):
    """torch fails where it is to give memory back while any thread captures."""
    from ttt4as_fast.kernels.dispatch import BackendWarning
    from ttt4as_fast.kernels.gpu_common import memory
    from ttt4as_fast.kernels.gpu_common.tables import DEVICE_MUST_NOT_WAIT

    given_back = []
    for name, found in (("is_initialized", True), ("is_current_stream_capturing", False), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(DEVICE_MUST_NOT_WAIT.locked()))

    def work(start, stop):
        if stop - start > 1:
            raise torch.OutOfMemoryError("too much")

    with pytest.warns(BackendWarning, match="going on with 1 things or fewer"):
        assert memory.in_chunks(work, 2, 2, "things") == 1
    assert given_back == [True] and not DEVICE_MUST_NOT_WAIT.locked()


def test_layout_is_the_callers():
    from ttt4as_fast.kernels.gpu_common.layout import dense, layout

    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for kept in (last, last[:, :, :1]):
        assert layout(kept) is torch.channels_last
    for kept in (x, x[0], x[:, :1]):  # one channel is adjacent to nothing
        assert layout(kept) is torch.contiguous_format
    for kept in (x, last):
        assert dense(kept).data_ptr() == kept.data_ptr()
    assert dense(last[..., 1:]).stride(1) == 1
    unaligned = torch.arange(121.0)[1:].view(x.shape)
    assert dense(unaligned).data_ptr() % 16 == 0 and torch.equal(dense(unaligned), unaligned)


def test_units_divide_every_size():
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.gpu_common.units import unit_of

    assert [unit_of(152, 48), unit_of(7), unit_of(64)] == [8, 1, 16]


def test_sizes_on_the_host_are_those_of_triton():
    triton = pytest.importorskip("triton")
    from ttt4as_fast.kernels.gpu_common.units import blocks, power_of_two

    for number in (1, 2, 3, 4, 5, 127, 128, 129, 1 << 30, (1 << 30) + 1):
        assert power_of_two(number) == triton.next_power_of_2(number)
        assert blocks(number, 128) == triton.cdiv(number, 128)


def test_the_host_sets_aside_what_the_kernels_take():
    """Shared memory and scratch are sized in Python, by numbers that stand in the sources too."""
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.gpu_common import cuda, svm

    def constants(file: str) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)\b", cuda.source(file), re.M)}

    gram, solver = constants(svm._GRAM), constants(svm._SOLVER)
    pitch, tile = gram["CHUNK"] + 1, gram["TILE"]
    stages = gram["STAGES"] * 2 * tile * pitch * 16
    sums = svm._GRAM_THREADS // 32 * tile * (tile + 1) * 4
    assert max(stages, sums) == svm._GRAM_SHARED and svm._GRAM_THREADS <= gram["MOST_THREADS"]
    named = ("VECTORS", "PAD", "CELL_DOUBLES", "PIXEL_DOUBLES")
    assert [solver[name] for name in named] == [svm._VECTORS, svm._PAD, svm._CELL, svm._PIXEL]
    assert svm.THREADS <= solver["MAX_THREADS"]
