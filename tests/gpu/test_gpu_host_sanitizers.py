"""Every CUDA C++ kernel and its ways under sanitizers: no unordered access, none past what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast.kernels.gpu_common.cuda import Unit
from ttt4as_fast.kernels.segment import nominal_candidates

from . import emulator, host_sanitizers, test_gpu_knn, test_gpu_knn_proposals
from .conftest import require_interpreter
from .test_gpu_segment import inputs

pytestmark = pytest.mark.interpret


@pytest.fixture(params=list(host_sanitizers.SANITIZERS))
def checked(request, monkeypatch) -> host_sanitizers.Sanitizer:
    """Launches of host tensors go through the check."""
    pytest.importorskip("triton", reason="Triton is not installed")
    reason = host_sanitizers.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    from ttt4as_fast.kernels.gpu_common import cuda, driver

    launcher = host_sanitizers.Sanitizer(request.param)
    monkeypatch.setitem(cuda.LAUNCHERS, "cpu", launcher)
    monkeypatch.setattr(driver, "tensor_map", emulator.tensor_map)
    return launcher


TURN = "slots[i] = x[i]; {} x[i] = slots[(i + 1) % 64];"
RAISE = "asked[i + {0}] = x[i]; x[i] = asked[i + {0}] + 1;"


@pytest.mark.parametrize(
    ("checked", "body", "wrong"),
    [
        ("races", TURN.format("__syncthreads();"), None),
        ("races", TURN.format(""), "data race"),
        ("races", TURN.format("__shfl_xor_sync(0xffffffffu, 1, 1);"), "data race"),
        ("memory", RAISE.format(0), None),
        ("memory", RAISE.format(1), "AddressSanitizer"),
        ("memory", "slots[i + 1] = x[i]; x[i] = slots[i + 1];", "out of bounds"),
        ("memory", "x[i] = x[i + 64];", "AddressSanitizer"),
    ],
    ids=["barrier", "none", "shuffle", "asked", "past-asked", "past-shared", "past-tensor"],
    indirect=["checked"],
)
def test_what_is_wrong_is_found(checked, tmp_path, monkeypatch, body, wrong):
    from ttt4as_fast.kernels.gpu_common import cuda

    (tmp_path / "turn.cu").write_text(
        'extern "C" __global__ void turn(int* x) {\n    __shared__ int slots[64];\n    DYNAMIC_SHARED(int, asked);\n'
        f"    (void)slots, (void)asked;\n    const int i = threadIdx.x;\n    {body}\n}}\n"
    )
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path)
    caches = (cuda.source, host_sanitizers.program, emulator.library)
    for cache in caches:
        cache.cache_clear()
    x = torch.arange(64, dtype=torch.int32)
    if wrong is None:
        checked(Unit("turn.cu"), "turn", 1, 64, 256, (x,))
        assert x.tolist() == ([*range(1, 64), 0] if checked.kind == "races" else list(range(1, 65)))
    else:
        with pytest.raises(host_sanitizers.SanitizerError, match=wrong):
            checked(Unit("turn.cu"), "turn", 1, 64, 256, (x,))
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_peaks(checked, rng, kind):
    x = torch.from_numpy((np.round(rng.standard_normal((1, 23, 41)) * 3)).astype(kind))
    out, scratch = torch.zeros(x.shape, dtype=torch.bool), torch.zeros(2 * 23 * 2, dtype=torch.int32)
    name = f"local_maxima_f{x.element_size() * 8}"
    checked(Unit("peaks/peaks.cu"), name, 1, 1024, 0, (x, out, np.int32(23), np.int32(41), np.float64(95.0)))
    grown = torch.zeros_like(out)
    checked(
        Unit("peaks/peaks.cu"), "dilate", 1, 1024, 0, (out, grown, scratch, np.int32(23), np.int32(41), np.int32(3))
    )
    assert 0 < out.sum() < grown.sum()


def test_knn(checked, rng):
    """Seeds, single rows, whole groups in several rounds; rows read 16 bytes at a time and number by number."""
    bank = torch.from_numpy(rng.integers(0, 4, (150, 16)).astype(np.float32))
    for rows, bound in ((bank, 4.0), (bank[:, 1:], 1e6)):
        test_gpu_knn.TestRefining().check(rows[:1] + 0.5, rows, 5, "cuda", torch.device("cpu"), bound=bound)


@pytest.mark.parametrize("checked", ["races"], indirect=True)
@pytest.mark.parametrize("listed", [False, True])
def test_knn_looks_twice(checked, rng, listed):
    """The seed is the nearest; a group that the second look is at has rows that may be, or the first look's, too."""
    bank = torch.from_numpy(rng.standard_normal((268 * 32, 1)).astype(np.float32) / 9 + 9)
    bank[0], bank[test_gpu_knn.rows_of(266, torch.tensor([3, 4]))] = 1, 1.1
    if listed:
        bank[test_gpu_knn.rows_of(8, torch.tensor(5))] = 1.1
    test_gpu_knn.TestRefining().check(torch.zeros(1, 1), bank, 1, "cuda", torch.device("cpu"), slack=1e-2)


