"""The headline: what test-time training adds to the time of an image, by stage, as published and as it is here.

The detector's stages are those of `PatchCore.predict` (backbone, k-NN, map), the most that the method could be compared
with. Time does not depend on the weights' values, so backbones whose weights must be downloaded run with random ones;
searches and test-time training run on real activations of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import gate, machine, measure, peers, workloads
from .results_file import result

TITLE = "What test-time training adds to an image"
FULL = ("lite0", "wrn50", "wrn50_1536", "dinov2_vits14", "dino_vitb8")
QUICK = ("lite0", "wrn50")
PARTS = ("pseudo-labels", "sampling", "SVM", "prediction")
DETECTOR = ("backbone", "knn", "map")

_BACKBONES = {
    "lite0": "efficientnet_lite0",
    "wrn50": "wide_resnet50_2",
    "wrn50_1536": "wide_resnet50_2",
    "dinov2_vits14": "dinov2_vits14",
    "dino_vitb8": "dino_vitb8",
}
_BANK = 16_384  # 10 % of the patches of 209 images: the mean training set of MVTec AD


def run(
    names: tuple[str, ...] = FULL,
    threads: int = 1,
    seconds: float = 6.0,
    seed: int = 0,
    data: str | Path | None = None,
    bank: int = _BANK,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the headline.

    Parameters
    ----------
    names : tuple of str
        Workloads that have a detector: those of `FULL`.
    threads : int
        For everything that is timed.
    seconds : float
        Time to spend on each comparison, more where three rounds take more.
    seed : int
    data : path-like, optional
        A data set to take the images from.
    bank : int
        Patches in the memory bank that the detector searches. Default 16384.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Returns
    -------
    dict
        The content of ``headline.json``.
    """
    pinned = machine.pin(threads)
    watch = machine.Watch()
    rows = []
    for i, name in enumerate(names):
        progress("headline", i, len(names))
        rows.append(_row(workloads.WORKLOADS[name], seconds, seed, data, bank))
    progress("headline", len(names), len(names))
    about = machine.describe(pinned, watch)
    return result(
        "headline",
        TITLE,
        about,
        rows,
        absent_peers=peers.absent("segment", "linear_svm"),
        settings={"bank": bank, "seed": seed},
    )


def _row(workload: workloads.Workload, seconds: float, seed: int, data: str | Path | None, bank: int) -> dict[str, Any]:
    from ttt4as_fast import TTT4AS

    scene = workloads.scene(workload, 1, seed, data)
    anomaly_map, features = scene.anomaly_map[0], scene.features[0]
    segmenter = TTT4AS()
    out = segmenter(anomaly_map, features)
    verdict = gate.check_segment(anomaly_map, features, out.pred_mask, out.decision_map, out.pseudo_labels)

    recipe_stages: list[dict[str, float]] = []

    def recipe() -> np.ndarray:
        mask, spent = peers.recipe_stages(anomaly_map, features)
        recipe_stages.append(spent)
        return mask

    peer_verdict = gate.check_mask(recipe(), out.pred_mask)
    recipe_stages.clear()
    timings = measure.by_turns({"recipe": recipe, "ours": lambda: segmenter(anomaly_map, features)}, seconds)
    parts = measure.by_turns(_parts(anomaly_map, features), seconds / 6, least=20)
    detector = _detector(workload, seconds / 3, seed, data, bank)
    spent = sum(detector[stage]["p50"] for stage in DETECTOR)
    row = {
        "workload": workload.name,
        "like": workload.like,
        "shape": workload.shape,
        "images": scene.source,
        "backend": backend_of("segment"),
        "detector": detector,
        "detector_ms": measure.significant(spent),
        "recipe": {
            **timings["recipe"].summary(),
            "stages": {stage: _median([one[stage] for one in recipe_stages]) for stage in peers.STAGES},
            "version": peers.peers("segment")[0].version,
        },
        "ours": {
            **timings["ours"].summary(),
            "stages": {stage: parts[stage].summary()["p50"] for stage in PARTS},
        },
        "overhead_recipe": measure.significant(timings["recipe"].quantile(50) / spent, 3),
        "gate": {"passed": verdict.passed, "detail": verdict.detail, "recipe": peer_verdict.detail},
        "speedup": None,
        "overhead": None,
    }
    if verdict:
        row["speedup"] = measure.ratio(timings["recipe"], timings["ours"])
        row["overhead"] = measure.significant(timings["ours"].quantile(50) / spent, 3)
    return row


