"""The main job on real photographs: textures that ship with scikit-image, defects with ground truth by construction.

`make_defects` is the generator (also for defects of other sizes); `run_demo` is what ``ttt4as demo`` runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .installation import origin, versions
from .io import atomic_path, check_folder
from .kernels.arrays import check_float, check_int, check_option, to_numpy
from .progress import Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

TEXTURES = ("brick", "gravel", "grass")

# A photograph of 512 x 512 is cut into three areas that share no pixel: (row slice, column slice).
_AREAS = {
    "train": (slice(0, 512), slice(0, 320)),
    "validation": (slice(0, 256), slice(320, 512)),
    "test": (slice(256, 512), slice(320, 512)),
}


# ---------------------------------------------------------------- defects


def make_defects(
    images: np.ndarray,
    donors: np.ndarray | Sequence[np.ndarray],
    *,
    size: tuple[float, float] = (0.03, 0.05),
    contrast: float = 1.0,
    number: int = 1,
    softness: float = 2.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Blend irregular smooth blobs of other textures into images; the ground truth follows from the construction.

    Each image gets the number of pixels drawn from `size`, exactly, in `number` blobs. A blob is a star-shaped region
    with a random, elongated outline. The donor shows through it with weight `contrast`; towards the outline the weight
    falls linearly over `softness` pixels and passes half of `contrast` exactly there, so the mask is where it is more.
    Image `i` depends on `seed`, `i` and its own content only, not on how many others are given.

    Parameters
    ----------
    images : numpy.ndarray
        (N, H, W) or (N, H, W, 3), uint8 or floats in [0, 1]. Not modified.
    donors : numpy.ndarray or sequence of them
        Textures to blend in, each (h, w) or (h, w, 3) of the kind and range of `images`, h >= H and w >= W. For each
        image one of them and a place in it are drawn.
    size : (float, float)
        Smallest and largest share of the image that is defective, in (0, 0.6]. Default (0.03, 0.05).
    contrast : float
        Weight of the donor inside the blob, in (0, 1]. Default 1: the texture is replaced.
    number : int
        Blobs per image, >= 1. Large ones may touch. Default 1.
    softness : float
        Width of the blended rim in pixels, >= 0. Default 2.
    seed : int
        Non-negative. Default 0.

    Returns
    -------
    images : numpy.ndarray
        Shape and dtype of `images`.
    masks : numpy.ndarray
        (N, H, W) bool.

    Raises
    ------
    ValueError, TypeError
        An argument outside the ranges above, a donor too small or of another kind.
    """
    images = np.asarray(images)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images: expected shape (N, H, W) or (N, H, W, 3), got {images.shape}")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
    height, width = images.shape[1:3]
    low, high = _check_size_range(size)
    contrast = check_float(contrast, "contrast", 0.0, 1.0, open_low=True)
    number = check_int(number, "number", 1)
    softness = check_float(softness, "softness", 0.0)
    seed = check_int(seed, "seed", 0)
    donors = [np.asarray(donor) for donor in donors]
    if not donors:
        raise ValueError("donors: expected at least one texture, got none")
    for i, donor in enumerate(donors):
        if donor.ndim != images.ndim - 1 or donor.shape[2:] != images.shape[3:] or donor.dtype != images.dtype:
            raise ValueError(
                f"donors[{i}]: expected {images.dtype} of shape (h, w{', 3' if images.ndim == 4 else ''}) like images, "
                f"got {donor.dtype} of shape {donor.shape}"
            )
        if donor.shape[0] < height or donor.shape[1] < width:
            raise ValueError(f"donors[{i}]: expected at least {height} x {width} pixels, got {donor.shape[:2]}")

    defective = images.copy()
    masks = np.zeros((len(images), height, width), dtype=bool)
    for i in range(len(images)):
        rng = np.random.default_rng([seed, i])
        area = max(1, round(rng.uniform(low, high) * height * width))
        masks[i] = _blobs(rng, height, width, area, number)
        donor = donors[rng.integers(len(donors))]
        row = rng.integers(donor.shape[0] - height + 1)
        column = rng.integers(donor.shape[1] - width + 1)
        patch = donor[row : row + height, column : column + width].astype(np.float64)
        weight = contrast * _rim(masks[i], softness)
        if images.ndim == 4:
            weight = weight[..., None]
        blended = (1 - weight) * images[i] + weight * patch
        defective[i] = np.rint(blended) if images.dtype == np.uint8 else blended
    return defective, masks


