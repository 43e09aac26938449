"""Every way to make a mask, on identical anomaly maps of a test set, against its ground truth: the tables of a paper.

`evaluate` streams the test images through the detector. Features are dropped as soon as an image's masks are made; the
maps (float32) and the masks of the truth are kept, because the ranking metrics and the oracle need all of them at
once.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import baselines, metrics
from .datasets import Dataset, ImageError, Sample, image_size, load_dataset, read_mask
from .installation import versions
from .kernels.arrays import check_float, check_int, like, to_numpy
from .kernels.segment_robust import OPERATION
from .progress import Progress, silent
from .report import MASK_METRICS, METHODS, RANKINGS, Report
from .segmenter import TTT4AS

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .kernels.arrays import Array
    from .patchcore import PatchCore
    from .prediction import ImagePrediction

_SCORE_ONLY_C = 10.0
"""C of the SVM on the score alone. The default C suits a backbone's hundreds of features; it is too small for one."""
_ORACLES = {"oracle_image_f1": "image_f1", "oracle_pooled_f1": "pooled_f1"}


class _Judged(NamedTuple):
    """What the model says of an image; `placed` are map and features on its device, for methods that run there."""

    psi: np.ndarray
    features: np.ndarray
    score: float
    placed: tuple[Array, Array]


_Method = Callable[[_Judged], tuple[np.ndarray, str]]


def evaluate(
    model: PatchCore,
    dataset: Dataset | str | os.PathLike[str],
    segmenter: TTT4AS | None = None,
    *,
    batch_size: int = 8,
    quantile: float = 0.95,
    progress: Progress | None = None,
) -> Report:
    """Run the detector over a test set and compare the masks that each method makes of its maps.

    Masks are judged at the resolution of the model's crop; the ground truth goes through the same resizing and
    cropping as the images, by nearest neighbour. A file that cannot be read, or a mask of another size than its image,
    is recorded in the report and its image left out. A defective image without a mask file counts for I-AUROC only.

    Parameters
    ----------
    model : PatchCore
        Fitted and calibrated: `predict_iter`, `transform_mask`, `nominal_statistics_` and `image_threshold_` are used,
        and `device` where there is one.
    dataset : Dataset or path-like
        A path goes through `load_dataset`.
    segmenter : TTT4AS, optional
        Default ``TTT4AS()``. Without an `image_threshold` of its own the gated run takes the model's. The next two
        runs are ungated. The robust rows are those of ``TTT4AS(preset="robust")`` with the model's nominal level, or
        of `segmenter` again if that is its preset; gated by the same threshold, and not.
    batch_size : int, default 8
        Images the detector takes at once.
    quantile : float in [0, 1], default 0.95
        Of ``"quantile_nominal"``.
    progress : callable, optional
        Called as ``progress("evaluation", done, total)`` after each batch, with the numbers of images.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        The set has no test images, none of them can be read, a kind of defect is called ``"mean"`` or ``"all"``, or
        the model is not calibrated.
    """
    dataset = dataset if isinstance(dataset, Dataset) else load_dataset(dataset)
    batch_size = check_int(batch_size, "batch_size", 1)
    check_float(quantile, "quantile", 0.0, 1.0)
    if not dataset.test:
        raise ValueError(f"dataset: {dataset.name!r} (layout {dataset.layout!r}) has no test images")
    if taken := [kind for kind in dataset.kinds if kind in ("mean", "all")]:
        raise ValueError(f"dataset: expected kinds of defect other than 'mean' and 'all', got {taken[0]!r}")
    if model.nominal_statistics_ is None or model.image_threshold_ is None:
        raise ValueError("model: expected a calibrated model; call calibrate() with nominal validation images")
    segmenter = TTT4AS() if segmenter is None else segmenter
    stats, gate = model.nominal_statistics_, _gate(model, segmenter)
    methods = _methods(stats, gate, segmenter, quantile)

    run = _Run(list(methods), dataset.root)
    for sample, prediction, mask in _predictions(model, dataset.test, batch_size, run, progress or silent):
        run.add(sample, _placed(prediction, getattr(model, "device", None)), mask, methods)
    if not run.samples:
        raise ValueError(f"dataset: none of the {len(dataset.test)} test images could be read; {run.failures[0]}")
    thresholds = run.add_oracles()
    thresholds.update(
        image=gate,
        max_nominal=stats.max_threshold(),
        quantile_nominal=stats.quantile_threshold(quantile),
    )
    return Report(
        dataset=dataset.name,
        layout=dataset.layout,
        rows=run.rows(dataset.kinds),
        images=run.image_entries(),
        counts=run.counted(len(dataset.test)),
        statuses={name: dict(count) for name, count in run.statuses.items()},
        thresholds=thresholds,
        failures=run.failures,
        settings=_settings(model, segmenter, quantile, run, len(stats.scores)),
        environment=_environment(),
    )