def _parts(anomaly_map: np.ndarray, features: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The stages as operations of their own; fused they take less, or share what they read."""
    from ttt4as_fast import kernels
    from ttt4as_fast.kernels.segment import nominal_candidates

    height, width = anomaly_map.shape
    candidates, limit = nominal_candidates((height, width), 100)

    def pseudo_labels() -> tuple[np.ndarray, np.ndarray]:
        anomalous = kernels.dilate(kernels.local_maxima(anomaly_map, 99.0), 5).ravel()
        positive, negative = np.flatnonzero(anomalous), candidates[~anomalous[candidates]][:limit]
        return np.concatenate([positive, negative]), np.repeat([1, -1], [len(positive), len(negative)])

    places, labels = pseudo_labels()

    def sampling() -> np.ndarray:
        return kernels.bilinear_sample(features, (height, width), places // width, places % width)

    samples = sampling()
    svm = kernels.fit_linear_svm(samples, labels)
    coef = svm.coef.astype(features.dtype)

    def prediction() -> np.ndarray:
        coarse = (np.tensordot(coef, features, 1) + features.dtype.type(svm.intercept))[None]
        return kernels.bilinear_upsample(coarse, (height, width))[0] > 0

    stages = (pseudo_labels, sampling, lambda: kernels.fit_linear_svm(samples, labels), prediction)
    return dict(zip(PARTS, stages, strict=True))


def _detector(
    workload: workloads.Workload, seconds: float, seed: int, data: str | Path | None, bank: int
) -> dict[str, Any]:
    """Milliseconds of the detector's stages on one image of 224 x 224."""
    import torch

    from ttt4as_fast import kernels
    from ttt4as_fast.patches import MapMaker

    network, weights = _backbone(_BACKBONES[workload.name])
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((1, 3, 224, 224), generator=generator).contiguous(memory_format=torch.channels_last)
    index = kernels.KnnIndex(workloads.nominal_patches(workload.channels, bank, seed, data, workload.grid))
    query = workloads.query_patches(workload.channels, seed, data, workload.grid)
    to_map = MapMaker(workload.map_size, 4.0)
    distances, _ = index.search(query)
    verdict = gate.check_knn(query, index.bank, *index.search(query), n_rows=8)
    if not verdict:
        raise RuntimeError(f"knn: {verdict.detail}: the detector's time would mean nothing")
    grid = distances.reshape(workload.grid, workload.grid)

    def search() -> None:
        index.search(query)  # all patches, and the neighbours that re-weight the image score
        index.search(query[:1], 9)

    timings = measure.by_turns(
        {"knn": search, "map": lambda: to_map(grid), "backbone": lambda: network(image)}, seconds
    )
    return {**{name: timings[name].summary() for name in DETECTOR}, "weights": weights}


@functools.cache
def _backbone(name: str) -> tuple[Any, str]:
    """The network as `PatchCore` runs it; with random weights where the real ones must be downloaded."""
    from ttt4as_fast import backbones

    if name == "efficientnet_lite0":
        return backbones.create_backbone(name, device="cpu"), "real"
    import timm
    import torch

    spec = backbones._SPECS[name]
    torch.manual_seed(0)
    options: dict[str, Any] = {} if spec.patch is None else {"dynamic_img_size": True}
    network = timm.create_model(spec.timm_name, pretrained=False, num_classes=0, **options)
    return backbones.Backbone(name, spec, network, spec.layers), "random"


def backend_of(operation: str) -> str:
    """The backend that ``"auto"`` takes for host arrays."""
    from ttt4as_fast import kernels

    return next(name for name, reason in kernels.backends()[operation].items() if reason is None)


def _median(values: list[float]) -> float:
    return measure.significant(float(np.median(values)))


def table(content: dict[str, Any]) -> Any:
    """The headline for the screen."""
    from rich.table import Table

    threads = next(iter(content["threads"].values()))
    caption = (
        f"median milliseconds an image, {threads} thread(s) for all; overhead: of the detector's time. "
        f"{content['machine']['cpu']}, commit {content['commit'] or 'unknown'}"
    )
    shown = Table("", "shape", "detector", "recipe", "overhead", "TTT4AS", "overhead", "speed-up", "gate")
    shown.title, shown.caption = TITLE, caption
    for column in shown.columns[2:8]:
        column.justify = "right"
    for row in content["rows"]:
        speedup, overhead = row["speedup"], row["overhead"]
        shown.add_row(
            row["workload"],
            row["shape"],
            f"{row['detector_ms']:.1f}",
            f"{row['recipe']['p50']:.1f}",
            f"{row['overhead_recipe']:.0%}",
            f"{row['ours']['p50']:.2f}",
            "-" if overhead is None else f"{overhead:.1%}",
            "-" if speedup is None else f"{speedup['ratio']:.0f}x ({speedup['low']:.0f}-{speedup['high']:.0f})",
            "passed" if row["gate"]["passed"] else f"FAILED: {row['gate']['detail']}",
        )
    return shown


def stage_table(content: dict[str, Any]) -> Any:
    """The same by stage."""
    from rich.table import Table

    shown = Table("", *(f"{name}" for name in DETECTOR), *peers.STAGES, title="By stage: median milliseconds")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in content["rows"]:
        detector = [f"{row['detector'][name]['p50']:.1f}" for name in DETECTOR]
        shown.add_row(
            f"{row['workload']}: recipe", *detector, *(f"{row['recipe']['stages'][s]:.1f}" for s in peers.STAGES)
        )
        parts = [row["ours"]["stages"].get(stage) for stage in peers.STAGES]
        shown.add_row(
            f"{row['workload']}: TTT4AS", *detector, *("-" if part is None else f"{part:.2f}" for part in parts)
        )
    shown.caption = "TTT4AS by stage: its operations called one by one; the fused call above does not add up from them"
    return shown