def _check_size_range(size: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = size
    except (TypeError, ValueError):
        raise TypeError(f"size: expected (smallest, largest) share of the image, got {size!r}") from None
    low = check_float(low, "size[0]", 0.0, 0.6, open_low=True)
    high = check_float(high, "size[1]", 0.0, 0.6, open_low=True)
    if low > high:
        raise ValueError(f"size: expected smallest <= largest, got {size!r}")
    return low, high


def _blobs(rng: np.random.Generator, height: int, width: int, area: int, number: int) -> np.ndarray:
    """A bool mask of exactly `area` pixels: the lowest ones of the least of `number` distances to blob centres."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    reach = np.sqrt(area / number / np.pi)  # a disc of one blob's area has this radius
    field = np.full((height, width), np.inf)
    centres: list[np.ndarray] = []
    for _ in range(number):
        margin = np.minimum(1.3 * reach, 0.5 * np.array([height, width]) - 0.5)
        candidates = rng.uniform(margin, np.array([height, width]) - 1 - margin + 1e-9, size=(16, 2))
        # The candidate farthest from the earlier blobs keeps them apart.
        gaps = [min((np.hypot(*(c - other)) for other in centres), default=0.0) for c in candidates]
        centre = candidates[int(np.argmax(gaps))]
        centres.append(centre)
        field = np.minimum(field, _star_distance(rng, rows - centre[0], columns - centre[1]))
    mask = np.zeros(height * width, dtype=bool)
    mask[np.argsort(field, axis=None, kind="stable")[:area]] = True
    return mask.reshape(height, width)


def _star_distance(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Distance from a centre in units of a random outline: elongated, rotated, with five random harmonics."""
    turn, stretch = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1.0, 2.2))
    along = (np.cos(turn) * dx + np.sin(turn) * dy) / stretch
    across = (np.cos(turn) * dy - np.sin(turn) * dx) * stretch
    angle = np.arctan2(across, along)
    outline = np.ones_like(angle)
    for k in range(2, 7):
        outline += rng.normal(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(along, across) / np.maximum(outline, 0.3)


def _rim(mask: np.ndarray, softness: float) -> np.ndarray:
    """Weight in [0, 1]: above a half inside the mask, below it outside, linear over `softness` pixels between."""
    from scipy.ndimage import distance_transform_edt

    if softness == 0 or mask.all():
        return mask.astype(np.float64)
    # Distances run between pixel centres; the outline lies half a pixel before the nearest one on the other side.
    signed = np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask))
    return np.clip(0.5 + signed / softness, 0.0, 1.0)


# ---------------------------------------------------------------- the main job


def texture_crops(name: str, area: str, n: int, side: int, seed: int) -> np.ndarray:
    """Random crops of one area of a texture photograph; half of the training ones are mirrored.

    Parameters
    ----------
    name : {"brick", "gravel", "grass"}
    area : {"train", "validation", "test"}
        Areas share no pixel.
    n, side, seed : int
        How many crops, of how many pixels a side (at most 192), drawn how.

    Returns
    -------
    numpy.ndarray
        (n, side, side) uint8.
    """
    return photograph_crops(load_texture(name), area, n, side, [seed, TEXTURES.index(name)])


def photograph_crops(photograph: np.ndarray, area: str, n: int, side: int, seed: Sequence[int]) -> np.ndarray:
    """`texture_crops` of any photograph (512, 512) uint8; `seed` is what `numpy.random.default_rng` takes."""
    photograph = photograph[_AREAS[area]]
    rng = np.random.default_rng([*seed, list(_AREAS).index(area)])
    rows = rng.integers(photograph.shape[0] - side + 1, size=n)
    columns = rng.integers(photograph.shape[1] - side + 1, size=n)
    crops = np.stack([photograph[r : r + side, c : c + side] for r, c in zip(rows, columns, strict=True)])
    if area == "train":
        crops[1::2] = crops[1::2, :, ::-1]
    return crops


def load_texture(name: str) -> np.ndarray:
    """A photograph that ships with scikit-image: (512, 512) uint8, grey. Nothing is downloaded.

    Raises
    ------
    ValueError
        An unknown name.
    ImportError
        scikit-image is not installed.
    """
    check_option(name, "texture", TEXTURES)
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("the demo's photographs come with scikit-image: pip install scikit-image") from error
    return np.asarray(getattr(data, name)())


@dataclass(frozen=True)
class DemoPlan:
    """How large a demo is. The default runs all three textures in well under two minutes on two cores."""

    n_train: int = 32
    n_validation: int = 32
    n_test: int = 8
    side: int = 160
    size: tuple[float, float] = (0.03, 0.05)