def _gate(model: PatchCore, segmenter: TTT4AS) -> float:
    own = segmenter.get_params()["image_threshold"]
    gate = model.image_threshold_ if own is None else own
    assert gate is not None, "a calibrated model has an image threshold"
    return float(gate)


def _methods(stats: baselines.NominalStatistics, gate: float, segmenter: TTT4AS, quantile: float) -> dict[str, _Method]:
    params = segmenter.get_params()
    robust = params if params["preset"] == "robust" else _robust_params(stats, params["backend"])
    gated, robust_gated = (TTT4AS(**{**given, "image_threshold": gate}) for given in (params, robust))
    ungated, robust_ungated = (TTT4AS(**{**given, "image_threshold": None}) for given in (params, robust))
    score_only = TTT4AS(**{**params, "image_threshold": None, "C": _SCORE_ONLY_C})

    def threshold(mask: Callable[[np.ndarray], np.ndarray]) -> _Method:
        return lambda image: (mask(image.psi), "ok")

    def test_time(ttt: TTT4AS, only_score: bool = False) -> _Method:
        def run(image: _Judged) -> tuple[np.ndarray, str]:
            psi, features = image.placed if ttt.runs_on_cuda else (image.psi, image.features)
            out = ttt(psi, like(_standardised(image.psi)[None], psi) if only_score else features, image.score)
            return to_numpy(out.pred_mask), str(out.status)

        return run

    return {
        "thr_1std": threshold(lambda psi: baselines.mean_std_mask(psi, stats, 1.0)),
        "thr_2std": threshold(lambda psi: baselines.mean_std_mask(psi, stats, 2.0)),
        "thr_3std": threshold(lambda psi: baselines.mean_std_mask(psi, stats, 3.0)),
        "max_nominal": threshold(lambda psi: baselines.max_nominal_mask(psi, stats)),
        "quantile_nominal": threshold(lambda psi: baselines.quantile_nominal_mask(psi, stats, quantile)),
        "otsu": threshold(baselines.otsu_mask),
        "ttt4as": test_time(gated),
        "ttt4as_ungated": test_time(ungated),
        "ttt4as_score_only": test_time(score_only, only_score=True),
        "ttt4as_robust": test_time(robust_gated),
        "ttt4as_robust_ungated": test_time(robust_ungated),
    }


def _robust_params(stats: baselines.NominalStatistics, backend: str) -> dict[str, Any]:
    """The preset, calibrated, by the backend asked for if it has one of that name."""
    named = backend if backend in OPERATION.backends else "auto"
    return {"preset": "robust", "nominal_level": stats.level, "backend": named}


def _standardised(psi: np.ndarray) -> np.ndarray:
    """`psi` with mean 0 and standard deviation 1, zeros if it is constant.

    The SVM penalises its intercept: by a single feature far from zero, as raw distances are, it would mark every pixel.
    """
    centred = psi - psi.mean(dtype=np.float64)
    spread = centred.std()
    return (centred / spread if spread > 0 else centred).astype(np.float32)


