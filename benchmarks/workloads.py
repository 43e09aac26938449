"""Named, seeded inputs with the statistics of real ones: activations of a real network on real photographs.

White noise flatters what prunes nothing and harms what prunes: every benchmark runs on EfficientNet-Lite0's activations
instead. Two sources of images, both with defects: the textures that scikit-image ships, with blobs of other textures
blended in (`ttt4as_fast.demo.make_defects`), or a data set of one's own. Shapes of other backbones are met by taking
that many channels of Lite0's: its block outputs (152 and 344), else its expanded hidden layers (up to 1536,
non-negative after ReLU6, as a WideResNet's are). They are real activations of another network than the shape's
namesake; a transformer's are signed and denser.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt4as_fast.kernels.arrays import check_int

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Workload:
    """The shape of one image's input to test-time training.

    Attributes
    ----------
    name : str
    channels, grid : int
        Features are (channels, grid, grid).
    map_size : int
        The anomaly map is (map_size, map_size).
    like : str
        Whose shape it is.
    """

    name: str
    channels: int
    grid: int
    map_size: int
    like: str

    @property
    def shape(self) -> str:
        """``"1024 x 28 x 28 -> 224 x 224"``."""
        return f"{self.channels} x {self.grid} x {self.grid} -> {self.map_size} x {self.map_size}"


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("lite0", 152, 28, 224, "EfficientNet-Lite0, blocks 2 and 4 (the package's default)"),
        Workload("lite0_344", 344, 28, 224, "EfficientNet-Lite0, blocks 2, 4 and 5"),
        Workload("wrn50", 1024, 28, 224, "WideResNet-50, layer 3 at the grid of layer 2"),
        Workload("wrn50_1536", 1536, 28, 224, "WideResNet-50, layers 2 and 3"),
        Workload("wrn50_512px", 1024, 28, 512, "WideResNet-50 with maps of 512 px"),
        Workload("wrn50_1024px", 1024, 28, 1024, "WideResNet-50 with maps of 1024 px"),
        Workload("dino_vitb8", 768, 28, 224, "DINO ViT-B/8"),
        Workload("dinov2_vits14", 384, 16, 224, "DINOv2 ViT-S/14"),
        Workload("dinov2_vits14_1024px", 384, 16, 1024, "DINOv2 ViT-S/14 with maps of 1024 px"),
        Workload("dinov2_vitb14", 768, 16, 224, "DINOv2 ViT-B/14"),
        Workload("multimodal", 1152, 56, 224, "M3DM and CFM: image and point features"),
    )
}

_STRIDE = 8
_NOMINAL_IMAGES = 6  # whose patches are the memory bank behind a scene's anomaly maps
_BANK_PATCHES = 2000
_CROP = 160  # pixels of a photograph that become one image, whatever its size after that
# Layer -> channels, of the network below; bn1 and bn2 are the hidden, expanded layers after their activation.
_BLOCKS = {"blocks.2": 40, "blocks.4": 112, "blocks.5": 192}
_HIDDEN = {"blocks.2.0.bn2": 144, "blocks.2.1.bn1": 240, "blocks.3.2.bn2": 480, "blocks.4.2.bn1": 672}
MOST_CHANNELS = sum(_HIDDEN.values())


@dataclass(frozen=True)
class Scene:
    """Images as test-time training meets them.

    Attributes
    ----------
    anomaly_map : numpy.ndarray, (N, H, W) float32
        PatchCore's: distance of each patch to the nearest nominal one, upsampled and blurred (sigma 4 pixels).
    features : numpy.ndarray, (N, C, h, w) float32
    gt_mask : numpy.ndarray, (N, H, W) bool
        The defects; None with a data set.
    source : str
        Where the images come from.
    """

    anomaly_map: np.ndarray
    features: np.ndarray
    gt_mask: np.ndarray | None
    source: str


def scene(workload: Workload, n_images: int = 4, seed: int = 0, data: str | Path | None = None) -> Scene:
    """Defective images of a workload's shape: the same for the same arguments, on any machine up to rounding.

    Parameters
    ----------
    workload : Workload
        Up to 1536 channels.
    n_images : int
        Default 4. Image i does not depend on it.
    seed : int
        Of crops, defects and the bank. Default 0.
    data : path-like, optional
        Root of a data set in a layout that `ttt4as_fast.datasets` knows; its defective test images are taken, repeated
        if there are too few. Default: the textures.

    Returns
    -------
    Scene

    Raises
    ------
    ValueError
        Too many channels, no image, or a data set without nominal and defective ones.
    """
    from scipy import ndimage

    from ttt4as_fast import kernels
    from ttt4as_fast.demo import TEXTURES
    from ttt4as_fast.patches import MapMaker

    n_images = check_int(n_images, "n_images", 1)
    side = _STRIDE * workload.grid
    defective, gt, source = _defective_images(n_images, side, seed, data)
    # A detector knows one kind of object: with a texture in its bank it would not see blobs of it as defects.
    textures = list(TEXTURES[:n_images]) if data is None else [None]
    indices = []
    for texture in textures:
        bank = nominal_patches(
            workload.channels, _BANK_PATCHES, seed, data, workload.grid, _NOMINAL_IMAGES, texture=texture
        )
        indices.append(kernels.KnnIndex(bank))
    to_map = MapMaker(workload.map_size, 4.0)
    maps = np.zeros((n_images, workload.map_size, workload.map_size), np.float32)
    features = np.zeros((n_images, workload.channels, workload.grid, workload.grid), np.float32)
    for i, (deep, pooled) in enumerate(_activations(defective, workload.channels)):
        features[i] = deep
        distances, _ = indices[i % len(indices)].search(pooled.reshape(workload.channels, -1).T)
        maps[i] = to_map(distances[:, 0].reshape(workload.grid, workload.grid))
    if gt is not None:
        zoom = workload.map_size / side
        gt = np.stack(
            [ndimage.zoom(mask.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest") for mask in gt]
        )
        gt = gt > 0.5
    return Scene(maps, features, gt, source)


def nominal_patches(
    channels: int,
    n_patches: int,
    seed: int = 0,
    data: str | Path | None = None,
    grid: int = 28,
    n_images: int = 0,
    texture: str | None = None,
) -> np.ndarray:
    """Patch features of nominal images, averaged over 3 x 3 neighbours as PatchCore's are: banks and coreset inputs.

    Parameters
    ----------
    channels : int
        Up to 1536.
    n_patches : int
        How many, drawn without replacement from as many images as it takes, at least `n_images`.
    seed : int
    data : path-like, optional
        As in `scene`; its training images are taken.
    grid : int
        Patches a side of an image. Default 28.
    n_images : int
    texture : str, optional
        Of one texture only. Default: of all three.

    Returns
    -------
    numpy.ndarray, (n_patches, channels) float32
    """
    n_patches = check_int(n_patches, "n_patches", 1)
    n_images = max(n_images, -(-n_patches // grid**2))
    images, _ = _nominal_images(n_images, _STRIDE * grid, seed, data, texture)
    keep = np.zeros(n_images * grid**2, bool)
    keep[np.random.default_rng([seed, 7]).permutation(keep.size)[:n_patches]] = True
    patches = np.zeros((n_patches, channels), np.float32)
    done = 0
    for i, (_, pooled) in enumerate(_activations(images, channels)):
        found = pooled.reshape(channels, -1).T[keep[i * grid**2 : (i + 1) * grid**2]]
        patches[done : done + len(found)] = found
        done += len(found)
    return patches


def query_patches(channels: int, seed: int = 0, data: str | Path | None = None, grid: int = 28) -> np.ndarray:
    """All patches of one defective image, (grid * grid, channels) float32: what a detector searches for an image."""
    images, _, _ = _defective_images(1, _STRIDE * grid, seed, data)
    ((_, pooled),) = _activations(images, channels)
    return np.ascontiguousarray(pooled.reshape(channels, -1).T)


def svm_samples(n: int, channels: int, seed: int = 0, data: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labelled pixels as test-time training has them: `n` features, a tenth of them nominal, a row a pixel.

    Returns
    -------
    X : numpy.ndarray, (n, channels) float32
        Bilinear samples at the `n` pixels.
    y : numpy.ndarray, (n,) int64
        1 for the pixels of highest score, -1 for a grid over the rest.
    """
    from ttt4as_fast import kernels

    n = check_int(n, "n", 20)
    workload = Workload("svm", channels, 28, 224, "")
    one = scene(workload, 1, seed, data)
    order = np.argsort(-one.anomaly_map[0], axis=None, kind="stable")
    n_nominal = max(n // 10, 1)
    positive = order[: n - n_nominal]
    rest = np.sort(order[n - n_nominal :])
    negative = rest[np.linspace(0, len(rest) - 1, n_nominal).astype(np.intp)]
    places = np.concatenate([positive, negative])
    X = kernels.bilinear_sample(one.features[0], (224, 224), places // 224, places % 224)
    return X, np.repeat([1, -1], [len(positive), len(negative)])


# ---------------------------------------------------------------- images


def images(kind: str, n: int, side: int, seed: int = 0, data: str | Path | None = None) -> tuple[list[Any], str]:
    """`n` PIL images of `side` pixels a side, ``"nominal"`` or ``"defective"``, and where they come from."""
    if kind == "nominal":
        return _nominal_images(n, side, seed, data)
    found, _, source = _defective_images(n, side, seed, data)
    return found, source


def _nominal_images(
    n: int, side: int, seed: int, data: str | Path | None, texture: str | None = None
) -> tuple[Any, str]:
    from ttt4as_fast.demo import TEXTURES, texture_crops

    if data is not None:
        files = _files(data)[0]
        return [_read(files[i % len(files)], side) for i in range(n)], f"{Path(data).name}, training images"
    names = TEXTURES if texture is None else (texture,)
    crops = [texture_crops(name, "train", -(-n // len(names)), _CROP, seed) for name in names]
    return [_resize(crops[i % len(names)][i // len(names)], side) for i in range(n)], "scikit-image's textures"


def _defective_images(n: int, side: int, seed: int, data: str | Path | None) -> tuple[list[Any], Any, str]:
    from ttt4as_fast.demo import TEXTURES, load_texture, make_defects, texture_crops

    if data is not None:
        files = _files(data)[1]
        return [_read(files[i % len(files)], side) for i in range(n)], None, f"{Path(data).name}, defective test images"
    images, masks = [], []
    for i in range(n):
        name = TEXTURES[i % 3]
        crop = texture_crops(name, "test", i // 3 + 1, _CROP, seed)[-1:]
        donors = [load_texture(other) for other in TEXTURES if other != name]
        defective, mask = make_defects(crop, donors, number=1 + i % 2, seed=seed + i)
        images.append(_resize(defective[0], side))
        masks.append(np.asarray(_resize(mask[0].astype(np.uint8) * 255, side))[:, :, 0] > 127)
    return images, np.stack(masks), "scikit-image's textures, defects blended in"


@functools.cache
def _files(data: str | Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    from ttt4as_fast.datasets import load_dataset

    found = load_dataset(data)
    nominal = tuple(sample.image for sample in found.train)
    defective = tuple(sample.image for sample in found.test if sample.label)
    if not nominal or not defective:
        raise ValueError(f"data: expected nominal training and defective test images below {str(data)!r}")
    return nominal, defective


def _read(path: Path, side: int) -> Any:
    from PIL import Image

    from ttt4as_fast.images import read_image

    return read_image(path).resize((side, side), Image.Resampling.BILINEAR)


def _resize(pixels: np.ndarray, side: int) -> Any:
    from PIL import Image

    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR).convert("RGB")


# ---------------------------------------------------------------- activations


def _layers(channels: int) -> dict[str, int]:
    """The network's layers that hold `channels` channels or more, on grids of stride 8 and coarser."""
    for names in (("blocks.2", "blocks.4"), ("blocks.2", "blocks.4", "blocks.5")):
        layers = {name: _BLOCKS[name] for name in names}
        if sum(layers.values()) == channels:
            return layers
    if channels > MOST_CHANNELS:
        raise ValueError(f"channels: expected at most {MOST_CHANNELS}, got {channels}")
    return _HIDDEN


@functools.cache
def _network() -> tuple[Any, dict[str, Any]]:
    """EfficientNet-Lite0 with a hook on every layer above; the hooks fill the dictionary."""
    from ttt4as_fast.backbones import create_backbone

    backbone = create_backbone("efficientnet_lite0", ["blocks.6"], device="cpu")
    outputs: dict[str, Any] = {}
    modules = dict(backbone.network.named_modules())
    for name in (*_BLOCKS, *_HIDDEN):
        modules[name].register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
    return backbone, outputs


def _activations(images: list[Any], channels: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features, features averaged over 3 x 3 neighbours), both (channels, h, w) float32, of each image."""
    import torch
    import torch.nn.functional as F

    from ttt4as_fast.patches import join_layers

    backbone, outputs = _network()
    layers = _layers(channels)
    total = sum(layers.values())
    # The same channels for every image and seed: a network's channels do not change either.
    kept = np.sort(np.random.default_rng(channels).permutation(total)[:channels])
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div_(255)
        with torch.inference_mode():
            backbone(pixels)
            joined: torch.Tensor = join_layers([outputs[name] for name in layers])[:, kept]
            pooled = F.avg_pool2d(joined, 3, stride=1, padding=1)
        yield joined[0].contiguous().numpy(), pooled[0].contiguous().numpy()
