"""``ttt4as bench masks``: every way to make a mask, on identical anomaly maps, beside the paper's printed figures.

`ttt4as_fast.evaluate` compares the methods of this package; here anomalib's MEBin joins them on the same maps, and the
paper's Tables 1 to 6 stand beside them, labelled as printed, with what differs.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import machine, measure, peers
from .results_file import result

if TYPE_CHECKING:
    from ttt4as_fast.datasets import Dataset, Sample
    from ttt4as_fast.patchcore import PatchCore

PAPER = Path(__file__).with_name("paper.json")
METRICS = ("precision", "recall", "f1", "pooled_f1", "iou", "fpr_pixels_nominal", "fpr_images_nominal", "milliseconds")
EXTRA = {
    "mebin": "anomalib's MEBin on all test maps at once, components counted by SciPy (its own way: a minute a map)",
}


def paper_rows(category: str) -> list[dict[str, Any]]:
    """The figures that the paper prints for a category, such as ``"screw"``; empty if it has none.

    Each row has ``table``, ``part``, ``detector``, ``backbone``, ``what`` and the metrics printed.
    """
    tables = json.loads(PAPER.read_text("utf-8"))["tables"]
    wanted = category.lower().replace(" ", "_")
    rows = []
    for table in tables:
        printed = {name: by_category[wanted] for name, by_category in table["metrics"].items() if wanted in by_category}
        if printed and wanted != "mean":
            about = {name: table[name] for name in ("table", "part", "detector", "backbone", "dataset", "what")}
            rows.append({**about, **printed})
    return rows


def run(
    root: str | Path,
    model_file: str | Path | None = None,
    image_size: int = 256,
    crop_size: int = 224,
    threads: int = 1,
    progress: Progress = silent,
    weights: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate every method on a data set; returns the content of ``masks-<name>.json``.

    Parameters
    ----------
    root : path-like
        One category, in a layout that `ttt4as_fast.datasets` knows.
    model_file : path-like, optional
        A calibrated model; by default one is fitted as ``ttt4as fit`` does, 20 % of the training images held out.
    image_size, crop_size : int
        Of the model that is fitted.
    threads : int
    progress : callable, optional
    weights : path-like, optional
        Weight file of the backbone of `model_file`, where it was fitted with a local one that is elsewhere now.

    Raises
    ------
    ValueError
        No test images, or a model that is not calibrated.
    """
    from ttt4as_fast.datasets import load_dataset
    from ttt4as_fast.evaluate import evaluate
    from ttt4as_fast.report import METHODS

    pinned = machine.pin(threads)
    watch = machine.Watch()
    dataset = load_dataset(root)
    model = _model(dataset, model_file, weights, image_size, crop_size, progress)
    report = evaluate(model, dataset, progress=progress)
    rows = []
    for method, meaning in METHODS.items():
        row = report.row(method)
        rows.append({"method": method, "meaning": meaning, **{name: _plain(row[name]) for name in METRICS}})
    rows += _extra_rows(model, dataset, progress)
    first = report.row("thr_3std")
    category = dataset.name.split("/")[-1]
    return result(
        f"masks-{category}",
        f"Masks: {category}",
        machine.describe(pinned, watch),
        rows,
        absent_peers=peers.absent("binarise"),
        detector={name: _plain(first[name]) for name in ("i_auroc", "p_auroc", "aupro")},
        counts=report.counts,
        paper=paper_rows(category),
        differs=_differences(model, report),
        settings={key: value for key, value in report.settings.items() if key != "segmenter"},
    )


def _plain(value: float) -> float | None:
    return None if value != value else measure.significant(value)


def _model(
    dataset: Dataset,
    model_file: str | Path | None,
    weights: str | Path | None,
    image_size: int,
    crop_size: int,
    progress: Progress,
) -> PatchCore:
    from ttt4as_fast import runs
    from ttt4as_fast.patchcore import PatchCore

    if model_file is not None:
        return PatchCore.load(model_file, weights=weights)
    model = PatchCore(image_size=image_size, crop_size=crop_size)
    with tempfile.TemporaryDirectory() as folder:
        paths, own = ([sample.image for sample in part] for part in (dataset.train, dataset.validation))
        runs.fit(model, paths, Path(folder) / "model.safetensors", progress=progress, validation=own)
    return model


