"""The whole method on the device against the reference; batches, limits, memory, graphs."""

from __future__ import annotations

import threading
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.kernels.segment import nominal_candidates

from ..kernels.cases import smooth_map, structured_features

SHAPES = [  # map, features
    ((1, 1), (1, 1, 1)),
    ((9, 9), (3, 1, 1)),
    ((5, 64), (3, 1, 9)),
    ((32, 40), (8, 5, 6)),
    ((17, 13), (5, 30, 29)),  # features finer than the map
    ((24, 24), (70, 24, 24)),
    ((37, 29), (6, 11, 3)),
    ((1, 90), (3, 1, 9)),  # no row for the nominal grid: no candidate at all
]


def inputs(rng, size, feature_shape, batch=1):
    maps = np.stack([smooth_map(rng, *size) for _ in range(batch)])
    return torch.from_numpy(maps), torch.from_numpy(
        np.stack([structured_features(rng, *feature_shape) for _ in range(batch)])
    )


def check(device, maps, features, **params):
    params = {"n_nominal": 20, "neighbor_radius": 2, "tol": 1e-6, **params}
    got = kernels.segment(maps.to(device), features.to(device), backend="gpu", **params)
    want = kernels.segment(maps, features, backend="reference", **{**params, "tol": 1e-9, "max_iter": 100_000})
    assert torch.equal(got.pseudo_labels.cpu(), want.pseudo_labels)
    assert got.status == want.status
    assert (got.pred_mask.dtype, got.decision_map.dtype, got.status_code.dtype) == (
        torch.bool,
        torch.float32,
        torch.int8,
    )
    scale = max(1.0, float(want.decision_map.abs().max()))
    tolerance = (3e-3 if params.get("loss") == "hinge" else 3e-4) * scale
    assert torch.allclose(got.decision_map.cpu(), want.decision_map, rtol=0, atol=tolerance)
    differ = got.pred_mask.cpu() != want.pred_mask
    assert not (differ & (want.decision_map.abs() > tolerance)).any()
    return got


@pytest.mark.usefixtures("cuda_source")
class TestParity:
    @pytest.mark.parametrize(("size", "feature_shape"), SHAPES, ids=str)
    def test_shapes(self, device, rng, size, feature_shape):
        check(device, *inputs(rng, size, feature_shape))

    @pytest.mark.parametrize(
        "params",
        [
            {"loss": "hinge", "tol": 1e-4},
            {"C": 1.0},
            {"C": 0.03, "percentile": 50.0, "neighbor_radius": 0},
            {"n_nominal": 400},  # nominal samples share the cells' basis
            {"n_nominal": 5, "nominal_sampling": "random", "random_state": 3},
            {"neighbor_radius": 10**12},  # all anomalous: degenerate
            {"percentile": 100.0, "n_nominal": 1, "max_iter": 10**12},
        ],
        ids=str,
    )
    def test_options(self, device, rng, params):
        check(device, *inputs(rng, (30, 26), (9, 7, 8)), **params)

    @pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
    def test_as_many_threads_as_on_a_gpu(self, device, rng, monkeypatch, loss):
        """A small K in registers, and more threads than a patch has pixels."""
        from ttt4as_fast.kernels.gpu_common import cuda, svm

        if device.type == "cpu":
            from . import emulator

            monkeypatch.setitem(cuda.LAUNCHERS, "cpu", emulator.Emulator(svm.THREADS))
        check(device, *inputs(rng, (40, 36), (9, 7, 8)), loss=loss, tol=1e-4)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_dtypes(self, device, rng, dtype):
        maps, features = (x.to(getattr(torch, dtype)) for x in inputs(rng, (21, 33), (7, 4, 6)))
        check(device, maps, features)

    def test_features_far_from_zero(self, device, rng):
        """Their products in float32 hide what tells them apart; masks came out wrong, their gap below 0."""
        maps, features = inputs(rng, (32, 32), (8, 6, 6))
        check(device, maps, features + 1000)

    def test_layouts(self, device, rng):
        maps, features = inputs(rng, (42, 22), (10, 6, 7), batch=2)
        last = features.contiguous(memory_format=torch.channels_last)
        check(device, maps, last)
        check(device, maps[:, ::2], features[:, ::2, ::2])

    def test_batch_with_a_gate_a_constant_and_a_plateau(self, device, rng):
        maps, features = inputs(rng, (20, 20), (6, 5, 5), batch=4)
        maps[1] = 0.5
        maps[2, 5:9, 5:9] = 9.0
        score = torch.tensor([0.9, 0.9, 0.9, 0.1])
        got = check(device, maps, features, pred_score=score, image_threshold=0.5)
        assert got.status == ["ok", "degenerate", "ok", "nominal"]
        assert not got.pred_mask[[1, 3]].any() and not got.decision_map[[1, 3]].any()

    def test_same_bits_alone_in_a_batch_and_in_parts(self, device, rng, monkeypatch):
        from ttt4as_fast.kernels.segment import gpu

        maps, features = (x.to(device) for x in inputs(rng, (25, 31), (33, 6, 7), batch=3))
        options = {"n_nominal": 16, "neighbor_radius": 2, "backend": "gpu"}
        together = kernels.segment(maps, features, **options)
        for i in range(3):
            alone = kernels.segment(maps[i], features[i], **options)
            assert torch.equal(alone.decision_map, together.decision_map[i])
        monkeypatch.setattr(gpu, "SCRATCH_BYTES", 1)
        gpu.GRAPHS.clear()
        parts = kernels.segment(maps.flip(0), features.flip(0), **options)
        assert torch.equal(parts.decision_map.flip(0), together.decision_map)
        gpu.GRAPHS.clear()

    def test_one_iteration_is_not_enough(self, device, rng):
        maps, features = inputs(rng, (20, 20), (6, 5, 5))
        got = kernels.segment(maps.to(device), features.to(device), C=1.0, tol=1e-9, max_iter=1, backend="gpu")
        assert got.status == ["not_converged"]
        assert got.decision_map.abs().max() > 0


