"""The parity suite of the GPU backends, twice: interpreted on host tensors, and on a real device where there is one.

Without a GPU, Triton's kernels run in its interpreter and the CUDA C++ kernels in `emulator`; both compute what the
device computes, from the same source. Beside a GPU, ``TRITON_INTERPRET=1 pytest tests/gpu -m interpret`` does so too.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ..untraced import untraced

CUDA = torch.cuda.is_available()
# Triton reads the variable once, when it is imported.
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)],
    ids=["interpreted", "cuda"],
)
def device(request, monkeypatch) -> Iterator[torch.device]:
    """Where the test's tensors live; the backend ``"gpu"`` serves it."""
    from ttt4as_fast.kernels import dispatch

    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda":
        if not CUDA:
            pytest.skip("no CUDA device")
        yield torch.device("cuda", torch.cuda.current_device())
        return
    require_interpreter()
    from triton.runtime.interpreter import GridExecutor

    from ttt4as_fast.kernels.gpu_common import cuda, driver

    from . import emulator

    # The bodies of kernels do not count for coverage; interpreting one is Triton's Python.
    monkeypatch.setattr(GridExecutor, "__call__", untraced()(GridExecutor.__call__))
    if emulator.compiler():
        monkeypatch.setitem(cuda.LAUNCHERS, "cpu", emulator.Emulator())
        monkeypatch.setattr(driver, "tensor_map", emulator.tensor_map)
    dispatch._why_not.cache_clear()
    yield torch.device("cpu")
    dispatch._why_not.cache_clear()


@pytest.fixture
def cuda_source(device) -> None:
    """The test launches CUDA C++ kernels."""
    if device.type == "cuda":
        pytest.importorskip("cupy", reason="CuPy is not installed")
        return
    from . import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler to build CUDA sources for the host with")


def require_interpreter() -> None:
    """Skip beside a GPU, fail where Triton came too early to interpret."""
    import triton

    from ttt4as_fast.kernels.gpu_common import capability

    if not capability.interpreting():
        if CUDA:
            pytest.skip("a GPU is here: the same tests run on it; TRITON_INTERPRET=1 runs these too")
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set: import tests/gpu/conftest.py earlier")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"Triton {triton.__version__}'s interpreter cannot run loops with NumPy {np.__version__}")


FAR = 2**31
"""Numbers from a row to the next: in units of 16 of them a stride that 32 bits hold."""


@pytest.fixture
def far_apart(device) -> torch.Tensor:
    """(3, 16) float16: rows of 0, 1 and 5 that lie `FAR` apart, in memory of which they alone are ever touched."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("less than 24 GiB of free device memory")
        memory = torch.zeros(2 * FAR + 16, dtype=torch.float16, device=device)
        rows = memory.as_strided((3, 16), (FAR, 1))
    else:
        no_reserve = 0x4000  # Linux; Python names it from 3.13 on
        try:
            memory = mmap.mmap(-1, 10 * FAR, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        except OSError as error:
            pytest.skip(f"no {10 * FAR} addresses: {error}")
        # In the middle, so that strides that wrap around find zeros.
        rows = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 16), (FAR, 1), 2 * FAR)
    return rows.copy_(torch.tensor([[0.0], [1.0], [5.0]]))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240617)
