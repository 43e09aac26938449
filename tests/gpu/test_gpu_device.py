"""What only a device can show: bounds of a launch, memory that graphs hold, streams, other devices, no memory left."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from ..kernels.cases import smooth_map, structured_features

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPTIONS = {"n_nominal": 30, "neighbor_radius": 3, "backend": "gpu"}


def case(rng, size=(56, 56), shape=(64, 14, 14), batch=2, device="cuda") -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("cupy")
    maps = np.stack([smooth_map(rng, *size) for _ in range(batch)])
    features = np.stack([structured_features(rng, *shape) for _ in range(batch)])
    return torch.from_numpy(maps).to(device), torch.from_numpy(features).to(device)


def same(a, b) -> bool:
    names = ("pred_mask", "decision_map", "pseudo_labels", "status_code")
    return all(torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()) for name in names)


def test_problems_of_every_size_by_turns(rng):
    """The solver asks for more and less shared memory, up to all there is, in any order."""
    from ttt4as_fast.kernels.gpu_common import cuda
    from ttt4as_fast.kernels.segment import gpu

    sizes = [(64, 28, 28), (8, 4, 4), (16, 40, 40), (8, 4, 4), (64, 28, 28)]
    cases = [case(rng, (56, 56), shape, 1) for shape in sizes]
    for maps, features in cases:
        gpu.GRAPHS.clear()
        got = kernels.segment(maps, features, **(OPTIONS | {"tol": 1e-6}))
        want = kernels.segment(maps.cpu(), features.cpu(), **(OPTIONS | {"tol": 1e-6, "backend": "reference"}))
        scale = max(1.0, float(want.decision_map.abs().max()))
        torch.testing.assert_close(got.decision_map.cpu(), want.decision_map, rtol=0, atol=1e-3 * scale)
    for n in (5, 90, 110, 180, 300, 5):  # around 48 KB, where a block's shared memory has to be asked for
        X, y = torch.from_numpy(rng.standard_normal((n, 7)).astype(np.float32)).cuda(), np.arange(n) % 2
        assert kernels.fit_linear_svm(X, y, backend="gpu").converged
    assert cuda.shared_memory_limit(torch.device("cuda", 0)) > 96 * 1024


class TestGraphs:
    def test_tables_of_a_graph_outlive_their_cache(self, rng, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import tables

        maps, features = case(rng)
        want = kernels.segment(maps, features, **OPTIONS)
        kernels.segment(maps, features, **OPTIONS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.segment(maps, features, **OPTIONS)
        monkeypatch.setattr(tables, "CAPACITY", 0)
        kernels.segment(*case(rng, (9, 9), (3, 4, 4)), **OPTIONS)
        junk = [torch.full((n,), 2**30, dtype=torch.int32, device="cuda") for n in (30, 56, 57, 14, 15, 100, 128) * 50]
        graph.replay()
        assert same(out, want)
        assert same(kernels.segment(maps, features, **OPTIONS), want)
        del junk

    def test_a_graph_may_be_dropped_while_it_runs(self, rng):
        from ttt4as_fast.kernels.segment import gpu

        cases = [case(rng) for _ in range(2)]
        want = [kernels.segment(*one, **OPTIONS) for one in cases]
        torch.cuda.synchronize()
        for _ in range(10):
            with torch.cuda.stream(torch.cuda.Stream()):
                for one in cases:  # captures the graph that the calls below replay behind the sleep
                    kernels.segment(*one, **OPTIONS)
                torch.cuda._sleep(2_000_000)
                got = [kernels.segment(*one, **OPTIONS) for one in cases]
            gpu.GRAPHS.clear()
            junk = [torch.full_like(one[1], 9.0) for one in cases * 4]
            torch.cuda.synchronize()
            assert all(same(a, b) for a, b in zip(got, want, strict=True))
            del junk

    def test_the_first_call_inside_a_capture_says_so_and_spoils_nothing(self, monkeypatch):
        from ttt4as_fast.kernels import dispatch
        from ttt4as_fast.kernels.gpu_common import capability, cuda

        x = torch.rand((1, 3, 4, 4), device="cuda")
        for module, name in ((capability, "_probe_triton"), (cuda, "_probe"), (dispatch, "_why_not")):
            monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with pytest.raises(RuntimeError, match="once before capturing"):
            with torch.cuda.graph(graph, stream=stream):
                kernels.bilinear_upsample(x, 8, backend="gpu")
        assert kernels.bilinear_upsample(x, 8, backend="gpu").shape == (1, 3, 8, 8)

    def test_a_capture_that_is_refused_leaves_the_eager_path_on_the_callers_stream(self, tmp_path):
        """And torch's random numbers, and an allocator that gives memory back; in a process of its own, in case not."""
        pytest.importorskip("cupy")
        script = tmp_path / "refused.py"
        script.write_text(
            "import warnings, torch\n"
            "from ttt4as_fast import kernels\n"
            "from ttt4as_fast.kernels.segment import gpu\n"
            "part = gpu._Plan.part\n"
            "def refused(self, *inputs):\n"
            "    if torch.cuda.is_current_stream_capturing():\n"
            "        torch.cuda.current_stream().synchronize()\n"
            "    return part(self, *inputs)\n"
            "gpu._Plan.part = refused\n"
            "maps, features = torch.rand((1, 20, 20)).cuda(), torch.rand((1, 6, 5, 5)).cuda()\n"
            "stream = torch.cuda.current_stream()\n"
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always')\n"
            "    found = [kernels.segment(maps, features, backend='gpu', n_nominal=9) for _ in range(4)]\n"
            "assert torch.cuda.current_stream() == stream\n"
            "assert sum('no CUDA graph' in str(one.message) for one in seen) == 1\n"
            "assert all(torch.equal(found[0].decision_map, one.decision_map) for one in found)\n"
            "assert torch.rand(3, device='cuda').isfinite().all()\n"
            "block = torch.empty(1 << 28, dtype=torch.uint8, device='cuda')\n"
            "del block\n"
            "reserved = torch.cuda.memory_reserved()\n"
            "torch.cuda.empty_cache()\n"
            "assert torch.cuda.memory_reserved() <= reserved - (1 << 28)\n"
            "print('done')\n"
        )
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]

    @pytest.mark.usefixtures("compiling")
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, rng, mode):
        """Beside inductor's own graphs the operators run as they are, in the first call and in later ones."""
        maps, features = case(rng, (56, 64), batch=1)

        def call(maps, features):
            found = torch.ops.ttt4as.segment(
                maps * 1.0, features * 2.0, None, 99.0, 3, 30, 1e-3, "squared_hinge", "grid", 0, None, 1e-4, 1000, "gpu"
            )
            up = torch.ops.ttt4as.bilinear_upsample(features * 3.0, 20, 20, "gpu")
            _, nearest = torch.ops.ttt4as.nearest_neighbors(features[0].flatten(1).T + 0.0, maps[0], 1, "gpu")
            return found[1] + 1.0, up.relu(), nearest + 1

        want = call(maps, features)
        compiled = torch.compile(call, fullgraph=True, mode=mode)
        for _ in range(5):
            got = compiled(maps, features)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one(rng):
    maps, features = case(rng)
    there = torch.device("cuda", 1)
    bank = torch.from_numpy(rng.standard_normal((99, 20)).astype(np.float32))
    X, y = bank, np.arange(99) % 2
    assert torch.cuda.current_device() == 0

    def results(device: torch.device) -> list:
        fitted = kernels.fit_linear_svm(X.to(device), y, backend="gpu")
        peaks = kernels.local_maxima(maps.to(device), 90.0, backend="gpu")
        segmented = [kernels.segment(maps.to(device), features.to(device), **OPTIONS) for _ in range(3)]
        return [
            kernels.bilinear_upsample(features.to(device), 30, backend="gpu"),
            *kernels.nearest_neighbors(bank[:7].to(device), bank.to(device), 3, backend="gpu"),
            kernels.k_center_greedy(bank.to(device), 9, backend="gpu"),
            fitted.coef,
            peaks,
            kernels.dilate(peaks, 3, backend="gpu"),
            *(one.decision_map for one in segmented),
        ]

    for here, other in zip(results(torch.device("cuda", 0)), results(there), strict=True):
        assert other.device == there and torch.equal(here.cpu(), other.cpu())