def run_demo(
    output: str | os.PathLike[str],
    textures: Sequence[str] = TEXTURES,
    seed: int = 0,
    backend: str = "auto",
    plan: DemoPlan | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit PatchCore on crops of real photographs, blend defects into others, and compare the masks of THR and TTT4AS.

    THR marks what lies above the per-pixel mean + 3 standard deviations of the validation crops, as in the paper.
    TTT4AS marks every defective crop, as in the paper; ``ttt4as_gated`` leaves those empty whose image score is below
    the image threshold of the validation crops, as ``ttt4as predict`` does, which is what keeps nominal crops empty.

    Parameters
    ----------
    output : path-like
        Folder for ``summary.json`` and ``figure.png``; made if absent.
    textures : sequence of str
        Out of ``"brick"``, ``"gravel"``, ``"grass"``. Default: all.
    seed : int
        For crops, defects and coreset. Default 0.
    backend : str
        For PatchCore and TTT4AS.
    plan : DemoPlan, optional
        Numbers and sizes of the crops.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    dict
        The content of ``summary.json``: ``f1_threshold`` and ``f1_ttt4as`` (means over the defective crops of all
        textures), the same with precision and recall for each texture and each crop, ``milliseconds`` a stage and
        image, versions, seed, and the checkout's commit, None outside one, with the day it was measured.

    Raises
    ------
    ValueError, TypeError, ImportError, OSError
        An unknown texture, a negative seed, scikit-image missing, a folder that cannot be written.
    """
    plan = plan or DemoPlan()
    seed = check_int(seed, "seed", 0)
    textures = tuple(check_option(name, "texture", TEXTURES) for name in dict.fromkeys(textures))
    if not textures:
        raise ValueError("textures: expected at least one, got none")
    output = Path(output)
    check_folder(output, "output")
    output.mkdir(parents=True, exist_ok=True)
    report = progress or silent
    began = time.perf_counter()
    runs = [_run_texture(name, seed, backend, plan, report) for name in textures]
    rows = [row for run in runs for row in run.rows]
    summary = {
        **_means(rows),
        "textures": {run.name: {**_means(run.rows), "milliseconds": run.milliseconds} for run in runs},
        "milliseconds": {
            key: _round(float(np.mean([r.milliseconds[key] for r in runs]))) for key in runs[0].milliseconds
        },
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "plan": asdict(plan),
        "versions": versions(),
        **origin(),
        "images": rows,
    }
    with atomic_path(output / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _draw(output / "figure.png", runs)
    return summary


@dataclass(frozen=True)
class _TextureRun:
    name: str
    images: np.ndarray  # the defective crops
    gt_masks: np.ndarray
    anomaly_maps: np.ndarray  # in units of the highest score of any validation map
    masks: dict[str, np.ndarray]
    rows: list[dict[str, Any]]
    milliseconds: dict[str, float]


def _run_texture(name: str, seed: int, backend: str, plan: DemoPlan, report: Progress) -> _TextureRun:
    from .baselines import mean_std_mask
    from .metrics import precision_recall_f1
    from .patchcore import PatchCore
    from .segmenter import TTT4AS

    crops = {
        area: texture_crops(name, area, n, plan.side, seed)
        for area, n in (("train", plan.n_train), ("validation", plan.n_validation), ("test", plan.n_test))
    }
    donors = [load_texture(other) for other in TEXTURES if other != name]
    defective, gt = make_defects(crops["test"], donors, size=plan.size, seed=seed + TEXTURES.index(name))

    def stages(stage: str, done: int, total: int) -> None:
        report(f"{name}: {stage}", done, total)

    began = time.perf_counter()
    model = PatchCore(image_size=plan.side, crop_size=plan.side, random_state=seed, backend=backend)
    model.fit(_as_input(crops["train"]), progress=stages)
    fitted = time.perf_counter()
    model.calibrate(_as_input(crops["validation"]), progress=stages)
    calibrated = time.perf_counter()
    stats, image_threshold = model.nominal_statistics_, model.image_threshold_
    assert stats is not None  # calibrate has set it
    images = np.concatenate([defective, crops["test"]])
    prediction = model.predict(_as_input(images), progress=stages, keep_on_device=True)
    maps, scores = map(to_numpy, (prediction.anomaly_map, prediction.pred_score))
    labels = np.repeat([1, 0], plan.n_test)
    gt_masks = np.concatenate([gt, np.zeros_like(gt)])

    segmenter = TTT4AS(backend=backend)
    segmenter.warmup(prediction.anomaly_map[0], prediction.features[0])
    start = time.perf_counter()
    masks = {"THR": mean_std_mask(maps, stats, k=3.0)}
    thresholded = time.perf_counter()
    pairs = zip(prediction.anomaly_map, prediction.features, strict=True)
    masks["TTT4AS"] = np.stack([to_numpy(segmenter(*pair).pred_mask) for pair in pairs])
    segmented = time.perf_counter()
    gate = scores >= image_threshold
    masks["TTT4AS gated"] = masks["TTT4AS"] & gate[:, None, None]

    rows = []
    for i, (label, truth) in enumerate(zip(labels, gt_masks, strict=True)):
        row: dict[str, Any] = {"texture": name, "image": i, "label": int(label), "score": float(scores[i])}
        row.update(defect_share=float(truth.mean()), detected=bool(gate[i]))
        for method, (key, _) in METHODS.items():
            mask = masks[method][i]
            row[key] = {"marked_share": float(mask.mean())}
            if label:
                row[key].update(zip(("precision", "recall", "f1"), precision_recall_f1(mask, truth), strict=True))
        rows.append(row)
    unit = stats.max_threshold()
    n = len(images)
    milliseconds = {
        "fit": 1e3 * (fitted - began),
        "calibrate": 1e3 * (calibrated - fitted),
        **{f"predict_{stage}": spent / n for stage, spent in prediction.milliseconds.items()},
        "threshold": 1e3 * (thresholded - start) / n,
        "ttt4as": 1e3 * (segmented - thresholded) / n,
    }
    return _TextureRun(
        name=name,
        images=defective,
        gt_masks=gt,
        anomaly_maps=maps[: plan.n_test] / unit,
        masks={method: mask[: plan.n_test] for method, mask in masks.items()},
        rows=rows,
        milliseconds={stage: _round(spent) for stage, spent in milliseconds.items()},
    )


# Column title -> key in summary.json, and suffix of its keys of means.
METHODS = {
    "THR": ("thr", "threshold"),
    "TTT4AS": ("ttt4as", "ttt4as"),
    "TTT4AS gated": ("ttt4as_gated", "ttt4as_gated"),
}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the defective crops, and what is marked on nominal ones."""
    defective = [row for row in rows if row["label"]]
    nominal = [row for row in rows if not row["label"]]
    means = {}
    for key, suffix in METHODS.values():
        for metric in ("f1", "precision", "recall"):
            means[f"{metric}_{suffix}"] = float(np.mean([row[key][metric] for row in defective]))
        means[f"nominal_marked_share_{suffix}"] = float(np.mean([row[key]["marked_share"] for row in nominal]))
    means["detection_rate"] = float(np.mean([row["detected"] for row in defective]))
    means["false_alarm_rate"] = float(np.mean([row["detected"] for row in nominal]))
    return means


def table(summary: dict[str, Any]) -> Table:
    """Precision, recall and F1 of each method on each defective crop, and their means, for the screen."""
    from rich.table import Table

    def cells(values: Callable[[str, str, str], float]) -> list[str]:
        metrics = ("precision", "recall", "f1")
        return ["  ".join(f"{values(key, suffix, m):.2f}" for m in metrics) for key, suffix in METHODS.values()]

    shown = Table("texture", "image", title="Defective crops: precision, recall, F1")
    for method in METHODS:
        shown.add_column(method, justify="right")
    for row in summary["images"]:
        if row["label"]:
            shown.add_row(row["texture"], str(row["image"]), *cells(lambda key, _, metric: row[key][metric]))  # noqa: B023
    for name, means in [*summary["textures"].items(), ("all", summary)]:
        shown.add_section()
        style = "bold" if name == "all" else None
        shown.add_row(name, "mean", *cells(lambda _, suffix, metric: means[f"{metric}_{suffix}"]), style=style)  # noqa: B023
    return shown


def _as_input(images: np.ndarray) -> np.ndarray:
    """(N, H, W) uint8 as float32 (N, 3, H, W) in [0, 1]."""
    return np.repeat(images[:, None].astype(np.float32) / 255, 3, axis=1)


def _draw(path: Path, runs: list[_TextureRun]) -> None:
    """Two rows a texture: of the crops in the order of TTT4AS's F1, the ones at a third and at two thirds."""
    from .figures import comparison

    picked = []
    for run in runs:
        order = np.argsort([row["ttt4as"]["f1"] for row in run.rows if row["label"]], kind="stable")
        picked += [(run, int(order[len(order) * k // 3])) for k in (2, 1)]
    comparison(
        path,
        images=[run.images[i] for run, i in picked],
        anomaly_maps=[run.anomaly_maps[i] for run, i in picked],
        masks={method: [run.masks[method][i] for run, i in picked] for method in ("THR", "TTT4AS")},
        gt_masks=[run.gt_masks[i] for run, i in picked],
        labels=[run.name for run, _ in picked],
        scale=(0.5, 1.5),
        scale_label="score / highest nominal score",
    )


def _round(value: float) -> float:
    return float(f"{value:.4g}")
