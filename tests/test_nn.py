"""The PyTorch module: the operation's masks, eager, compiled and exported; its threshold in the state dict."""

from __future__ import annotations

import pytest
import torch

import ttt4as_fast as ttt
from ttt4as_fast import nn


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand((batch, 40, 44), generator=generator), torch.rand((batch, 12, 7, 9), generator=generator)


@pytest.mark.parametrize("channel", [False, True], ids=["BHW", "B1HW"])
def test_masks_are_the_operations(channel):
    maps, features = inputs()
    module = nn.TTT4AS(neighbor_radius=2, C=0.1)
    got = module(maps[:, None] if channel else maps, features)
    want = ttt.TTT4AS(neighbor_radius=2, C=0.1)(maps, features).pred_mask
    assert torch.equal(got.reshape(want.shape), want)
    assert got.shape == (maps[:, None] if channel else maps).shape


def test_gate_is_a_buffer():
    maps, features = inputs()
    score = torch.tensor([0.1, 0.5, 0.9])
    module = nn.TTT4AS(image_threshold=0.5)
    assert module(maps, features, score).flatten(1).any(1).tolist() == [False, True, True]
    assert list(module.parameters()) == []
    open_gate = nn.TTT4AS()
    assert open_gate(maps, features, score).flatten(1).any(1).all()
    open_gate.load_state_dict(module.state_dict())
    assert torch.equal(open_gate(maps, features, score), module(maps, features, score))
    by_maximum = nn.TTT4AS(image_threshold=2.0)
    assert not by_maximum(maps, features).any()


@pytest.mark.usefixtures("compiling")
def test_compiles_whole():
    module = nn.TTT4AS(image_threshold=0.2)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(*inputs()), module(*inputs()))


def test_exports_with_a_dynamic_batch(tmp_path):
    module = nn.TTT4AS()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, inputs(), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(exported, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    for size in (2, 5):
        assert torch.equal(loaded(*inputs(size)), module(*inputs(size)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.rand(40, 44), torch.rand(1, 2, 3, 3)), "anomaly_map: expected"),
        ((torch.rand(2, 40, 44), torch.rand(1, 2, 3, 3)), "anomaly_map: expected"),
        ((torch.rand(1, 44), torch.rand(1, 2, 3, 3)), r"anomaly_map: expected \(B, H, W\)"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3), torch.rand(2)), "pred_score: expected shape"),
        ((torch.full((1, 8, 8), torch.nan), torch.rand(1, 2, 3, 3)), "anomaly_map: expected finite values"),
        ((torch.rand(1, 0, 8), torch.rand(1, 2, 3, 3)), r"anomaly_map: expected no empty axis, got shape \(1, 0, 8\)"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 0, 3)), "features: expected no empty axis"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3, device="meta")), "features: .* the device meta"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3), torch.rand(1, device="meta")), "pred_score: .* the device meta"),
        ((torch.rand(1, 8, 8, device="meta"), torch.rand(1, 2, 3, 3)), "features: expected device meta .* got cpu"),
    ],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        nn.TTT4AS()(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3).numpy()), "features: expected a tensor, got ndarray"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3), [1.0]), "pred_score: expected a tensor, got list"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3), 0.5), "pred_score: expected a tensor, got float"),
        ((torch.rand(1, 8, 8).cfloat(), torch.rand(1, 2, 3, 3)), "anomaly_map: .* real numbers, got torch.complex64"),
        ((torch.rand(1, 8, 8), torch.rand(1, 2, 3, 3), torch.rand(1).cfloat()), "pred_score: .* real numbers"),
        ((torch.rand(1, 8, 8).to_sparse(), torch.rand(1, 2, 3, 3)), "anomaly_map: expected a dense tensor"),
    ],
)
def test_what_is_no_tensor_of_real_numbers_is_named(arguments, says):
    with pytest.raises(TypeError, match=says):
        nn.TTT4AS()(*arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_threshold_that_is_none_is_not_loaded(bad):
    model = torch.nn.Sequential(nn.TTT4AS(image_threshold=0.5))
    with pytest.raises(ValueError, match=rf"^0\.image_threshold: expected a finite number, got {bad}"):
        model.load_state_dict({"0.image_threshold": torch.tensor(bad)})
    assert float(model[0].image_threshold) == 0.5
    model.load_state_dict({"0.image_threshold": torch.tensor(0.25)})
    assert float(model[0].image_threshold) == 0.25


@pytest.mark.parametrize(("bad", "error"), [(float("nan"), ValueError), ("high", TypeError)])
def test_a_threshold_is_a_number(bad, error):
    with pytest.raises(error, match="image_threshold: expected a number"):
        nn.TTT4AS(image_threshold=bad)


def test_repr_shows_the_threshold_as_it_stands():
    assert "image_threshold=None" in repr(nn.TTT4AS())
    module = nn.TTT4AS(image_threshold=7.5, backend="reference")
    assert "preset='paper'" in repr(module) and "image_threshold=7.5" in repr(module)
    assert "backend='reference'" in repr(module)
    module.load_state_dict({"image_threshold": torch.tensor(2.5)})
    assert "image_threshold=2.5" in repr(module)
    assert "meta" in repr(module.to("meta"))
    robust = repr(nn.TTT4AS("robust"))
    assert "preset='robust'" in robust and "score_weight=1.0" in robust


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_leaves_the_threshold(dtype):
    maps, features = torch.rand(2, 40, 44), torch.rand(2, 6, 5, 5)
    for threshold in (None, 47.1625, 1e300):
        module = nn.TTT4AS(image_threshold=threshold)
        want = module(maps, features)
        assert torch.equal(module.to(dtype)(maps, features), want)
        assert module.image_threshold.dtype == torch.float64
        assert threshold is None or float(module.image_threshold) == threshold
    assert nn.TTT4AS(image_threshold=1.5).to("meta").image_threshold.is_meta


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="percentile"):
        nn.TTT4AS(percentile=200)
    with pytest.raises(TypeError, match="radius"):
        nn.TTT4AS(radius=3)
    for kind in (nn.TTT4AS, ttt.TTT4AS):
        with pytest.raises(ValueError, match="backend: expected one of 'auto', 'gpu', 'cpu', 'reference', got 'no'"):
            kind(backend="no")
        with pytest.raises(ValueError, match="backend: expected one of 'auto', 'cpu', 'reference', got 'gpu'"):
            kind(preset="robust", backend="gpu")
        assert kind(backend="gpu") is not None  # that it exists says not that it can serve here


@pytest.mark.parametrize("threshold", [None, -1e308, 1e308])
def test_scores_as_large_as_numbers_are(threshold):
    maps = (
        torch.rand(2, 20, 20, dtype=torch.float64)
        * torch.tensor([0.5e308, 1.7e308], dtype=torch.float64)[:, None, None]
    )
    features = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    masks = nn.TTT4AS(image_threshold=threshold)(maps, features)
    assert torch.equal(masks, ttt.TTT4AS(image_threshold=threshold)(maps, features).pred_mask)
    with pytest.raises(ValueError, match="pred_score: expected finite"):
        nn.TTT4AS(image_threshold=threshold)(maps, features, torch.tensor([1.0, torch.inf]))