def _extra_rows(model: PatchCore, dataset: Dataset, progress: Progress) -> list[dict[str, Any]]:
    """The methods that `evaluate` does not have, on the maps that it had."""
    from ttt4as_fast import metrics
    from ttt4as_fast.datasets import ImageError

    (mebin,) = peers.peers("binarise")
    if mebin.why_not() is not None:
        return []
    maps: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    labels: list[bool] = []
    for i, sample in enumerate(dataset.test):
        try:
            (found,) = model.predict_iter([sample.image])
            truth = _truth(model, sample, found.size)
        except ImageError:
            continue  # `evaluate` has named it
        if truth is None:
            continue
        maps.append(found.anomaly_map)
        truths.append(truth)
        labels.append(bool(sample.label))
        progress("MEBin", i + 1, len(dataset.test))
    begin = time.perf_counter()
    masks = mebin.adapter()(np.stack(maps))
    spent = time.perf_counter() - begin
    counts = [metrics.mask_counts(mask, truth) for mask, truth in zip(masks, truths, strict=True)]
    summary = metrics.summarise_counts(counts, np.array(labels))
    summary["milliseconds"] = 1e3 * spent / len(labels)
    return [{"method": "mebin", "meaning": EXTRA["mebin"], **{key: _plain(summary[key]) for key in METRICS}}]


def _truth(model: PatchCore, sample: Sample, size: tuple[int, int]) -> np.ndarray | None:
    """The ground truth on the grid of the map; None for a defective image whose mask is missing."""
    from ttt4as_fast.datasets import read_mask

    if not sample.label:
        return np.zeros((model.crop_size, model.crop_size), bool)
    return None if sample.mask is None else np.asarray(model.transform_mask(read_mask(sample.mask, size)))


def _differences(model: PatchCore, report: Any) -> list[str]:
    """What a reader must know before comparing with the paper's figures."""
    return [
        f"Backbone {model.backbone} with layers {', '.join(model.network.layers)}; the paper: WideResNet-50 or DINOv2.",
        f"Images of {model.image_size} pixels, cropped to {model.crop_size}.",
        f"Validation: {report.settings['n_validation']} nominal images of this package's own draw.",
        "The radius, the number of nominal samples and C of the paper's text did not survive; this package's contract "
        "takes 5, 100 and 1e-3.",
        "The SVM is solved to a duality gap of 1e-4 with the squared hinge; the paper: LinearSVC's defaults.",
        "The data may be a resized copy of the original set.",
    ]


def tables(content: dict[str, Any]) -> list[Any]:
    """The measured table and the printed one, for the screen."""
    from rich.table import Table

    heads = ("precision", "recall", "F1", "pooled F1", "IoU", "good px %", "good img %", "ms")
    detector = content["detector"]
    shown = Table("method", *heads, title=content["title"])
    ranks = (("I-AUROC", "i_auroc"), ("P-AUROC", "p_auroc"), ("AU-PRO", "aupro"))
    shown.caption = "detector: " + ", ".join(f"{label} {detector[key]:.3f}" for label, key in ranks)
    for row in content["rows"]:
        cells = []
        for name in METRICS:
            value = row[name]
            scale = 100 if name.startswith("fpr") else 1
            cells.append(
                "-" if value is None else f"{value * scale:.{2 if scale == 100 or name == 'milliseconds' else 3}f}"
            )
        shown.add_row(row["method"], *cells)
    printed = Table("as printed in the paper", "table", "detector", "backbone", "precision", "recall", "F1")
    printed.title = "Figures printed in the paper for this category; not measured here"
    printed.caption = "\n".join(["What differs:", *content["differs"]])
    for row in content["paper"]:
        values = ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
        if "f1" not in row:
            values = [f"I-AUROC {row['i_auroc']:.3f}", f"P-AUROC {row['p_auroc']:.3f}", "-"]
        printed.add_row(
            row["what"], f"{row['table']}{row['part'] or ''}", row["detector"], row["backbone"] or "-", *values
        )
    for one in (shown, printed):
        for column in one.columns[1 if one is shown else 4 :]:
            column.justify = "right"
    return [shown, printed] if content["paper"] else [shown]
