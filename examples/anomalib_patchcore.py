"""anomalib's own training and testing on images in folders: its PatchCore beside ours, one threshold beside TTT4AS.

    pip install 'ttt4as_fast[anomalib]'
    python examples/anomalib_patchcore.py                      crops of a photograph, with defects made
    python examples/anomalib_patchcore.py --data DIR           any data set in the layout of MVTec AD, like screw,
                                                               from here or from the folder that TTT4AS_DATA names

Both models get the same seed, network (EfficientNet-Lite0, whose weights come with the package: nothing is downloaded)
and threads. Prints anomalib's metrics and the seconds of each, and draws the masks. anomalib chooses its threshold for
masks as the best one for the ground truth of these very images, an advantage that no line has; TTT4AS sees no mask.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ttt4as_fast import demo
from ttt4as_fast.datasets import load_dataset, read_mask
from ttt4as_fast.integrations.anomalib import Patchcore, TTT4ASPostProcessor, load_installed_weights


def make_folder(root: Path, side: int = 160, n_train: int = 16, n_test: int = 8) -> None:
    """Nominal crops of a photograph of bricks, and others with parts of other photographs blended in."""
    crops = {
        area: demo.texture_crops("brick", area, n, side, 0)
        for area, n in (("train", n_train), ("validation", n_test), ("test", n_test))
    }
    donors = [demo.load_texture(name) for name in ("grass", "gravel")]
    defective, masks = demo.make_defects(crops["test"], donors, seed=0)
    content = {
        "train/good": crops["train"],
        "test/good": crops["validation"],
        "test/patch": defective,
        "ground_truth/patch": 255 * masks,
    }
    for name, images in content.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            suffix = "_mask" if name.startswith("ground_truth") else ""
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i:03}{suffix}.png")


def datamodule(root: Path) -> Any:
    """anomalib's `Folder` over the layout of MVTec AD, thresholds from the test set as is its custom."""
    from anomalib.data import Folder

    kinds = sorted(path.name for path in (root / "test").iterdir() if path.is_dir() and path.name != "good")
    return Folder(
        name=root.name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def evaluator() -> Any:
    """anomalib's metrics of maps, scores and masks."""
    from anomalib.metrics import AUROC, Evaluator, F1Score

    return Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
        ]
    )


def run(model_class: Any, post_processor: Any, root: Path, results: Path, side: int) -> dict[str, Any]:
    """Fit, test and predict through anomalib's engine."""
    from anomalib.engine import Engine
    from anomalib.pre_processing import PreProcessor
    from lightning.pytorch import seed_everything
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    seed_everything(0, verbose=False)
    normalize = Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3)  # as the network was trained
    model = model_class(
        backbone="tf_efficientnet_lite0",
        layers=["blocks.2", "blocks.4"],
        pre_trained=False,
        coreset_sampling_ratio=0.1,
        pre_processor=PreProcessor(transform=Compose([Resize((side, side), antialias=True), normalize])),
        post_processor=post_processor,
        evaluator=evaluator(),
        visualizer=False,
    )
    load_installed_weights(model)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    engine = Engine(default_root_dir=results, accelerator="cpu", devices=1, **quiet)
    data = datamodule(root)
    began = time.perf_counter()
    engine.fit(model, datamodule=data)
    fitted = time.perf_counter()
    (metrics,) = engine.test(model, datamodule=data, verbose=False)
    tested = time.perf_counter()
    masks = {}
    for batch in engine.predict(model, datamodule=data, return_predictions=True):
        for path, mask in zip(batch.image_path, batch.pred_mask, strict=True):
            masks["/".join(Path(path).parts[-2:])] = mask.numpy()
    return {"metrics": metrics, "fit": fitted - began, "test": tested - fitted, "masks": masks}


def f1_by_image(root: Path, masks: dict[str, np.ndarray]) -> float:
    """Mean over the defective images, against the masks at their own size brought to the prediction's."""
    from ttt4as_fast.metrics import precision_recall_f1

    found = []
    for sample in load_dataset(root, "mvtec_ad").test:
        if sample.label and sample.mask is not None:
            mask = masks["/".join(sample.image.parts[-2:])]
            truth = Image.fromarray(read_mask(sample.mask)).resize(mask.shape[::-1], Image.Resampling.NEAREST)
            found.append(precision_recall_f1(mask, np.asarray(truth))[2])
    return float(np.mean(found))


def draw(root: Path, runs: dict[str, dict[str, Any]], output: Path, rows: int = 4) -> None:
    """The first defective images, their ground truth, and what each way marks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    samples = [sample for sample in load_dataset(root, "mvtec_ad").test if sample.label and sample.mask is not None]
    figure, axes = plt.subplots(rows, 2 + len(runs), figsize=(3 * (2 + len(runs)), 3 * rows), squeeze=False)
    for line, sample in zip(axes, samples[:: max(1, len(samples) // rows)], strict=False):
        shown = {"image": Image.open(sample.image).convert("RGB"), "ground truth": read_mask(sample.mask)}
        shown.update({name: one["masks"]["/".join(sample.image.parts[-2:])] for name, one in runs.items()})
        for axis, (title, picture) in zip(line, shown.items(), strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set_title(title)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(output)
    print(f"masks: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set in the layout of MVTec AD (default: one made here)")
    parser.add_argument("--side", type=int, default=160, help="pixels a side that images are resized to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both")
    parser.add_argument("--output", type=Path, default=Path("anomalib-masks.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers

    from anomalib.models import Patchcore as StockPatchcore

    with tempfile.TemporaryDirectory() as scratch:
        root = options.data
        if root is not None and not root.is_dir():
            root = Path(os.environ.get("TTT4AS_DATA", ".")) / root
            if not root.is_dir():
                parser.error(f"--data: no such folder: {options.data}, nor in TTT4AS_DATA")
        if root is None:
            root = Path(scratch) / "brick"
            make_folder(root)
        ways: dict[str, Any] = {
            "anomalib": (StockPatchcore, True),
            "TTT4AS": (Patchcore, TTT4ASPostProcessor()),
            "robust": (Patchcore, TTT4ASPostProcessor(preset="robust")),
        }
        first = Path(scratch) / "first"  # what is loaded and compiled on first use shall count for none of them
        make_folder(first, side=64, n_train=4, n_test=2)
        for model_class, _ in ways.values():
            run(model_class, True, first, Path(scratch) / "results", 64)
        runs = {
            name: run(model_class, post_processor, root, Path(scratch) / name, options.side)
            for name, (model_class, post_processor) in ways.items()
        }
        print(f"\n{root.name}, {options.side} x {options.side} pixels, {options.threads} torch threads")
        rows: dict[str, list[float]] = {
            "seconds to fit (and validate)": [one["fit"] for one in runs.values()],
            "seconds to test": [one["test"] for one in runs.values()],
            "mean F1 of the masks of defective images": [f1_by_image(root, one["masks"]) for one in runs.values()],
        }
        for metric in runs["anomalib"]["metrics"]:
            rows[f"anomalib's {metric}"] = [one["metrics"][metric] for one in runs.values()]
        print(f"{'':44}" + "".join(f"{name:>12}" for name in runs))
        for name, values in rows.items():
            print(f"{name:44}" + "".join(f"{value:12.4f}" for value in values))
        draw(root, runs, options.output)


if __name__ == "__main__":
    main()
