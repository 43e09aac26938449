"""The detector on a GPU: patches stay there as tensors, a batch at once, and `TTT4AS` takes them where they lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttt4as_fast import TTT4AS, PatchCore, runs
from ttt4as_fast.kernels import dispatch

SIDE = 24
"""Of images: 3 by 3 patches, as the interpreter takes milliseconds for each."""


@pytest.fixture
def photographs(rng) -> list[Image.Image]:
    """Smooth noise; the last has a bright square."""
    grids = rng.integers(60, 120, (3, 6, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for grid in grids]
    images[-1].paste((250, 240, 30), (8, 9, 17, 16))
    return images


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", pretrained=False, num_classes=0).state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def patchcore(weights: Path, device: torch.device, backend: str = "auto", **options) -> PatchCore:
    sizes = {"image_size": SIDE, "crop_size": SIDE, "coreset_ratio": 0.5}
    return PatchCore("resnet18", weights=weights, device=device, backend=backend, **sizes, **options)


@pytest.fixture
def models(weights, photographs, device, monkeypatch) -> tuple[PatchCore, PatchCore]:
    """The same bank on the host, by the reference, and where the GPU's backends run."""
    host = patchcore(weights, torch.device("cpu"), "reference").fit(photographs[:2])
    host.save(weights.with_name("host.safetensors"))
    monkeypatch.setattr(PatchCore, "_on_cuda", property(lambda self: self.backend == "gpu"))
    there = PatchCore.load(weights.with_name("host.safetensors"), device=device, backend="gpu", weights=weights)
    return host, there


def test_a_batch_gives_what_the_host_gives(models, photographs, device):
    host, there = models
    want, got = host.predict(photographs), there.predict(photographs, batch_size=2, keep_on_device=True)
    assert not isinstance(want.anomaly_map, torch.Tensor)
    for name in ("anomaly_map", "pred_score", "features"):
        found, expected = getattr(got, name), torch.from_numpy(getattr(want, name))
        assert found.device == device and found.dtype == torch.float32 and not found.is_inference()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3 * scale)  # convolutions by TF32 on a device
    assert int(got.pred_score.argmax()) == 2
    tensors = torch.rand((1, 3, SIDE, SIDE), device=device)
    assert there.predict(tensors).features.device == there.predict(tensors).anomaly_map.device == device
    copied = there.predict(photographs, batch_size=2)
    assert isinstance(copied.features, np.ndarray)
    np.testing.assert_array_equal(copied.anomaly_map, got.anomaly_map.cpu())
    np.testing.assert_array_equal(copied.pred_score, got.pred_score.cpu())


def test_one_neighbour_and_scaled_channels(weights, photographs, device, monkeypatch):
    options = {"n_neighbors": 1, "standardize": True}
    want = patchcore(weights, torch.device("cpu"), "reference", **options).fit(photographs[:2]).predict(photographs)
    monkeypatch.setattr(PatchCore, "_on_cuda", property(lambda self: True))
    got = patchcore(weights, device, "gpu", **options).fit(photographs[:2]).predict(photographs)
    np.testing.assert_allclose(got.pred_score, want.pred_score, rtol=2e-2)
    np.testing.assert_allclose(got.anomaly_map, want.anomaly_map, rtol=0, atol=2e-2 * want.anomaly_map.max())


def test_features_that_are_not_finite_are_refused(models, photographs):
    _, there = models
    with torch.no_grad():
        next(there.network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="images: the features that 'resnet18' gives of one are not finite"):
        there.predict(photographs[:2])


@pytest.mark.usefixtures("cuda_source")
def test_masks_of_files_and_of_the_service_are_made_there(models, photographs):
    """No array of map or features comes to the host before the mask: a backend of the host would have to be asked."""
    _, there = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Operation, "preference", lambda self, device: ("gpu",))
        found = list(runs.predict_batch(there, TTT4AS(n_nominal=30, neighbor_radius=2), photographs, 1.0))
    assert [one["status"] for one in found] == ["ok"] * 3
    prediction = there.predict(photographs, keep_on_device=True)
    for i, one in enumerate(found):
        assert isinstance(one["anomaly_map"], np.ndarray) and isinstance(one["pred_mask"], np.ndarray)
        np.testing.assert_array_equal(one["anomaly_map"], prediction.anomaly_map[i].cpu())
        assert one["score"] == float(prediction.pred_score[i])
        segmenter = TTT4AS(n_nominal=30, neighbor_radius=2, backend="reference", tol=1e-6)
        out = segmenter(prediction.anomaly_map[i].cpu(), prediction.features[i].cpu())
        close = out.decision_map.abs() < 1e-2 * out.decision_map.abs().max()
        assert bool((torch.from_numpy(one["pred_mask"]) == out.pred_mask)[~close].all())


COMMANDS = [
    ("predict", "{model}", "{images}", "--no-gate", "--n-nominal", "30", "--neighbor-radius", "2"),
    ("segment", "{maps}", "{features}", "--device", "cuda", "--n-nominal", "30", "--neighbor-radius", "2"),
    ("predict", "{model}", "{images}", "--no-gate", "--preset", "robust"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("command", COMMANDS, ids=["predict", "segment", "robust"])
def test_the_command_runs_there(weights, photographs, tmp_path, command):
    pytest.importorskip("cupy")
    pytest.importorskip("typer")
    model = patchcore(weights, torch.device("cuda")).fit(photographs[:2])
    model.save(tmp_path / "m.safetensors")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(photographs):
        image.save(tmp_path / "images" / f"{i}.png")
    found = model.predict(photographs)
    np.save(tmp_path / "maps.npy", found.anomaly_map)
    np.save(tmp_path / "features.npy", found.features)
    names = {"model": "m.safetensors", "images": "images", "maps": "maps.npy", "features": "features.npy"}
    words = [word.format(**names) for word in command]
    named = [] if "robust" in command else ["--backend", "gpu"]
    for extra in ([*named], ["--backend", "cpu"]):
        done = subprocess.run(
            [sys.executable, "-m", "ttt4as_fast", *words, "--output", "out-" + (extra or ["", "auto"])[1], *extra],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.returncode == 0, done.stderr
        assert "3 done" in done.stdout, done.stdout
    lines = (tmp_path / ("out-" + (named or ["", "auto"])[1]) / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record["status"] == "ok" for record in records if "status" in record)