class TestMemory:
    @pytest.fixture
    def limited(self):
        """``limited(n)``: no more than `n` further bytes for this process."""

        def limit(more: int) -> None:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

        yield limit
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

    def test_knn_goes_on_in_smaller_parts(self, rng, limited):
        from ttt4as_fast.kernels.dispatch import BackendWarning
        from ttt4as_fast.kernels.knn import gpu

        bank = torch.from_numpy(rng.standard_normal((4096, 64)).astype(np.float32)).cuda()
        query = torch.from_numpy(rng.standard_normal((1 << 17, 64)).astype(np.float32)).cuda()
        index = gpu.Index(bank, scratch_bytes=1 << 34)
        want = index.search(query, 1)
        limited(96 << 20)
        with pytest.warns(BackendWarning, match="queries or fewer at a time") as warned:
            got = index.search(query, 1)
        assert len(warned) == 1
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_segment_goes_on_in_smaller_parts(self, rng, limited):
        from ttt4as_fast.kernels.dispatch import BackendWarning
        from ttt4as_fast.kernels.segment import gpu

        maps, features = case(rng, (224, 224), (256, 28, 28), 1)
        maps, features = maps.expand(64, -1, -1).contiguous(), features.expand(64, -1, -1, -1).contiguous()
        gpu.GRAPHS.clear()
        want = kernels.segment(maps, features, **OPTIONS)
        gpu.GRAPHS.clear()
        limited(128 << 20)
        with pytest.warns(BackendWarning, match="images or fewer at a time"):
            got = kernels.segment(maps, features, **OPTIONS)
        gpu.GRAPHS.clear()
        assert same(got, want)

    def test_graphs_go_before_segment_does_in_smaller_parts(self, rng, limited):
        from ttt4as_fast.kernels.segment import gpu

        maps, features = case(rng, (224, 224), (256, 28, 28), 1)
        maps, features = maps.expand(64, -1, -1).contiguous(), features.expand(64, -1, -1, -1).contiguous()
        gpu.GRAPHS.clear()
        want = kernels.segment(maps, features, **OPTIONS)
        gpu.GRAPHS.clear()
        for _ in range(2):
            kernels.segment(maps[:60], features[:60], **OPTIONS)
        (graph,) = gpu.GRAPHS.graphs
        limited(graph.bytes // 8)  # the results fit, what is set aside for them does not
        del graph
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = kernels.segment(maps, features, **OPTIONS)
        assert not gpu.GRAPHS.graphs
        assert same(got, want)

    def test_graphs_hold_what_they_say(self, rng):
        from ttt4as_fast.kernels.segment import gpu

        maps, features = case(rng, (224, 224), (256, 28, 28), 1)
        maps, features = maps.expand(32, -1, -1).contiguous(), features.expand(32, -1, -1, -1).contiguous()
        kernels.segment(maps, features, **OPTIONS)
        torch.cuda.synchronize()
        gpu.GRAPHS.clear()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(2):
            kernels.segment(maps, features, **OPTIONS)
        (graph,) = gpu.GRAPHS.graphs
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - before
        inputs = sum(x.nbytes for x in graph.inputs if x is not None)  # may lie in what was reserved before
        assert graph.bytes - inputs <= held <= graph.bytes + (64 << 20)

    def test_more_than_two_billion_values(self):
        """Offsets past 2**31: a bank whose channels lie N apart, and an upsampled map of that size."""
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("less than 24 GiB of free device memory")
        dim, n = 1024, 2_200_000
        bank = torch.empty((dim, n), dtype=torch.float16, device="cuda").uniform_(-1, 1).T
        picks = torch.tensor([0, n // 2, n - 1], device="cuda")
        distances, indices = kernels.KnnIndex(bank, backend="gpu").search(bank[picks].contiguous(), 1)
        assert torch.equal(indices[:, 0], picks) and not distances.any()
        del bank
        x = torch.rand((1, 1024, 5, 7), dtype=torch.float16, device="cuda")
        for features in (x, x.contiguous(memory_format=torch.channels_last)):
            got = kernels.bilinear_upsample(features, (1500, 1500), backend="gpu")
            want = torch.nn.functional.interpolate(x[:, -1:].float(), (1500, 1500), mode="bilinear")
            torch.testing.assert_close(got[:, -1:].float(), want, rtol=0, atol=2e-3)
            del got


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_host_backends_serve_device_tensors(rng, backend):
    """Where no GPU backend can serve, or the host's is named: the same result on the device, the gate included."""
    maps, features = case(rng, (30, 30), (8, 7, 7), 3)
    score = torch.tensor([0.9, 0.1, 0.9])
    options = OPTIONS | {"backend": backend, "image_threshold": 0.5}
    want = kernels.segment(maps.cpu(), features.cpu(), pred_score=score, **options)
    for given in (score.cuda(), score.tolist()):
        got = kernels.segment(maps, features, pred_score=given, **options)
        assert got.pred_mask.device == maps.device and same(got, want) and got.status[1] == "nominal"
    assert torch.equal(
        kernels.local_maxima(maps, 90.0, backend=backend).cpu(), kernels.local_maxima(maps.cpu(), 90.0, backend=backend)
    )
    got = kernels.nearest_neighbors(maps[0], maps[1], 2, backend=backend)
    want = kernels.nearest_neighbors(maps[0].cpu(), maps[1].cpu(), 2, backend=backend)
    assert all(torch.equal(a.cpu(), b) and a.is_cuda for a, b in zip(got, want, strict=True))


def test_robust_makes_the_trip_to_the_host_and_says_so_once(rng):
    from ttt4as_fast.kernels import dispatch

    maps, features = case(rng)
    want = kernels.segment_robust(maps.cpu(), features.cpu())
    dispatch.warn_once.cache_clear()
    with pytest.warns(dispatch.BackendWarning, match="segment_robust: has no backend for cuda"):
        got = kernels.segment_robust(maps, features, pred_score=maps.amax((1, 2)), image_threshold=-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = kernels.segment_robust(maps, features)
    assert got.pred_mask.device == maps.device and same(got, want) and same(again, want)
    half = kernels.segment_robust(maps.half(), features.bfloat16())
    assert half.pred_mask.is_cuda and half.decision_map.dtype == torch.float32
    maps[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="anomaly_map: expected finite"):
        kernels.segment_robust(maps, features)
