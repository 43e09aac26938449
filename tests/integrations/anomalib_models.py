"""Models of anomalib that need no download, fitted through its engine or without, and the data they are fitted on."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'ttt4as_fast[anomalib]'")

import anomalib.models as host
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from ttt4as_fast.integrations.anomalib import Patchcore, TTT4ASPostProcessor, load_installed_weights

from .conftest import SIDE

AMONG_THEMSELVES = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
"""What anomalib and timm warn each other of."""
NETWORK = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"], "pre_trained": False}
SIMPLE = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False}
"""For exporters, which take ten times as long over paddings that depend on the size."""
LITE0 = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}


def pre_processor(side: int = SIDE) -> PreProcessor:
    return PreProcessor(transform=Compose([Resize((side, side)), Normalize(**LITE0)]))


def data(folder: Path, batch_size: int = 4) -> Folder:
    return Folder(
        name="brick",
        root=folder,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="bad",
        mask_dir="masks",
        train_batch_size=4,
        eval_batch_size=batch_size,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def engine(root: Path, **options) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=root, accelerator="cpu", devices=1, **quiet, **options)


def make(name: str, **options):
    """A model of anomalib's (``"ours"``: `Patchcore` of the integration) that needs no download."""
    torch.manual_seed(0)
    options = {"pre_processor": pre_processor(), "visualizer": False, **options}
    if name == "ReverseDistillation":  # whose decoder mirrors a ResNet; its weights are random here
        return host.ReverseDistillation(
            backbone="resnet18", layers=["layer1", "layer2", "layer3"], pre_trained=False, **options
        )
    if name == "Padim":
        return load_installed_weights(host.Padim(**NETWORK, n_features=24, **options))
    return load_installed_weights((Patchcore if name == "ours" else host.Patchcore)(**NETWORK, **options))


@functools.cache
def fitted(name: str, folder: Path):
    """A model with a `TTT4ASPostProcessor`, fitted through the engine, and its engine."""
    model = make(name, post_processor=TTT4ASPostProcessor())
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - which anomalib's projection draws from
    runner = engine(folder / f"results_{name}", max_epochs=1)
    runner.fit(model, datamodule=data(folder))
    return model.eval(), runner


def predict(model, runner: Engine, folder: Path, batch_size: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """What the engine predicts, by image."""
    found = {}
    for batch in runner.predict(model, datamodule=data(folder, batch_size), return_predictions=True):
        for i, path in enumerate(batch.image_path):
            names = ("pred_mask", "pred_label", "pred_score", "anomaly_map")
            found["/".join(Path(path).parts[-2:])] = {name: getattr(batch, name)[i].clone() for name in names}
    assert len(found) == 10
    return found


def read(folder: Path, name: str) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(folder / name).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def bank_model(cls=host.Patchcore, n: int = 6, network=NETWORK, **options):
    """A PatchCore over noise, fitted after a fixed seed, without the engine."""
    torch.manual_seed(0)
    model = cls(**network, pre_processor=cls.configure_pre_processor((SIDE, SIDE)), **options)
    if network is NETWORK:
        load_installed_weights(model)
    model.train()
    model.model(torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(model.model.memory_bank))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    model.fit()
    return model.eval()
