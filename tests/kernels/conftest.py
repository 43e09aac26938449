"""Every test of an operation runs over its backends."""

from __future__ import annotations

import numpy as np
import pytest

from ttt4as_fast import kernels


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` in a test's arguments: every backend of the module's OPERATION that can serve host arrays here."""
    if "backend" in metafunc.fixturenames:
        usable = kernels.backends()[metafunc.module.OPERATION]
        metafunc.parametrize(
            "backend",
            [
                pytest.param(name, marks=[] if reason is None else pytest.mark.skip(reason=reason))
                for name, reason in usable.items()
            ],
        )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240617)