def _placed(prediction: ImagePrediction, device: torch.device | None) -> _Judged:
    psi, features = prediction.anomaly_map, prediction.features
    placed: tuple[Array, Array] = psi, features
    if device is not None and device.type == "cuda":
        import torch

        placed = torch.from_numpy(psi).to(device), torch.from_numpy(features).to(device)
    return _Judged(psi, features, prediction.pred_score, placed)


def _predictions(
    model: PatchCore, samples: Sequence[Sample], batch_size: int, run: _Run, progress: Progress
) -> Iterator[tuple[Sample, ImagePrediction, np.ndarray | None]]:
    """Each sample with what the model says and the ground truth on its grid, or None; what cannot be read to `run`."""
    for start in range(0, len(samples), batch_size):
        good: list[tuple[Sample, np.ndarray | None]] = []
        for sample in samples[start : start + batch_size]:
            try:
                size = image_size(sample.image)
                mask = None if sample.mask is None else model.transform_mask(read_mask(sample.mask, size))
            except ImageError as error:
                run.fail(error)
            else:
                good.append((sample, mask))
        paths, rest = [sample.image for sample, _ in good], iter(good)
        for prediction in model.predict_iter(paths, batch_size=batch_size, on_error=run.fail) if good else ():
            for stage, milliseconds in prediction.milliseconds.items():
                run.detector_milliseconds[stage] += milliseconds
            # In the order of the images, without those that failed; an image may be listed twice.
            sample, mask = next(one for one in rest if one[0].image == prediction.path)
            yield sample, prediction, mask
        progress("evaluation", min(start + batch_size, len(samples)), len(samples))


