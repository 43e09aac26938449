"""The report of `evaluate`: its rows, and how they look as JSON, CSV and on the screen."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .io import atomic_path, plain

if TYPE_CHECKING:
    from rich.console import Group

FORMAT_VERSION = 1

#: Method -> what it is, in the order of the tables.
METHODS = {
    "thr_1std": "per-pixel mean + 1 std of nominal maps",
    "thr_2std": "per-pixel mean + 2 std of nominal maps",
    "thr_3std": "per-pixel mean + 3 std of nominal maps (THR)",
    "max_nominal": "maximum over nominal maps",
    "quantile_nominal": "quantile of the maxima of nominal maps",
    "otsu": "Otsu's threshold of the map itself",
    "ttt4as": "TTT4AS, gated by the image threshold",
    "ttt4as_ungated": "TTT4AS on every image",
    "ttt4as_score_only": "TTT4AS on every image, its anomaly score, standardised, as the only feature, at C = 10",
    "ttt4as_robust": "TTT4AS, preset robust, calibrated, gated by the image threshold",
    "ttt4as_robust_ungated": "TTT4AS, preset robust, calibrated, on every image",
    "oracle_image_f1": "one threshold, best for the mean per-image F1 (sees the ground truth)",
    "oracle_pooled_f1": "one threshold, best for the pooled F1 (sees the ground truth)",
}
RANKINGS = ("i_auroc", "p_auroc", "aupro")
MASK_METRICS = (
    "precision",
    "recall",
    "f1",
    "iou",
    "pooled_f1",
    "pooled_iou",
    "fpr_pixels_nominal",
    "fpr_images_nominal",
)
COLUMNS = ("kind", "method", "n_defective", "n_marked", "n_nominal", *RANKINGS, *MASK_METRICS, "milliseconds")


@dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    Attributes
    ----------
    dataset, layout : str
    rows : list of dict
        One for each method and kind of defect (its images against all nominal ones), ``"mean"`` (the plain mean over
        the kinds) and ``"all"`` (all defective images together); keys are `COLUMNS`, undefined values NaN. The
        rankings are the detector's and so the same for every method. ``n_marked`` is the number of defective images
        whose ground truth marks a pixel of the crop: the means over images are theirs. ``milliseconds`` is the mean
        over images; an oracle, which no line can run, has none.
    images : list of dict
        One for each image judged: path below the set's root, kind, label, score, TTT4AS's status, and the F1 of every
        method (None where the image has no marked pixel).
    counts : dict
        Test images: listed, judged, failed, without a mask file, with a mask that lies outside the crop.
    statuses : dict
        Method -> status -> number of images, for the TTT4AS methods.
    thresholds : dict
        The scalar thresholds that were used, image threshold among them.
    failures : list of dict
        ``path`` (below the set's root) and ``reason`` of each file that could not be read; its image is in no metric.
    settings, environment : dict
        The segmenter's parameters, the detector's and its milliseconds an image by stage; versions, machine and
        threads.
    """

    dataset: str
    layout: str
    rows: list[dict[str, Any]]
    images: list[dict[str, Any]]
    counts: dict[str, int]
    statuses: dict[str, dict[str, int]]
    thresholds: dict[str, float]
    failures: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def row(self, method: str, kind: str = "all") -> dict[str, Any]:
        """The row of a method for a kind of defect, ``"mean"`` or ``"all"``; KeyError if there is none."""
        for row in self.rows:
            if row["method"] == method and row["kind"] == kind:
                return row
        raise KeyError(f"no row for method {method!r} and kind {kind!r}")

    def to_json(self, path: str | os.PathLike[str] | None = None, images: bool = False) -> str:
        """The report as JSON text (undefined values as null), written whole to `path` if given.

        Parameters
        ----------
        path : path-like, optional
        images : bool, default False
            Whether the entry of each image is included.
        """
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if images or name != "images"}
        text = json.dumps(plain({"format_version": FORMAT_VERSION, **content}), indent=1, allow_nan=False) + "\n"
        return _write(text, path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """`rows` as CSV text (undefined values empty, 6 decimals), written whole to `path` if given."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("dataset", *COLUMNS))
        for row in self.rows:
            writer.writerow((self.dataset, *(_cell(row[column]) for column in COLUMNS)))
        return _write(stream.getvalue(), path)

    def table(self) -> Group:
        """Three tables for the screen: the detector by kind, the methods over all images, and their F1 by kind."""
        from rich.console import Group
        from rich.table import Table

        kinds = list(dict.fromkeys(row["kind"] for row in self.rows))
        detector = Table("defect", "images", "I-AUROC", "P-AUROC", "AU-PRO", title=f"{self.dataset}: detector")
        first = next(iter(METHODS))
        for kind in kinds:
            row = self.row(first, kind)
            detector.add_row(kind, str(row["n_defective"]), *(_shown(row[name]) for name in RANKINGS))
        heads = ("precision", "recall", "F1", "IoU", "pooled F1", "good px %", "good img %", "ms")
        names = ("precision", "recall", "f1", "iou", "pooled_f1", "fpr_pixels_nominal", "fpr_images_nominal")
        masks = Table("method", *heads, title=f"{self.dataset}: masks, all defective images", caption=self._caption())
        by_kind = Table("method", *kinds, title=f"{self.dataset}: mean per-image F1 by kind of defect")
        for method in METHODS:
            row = self.row(method)
            shares = [_shown(row[name] * 100, 2) if name.startswith("fpr") else _shown(row[name]) for name in names]
            masks.add_row(method, *shares, _shown(row["milliseconds"], 2))
            by_kind.add_row(method, *(_shown(self.row(method, kind)["f1"]) for kind in kinds))
        for one in (detector, masks, by_kind):
            for column in one.columns[1:]:
                column.justify = "right"
        return Group(detector, masks, by_kind)

    def _caption(self) -> str:
        row = self.row(next(iter(METHODS)))
        text = f"precision, recall, F1, IoU: means over {row['n_marked']} defective images"
        if row["n_marked"] < row["n_defective"]:
            text += (
                f" of {row['n_defective']} ({self.counts['without_mask']} without a mask file, "
                f"{self.counts['mask_outside_crop']} with nothing marked in the crop)"
            )
        return text + "; good px/img: share of nominal pixels/images marked"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return str(value)


def _shown(value: float, decimals: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def _write(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    return text