@pytest.mark.parametrize("checked", ["memory"], indirect=True)
def test_knn_lists_two_rows_of_every_group(checked, rng):
    checked.threads = 128  # as many as a GPU has, of which each looks at some groups at once
    test_gpu_knn.TestRefining().test_two_rows_of_every_group(torch.device("cpu"), rng)


def test_knn_excludes_by_float16_copies(checked, rng):
    """Proposals of its own, whose groups hold several of the nearest."""
    require_interpreter()
    bank = torch.from_numpy(rng.standard_normal((130, 16)).astype(np.float32))
    test_gpu_knn.check(bank[:2] + 0.1, bank, 9, torch.device("cpu"))


@pytest.mark.parametrize("kept", [2, 3])
def test_knn_proposes_by_the_hardware_of_hopper(checked, rng, monkeypatch, kept):
    """A block has more tiles than stages, each warpgroup several, the last of few queries and vectors."""
    require_interpreter()
    from ttt4as_fast.kernels.knn import hopper

    search = test_gpu_knn_proposals.Proposing(rng, (60, 270, 100), torch.device("cpu"))
    monkeypatch.setattr(hopper, "processors", lambda device: 1)
    monkeypatch.setattr(hopper, "QUERIES", (56,))
    found = search.run(search.index._propose_hopper, kept)
    assert torch.equal(search.run(search.index._propose), found[:2])


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({}, {}),
        ({"loss": "hinge", "C": 1.0}, {}),  # directions in float64 too
        ({"limit": 40}, {}),  # nominal samples are pixels, not points; a K too large for registers
        ({}, {"GRAM_CAPACITY": 8}),  # products through the basis
        ({"batch": 2}, {"_RESERVED": 48 * 1024 - 2048}),  # everything in global memory
    ],
    ids=["points", "hinge", "pixels", "basis", "global"],
)
def test_segment(checked, rng, monkeypatch, options, patches):
    require_interpreter()
    from ttt4as_fast.kernels.gpu_common import cuda, svm
    from ttt4as_fast.kernels.segment import gpu

    monkeypatch.setattr(cuda, "shared_memory_limit", lambda device: 48 * 1024)
    for name, value in patches.items():
        monkeypatch.setattr(svm, name, value)
    maps, features = inputs(rng, (26, 30), (7, 6, 6), batch=options.get("batch", 1))
    limit = options.get("limit", 12)
    candidates, limit = nominal_candidates((26, 30), limit)
    base = {"percentile": 98.0, "neighbor_radius": 2, "C": 0.1, "loss": "squared_hinge", "tol": 1e-3, "max_iter": 12}
    given = base | {name: value for name, value in options.items() if name not in ("batch", "limit")}
    mask, _, labels, codes = gpu.segment(maps, features, skip=None, candidates=candidates, limit=limit, **given)
    assert int(codes[0]) in (0, 3) and mask.any() and (labels != 0).any()