class _Run:
    """What is kept of each test image while they stream through."""

    def __init__(self, methods: list[str], root: Path) -> None:
        self.root = root
        self.samples: list[Sample] = []
        self.maps: list[np.ndarray] = []
        self.masks: list[np.ndarray | None] = []  # None: defective, but nothing says where
        self.scores: list[float] = []
        self.status: list[str] = []
        self.counts: dict[str, list[metrics.Counts | None]] = {name: [] for name in methods}
        self.seconds = dict.fromkeys(methods, 0.0)
        self.statuses: dict[str, Counter[str]] = {name: Counter() for name in methods if name.startswith("ttt4as")}
        self.failures: list[dict[str, str]] = []
        self.detector_milliseconds: defaultdict[str, float] = defaultdict(float)

    def fail(self, error: ImageError) -> None:
        self.failures.append({"path": self._shown(error.path), "reason": error.reason})

    def _shown(self, path: Path) -> str:
        """Below the root, where it lies there."""
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def add(
        self,
        sample: Sample,
        image: _Judged,
        mask: np.ndarray | None,
        methods: dict[str, _Method],
    ) -> None:
        if not sample.label:
            mask = np.zeros(image.psi.shape, dtype=bool)
        if not self.samples:  # compiling and loading on the first call is no part of an image's time
            for method in methods.values():
                method(image)
        for name, method in methods.items():
            begin = time.perf_counter()
            pred_mask, status = method(image)
            self.seconds[name] += time.perf_counter() - begin
            self.counts[name].append(None if mask is None else metrics.mask_counts(pred_mask, mask))
            if name in self.statuses:
                self.statuses[name][status] += 1
            if name == "ttt4as":
                self.status.append(status)
        self.samples.append(sample)
        self.maps.append(image.psi)
        self.masks.append(mask)
        self.scores.append(float(image.score))

    def add_oracles(self) -> dict[str, float]:
        """Count what the best single thresholds mark; the thresholds, which need every map, are found here."""
        known = [(psi, mask) for psi, mask in zip(self.maps, self.masks, strict=True) if mask is not None]
        maps, masks = [psi for psi, _ in known], [mask for _, mask in known]
        thresholds = {}
        for name, objective in _ORACLES.items():
            thresholds[name], _ = baselines.oracle_threshold(maps, masks, objective)
            self.counts[name] = [
                None if mask is None else metrics.mask_counts(psi > thresholds[name], mask)
                for psi, mask in zip(self.maps, self.masks, strict=True)
            ]
            self.seconds[name] = math.nan
        return thresholds

    def rows(self, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        rows = []
        labels = np.array([sample.label for sample in self.samples], dtype=bool)
        kind_of = np.array([sample.kind for sample in self.samples], dtype=object)
        for kind in kinds:
            rows += self._rows_of(kind, np.flatnonzero(~labels | (kind_of == kind)))
        if kinds:
            rows += [self._mean_row(name, [row for row in rows if row["method"] == name]) for name in METHODS]
        return rows + self._rows_of("all", np.arange(len(labels)))

    def _rows_of(self, kind: str, places: np.ndarray) -> list[dict[str, Any]]:
        labels = np.array([self.samples[i].label for i in places], dtype=bool)
        masked = [i for i in places if self.masks[i] is not None]
        maps, masks = [self.maps[i] for i in masked], [self.masks[i] for i in masked]
        rankings = {
            "i_auroc": metrics.auroc(np.array([self.scores[i] for i in places]), labels),
            "p_auroc": metrics.pixel_auroc(maps, masks),
            "aupro": metrics.aupro(maps, masks),
        }
        masked_labels = np.array([self.samples[i].label for i in masked], dtype=bool)
        sizes = {
            "n_defective": int(labels.sum()),
            "n_marked": sum(bool(mask.any()) for mask in masks),
            "n_nominal": int((~labels).sum()),
        }
        return [
            {
                "kind": kind,
                "method": name,
                **sizes,
                **rankings,
                **metrics.summarise_counts([self.counts[name][i] for i in masked], masked_labels),
                "milliseconds": 1000 * self.seconds[name] / len(self.samples),
            }
            for name in METHODS
        ]

    @staticmethod
    def _mean_row(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        mean = {name: _mean([row[name] for row in rows]) for name in (*RANKINGS, *MASK_METRICS)}
        sizes = {name: sum(row[name] for row in rows) for name in ("n_defective", "n_marked")}
        fixed = {"kind": "mean", "method": method, **sizes, "n_nominal": rows[0]["n_nominal"]}
        return {**fixed, **mean, "milliseconds": rows[0]["milliseconds"]}

    def image_entries(self) -> list[dict[str, Any]]:
        entries = []
        for i, sample in enumerate(self.samples):
            f1 = {name: _f1_if_marked(self.counts[name][i]) for name in METHODS}
            entries.append(
                {
                    "image": self._shown(sample.image),
                    "kind": sample.kind,
                    "label": sample.label,
                    "pred_score": self.scores[i],
                    "status": self.status[i],
                    "f1": f1,
                }
            )
        return entries

    def counted(self, n_listed: int) -> dict[str, int]:
        pairs = [(sample, mask) for sample, mask in zip(self.samples, self.masks, strict=True) if sample.label]
        return {
            "listed": n_listed,
            "judged": len(self.samples),
            "failed": len(self.failures),
            "without_mask": sum(mask is None for _, mask in pairs),
            "mask_outside_crop": sum(mask is not None and not mask.any() for _, mask in pairs),
        }


def _settings(model: PatchCore, segmenter: TTT4AS, quantile: float, run: _Run, n_validation: int) -> dict[str, Any]:
    return {
        "segmenter": segmenter.get_params(),
        "model": model.get_params(),
        "n_validation": n_validation,
        "quantile": quantile,
        "detector_milliseconds": {
            stage: total / len(run.samples) for stage, total in run.detector_milliseconds.items()
        },
    }


def _environment() -> dict[str, Any]:
    import torch

    return {
        **versions(),
        "machine": platform.machine(),
        "n_cpus": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
    }


def _f1_if_marked(counts: metrics.Counts | None) -> float | None:
    return counts.f1 if counts is not None and counts.n_marked else None


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
