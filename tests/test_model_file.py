"""Files of fitted models: all of it comes back, and what is no model, or another's, is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ttt4as_fast.backbones import WeightsError
from ttt4as_fast.model_file import ModelFileError, digest
from ttt4as_fast.patchcore import PatchCore

from .small_patchcore import CROP, SIZE, assert_equal, fitted, resnet, small, textures


@pytest.fixture(scope="module")
def model() -> PatchCore:
    return fitted()


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return textures(5, 2)


def test_load_gives_back_everything(queries, tmp_path):
    options = {
        "layers": ("blocks.1", "blocks.4"),
        "coreset_ratio": 0.2,
        "n_neighbors": 4,
        "blur_sigma": 2.5,
        "random_state": 7,
        "standardize": True,
        "max_patches": 1000,
    }
    model = small(**options).fit(textures(3, 0)).calibrate(textures(4, 1))
    model.save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", device="cpu")
    assert {name: getattr(loaded, name) for name in options} == options
    assert (loaded.image_size, loaded.crop_size, loaded.backbone) == (SIZE, CROP, "efficientnet_lite0")
    assert loaded.image_threshold_ == model.image_threshold_
    for name, array in model.nominal_statistics_.arrays().items():
        np.testing.assert_array_equal(loaded.nominal_statistics_.arrays()[name], array)
    assert_equal(model.predict(queries), loaded.predict(queries))


def test_saving_is_deterministic_and_replaces(model, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"older")
    model.save(path)
    first = path.read_bytes()
    PatchCore.load(path, device="cpu").save(path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="expected a file in an existing folder"):
        model.save(tmp_path / "absent" / "m.safetensors")


def test_uncalibrated_model_stays_so(tmp_path):
    small().fit(textures(2, 0)).save(tmp_path / "m.safetensors")
    loaded = PatchCore.load(tmp_path / "m.safetensors", device="cpu")
    assert loaded.nominal_statistics_ is None and loaded.image_threshold_ is None


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    model.save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.01, 0.5, 0.99, 0.99999])
def test_truncated_file(saved, tmp_path, share):
    content = saved.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelFileError, match=r"cut\.safetensors.* truncated or corrupt"):
        PatchCore.load(tmp_path / "cut.safetensors", device="cpu")


@pytest.mark.parametrize("place", [0, 3, 8, 60, -1, -5000])
def test_one_wrong_byte(saved, tmp_path, place):
    content = bytearray(saved.read_bytes())
    content[place] ^= 0x15
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"path: .*bad\.safetensors"):
        PatchCore.load(tmp_path / "bad.safetensors", device="cpu")


def test_no_damaged_byte_of_the_header_passes(saved, tmp_path):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    padding = content[8:header].rstrip(b" ")  # safetensors fills up with spaces, which mean nothing
    for place in range(8, 8 + len(padding), 29):
        bad = bytearray(content)
        bad[place] ^= 0x01
        (tmp_path / "bad.safetensors").write_bytes(bad)
        with pytest.raises(ModelFileError, match=r"path: .*bad\.safetensors"):
            PatchCore.load(tmp_path / "bad.safetensors", device="cpu")


def test_a_full_disk_is_an_os_error_that_names_the_file(model, tmp_path, full_disk):
    with pytest.raises(OSError, match=r"m\.safetensors': .*too large"):
        model.save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_a_plain_open(model, tmp_path):
    before = os.umask(0o027)
    try:
        model.save(tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


def rewrite(saved: Path, target: Path, change, seal: bool) -> Path:
    """The model file with `change(content, tensors)` made to it, and a hash that fits if `seal`."""
    from safetensors import safe_open

    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    written, _, text = metadata["ttt4as_fast"].partition("\n")
    content, tensors = json.loads(text), load_file(saved)
    change(content, tensors)
    text = json.dumps(content)
    save_file(tensors, target, {"ttt4as_fast": f"{digest(text, tensors) if seal else written}\n{text}"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: c.update(format_version=2, package_version="9.9"),
            "version 2, written by ttt4as_fast 9.9; this one",
        ),
        (lambda c, t: c.update(format_version="one"), "format version 'one'"),
        (lambda c, t: c.update(format="other"), r"no model of ttt4as_fast\.PatchCore"),
        (lambda c, t: c.pop("options"), "damaged model: KeyError: 'options'"),
        (lambda c, t: c["options"].pop("standardize"), "damaged model: KeyError: 'standardize'"),
        (lambda c, t: c["options"].update(crop_size=-1), "damaged model: ValueError: crop_size"),
        (lambda c, t: c["options"].update(surprise=1), r"damaged model: TypeError: .*surprise"),
        (lambda c, t: c.update(layers=["layer1"]), r"damaged model: ValueError: layers"),
        (lambda c, t: c.update(layers=[]), r"damaged model: TypeError: layers"),
        (lambda c, t: c["options"].update(weights=5), r"damaged model: TypeError: weights: expected a path, got 5"),
        (lambda c, t: c.update(image_threshold="high"), "damaged model: TypeError: image_threshold"),
        (lambda c, t: c.update(image_threshold=float("nan")), "damaged model: ValueError: image_threshold"),
        (lambda c, t: c["options"].update(crop_size=56), r"nominal statistics of shape \(64, 64\) for a crop of 56"),
        (lambda c, t: t.pop("nominal.mean"), r"damaged model: .*mean"),
        (lambda c, t: t.pop("memory_bank"), "damaged model: KeyError: 'memory_bank'"),
        (lambda c, t: t.update(memory_bank=t["memory_bank"][:, :9].copy()), r"a memory bank of shape \(51, 9\)"),
        (lambda c, t: t.update(memory_bank=t["memory_bank"].astype(np.int32)), "a memory bank of int32"),
        (lambda c, t: t["memory_bank"].__setitem__((0, 0), np.nan), "a non-finite value in memory_bank"),
    ],
)
def test_sealed_file_that_makes_no_sense(saved, tmp_path, change, message):
    path = rewrite(saved, tmp_path / "m.safetensors", change, seal=True)
    with pytest.raises(ModelFileError, match=message):
        PatchCore.load(path, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda c, t: c["options"].update(blur_sigma=3.0),
        lambda c, t: c.update(image_threshold=1.0),
        lambda c, t: t["memory_bank"].__setitem__((0, 0), 1e3),
        lambda c, t: t.pop("nominal.mean"),
    ],
)
def test_changed_file(saved, tmp_path, change):
    with pytest.raises(ModelFileError, match="corrupt: its content is not what was written"):
        PatchCore.load(rewrite(saved, tmp_path / "m.safetensors", change, seal=False), device="cpu")


@pytest.mark.parametrize("held", [False, True], ids=["numpy", "numpy with ml_dtypes"])
def test_tensors_that_numpy_cannot_hold(saved, tmp_path, held):
    """Where a program has imported ml_dtypes, as ONNX does, they come as arrays, of which there is no buffer."""
    from safetensors import safe_open
    from safetensors import torch as for_torch

    if held:
        pytest.importorskip("ml_dtypes")
    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    for_torch.save_file({"memory_bank": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ModelFileError, match="damaged model: tensors of another dtype"):
        PatchCore.load(tmp_path / "m.safetensors", device="cpu")


def test_metadata_nested_beyond_all_reason(tmp_path):
    save_file(
        {"memory_bank": np.zeros((2, 2), np.float32)}, tmp_path / "m.safetensors", {"ttt4as_fast": "\n" + "[" * 10**5}
    )
    with pytest.raises(ModelFileError, match="metadata that is no JSON"):
        PatchCore.load(tmp_path / "m.safetensors", device="cpu")


def test_rewriting_alone_changes_nothing(saved, tmp_path, model, queries):
    path = rewrite(saved, tmp_path / "m.safetensors", lambda content, tensors: None, seal=True)
    assert_equal(model.predict(queries), PatchCore.load(path, device="cpu").predict(queries))


def test_other_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        PatchCore.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        PatchCore.load(tmp_path)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match="a safetensors file, but no model"):
        PatchCore.load(tmp_path / "other.safetensors")
    torch.save({"memory_bank": torch.zeros(3, 152)}, tmp_path / "pickle.pth")
    with pytest.raises(ModelFileError, match="is no safetensors file"):
        PatchCore.load(tmp_path / "pickle.pth")


def test_local_weights_are_followed_and_checked(tmp_path, queries):
    path = resnet(tmp_path, seed=0)
    model = small(backbone="resnet18", weights=path).fit(textures(2, 0))
    model.save(tmp_path / "m.safetensors")
    assert_equal(model.predict(queries), PatchCore.load(tmp_path / "m.safetensors", device="cpu").predict(queries))
    moved = path.rename(tmp_path / "moved.pth")
    with pytest.raises(
        WeightsError, match=r"fitted with the local weights .*resnet18-0\.pth.* pass their present path"
    ):
        PatchCore.load(tmp_path / "m.safetensors", device="cpu")
    loaded = PatchCore.load(tmp_path / "m.safetensors", device="cpu", weights=moved)
    assert_equal(model.predict(queries), loaded.predict(queries))
    with pytest.raises(WeightsError, match=r"not the ones that .* was fitted with"):
        PatchCore.load(tmp_path / "m.safetensors", device="cpu", weights=resnet(tmp_path, seed=1))


def test_vision_transformer_end_to_end(tmp_path):
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch8_224.dino", pretrained=False).state_dict(), tmp_path / "w.pth")
    model = PatchCore(
        "dino_vits8", image_size=40, crop_size=32, weights=tmp_path / "w.pth", device="cpu", coreset_ratio=0.5
    )
    x = textures(3, 0, side=40)
    found = model.fit(x).predict(x)
    assert found.features.shape == (3, 384, 4, 4) and found.anomaly_map.shape == (3, 32, 32)
    assert_equal(found, model.predict(x[[2, 0, 1]], batch_size=1), [2, 0, 1])


def test_the_environments_backend_is_no_fault_of_the_file(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m.safetensors")
    monkeypatch.setenv("TTT4AS_BACKEND", "bogus")
    assert PatchCore.load(tmp_path / "m.safetensors", device="cpu", backend="cpu").backend == "cpu"
    with pytest.raises(ValueError, match="TTT4AS_BACKEND: expected one of"):
        PatchCore.load(tmp_path / "m.safetensors", device="cpu")
