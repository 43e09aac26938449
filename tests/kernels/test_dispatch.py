"""Backend choice, and the torch operators: compiled, exported and checked by torch's own tools."""

from __future__ import annotations

import contextlib
import importlib.machinery
import re
import sys
import threading
import types
import warnings
from dataclasses import astuple, fields

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.kernels import dispatch
from ttt4as_fast.kernels.segment import SegmentOptions
from ttt4as_fast.kernels.segment_robust import RobustOptions


@pytest.fixture
def operation(monkeypatch):
    """An operation of three backends: one that lacks a library, one that works, the reference."""
    package = "ttt4as_fast.kernels.made_up"
    for name, reason in {"gpu": "no device", "cpu": None, "reference": None}.items():
        module = types.ModuleType(f"{package}.{name}")
        module.unavailable = lambda device, reason=reason: reason
        module.ARRAYS = "numpy"
        module.double = lambda x, name=name: x * 2
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    dispatch._why_not.cache_clear()
    dispatch.warn_once.cache_clear()
    yield dispatch.Operation("made_up", host=("gpu", "cpu", "reference"), cuda=("gpu", "reference"))
    dispatch._why_not.cache_clear()


def test_automatic_choice_falls_back_with_one_warning(operation):
    with pytest.warns(dispatch.BackendWarning, match="made_up: backend 'gpu' is not usable .no device."):
        assert operation.resolve("auto", "cpu").__name__.endswith("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operation.resolve("auto", "cpu")
        assert operation.resolve("auto", "cuda").__name__.endswith("reference")  # no word of a backend that is missing


def test_an_operation_without_a_gpu_backend_says_once_that_tensors_travel(operation):
    host_only = dispatch.Operation("made_up", host=("cpu", "reference"), cuda=("cpu", "reference"))
    with pytest.warns(dispatch.BackendWarning, match="made_up: has no backend for cuda; tensors go to the host"):
        assert host_only.resolve("auto", "cuda").__name__.endswith("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host_only.resolve("auto", "cuda")
        host_only.resolve("auto", "cpu")
        host_only.resolve("cpu", "cuda")  # named, so nobody has to be told


def test_a_named_backend_serves_or_raises(operation, monkeypatch):
    assert operation.resolve("reference", "cpu").__name__.endswith("reference")
    with pytest.raises(RuntimeError, match="backend='gpu' cannot serve made_up on cpu: no device"):
        operation.resolve("gpu", "cpu")
    with pytest.raises(
        ValueError, match="backend: expected one of 'auto', 'gpu', 'cpu', 'reference' for made_up, got 'fast'"
    ):
        operation.resolve("fast", "cpu")
    monkeypatch.setenv("TTT4AS_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match="TTT4AS_BACKEND='gpu' cannot serve made_up"):
        operation.resolve("auto", "cpu")
    assert operation.resolve("cpu", "cpu").__name__.endswith("cpu")  # the argument comes first
    monkeypatch.setenv("TTT4AS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="TTT4AS_BACKEND: expected one of"):
        operation.resolve("auto", "cpu")


def test_a_backend_that_another_thread_imports_is_waited_for(monkeypatch, tmp_path):
    package = types.ModuleType("ttt4as_fast.kernels.made_up")
    package.__path__ = [str(tmp_path)]
    package.begun, package.go_on = threading.Event(), threading.Event()
    lines = [
        "import sys",
        f"package = sys.modules[{package.__name__!r}]",
        "package.begun.set()",
        "package.go_on.wait(60)",
    ]
    (tmp_path / "slow.py").write_text("\n".join([*lines, "def unavailable(device): return None"]))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    operation = dispatch.Operation("made_up", host=("slow",), cuda=("slow",))
    found = []
    threads = [threading.Thread(target=lambda: found.append(operation.resolve("slow", "cpu"))) for _ in range(2)]
    threads[0].start()
    assert package.begun.wait(60)
    threads[1].start()
    threads[1].join(0.2)  # it took the half of the module that was there, and raised
    package.go_on.set()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] is found[1] is sys.modules.pop(f"{package.__name__}.slow")


OPERATIONS = {
    "segment": (np.eye(9), np.ones((2, 3, 3))),
    "segment_robust": (np.eye(9), np.ones((2, 3, 3))),
    "bilinear_upsample": (np.ones((2, 3, 3)), 4),
    "bilinear_sample": (np.ones((2, 3, 3)), 4, np.arange(2), np.arange(2)),
    "nearest_neighbors": (np.eye(3), np.eye(3)),
    "local_maxima": (np.eye(3),),
    "dilate": (np.eye(3) > 0, 1),
    "k_center_greedy": (np.eye(3), 2),
    "fit_linear_svm": (np.eye(3), np.array([0, 1, 1])),
}


@pytest.mark.parametrize("other", ["fast", None, b"cpu", np.array(["cpu"])], ids=repr)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_takes_the_backends_it_has(name, kind, other):
    given = [kind(x) if isinstance(x, np.ndarray) else x for x in OPERATIONS[name]]
    with pytest.raises(ValueError, match=rf"^backend: expected one of 'auto', .*, got {re.escape(repr(other))}$"):
        getattr(kernels, name)(*given, backend=other)


def test_an_empty_index_takes_the_backends_there_are():
    with pytest.raises(ValueError, match=r"^backend: expected one of 'auto', .* for knn, got None"):
        kernels.KnnIndex(dim=3, backend=None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_arrays_need_no_torch_that_another_thread_imports(name, monkeypatch):
    half = types.ModuleType("torch")  # nothing of it is there yet
    half.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    half.__spec__._initializing = True
    want = getattr(kernels, name)(*OPERATIONS[name])
    monkeypatch.setitem(sys.modules, "torch", half)
    got = getattr(kernels, name)(*OPERATIONS[name])
    monkeypatch.undo()
    np.testing.assert_equal(
        vars(got) if hasattr(got, "__dict__") else got, vars(want) if hasattr(want, "__dict__") else want
    )


class TestSeveralDevices:
    """What a backend says of one is not what it says of another, nor what it said while memory was short."""

    @pytest.fixture
    def current(self, monkeypatch):
        """Two devices, made up; the one that is current."""
        found = [0]

        @contextlib.contextmanager
        def device_of(x):
            before, found[0] = found[0], int(x[0])
            yield
            found[0] = before

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: found[0])
        monkeypatch.setattr(dispatch.arrays, "device_type", lambda x: "cuda")
        monkeypatch.setattr(dispatch.arrays, "device_of", device_of)
        return found

    def test_each_is_asked_once_and_is_current_then(self, operation, current, monkeypatch):
        asked = []

        def unavailable(device):
            asked.append(current[0])
            return None if current[0] else "too old"

        monkeypatch.setattr(operation.module("gpu"), "unavailable", unavailable)
        for _ in range(2):
            operation.run("double", {"x": torch.ones(2)}, "gpu")
            with pytest.raises(RuntimeError, match="cannot serve made_up on cuda: too old"):
                operation.run("double", {"x": torch.zeros(2)}, "gpu")
        assert asked == [1, 0]

    @pytest.mark.usefixtures("current")
    @pytest.mark.parametrize(
        ("passing", "error"),
        [
            ("out of memory", torch.OutOfMemoryError),
            ("operation not permitted when stream is capturing", RuntimeError),  # another thread's
        ],
    )
    def test_what_may_pass_is_not_remembered(self, operation, monkeypatch, passing, error):
        from ttt4as_fast.kernels.gpu_common.capability import reason_of

        errors = [RuntimeError(f"Triton Error [CUDA]: {passing}"), RuntimeError("no compiler")]
        monkeypatch.setattr(operation.module("gpu"), "unavailable", lambda device: reason_of(errors[0], "Triton"))
        monkeypatch.setattr(kernels, "OPERATIONS", (operation,))
        with pytest.raises(error, match="Triton cannot run a kernel here"):
            operation.resolve("auto", "cuda")
        assert passing in kernels.backends("cuda")["made_up"]["gpu"]
        del errors[0]
        for _ in range(2):
            assert operation.why_not("gpu", "cuda").endswith("(RuntimeError: no compiler)")
            errors[0] = RuntimeError("something else")


def test_a_host_backend_gets_host_arrays_in_its_options_too(operation, monkeypatch):
    seen = []
    module = operation.module("cpu")
    monkeypatch.setattr(module, "double", lambda x, skip: seen.append((x, skip)) or x, raising=False)
    operation.run("double", {"x": torch.ones(3)}, "cpu", skip=torch.ones(3, dtype=torch.bool))
    assert all(isinstance(x, np.ndarray) for x in seen[0])


def test_results_come_back_as_they_went(operation):
    assert isinstance(operation.run("double", {"x": np.ones(3)}, "cpu"), np.ndarray)
    doubled = operation.run("double", {"x": torch.ones(3, dtype=torch.bfloat16)}, "cpu")
    assert isinstance(doubled, torch.Tensor)
    assert doubled.tolist() == [2, 2, 2]


def test_what_comes_from_a_device_is_looked_at_on_the_host(operation, monkeypatch):
    monkeypatch.setattr(dispatch.arrays, "device_type", lambda x: "cuda")
    with pytest.raises(ValueError, match=r"x: expected finite values, got nan at \(1,\)"):
        operation.run("double", {"x": torch.tensor([0.0, torch.nan])}, "reference")
    upsampled = kernels.bilinear.OPERATION.run(
        "upsample", {"features": torch.full((1, 2, 2), torch.nan)}, "cpu", height=4, width=4
    )
    assert upsampled.isnan().all()


def test_backends_tells_what_is_usable():
    for device in ("cpu", "cuda"):
        table = kernels.backends(device)
        assert set(table) == {"bilinear", "knn", "coreset", "peaks", "linear_svm", "segment", "segment_robust"}
        for name, choices in table.items():
            assert choices["reference"] is None, name
            assert all(reason is None or reason for reason in choices.values())
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'tpu'"):
        kernels.backends("tpu")


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.rand((2, 33, 35), generator=generator), torch.rand((2, 6, 7, 5), generator=generator)


CALLS = {
    "segment": lambda m, f: kernels.segment(m, f).pred_mask,
    "segment_robust": lambda m, f: kernels.segment_robust(m, f).pred_mask,
    "bilinear_upsample": lambda m, f: kernels.bilinear_upsample(f, (20, 21)),
    "bilinear_sample": lambda m, f: kernels.bilinear_sample(f[0], (20, 21), torch.arange(5), torch.arange(5)),
    "nearest_neighbors": lambda m, f: kernels.nearest_neighbors(m[0], m[1], 3)[0],
    "k_center_greedy": lambda m, f: kernels.k_center_greedy(m[0], 4, 1),
    "local_maxima": lambda m, f: kernels.local_maxima(m, 90.0),
    "dilate": lambda m, f: kernels.dilate(m > 0.9, 2),
}


class Call(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.call = CALLS[name]

    def forward(self, anomaly_map: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.call(anomaly_map, features)


@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("error:Dynamo detected a call")
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(monkeypatch, name):
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())
    want = CALLS[name](*inputs())
    got = torch.compile(Call(name), fullgraph=True, backend="aot_eager")(*inputs())
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("compiling")
def test_a_named_backend_compiles_without_a_graph_break():
    def call(anomaly_map, features):
        return kernels.segment(anomaly_map, features, backend="reference").pred_mask

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs()), call(*inputs()))


@pytest.mark.parametrize("name", CALLS)
def test_exports(name):
    exported = torch.export.export(Call(name), inputs())
    assert any(f"ttt4as.{name}" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*inputs()), CALLS[name](*inputs()))


def operator_samples():
    m, f = inputs()
    return {
        "segment": (m, f, None, *astuple(SegmentOptions()), "auto"),
        "segment_robust": (m, f, None, *astuple(RobustOptions()), "auto"),
        "bilinear_upsample": (f, 20, 21, "auto"),
        "bilinear_sample": (f[0], 20, 21, torch.arange(5), torch.arange(5), "auto"),
        "nearest_neighbors": (m[0], m[1], 3, "auto"),
        "k_center_greedy": (m[0], 4, 1, "auto"),
        "local_maxima": (m, 99.0, "auto"),
        "dilate": (m > 0.9, 2, "auto"),
    }


@pytest.mark.parametrize(("name", "options"), [("segment", SegmentOptions), ("segment_robust", RobustOptions)])
def test_operators_take_the_options_in_their_order(name, options):
    kernels.dilate(torch.ones((2, 2), dtype=torch.bool), 1)
    schema = getattr(torch.ops.ttt4as, name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == ["anomaly_map", "features", "score", *(field.name for field in fields(options)), "backend"]


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    kernels.dilate(torch.ones((2, 2), dtype=torch.bool), 1)  # the operators register on the first tensor
    torch.library.opcheck(getattr(torch.ops.ttt4as, name), operator_samples()[name])


def test_no_gradient_is_kept(monkeypatch):
    _, f = inputs()
    got = kernels.bilinear_upsample(f.requires_grad_(), (9, 9))
    assert not got.requires_grad
    recorded = []
    run = dispatch.Operation.run

    def spy(*args, **kwargs):
        recorded.append(torch.is_grad_enabled())
        return run(*args, **kwargs)

    monkeypatch.setattr(dispatch.Operation, "run", spy)
    torch.ops.ttt4as.bilinear_upsample(f.requires_grad_(), 9, 9, "auto")
    assert recorded == [False], "what a backend keeps would keep the history of its inputs"