@pytest.mark.interpret
@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
def test_no_bit_depends_on_the_order_of_threads(rng, monkeypatch, loss):
    """Labels and solver, three warps a block, threads and blocks forwards and backwards: a race would show."""
    from ttt4as_fast.kernels.gpu_common import cuda

    from . import emulator
    from .conftest import require_interpreter

    require_interpreter()
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    from ttt4as_fast.kernels.segment import gpu

    maps, features = inputs(rng, (26, 30), (6, 5, 6), batch=2)
    candidates, limit = nominal_candidates((26, 30), 12)
    options = {"percentile": 98.0, "neighbor_radius": 2, "C": 0.1, "loss": loss, "tol": 1e-3, "max_iter": 40}
    results = []
    for backwards in (False, True):
        monkeypatch.setitem(cuda.LAUNCHERS, "cpu", emulator.Emulator(96, backwards))
        results.append(gpu.segment(maps, features, skip=None, candidates=candidates, limit=limit, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().max() > 0


@pytest.mark.usefixtures("cuda_source")
class TestMemory:
    """A problem that fits no shared memory, and one whose Gram matrix is not formed: slower ways, same answer."""

    def test_vectors_and_gram_in_global_memory(self, device, rng, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import cuda

        if device.type == "cuda":
            pytest.skip("the limit is the device's own")
        maps, features = inputs(rng, (24, 24), (6, 6, 6))
        monkeypatch.setattr(cuda, "shared_memory_limit", lambda device: 6 * 1024)
        check(device, maps, features)

    def test_gram_in_global_memory(self, device, rng, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import svm

        maps, features = inputs(rng, (24, 24), (6, 6, 6))
        monkeypatch.setattr(svm.Capacity, "shared_bytes", property(lambda self: 16 * self.vectors))
        check(device, maps, features)

    def test_every_amount_of_shared_memory(self, device, rng, monkeypatch):
        """Vectors, and K in 16 or in 32 bits, in shared memory or not."""
        from ttt4as_fast.kernels.gpu_common import svm
        from ttt4as_fast.kernels.segment import gpu

        maps, features = inputs(rng, (24, 24), (6, 6, 6))
        for size in range(1024, 20 * 1024, 1024):
            monkeypatch.setattr(svm.Capacity, "shared_bytes", property(lambda self, size=size: size))
            gpu.GRAPHS.clear()
            check(device, maps, features)

    def test_products_through_the_basis(self, device, rng, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import svm

        maps, features = inputs(rng, (24, 24), (6, 6, 6))
        monkeypatch.setattr(svm, "GRAM_CAPACITY", 8)
        check(device, maps, features)

    def test_capacity_is_of_shapes_alone(self):
        pytest.importorskip("triton")
        from ttt4as_fast.kernels.gpu_common.svm import Capacity
        from ttt4as_fast.kernels.gpu_common.tables import Same
        from ttt4as_fast.kernels.segment import gpu

        usual = Capacity(884, 1024, (224, 224), (28, 28), 232448)
        assert 16 * usual.vectors <= usual.shared_bytes <= 232448 - 4096
        assert usual.bytes < 16 << 20
        large = Capacity(20_000, 1024, (1024, 1024), (140, 140), 232448)
        assert 16 * large.vectors > large.shared_bytes and large.gram == 1024
        plan = gpu._Plan(Same(np.arange(4)), 4, 99.0, 2, 1e-3, "hinge", 1e-4, 10)
        huge, features = torch.empty((1, 1 << 15, 1 << 14), device="meta"), torch.empty((1, 4, 2, 2), device="meta")
        with pytest.raises(ValueError, match=r"anomaly_map: expected fewer than 2\*\*29 pixels, got 32768 x 16384"):
            plan.capacity(huge, features)
        small = Capacity(60, 4)
        assert small.gram == 64 and small.shared_bytes == 8 * 12 * 64 + 4 * 64 * 64


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["anomaly_map", "features"])
def test_not_finite(device, rng, where, value):
    """Raising would wait for the device: its code says so, the mask stays empty, other images are not touched."""
    from ttt4as_fast.kernels.segment import gpu

    maps, features = inputs(rng, (20, 22), (6, 5, 4), batch=2)
    candidates, limit = nominal_candidates((20, 22), 12)
    options = {
        "percentile": 99.0,
        "neighbor_radius": 2,
        "C": 1e-3,
        "loss": "squared_hinge",
        "tol": 1e-4,
        "max_iter": 99,
    }

    def run():
        return gpu.segment(
            maps.to(device), features.to(device), skip=None, candidates=candidates, limit=limit, **options
        )

    clean = run()
    if where == "features":
        features[1, 3, 2, 2] = value  # wherever it lies, every feature is read
    else:
        maps[1, 7, 7] = value
    mask, decision, labels, codes = run()
    assert codes.tolist() == [0, 4]
    assert not mask[1].any() and torch.isnan(decision[1]).all()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(clean, (mask, decision, labels, codes), strict=True))
    with pytest.raises(ValueError, match=r"non|finite values, got others in image \[1\]"):
        _ = kernels.Segmentation(mask, decision, labels, codes).status


def views(x):
    """`x` (B, C, h, w) as others may hand it over: name, and a tensor of the same values."""
    batch, channels, h, w = x.shape
    padded = torch.zeros((batch, channels + 1, h + 2, w + 3), dtype=x.dtype, device=x.device)
    padded[:, :channels, 1 : h + 1, 2 : w + 2] = x
    tokens = torch.zeros((batch, h * w + 1, channels), dtype=x.dtype, device=x.device)
    tokens[:, 1:] = x.flatten(2).transpose(1, 2)
    odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    odd.copy_(x)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "crop": padded[:, :channels, 1 : h + 1, 2 : w + 2],
        "tokens": tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w)),
        "odd address": odd,
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "one image of many": x.new_zeros((batch, 3, *x.shape[1:])).index_copy_(
            1, torch.tensor([1]).to(x.device), x[:, None]
        )[:, 1],
    }


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 8, 2, 3), (2, 1, 3, 3), (3, 4, 1, 1), (1, 1, 1, 7)], ids=str)
def test_features_reach_the_kernels_dense(rng, shape):
    """A kernel's sums may not depend on how the caller's tensor lies: the strides that it gets are those of memory."""
    pytest.importorskip("triton")
    from ttt4as_fast.kernels.gpu_common.layout import dense
    from ttt4as_fast.kernels.segment import gpu_stages

    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    for name, view in views(x).items():
        assert torch.equal(view, x), name
        found = dense(view)
        assert torch.equal(found, x) and found.data_ptr() % 16 == 0, name
        by_image, by_channel, by_cell = gpu_stages.strides(found)
        batch, channels, h, w = shape
        flat = found.as_strided((batch, channels, h * w), (by_image, by_channel, by_cell))
        assert torch.equal(flat, x.flatten(2)), name
        if name in ("contiguous", "channels last"):
            assert found.data_ptr() == view.data_ptr() or view.data_ptr() % 16, name


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_warmup_on_a_host_calls_once_and_has_no_graph(rng, preset):
    import ttt4as_fast as ttt

    maps, features = (x.numpy() for x in inputs(rng, (20, 20), (6, 5, 5)))
    assert ttt.TTT4AS(preset=preset).warmup(maps[0], features[0]) is False
    with pytest.raises(ValueError, match="features: expected a batch of 1"):
        ttt.TTT4AS(preset=preset).warmup(maps, np.concatenate([features, features]))
    maps[0, 3, 3] = np.nan
    with pytest.raises(ValueError, match="anomaly_map: expected finite"):
        ttt.TTT4AS(preset=preset).warmup(maps, features)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnDevice:
    OPTIONS: ClassVar = {"n_nominal": 30, "neighbor_radius": 3, "backend": "gpu"}

    def case(self, rng, batch=2):
        pytest.importorskip("cupy")
        return tuple(x.cuda() for x in inputs(rng, (56, 56), (64, 14, 14), batch))

    def same(self, a, b):
        assert torch.equal(a.pred_mask, b.pred_mask) and torch.equal(a.decision_map, b.decision_map)
        assert torch.equal(a.pseudo_labels, b.pseudo_labels) and torch.equal(a.status_code, b.status_code)

    def test_replay_gives_the_eager_bits(self, rng):
        from ttt4as_fast.kernels.segment import gpu

        gpu.GRAPHS.clear()
        cases = [self.case(rng) for _ in range(3)]
        eager = [kernels.segment(*case, **self.OPTIONS) for case in cases[:1]]
        replays = [kernels.segment(*case, **self.OPTIONS) for case in (*cases, cases[0])]
        self.same(eager[0], replays[0])
        self.same(eager[0], replays[3])
        gpu.GRAPHS.clear()
        for case, replay in zip(cases, replays, strict=False):
            self.same(kernels.segment(*case, **self.OPTIONS), replay)
            gpu.GRAPHS.clear()

    def test_warmup_captures_what_the_first_call_replays(self, rng, monkeypatch):
        import ttt4as_fast as ttt
        from ttt4as_fast.kernels.segment import gpu

        gpu.GRAPHS.clear()
        maps, features = self.case(rng, 1)
        call = ttt.TTT4AS(n_nominal=30, neighbor_radius=3, image_threshold=-1.0, backend="gpu")
        want = call(maps[0], features[0])
        gpu.GRAPHS.clear()
        assert call.warmup(torch.zeros_like(maps[0]), torch.zeros_like(features[0])) is True
        monkeypatch.setattr(gpu._Plan, "run", None)  # nothing is launched one by one any more
        self.same(call(maps[0], features[0]), want)
        gpu.GRAPHS.clear()

    def test_inference_mode_and_none(self, rng):
        from ttt4as_fast.kernels.segment import gpu

        gpu.GRAPHS.clear()
        maps, features = self.case(rng)
        with torch.inference_mode():
            inside = [kernels.segment(maps.clone(), features.clone(), **self.OPTIONS) for _ in range(3)]
        outside = [kernels.segment(maps, features.requires_grad_(), **self.OPTIONS) for _ in range(2)]
        for one in (*inside[1:], *outside):
            self.same(one, inside[0])

    @pytest.mark.parametrize("cells", [14, 16])
    def test_the_bits_do_not_depend_on_how_the_features_lie(self, rng, cells):
        """Neither on whether the call is replayed."""
        from ttt4as_fast.kernels.segment import gpu

        pytest.importorskip("cupy")
        maps, features = (x.cuda() for x in inputs(rng, (56, 56), (64, cells, cells), 2))
        found = {}
        for name, view in views(features).items():
            gpu.GRAPHS.clear()
            found[name] = [kernels.segment(maps, view, **self.OPTIONS) for _ in range(3)]
            last = name in ("channels last", "tokens")
            for one in found[name]:
                self.same(one, found["channels last" if last else "contiguous"][0])

    def test_keeps_no_history_of_its_inputs(self, rng):
        import ttt4as_fast as ttt

        maps, features = self.case(rng)
        module = ttt.nn.TTT4AS(n_nominal=30, neighbor_radius=3, backend="gpu")
        weight = torch.ones((), device="cuda", requires_grad=True)
        alive = []
        for _ in range(4):
            made = features * weight
            alive.append(weakref.ref(made))
            assert not module(maps, made).requires_grad
            del made
        assert [one() for one in alive] == [None] * 4

    @pytest.mark.parametrize("score", [None, 3.0, "host", "device"], ids=str)
    def test_no_synchronisation(self, rng, score):
        case = self.case(rng, 1)
        score = {"host": np.ones(1), "device": torch.ones(1, device="cuda")}.get(score, score)
        options = {**self.OPTIONS, "pred_score": score, "image_threshold": 0.5}
        for _ in range(3):
            kernels.segment(*case, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels.segment(*case, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_score_on_the_host_is_refused_inside_a_graph_of_the_callers(self, rng):
        case = self.case(rng, 1)
        options = {**self.OPTIONS, "image_threshold": 0.5}
        kernels.segment(*case, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(
                ValueError, match="pred_score: expected a tensor on cuda:0 while its stream is captured"
            ):
                kernels.segment(*case, pred_score=1.0, **options)
            out = kernels.segment(*case, **options)
        graph.replay()
        self.same(out, kernels.segment(*case, **options))

    def test_streams_and_threads(self, rng):
        cases = [self.case(rng) for _ in range(4)]
        want = [kernels.segment(*case, **self.OPTIONS) for case in cases]
        got: dict[int, object] = {}

        def work(i):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    got[i] = kernels.segment(*cases[i], **self.OPTIONS)
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        torch.cuda.synchronize()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(4):
            self.same(got[i], want[i])

    def test_inside_a_graph_of_the_callers(self, rng):
        case = self.case(rng)
        want = kernels.segment(*case, **self.OPTIONS)
        kernels.segment(*case, **self.OPTIONS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.segment(*case, **self.OPTIONS)
        graph.replay()
        self.same(out, want)
