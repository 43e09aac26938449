"""CUDA graphs of small searches: an index's own, which replay what was launched, and those of its callers."""

from __future__ import annotations

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.kernels import arrays

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("capturing", [False, True])
def test_parts_are_merged_outside_of_a_capture_alone(monkeypatch, capturing):
    """To look at the ties ends the caller's capture, by an error of CUDA's that says nothing of an index."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    index = kernels.KnnIndex(torch.rand(9, 2), backend="reference")
    index.add(torch.rand(2, 2))
    index._device = "cuda"
    monkeypatch.setattr(arrays, "device_type", lambda x: "cuda")
    monkeypatch.setattr(arrays, "device_of", lambda x: contextlib.nullcontext())
    raises = pytest.raises(RuntimeError, match="query: the index is in 2 parts")
    with raises if capturing else contextlib.nullcontext():
        index.search(torch.rand(3, 2), 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestSearch:
    """Small searches of an index."""

    pytestmark = pytest.mark.filterwarnings("error::ttt4as_fast.kernels.dispatch.BackendWarning")

    @pytest.fixture(autouse=True)
    def cupy(self):
        pytest.importorskip("cupy")  # makes the stream that is captured

    def case(self, rng, n=70, queries=33, dim=48):
        bank, *query = (torch.from_numpy(rng.standard_normal((m, dim)).astype(np.float32)) for m in (n, *[queries] * 4))
        return kernels.KnnIndex(bank.cuda(), backend="gpu"), [x.cuda() for x in query]

    def same(self, a, b):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def graphs(self, index):
        return index._parts[0]._graphs.graphs

    def lying(self, x):
        """Queries of other strides, addresses and dtypes."""
        return [x, x[:7], x.T.contiguous().T, torch.cat((x[:, :1], x), 1)[:, 1:], x.double(), x.half(), x[3:4]]

    @pytest.mark.parametrize("k", [1, 9])
    def test_replays_what_it_launched(self, rng, k, monkeypatch):
        from ttt4as_fast.kernels.knn import gpu

        index, queries = self.case(rng)
        want = [kernels.KnnIndex(index.bank, backend="gpu").search(query, k) for query in queries]  # each its first
        index.search(queries[0], k)
        index.search(queries[0], k)
        assert len(self.graphs(index)) == 1
        monkeypatch.setattr(gpu.Index, "_search", None)  # nothing is launched one by one any more
        found = [index.search(query, k) for query in queries]
        for got, expected in zip(found, want, strict=True):
            self.same(got, expected)

    def test_keeps_the_kinds_of_search_apart(self, rng):
        index, queries = self.case(rng)
        for _ in range(3):
            for query in self.lying(queries[0]):
                for k, squared in ((1, False), (3, False), (3, True)):
                    want = kernels.nearest_neighbors(query.cpu(), index.bank.cpu(), k, backend="reference")
                    got = index.search(query, k, squared=squared)
                    assert torch.equal(got[1].cpu(), want[1])
                    torch.testing.assert_close(got[0].cpu(), want[0] ** (1 + squared), rtol=1e-6, atol=0)

    def test_a_query_that_is_not_finite(self, rng):
        index, queries = self.case(rng)
        for _ in range(3):
            want = index.search(queries[0], 2)
        broken = queries[0].clone()
        broken[3, 5] = float("nan")
        distances, indices = index.search(broken, 2)
        assert indices[3].tolist() == [-1, -1] and torch.isnan(distances[3]).all()
        self.same(index.search(queries[0], 2), want)

    def test_large_searches_have_none(self, rng, monkeypatch):
        from ttt4as_fast.kernels.knn import gpu

        monkeypatch.setattr(gpu, "GRAPH_BYTES", 1000)
        index, queries = self.case(rng)
        for _ in range(3):
            index.search(queries[0])
        assert not self.graphs(index) and not index.warmup(queries[0])

    def test_warmup_captures_at_once(self, rng, monkeypatch):
        from ttt4as_fast.kernels.knn import gpu

        index, queries = self.case(rng)
        index.add(queries[3])
        assert index.warmup(queries[0], 50) is True
        want = kernels.nearest_neighbors(queries[1], index.bank, 50, backend="gpu")
        monkeypatch.setattr(gpu.Index, "_search", None)
        self.same(index.search(queries[1], 50), want)

    def test_warmup_inside_a_capture_spoils_nothing(self, rng):
        index, queries = self.case(rng)
        want = index.search(queries[0], 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(RuntimeError, match="warm up before the capture"):
                index.warmup(queries[0], 3)
            found = index.search(queries[0], 3)
        graph.replay()
        self.same(found, want)

    def test_grows_and_searches_by_turns(self, rng):
        index, queries = self.case(rng)
        for _ in range(3):
            for _ in range(3):
                want = kernels.nearest_neighbors(queries[0], index.bank, 4, backend="gpu")
                self.same(index.search(queries[0], 4), want)
            index.add(queries[1])

    def test_inference_mode_and_none(self, rng):
        index, queries = self.case(rng)
        with torch.inference_mode():
            inside = [index.search(queries[0].clone(), 2) for _ in range(3)]
        for got in (*inside[1:], *(index.search(queries[0], 2) for _ in range(2))):
            self.same(got, inside[0])

    def test_no_synchronisation(self, rng):
        index, queries = self.case(rng)
        for _ in range(3):
            index.search(queries[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            index.search(queries[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_inside_a_graph_of_the_callers(self, rng):
        """After one call outside, however the query lies: nothing is left to compile."""
        index, queries = self.case(rng)
        for query in self.lying(queries[0]):
            want = index.search(query, 3)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = index.search(query, 3)
            graph.replay()
            self.same(out, want)
            for _ in range(3):
                self.same(index.search(query, 3), want)

    def test_an_index_in_several_parts_is_refused_inside_a_graph_of_the_callers(self, rng):
        """And the capture goes on."""
        index, queries = self.case(rng)
        index.add(queries[1][:5])
        index.search(queries[0], 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(RuntimeError, match="query: the index is in 2 parts"):
                index.search(queries[0], 3)
            out = 2 * queries[0]
        graph.replay()
        assert torch.equal(out, 2 * queries[0])

    def test_an_index_that_grows_leaves_a_graph_of_the_callers_what_it_reads(self, rng):
        index, queries = self.case(rng)
        want = index.search(queries[0], 3)
        low, bank = index._parts[0].low.shape, index.bank.shape
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = index.search(queries[0], 3)
        index.add(torch.cat(queries * 2))
        assert len(index._parts) == 1
        junk = [torch.full(low, 9.0, dtype=torch.float16, device="cuda") for _ in range(50)]
        junk += [torch.full(bank, 9.0, device="cuda") for _ in range(50)]
        graph.replay()
        self.same(out, want)
        del junk

    def test_an_index_may_be_dropped_while_another_stream_reads_it(self, rng, monkeypatch):
        monkeypatch.setenv("TTT4AS_CUDA_GRAPHS", "0")
        for drop in (lambda index: index.reset(), lambda index: index.add(torch.cat([index.bank] * 2))):
            index, queries = self.case(rng, n=3000, dim=256)
            want = index.search(queries[0], 2)
            low, bank = index._parts[0].low.shape, index.bank.shape
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(100_000_000)
                got = index.search(queries[0], 2)
            drop(index)
            junk = [torch.full(low, 9.0, dtype=torch.float16, device="cuda") for _ in range(8)]
            junk += [torch.full(bank, 9.0, device="cuda") for _ in range(8)]
            torch.cuda.synchronize()
            self.same(got, want)
            del junk

    def test_streams_and_threads_and_indices_that_capture_at_once(self, rng):
        cases = [self.case(rng) for _ in range(4)]
        want = [kernels.KnnIndex(index.bank, backend="gpu").search(queries[0], 2) for index, queries in cases]
        shared = cases[0][0]
        expected = [kernels.KnnIndex(shared.bank, backend="gpu").search(q, 2) for q in cases[0][1]]
        found: dict[int, list] = {}

        def work(i):
            index, queries = cases[i]
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    found[i] = [index.search(queries[0], 2), shared.search(cases[0][1][i], 2)]
                torch.cuda.current_stream().synchronize()

        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        for i in range(4):
            self.same(found[i][0], want[i])
            self.same(found[i][1], expected[i])
        assert all(self.graphs(index) for index, _ in cases)

    def test_an_index_takes_its_graphs_with_it(self, rng):
        """By counting references alone: nothing that holds device memory may wait for the collector."""
        index, queries = self.case(rng, n=3000, queries=500, dim=256)
        for _ in range(4):
            got = index.search(queries[0], 2)
        want = kernels.nearest_neighbors(queries[0], index.bank, 2, backend="gpu")
        bank, gone = index.bank, [weakref.ref(graph) for graph in self.graphs(index)]
        torch.cuda.synchronize()
        gc.disable()
        try:
            before = torch.cuda.memory_allocated()
            torch.cuda._sleep(2_000_000)
            got = index.search(queries[0], 2)
            del index
            assert [one() for one in gone] == [None]
            assert torch.cuda.memory_allocated() < before - (bank.nbytes + queries[0].nbytes) // 2
        finally:
            gc.enable()
        junk = [torch.full_like(bank, 9.0) for _ in range(8)]
        torch.cuda.synchronize()
        self.same(got, want)
        del junk

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
    def test_a_device_that_is_not_the_current_one(self, rng):
        index, queries = self.case(rng)
        there = kernels.KnnIndex(index.bank.to("cuda:1"), backend="gpu")
        for query in queries:
            got = there.search(query.to("cuda:1"), 2)
            assert got[0].device.index == 1
            self.same([x.cpu() for x in got], [x.cpu() for x in index.search(query, 2)])
        assert self.graphs(there)
