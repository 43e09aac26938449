"""Bilinear upsampling and sampling: the reference against torch's interpolate, every backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ttt4as_fast import kernels

from .cases import DTYPES, TOLERANCE, tensor

OPERATION = "bilinear"
SHAPES = [
    ((1, 1, 1), (1, 1)),
    ((3, 1, 1), (7, 5)),
    ((5, 7, 3), (1, 1)),
    ((2, 28, 28), (224, 224)),
    ((13, 17, 19), (101, 97)),
    ((4, 16, 16), (16, 16)),
    ((3, 31, 29), (11, 7)),  # smaller than the features
    ((67, 5, 1), (64, 33)),
    ((2, 1, 300), (3, 301)),
]


def interpolate(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(x.astype(np.float64))[None], size, mode="bilinear")[0].numpy()


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_upsample_matches_torch(backend, rng, shape, size):
    x = rng.standard_normal(shape).astype(np.float32)
    got = kernels.bilinear_upsample(x, size, backend=backend)
    assert got.dtype == np.float32
    assert got.shape == (shape[0], *size)
    np.testing.assert_allclose(got, interpolate(x, size), rtol=0, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsample_dtypes(backend, rng, dtype):
    x = tensor(rng.standard_normal((2, 5, 9, 7)), dtype)
    got = kernels.bilinear_upsample(x, (31, 33), backend=backend)
    assert got.dtype == x.dtype
    want = F.interpolate(x.double(), (31, 33), mode="bilinear")
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * x.double().abs().max().item())


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),  # channels-last
        lambda x: np.repeat(np.repeat(x, 2, 1), 3, 2)[:, ::2, ::3],  # strided
        lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],  # negative strides
        lambda x: np.asfortranarray(x),
    ],
    ids=["channels-last", "strided", "negative", "fortran"],
)
def test_layouts_change_nothing(backend, rng, layout):
    x = rng.standard_normal((11, 13, 9)).astype(np.float32)
    other = layout(x)
    assert np.array_equal(x, other)
    rows, cols = rng.integers(0, 50, 64), rng.integers(0, 40, 64)
    np.testing.assert_array_equal(
        kernels.bilinear_upsample(other, (50, 40), backend=backend),
        kernels.bilinear_upsample(x, (50, 40), backend=backend),
    )
    np.testing.assert_array_equal(
        kernels.bilinear_sample(other, (50, 40), rows, cols, backend=backend),
        kernels.bilinear_sample(x, (50, 40), rows, cols, backend=backend),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_tensors_stay_so(backend, rng, dtype):
    x = tensor(rng.standard_normal((2, 37, 5, 6)), dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    got = kernels.bilinear_upsample(last, (11, 13), backend=backend)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == x.dtype
    assert torch.equal(got, kernels.bilinear_upsample(x, (11, 13), backend=backend))


def test_other_tensors_give_contiguous_ones_of_one_column_too(backend):
    """A tensor of one column may be taken for either layout, and torch's own upsampling of a crop takes the other."""
    crop = torch.rand(1, 4, 6, 9)[..., :7]
    assert kernels.bilinear_upsample(crop, (31, 1), backend=backend).is_contiguous()


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_sample_is_upsample_at_those_pixels(backend, rng, shape, size):
    x = rng.standard_normal(shape).astype(np.float32)
    rows, cols = rng.integers(0, size[0], 50), rng.integers(0, size[1], 50)
    got = kernels.bilinear_sample(x, size, rows, cols, backend=backend)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, interpolate(x, size)[:, rows, cols].T, rtol=0, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_dtypes_and_kind(backend, rng, dtype):
    x = tensor(rng.standard_normal((5, 9, 7)), dtype)
    rows = torch.arange(20)
    got = kernels.bilinear_sample(x, (31, 33), rows, rows.to(torch.int32), backend=backend)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    want = F.interpolate(x.double()[None], (31, 33), mode="bilinear")[0][:, rows, rows].T
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_no_pixels_give_an_empty_result(backend):
    assert kernels.bilinear_sample(np.ones((3, 4, 5)), (8, 8), [], [], backend=backend).shape == (0, 3)


def test_batch_is_each_image_alone(backend, rng):
    x = rng.standard_normal((3, 4, 6, 5)).astype(np.float32)
    batch = kernels.bilinear_upsample(x, 23, backend=backend)
    for one, result in zip(x, batch, strict=True):
        np.testing.assert_array_equal(kernels.bilinear_upsample(one, 23, backend=backend), result)


def test_constant_stays_constant(backend):
    x = np.full((2, 3, 5), 0.1, np.float32)
    np.testing.assert_allclose(kernels.bilinear_upsample(x, (17, 19), backend=backend), 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((np.ones((3, 4)), 8), ValueError, "features: expected 3 or 4 dimensions, got shape (3, 4)"),
        ((np.ones((3, 0, 4)), 8), ValueError, "features: expected no empty axis"),
        ((np.ones((3, 4, 4), complex), 8), TypeError, "features: expected dtype"),
        ((np.array(["a"]), 8), TypeError, "features"),
        (([[1], [1, 2]], 8), TypeError, "features"),
        ((np.ones((3, 4, 4)), 0), ValueError, "size[0]: expected an integer >= 1, got 0"),
        ((np.ones((3, 4, 4)), (8, 8.5)), TypeError, "size[1]"),
        ((np.ones((3, 4, 4)), (8, 8, 8)), TypeError, "size: expected (height, width)"),
    ],
)
def test_bad_input_is_named(backend, arguments, error, says):
    with pytest.raises(error) as caught:
        kernels.bilinear_upsample(*arguments, backend=backend)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "cols", "error", "says"),
    [
        ([8], [0], ValueError, "rows: expected pixels in [0, 8), got 8 to 8"),
        ([0], [-1], ValueError, "cols: expected pixels in [0, 8), got -1"),
        ([0, 1], [0], ValueError, "cols: expected as many as rows (2), got 1"),
        ([[0]], [[0]], ValueError, "rows: expected 1 dimension"),
        ([0.5], [0], TypeError, "rows: expected integers"),
    ],
)
def test_bad_pixels_are_named(backend, rows, cols, error, says):
    with pytest.raises(error) as caught:
        kernels.bilinear_sample(np.ones((3, 4, 4)), 8, rows, cols, backend=backend)
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [0.5, True, 1j])
@pytest.mark.parametrize("name", ["rows", "cols"])
def test_pixels_of_a_tensor_are_integers(backend, name, value):
    pixels = {"rows": torch.tensor([1]), "cols": torch.tensor([1]), name: torch.tensor([value])}
    with pytest.raises(TypeError, match=f"{name}: expected integers"):
        kernels.bilinear_sample(torch.ones(1, 2, 2), 4, **pixels, backend=backend)
