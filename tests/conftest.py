"""For all tests: poisoned allocations, so that reading memory nobody wrote fails a comparison."""

from __future__ import annotations

import os

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
