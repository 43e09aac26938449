"""What enters the operations: integers, byte orders, arrays with holes; and options of the wrong kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt4as_fast import TTT4AS, PatchCore, baselines, kernels, metrics
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


def test_tensors_whose_memory_has_the_other_sign():
    """`torch.conj` negates no memory: the imaginary part is a view that says that it is to be negated."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    seen = torch.complex(x, -x).conj().imag
    assert seen.is_neg() and torch.equal(seen, x)
    found = arrays.as_float_array(seen, "x", (2,))
    assert not found.is_neg() and torch.equal(found, x)
    assert torch.equal(kernels.KnnIndex(seen).search(x)[1][:, 0], torch.arange(12))
    assert torch.equal(kernels.k_center_greedy(seen, 5), kernels.k_center_greedy(x, 5))
    y = (x[:, 0] > 0).float()
    signs = torch.complex(y, -y).conj().imag
    assert torch.equal(kernels.fit_linear_svm(seen, signs).coef, kernels.fit_linear_svm(x, y).coef)


HOLES = {
    "masked": (lambda x: np.ma.masked_equal(x, 0), "without masked values, got [0-9]+ masked"),
    "sparse": (lambda x: torch.from_numpy(x).to_sparse(), "a dense tensor, got the layout sparse_coo"),
    "nested": (lambda x: torch.nested.nested_tensor([torch.from_numpy(x)]), "a dense tensor, got a nested one"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([torch.from_numpy(x)], layout=torch.jagged),
        "a dense tensor, got a nested one",
    ),
}


@pytest.mark.parametrize("kind", HOLES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_arrays_with_holes_are_refused_by_name(kind):
    make, message = HOLES[kind]
    whole = np.eye(4) if kind == "masked" else torch.eye(4)
    for name, call in {
        "anomaly_map": lambda: kernels.local_maxima(make(np.eye(4))),
        "features": lambda: kernels.segment(whole, make(np.eye(4)[None])),
        "pred_score": lambda: TTT4AS()(whole, whole[None], make(np.zeros(1))),
        "points": lambda: kernels.k_center_greedy(make(np.eye(4)), 2),
        "bank": lambda: kernels.KnnIndex(make(np.eye(4))),
        "X": lambda: kernels.fit_linear_svm(make(np.eye(4)), [0, 1, 0, 1]),
        "y": lambda: kernels.fit_linear_svm(np.eye(4), make(np.eye(4)[0])),
        "mask": lambda: kernels.dilate(make(np.eye(4) > 0), 1),
        "rows": lambda: kernels.bilinear_sample(whole[None], (4, 4), make(np.arange(4)), np.arange(4)),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: expected .*{message}"):
            call()


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_a_tensor_of_compressed_rows_is_refused():
    with pytest.raises(TypeError, match="anomaly_map: expected a dense tensor, got the layout sparse_csr"):
        kernels.local_maxima(torch.eye(4).to_sparse_csr())


def test_a_masked_array_that_masks_nothing_is_an_array():
    x = np.ma.masked_less(np.eye(4), 0)
    np.testing.assert_array_equal(kernels.local_maxima(x), kernels.local_maxima(np.eye(4)))


def test_shapes_on_the_device_meta_go_through():
    assert kernels.local_maxima(torch.zeros((4, 5), device="meta")).shape == (4, 5)


def meta(*shape):
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("X", lambda: kernels.fit_linear_svm(meta(4, 2), [0, 1, 0, 1])),
        ("y", lambda: kernels.fit_linear_svm(np.eye(4), meta(4))),
        ("sample_weight", lambda: kernels.fit_linear_svm(np.eye(4), [0, 1, 0, 1], sample_weight=meta(4))),
        ("bank", lambda: kernels.KnnIndex(meta(4, 2))),
        ("points", lambda: kernels.KnnIndex(dim=2).add(meta(4, 2))),
        ("rows", lambda: kernels.bilinear_sample(torch.ones(3, 2, 2), 4, meta(1).long(), torch.tensor([1]))),
        ("pred_score", lambda: TTT4AS(image_threshold=1.0)(torch.ones(8, 8), torch.ones(3, 2, 2), meta(1))),
        ("images", lambda: PatchCore().predict(meta(1, 3, 8, 8))),
        ("maps", lambda: baselines.otsu_mask(meta(4, 4))),
        ("pred_mask", lambda: metrics.mask_counts(meta(4, 4).bool(), np.eye(4, dtype=bool))),
    ],
)
def test_what_reads_values_refuses_the_device_meta(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor with values, got one on the device meta"):
        call()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_finite_values_whose_sum_is_not(dtype):
    arrays.check_finite(np.full(9, np.finfo(dtype).max), "x")


@pytest.mark.parametrize(("value", "got"), [(10**400, "inf"), (-(10**400), "-inf")], ids=["large", "small"])
def test_integers_beyond_the_floats(value, got):
    with pytest.raises(ValueError, match=rf"C: expected a number in \(0, inf\), got {got}"):
        arrays.check_float(value, "C", 0.0, open_low=True)


@pytest.mark.parametrize("value", [b"1", bytearray(b"1"), "1", True, None])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="C: expected a number"):
        arrays.check_float(value, "C", 0.0)


@pytest.mark.parametrize("value", [np.array(["a", "b"]), torch.ones(2), ["a"], None, 1])
def test_what_is_no_option(value):
    with pytest.raises(ValueError, match="loss: expected one of 'a', 'b', got "):
        arrays.check_option(value, "loss", ("a", "b"))


def test_labels_of_several_kinds():
    with pytest.raises(TypeError, match="y: expected labels of one kind"):
        kernels.fit_linear_svm(np.eye(3), np.array([None, "a", "a"], object))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("anomaly_map", lambda: kernels.local_maxima([[1.0], [1.0, 2.0]])),
        ("mask", lambda: kernels.dilate([[True], [True, False]], 1)),
        ("rows", lambda: kernels.bilinear_sample(np.ones((1, 2, 2)), 2, [[0], [0, 1]], [0])),
        ("y", lambda: kernels.fit_linear_svm(np.ones((2, 1)), [[0], [0, 1]])),
    ],
)
def test_lists_that_make_no_array_are_refused_by_name(name, call):
    with pytest.raises(TypeError, match=rf"^{name}: expected an array or tensor, got list"):
        call()
