"""CUDA graphs of calls that come again: which calls capture, which replay, and that the result is the eager call's."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")


class Work:
    """Stands for a call's launches: counts them."""

    def __init__(self):
        self.runs = 0

    def __call__(self, *inputs):
        self.runs += 1
        return "eager"


class Captured:
    """Stands for a graph; of 13 rows there is none, and of 14 there would have to be CuPy."""

    def __init__(self, work, inputs):
        if inputs[0].shape[0] == 13:
            raise RuntimeError("operation not permitted when stream is capturing")
        if inputs[0].shape[0] == 14:
            raise ImportError("No module named 'cupy'")
        self.bytes = 10 * inputs[0].nbytes
        self.used = SimpleNamespace(synchronize=lambda: None)

    def replay(self, inputs):
        return "replayed"


class TestWhichCallsCapture:
    CAPACITY = 3

    @pytest.fixture
    def cache(self):
        from ttt4as_fast.kernels.gpu_common.graphs import Graphs

        return Graphs("segment", self.CAPACITY, make=Captured)

    def test_the_second(self, cache):
        work, x = Work(), (torch.zeros(2, 2),)
        assert [cache.run("a", work, x) for _ in range(3)] == ["eager", "replayed", "replayed"]
        assert work.runs == 1
        cache.clear()
        assert cache.run("a", work, x) == "eager"

    def test_by_options_shape_strides_dtype_and_what_is_given(self, cache):
        x = torch.zeros(2, 2)
        calls = [("a", (x,)), ("b", (x,)), ("a", (x[:1],)), ("a", (x.T,)), ("a", (x.double(),)), ("a", (x, None))]
        assert [cache.run(options, Work(), inputs) for options, inputs in calls] == ["eager"] * 6
        assert cache.run("a", Work(), (torch.ones(2, 2),)) == "replayed"

    def test_capture_is_at_once(self, cache):
        work, x = Work(), (torch.zeros(2, 2),)
        assert cache.capture("a", work, x) is True
        assert cache.run("a", work, x) == "replayed"

    @pytest.mark.parametrize("turned_off", [False, True])
    def test_none_inside_the_capture_of_another(self, cache, monkeypatch, turned_off):
        if turned_off:
            monkeypatch.setenv("TTT4AS_CUDA_GRAPHS", "0")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with FakeTensorMode():
            x = torch.empty(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="segment: warm up before the capture"):
            cache.capture("a", Work(), (None, x))
        assert not cache.kinds

    def test_least_recently_used_goes_first(self, cache):
        work, x = Work(), (torch.zeros(2, 2),)
        for key in range(self.CAPACITY):
            cache.capture(key, work, x)
        cache.run(0, work, x)
        cache.capture("new", work, x)
        assert [key for key, _ in cache.kinds] == [2, 0, "new"] and len(cache.graphs) == 3

    def test_more_shapes_than_graphs_do_not_capture_by_turns(self, cache):
        """A capture takes as long as a dozen calls."""
        from ttt4as_fast.kernels.gpu_common import graphs

        made = []
        cache.make = lambda *arguments: made.append(1) or Captured(*arguments)
        work, x = Work(), (torch.zeros(2, 2),)
        for _ in range(5 * graphs.PATIENCE):
            for key in range(self.CAPACITY + 1):
                cache.run(key, work, x)
        assert len(made) == self.CAPACITY

    def test_shapes_that_are_used_no_more_make_room(self, cache):
        from ttt4as_fast.kernels.gpu_common import graphs

        work, x = Work(), (torch.zeros(2, 2),)
        for key in range(2 * self.CAPACITY):
            for _ in range(graphs.PATIENCE):
                cache.run(key, work, x)
            assert cache.run(key, work, x) == "replayed" or key >= self.CAPACITY
        for _ in range(graphs.PATIENCE + 1):
            for key in range(self.CAPACITY, 2 * self.CAPACITY):
                cache.run(key, work, x)
        assert all(cache.run(key, work, x) == "replayed" for key in range(self.CAPACITY, 2 * self.CAPACITY))
        assert len(cache.graphs) == self.CAPACITY

    def test_one_off_shapes_are_forgotten_but_no_graph(self, cache):
        work, x = Work(), (torch.zeros(2, 2),)
        cache.capture("kept", work, x)
        for key in range(1000):
            cache.run(key, work, x)
        assert len(cache.kinds) <= 8 * self.CAPACITY and cache.run("kept", work, x) == "replayed"

    def test_the_environment_turns_them_off(self, cache, monkeypatch):
        work, x = Work(), (torch.zeros(2, 2),)
        cache.capture("a", work, x)
        monkeypatch.setenv("TTT4AS_CUDA_GRAPHS", "0")
        assert [cache.run("a", work, x) for _ in range(3)] == ["eager"] * 3
        assert cache.capture("b", work, x) is False

    def test_another_thread_launches_while_one_captures(self, cache):
        work, x = Work(), (torch.zeros(2, 2),)
        meanwhile = []

        def make(*arguments):
            meanwhile.append(cache.run("a", work, x))  # the lock is free, and nothing is captured twice
            return Captured(*arguments)

        cache.make = make
        cache.run("a", work, x)
        assert cache.run("a", work, x) == "replayed" and meanwhile == ["eager"]

    def test_without_cupy_there_are_none_and_it_is_said_once(self, cache):
        from ttt4as_fast.kernels import dispatch

        dispatch.warn_once.cache_clear()
        x = (torch.zeros(14, 2),)
        with pytest.warns(dispatch.BackendWarning, match="segment: no CUDA graphs without CuPy"):
            assert cache.capture("a", Work(), x) is False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cache.capture("b", Work(), x) is False
            assert cache.run("a", Work(), x) == "eager"

    def test_a_failed_capture_warns_once_and_runs_eagerly(self, cache):
        from ttt4as_fast.kernels.dispatch import BackendWarning

        work, x = Work(), (torch.zeros(13, 2),)
        assert cache.run("a", work, x) == "eager"
        with pytest.warns(BackendWarning, match="segment: no CUDA graph for .13, 2"):
            assert cache.run("a", work, x) == "eager"
        assert cache.run("a", work, x) == "eager" and work.runs == 3
        with pytest.warns(BackendWarning):
            assert cache.capture("b", work, x) is False


