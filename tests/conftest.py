"""For all tests: poisoned allocations, so that reading memory nobody wrote fails a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

os.environ.pop("TTT4AS_BACKEND", None)  # a developer's setting must not choose what the tests test


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """`numpy.empty` and `torch.empty` of floats come filled with NaN."""
    import torch

    numpy_empty, torch_empty = np.empty, torch.empty

    def poisoned_numpy(*args, **kwargs):
        array = numpy_empty(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    def poisoned_torch(*args, **kwargs):
        tensor = torch_empty(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta and type(tensor) is torch.Tensor:
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(np, "empty", poisoned_numpy)
    monkeypatch.setattr(torch, "empty", poisoned_torch)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` with nothing compiled before, and without the methods that it leaves in `torch.nn.Module`.

    Behind those nobody finds the parameters of a subclass any more: configuration files of anomalib are refused.
    """
    import torch

    torch._dynamo.reset()
    for name in ("__init__", "__setstate__"):
        monkeypatch.setattr(torch.nn.Module, name, getattr(torch.nn.Module, name))
    monkeypatch.setattr(torch.nn.Module, "___needs_generation_tag_patch", True, raising=False)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Every file ends at 4 KiB: a write beyond fails as on a full disk, though with "File too large"."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
