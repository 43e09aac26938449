"""What enters the operations: integers and byte orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.kernels import arrays

WIDE = ("int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", *WIDE])
def test_integers_become_floats_that_hold_them(dtype):
    largest = 1 if dtype == "bool" else min(np.iinfo(dtype).max, 2**53)
    values = np.array([0, largest - 1, largest], dtype)
    for x in (values, torch.from_numpy(values)):
        found = arrays.as_float_array(x, "x", (1,))
        assert arrays.dtype_name(found) == ("float64" if dtype in WIDE else "float32")
        assert [int(value) for value in found] == [0, largest - 1, largest]


@pytest.mark.parametrize("kind", ["list", *WIDE])
def test_a_peak_that_float32_would_level(kind):
    values = np.full((5, 5), 2**24, np.int64)
    values[2, 3] += 1
    x = values.tolist() if kind == "list" else values.astype(kind)
    assert np.argwhere(kernels.local_maxima(x, 100)).tolist() == [[2, 3]]
    if kind != "list":
        assert kernels.local_maxima(torch.from_numpy(x), 100).nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u2"])
def test_the_other_byte_order(dtype):
    here = np.random.default_rng(0).integers(0, 100, (9, 3)).astype(dtype)
    swapped = here.astype(here.dtype.newbyteorder())
    for one, other in zip(
        kernels.nearest_neighbors(here, here, 3), kernels.nearest_neighbors(swapped, here, 3), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    y = np.arange(9) % 2
    np.testing.assert_array_equal(kernels.fit_linear_svm(swapped, y).coef, kernels.fit_linear_svm(here, y).coef)
    np.testing.assert_array_equal(kernels.local_maxima(swapped), kernels.local_maxima(here))