class TestHowMuchGraphsHold:
    ROW = torch.zeros(1, 10, dtype=torch.uint8)  # whose graph holds 100 bytes

    @pytest.fixture
    def cache(self):
        from ttt4as_fast.kernels.gpu_common.graphs import Graphs

        self.made = []
        return Graphs("segment", 9, 250, make=lambda work, inputs: self.made.append(1) or Captured(work, inputs))

    def rows(self, n):
        return (self.ROW.expand(n, -1),)

    def test_the_least_recently_used_go_for_a_new_one(self, cache):
        work = Work()
        assert all(cache.capture(key, work, self.rows(1)) for key in "ab")
        assert cache.run("a", work, self.rows(1)) == "replayed"
        assert cache.capture("c", work, self.rows(1))
        assert [key for key, _ in cache.kinds] == ["a", "c"]
        assert cache.capture("d", work, self.rows(2))
        assert [key for key, _ in cache.kinds] == ["d"] and len(cache.graphs) == 1

    def test_what_holds_more_has_none_and_costs_the_others_nothing(self, cache):
        """One that does not fit is captured once, to find that out, and not at all where its inputs do not fit."""
        work = Work()
        assert cache.capture("a", work, self.rows(1))
        assert [cache.run("b", work, self.rows(3)) for _ in range(9)] == ["eager"] * 9 and len(self.made) == 2
        assert cache.capture("b", work, self.rows(3)) is False and len(self.made) == 2
        assert cache.capture("c", work, self.rows(26)) is False and len(self.made) == 2
        assert cache.run("a", work, self.rows(1)) == "replayed"

    def test_two_that_have_no_room_together_do_not_capture_by_turns(self, cache):
        from ttt4as_fast.kernels.gpu_common import graphs

        work = Work()
        for _ in range(5 * graphs.PATIENCE):
            for key in "ab":
                cache.run(key, work, self.rows(2))
        assert len(self.made) == 2 and len(cache.graphs) == 1
        for _ in range(graphs.PATIENCE + 1):
            cache.run("b", work, self.rows(2))
        assert cache.run("b", work, self.rows(2)) == "replayed" and len(cache.graphs) == 1

    def test_where_memory_runs_out_they_go_before_work_is_halved(self, cache, monkeypatch):
        """One after the other, of all operations."""
        from ttt4as_fast.kernels.dispatch import BackendWarning
        from ttt4as_fast.kernels.gpu_common import graphs, memory

        monkeypatch.setattr(graphs, "_ALL", weakref.WeakSet())
        other = graphs.Graphs("KnnIndex.search", 2, make=Captured)
        graphs._ALL.update((cache, other))
        calls = [(cache, "a"), (other, "b"), (cache, "c")]
        for where, key in calls:
            assert where.capture(key, Work(), self.rows(1))
        kept = []

        def work(start, stop):
            kept.append([key for where, key in calls if where.run(key, Work(), self.rows(1)) == "replayed"])
            if len(kept) < 3:
                raise torch.OutOfMemoryError("too much")

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert memory.in_chunks(work, 1, 1, "images") == 1
        assert kept == [["a", "b", "c"], ["b", "c"], ["c"]] and len(graphs._ALL) == 2
        with (
            pytest.warns(BackendWarning, match="going on with 1 images or fewer"),
            pytest.raises(torch.OutOfMemoryError),
        ):
            memory.in_chunks(lambda start, stop: (_ for _ in ()).throw(torch.OutOfMemoryError()), 2, 2, "images")
        assert not cache.graphs and not other.graphs

    def test_memory_of_a_replay_that_is_under_way_is_waited_for(self, cache, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import graphs

        monkeypatch.setattr(graphs, "_ALL", weakref.WeakSet([cache]))
        assert cache.capture("a", Work(), self.rows(1))
        (graph,) = cache.graphs
        alive, waited = weakref.ref(graph), []
        graph.used.synchronize = lambda: waited.append(alive() is not None)
        del graph
        assert graphs.drop_least_used(None) and waited == [True]
        assert alive() is None and not cache.graphs and not graphs.drop_least_used(None)


@pytest.mark.parametrize("why", ["off", "no room"])
def test_warmup_of_segment_compiles_without_a_graph_too(why, monkeypatch):
    from ttt4as_fast.kernels.segment import gpu

    if why == "off":
        monkeypatch.setenv("TTT4AS_CUDA_GRAPHS", "0")
    else:
        monkeypatch.setattr(gpu.GRAPHS, "most_bytes", 10)
    ran = []
    monkeypatch.setattr(gpu._Plan, "run", lambda plan, *inputs: ran.append(inputs))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    options = {"percentile": 99.0, "neighbor_radius": 5, "C": 1.0, "loss": "hinge", "tol": 1e-4, "max_iter": 9}
    maps, features = torch.zeros(1, 4, 4), torch.zeros(1, 2, 2, 2)
    assert gpu.warmup(maps, features, skip=None, candidates=np.arange(3), limit=3, **options) is False
    assert len(ran) == 1 and ran[0][0] is maps


def test_a_key_that_holds_an_object_keeps_its_place():
    from ttt4as_fast.kernels.gpu_common.tables import Same

    one, other = np.arange(3), np.arange(3)
    assert Same(one) == Same(one) and hash(Same(one)) == hash(Same(one)) and Same(one) != Same(other)
    assert Same(one) != one.tolist()


class TestBuffers:
    def test_made_in_inference_mode_can_be_written_outside(self):
        from ttt4as_fast.kernels.gpu_common import graphs

        with torch.inference_mode():
            x = torch.ones((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
            buffer = graphs._buffer_like(x)
        assert not buffer.is_inference() and buffer.stride() == x.stride()
        buffer.copy_(x)

    def test_copies_of_all_kinds_at_once(self, monkeypatch):
        from ttt4as_fast.kernels.gpu_common import graphs

        of = [torch.rand(3, 5).T, torch.arange(4), torch.tensor([True, False]), torch.rand(7).half(), torch.rand(2)]
        of += [torch.tensor([3, -4], dtype=torch.int8), torch.rand(40, 40), torch.rand(2, 2).bfloat16()]
        monkeypatch.setattr(graphs, "_SMALL", 1000)
        to = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in of]
        graphs._copy(to, of)
        assert all(torch.equal(a, b) for a, b in zip(to, of, strict=True))


@pytest.fixture
def made_up_device(monkeypatch):
    """Streams that say nothing, and a graph that runs its work again on the same tensors: what `Graph` asks of CUDA."""
    from ttt4as_fast.kernels.gpu_common import graphs

    stream = SimpleNamespace(
        wait_stream=lambda other: None, wait_event=lambda event: None, synchronize=lambda: None, device=None
    )
    captured = []

    class CUDAGraph:
        def replay(self):
            work, inputs, outputs = captured[-1]
            for kept, new in zip(outputs, work(*inputs), strict=True):
                kept.copy_(new)

    def capture(self, work):
        outputs = work(*self.inputs)
        captured.append((work, self.inputs, outputs))
        return outputs

    cuda = SimpleNamespace(
        Event=lambda: SimpleNamespace(record=lambda stream=None: None),
        CUDAGraph=CUDAGraph,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
    )
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    monkeypatch.setattr(graphs.Graph, "_capture", capture)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.usefixtures("made_up_device")
def test_a_replay_is_of_its_own_inputs_and_gives_tensors_of_the_callers(rng):
    from ttt4as_fast.kernels.gpu_common.graphs import Graphs

    def work(x, none, y):
        assert none is None and x.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
        return x * 2, y.sum((1, 2, 3)) > 0

    def inputs():
        x, y = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((5, 4), (2, 3, 4, 5)))
        return x.T, None, y.contiguous(memory_format=torch.channels_last)

    cache = Graphs("segment", 2)
    cases = [inputs() for _ in range(4)]
    want = [(x * 2, y.sum((1, 2, 3)) > 0) for x, _, y in cases]
    assert cache.capture("a", work, cases[0])
    assert cache.graphs[0].bytes == sum(x.nbytes for x in cases[0] if x is not None)
    found = [cache.run("a", work, case) for case in cases]
    for got, expected in zip(found, want, strict=True):  # none has been overwritten by a later one
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("made_up_device")
def test_a_replay_without_room_for_its_outputs_is_waited_for_too(monkeypatch):
    """By the next, from another stream: the graph's own inputs are being read."""
    from ttt4as_fast.kernels.gpu_common import graphs

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("too much")

    cache, x, recorded = graphs.Graphs("segment", 2), torch.ones(3), []
    assert cache.capture("a", lambda x: (2 * x,), (x,))
    cache.graphs[0].used.record = recorded.append
    monkeypatch.setattr(torch, "empty_like", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cache.run("a", None, (x,))
    assert len(recorded) == 1
