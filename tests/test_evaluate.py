"""evaluate: the report of a set whose maps are known, so that every number in it can be computed by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import ndimage

from ttt4as_fast import baselines, metrics
from ttt4as_fast.baselines import NominalStatistics
from ttt4as_fast.datasets import ImageError, load_dataset, read_image, read_mask
from ttt4as_fast.evaluate import _robust_params, evaluate
from ttt4as_fast.prediction import ImagePrediction
from ttt4as_fast.report import COLUMNS, METHODS
from ttt4as_fast.segmenter import TTT4AS

SIZE, CROP = 32, 28
EDGE = (SIZE - CROP) // 2


class BrightnessDetector:
    """A detector with PatchCore's interface: smoothed brightness is the anomaly map, smoothings are the features."""

    crop_size = CROP

    def __init__(self) -> None:
        rng = np.random.default_rng(9)
        maps = np.stack([self.map_of(_noise(rng)) for _ in range(40)])
        self.nominal_maps = maps
        self.nominal_statistics_ = NominalStatistics.from_maps(maps, maps.max(axis=(1, 2)))
        self.image_threshold_ = self.nominal_statistics_.image_threshold(0.01)
        self.batches: list[int] = []

    @staticmethod
    def map_of(pixels: np.ndarray) -> np.ndarray:
        psi = ndimage.gaussian_filter(pixels.astype(np.float32) / 255, 1.0)
        return psi[EDGE : EDGE + CROP, EDGE : EDGE + CROP]

    def predict_iter(self, images, *, batch_size=16, on_error=None):
        self.batches.append(len(images))
        for path in images:
            try:
                psi = self.map_of(np.asarray(read_image(path).resize((SIZE, SIZE)))[:, :, 0])
            except ImageError as error:
                on_error(error)
                continue
            features = np.stack([psi[::2, ::2], ndimage.gaussian_filter(psi, 2)[::2, ::2]])
            yield ImagePrediction(path, (SIZE, SIZE), psi, float(psi.max()), features, {"map": 2.0})

    def get_params(self):
        return {"crop_size": CROP}

    def transform_mask(self, mask: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(mask).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        return np.asarray(whole)[EDGE : EDGE + CROP, EDGE : EDGE + CROP]


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(80, 120, (SIZE, SIZE), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_set(root: Path, kinds: tuple[str, ...] = ("bright", "dim"), n: int = 3) -> Path:
    """An MVTec AD folder: squares that are plainly or hardly brighter than the noise around them."""
    rng = np.random.default_rng(1)
    write(root / "train/good/0.png", _noise(rng))
    for place in range(4):
        write(root / f"test/good/{place}.png", _noise(rng))
    for kind in kinds:
        for place in range(n):
            pixels, mask = _noise(rng), np.zeros((SIZE, SIZE), np.uint8)
            row, column = rng.integers(4, 20, 2)
            mask[row : row + 7, column : column + 6] = 255
            pixels[mask > 0] += 100 if kind == "bright" else 12
            write(root / f"test/{kind}/{place}.png", pixels)
            write(root / f"ground_truth/{kind}/{place}_mask.png", mask)
    return root


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The set, the detector, its report, and the maps and truths that the report is about."""
    root = make_set(tmp_path_factory.mktemp("set"))
    model, data = BrightnessDetector(), load_dataset(root)
    calls: list[tuple[str, int, int]] = []
    report = evaluate(model, data, batch_size=4, progress=lambda *call: calls.append(call))
    maps = np.stack([out.anomaly_map for out in model.predict_iter([s.image for s in data.test])])
    masks = np.stack(
        [model.transform_mask(read_mask(s.mask)) if s.label else np.zeros((CROP, CROP), bool) for s in data.test]
    )
    return SimpleNamespace(root=root, model=model, data=data, report=report, maps=maps, masks=masks, calls=calls)


def test_rows_are_every_method_for_every_kind(known):
    report = known.report
    assert [(row["kind"], row["method"]) for row in report.rows] == [
        (kind, method) for kind in ("bright", "dim", "mean", "all") for method in METHODS
    ]
    assert all(set(row) == set(COLUMNS) for row in report.rows)
    assert known.calls == [("evaluation", done, 10) for done in (4, 8, 10)]
    assert report.counts == {"listed": 10, "judged": 10, "failed": 0, "without_mask": 0, "mask_outside_crop": 0}


@pytest.mark.parametrize("kind", ["bright", "dim", "all"])
def test_rankings_are_over_the_kind_and_the_nominal_images(known, kind):
    chosen = [i for i, s in enumerate(known.data.test) if not s.label or kind in (s.kind, "all")]
    labels = [known.data.test[i].label for i in chosen]
    row = known.report.row("thr_3std", kind)
    maps, masks = known.maps[chosen], known.masks[chosen]
    assert row["i_auroc"] == metrics.auroc(maps.max(axis=(1, 2)), labels)
    assert row["p_auroc"] == pytest.approx(metrics.pixel_auroc(maps, masks))
    assert row["aupro"] == pytest.approx(metrics.aupro(maps, masks))
    assert (row["n_defective"], row["n_marked"], row["n_nominal"]) == (sum(labels), sum(labels), 4)
    assert row["p_auroc"] > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_each_method_are_judged_as_if_made_by_hand(known, method):
    stats, ungated, alone = known.model.nominal_statistics_, TTT4AS(), TTT4AS(C=10.0)
    batch = list(known.model.predict_iter([s.image for s in known.data.test]))
    gated = TTT4AS(image_threshold=known.model.image_threshold_)
    robust = TTT4AS(preset="robust").calibrate(known.model.nominal_maps)
    robust_gated = TTT4AS(**{**robust.get_params(), "image_threshold": known.model.image_threshold_})
    by_hand = {
        "thr_1std": lambda i, psi: psi > stats.mean + stats.std,
        "thr_2std": lambda i, psi: psi > stats.mean + 2 * stats.std,
        "thr_3std": lambda i, psi: psi > stats.mean + 3 * stats.std,
        "max_nominal": lambda i, psi: psi > stats.maxima.max(),
        "quantile_nominal": lambda i, psi: psi > np.quantile(stats.maxima, 0.95),
        "otsu": lambda i, psi: baselines.otsu_mask(psi),
        "ttt4as": lambda i, psi: gated(psi, batch[i].features, pred_score=batch[i].pred_score).pred_mask,
        "ttt4as_ungated": lambda i, psi: ungated(psi, batch[i].features).pred_mask,
        "ttt4as_score_only": lambda i, psi: alone(psi, ((psi - psi.mean()) / psi.std())[None]).pred_mask,
        "ttt4as_robust": lambda i, psi: robust_gated(psi, batch[i].features, batch[i].pred_score).pred_mask,
        "ttt4as_robust_ungated": lambda i, psi: robust(psi, batch[i].features).pred_mask,
        "oracle_image_f1": lambda i, psi: psi > baselines.oracle_threshold(known.maps, known.masks)[0],
        "oracle_pooled_f1": lambda i, psi: psi > baselines.oracle_threshold(known.maps, known.masks, "pooled_f1")[0],
    }[method]
    predictions = [by_hand(i, psi) for i, psi in enumerate(known.maps)]
    row = known.report.row(method)
    for name, value in metrics.mask_metrics(predictions, known.masks).items():
        assert row[name] == pytest.approx(value, abs=1e-12), name


def test_images_have_the_status_of_the_gated_method(known):
    gated = TTT4AS(image_threshold=known.model.image_threshold_)
    out = list(known.model.predict_iter([s.image for s in known.data.test]))
    expected = [gated(one.anomaly_map, one.features, one.pred_score).status for one in out]
    assert [entry["status"] for entry in known.report.images] == expected
    assert {"ok", "nominal"} <= set(expected)


def test_the_table_has_the_numbers_of_the_rows(known):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(known.report.table())
    row = known.report.row("ttt4as_ungated")
    line = next(one for one in console.export_text().splitlines() if "ttt4as_ungated" in one)
    cells = [cell.strip() for cell in line.strip("│┃| ").split("│")]
    assert cells[1] == f"{row['precision']:.3f}" and cells[7] == f"{100 * row['fpr_images_nominal']:.2f}"


def test_milliseconds_are_a_time(known):
    took = [row["milliseconds"] for row in known.report.rows if not row["method"].startswith("oracle")]
    assert all(0 < one < 60_000 for one in took)


def test_images_outside_of_the_root(known, tmp_path):
    data = replace(known.data, root=tmp_path)
    report = evaluate(known.model, data)
    assert [entry["image"] for entry in report.images] == [s.image.as_posix() for s in data.test]


def test_score_as_the_only_feature_is_no_matter_of_the_scale_of_scores(known):
    class Shifted(BrightnessDetector):
        @staticmethod
        def map_of(pixels: np.ndarray) -> np.ndarray:
            return BrightnessDetector.map_of(pixels) * np.float32(8) + np.float32(64)

    shifted = evaluate(Shifted(), known.data).row("ttt4as_score_only")
    assert shifted["f1"] == pytest.approx(known.report.row("ttt4as_score_only")["f1"], abs=0.01)
    assert shifted["fpr_pixels_nominal"] < 0.95


def test_methods_differ_as_they_should(known):
    row = known.report.row
    assert row("oracle_image_f1")["f1"] >= max(row(name)["f1"] for name in ("max_nominal", "quantile_nominal"))
    assert row("oracle_pooled_f1")["pooled_f1"] >= row("oracle_image_f1")["pooled_f1"]
    assert row("ttt4as_ungated")["fpr_images_nominal"] == 1.0  # without a gate every good part is marked
    assert row("ttt4as")["fpr_images_nominal"] == row("ttt4as_robust")["fpr_images_nominal"] == 0.0
    assert row("ttt4as_robust_ungated", "bright")["f1"] > row("ttt4as_ungated", "bright")["f1"]
    assert row("max_nominal", "bright")["f1"] > row("max_nominal", "dim")["f1"]


def test_robust_rows_are_of_the_backend_asked_for_if_it_has_that(known):
    stats = known.model.nominal_statistics_
    named = {name: _robust_params(stats, name)["backend"] for name in ("gpu", "reference", "auto")}
    assert named == {"gpu": "auto", "reference": "reference", "auto": "auto"}


def test_robust_rows_follow_a_robust_segmenter(known):
    report = evaluate(known.model, known.data, TTT4AS(preset="robust", core=0.0, C=1e-2))
    assert report.row("ttt4as_robust")["f1"] == report.row("ttt4as")["f1"]
    assert report.row("ttt4as_robust_ungated")["f1"] == report.row("ttt4as_ungated")["f1"]
    assert report.row("ttt4as")["f1"] != known.report.row("ttt4as_robust")["f1"]
    assert report.settings["segmenter"]["core"] == 0.0


def test_mean_is_over_kinds_and_all_over_images(known):
    for name in ("f1", "i_auroc", "aupro"):
        by_kind = [known.report.row("otsu", kind)[name] for kind in ("bright", "dim")]
        assert known.report.row("otsu", "mean")[name] == pytest.approx(np.mean(by_kind))
    with pytest.raises(KeyError, match="bent"):
        known.report.row("otsu", "bent")


def test_statuses_times_and_thresholds(known):
    report = known.report
    assert set(report.statuses) == {name for name in METHODS if name.startswith("ttt4as")}
    assert report.statuses["ttt4as_robust"] == report.statuses["ttt4as"]
    assert all(sum(count.values()) == 10 for count in report.statuses.values())
    assert report.statuses["ttt4as"]["nominal"] >= 4
    for method in METHODS:
        time = report.row(method)["milliseconds"]
        assert math.isnan(time) if method.startswith("oracle") else time > 0
    assert report.settings["detector_milliseconds"] == {"map": pytest.approx(2.0)}
    assert report.thresholds["image"] == known.model.image_threshold_
    assert report.thresholds["max_nominal"] == known.model.nominal_statistics_.max_threshold()


def test_images_are_listed_with_the_f1_of_every_method(known):
    entries = known.report.images
    assert [entry["image"] for entry in entries] == [
        s.image.relative_to(known.root).as_posix() for s in known.data.test
    ]
    assert all(entry["f1"]["otsu"] is None for entry in entries if not entry["label"])
    f1 = [entry["f1"]["otsu"] for entry in entries if entry["label"]]
    assert np.mean(f1) == pytest.approx(known.report.row("otsu")["f1"])


def test_own_image_threshold_of_the_segmenter_is_kept(known):
    report = evaluate(known.model, known.data, TTT4AS(image_threshold=1e9))
    assert report.thresholds["image"] == 1e9
    assert report.statuses["ttt4as"] == {"nominal": 10}
    assert report.row("ttt4as")["f1"] == 0.0
    assert report.row("ttt4as_ungated")["f1"] == known.report.row("ttt4as_ungated")["f1"]


def test_batch_size_changes_no_mask(known):
    one = evaluate(known.model, known.root, batch_size=1)
    for mine, theirs in zip(one.rows, known.report.rows, strict=True):
        for name in set(COLUMNS) - {"milliseconds"}:
            assert mine[name] == theirs[name] or (math.isnan(mine[name]) and math.isnan(theirs[name]))


def test_json_and_csv_are_written_whole_and_hold_the_rows(known, tmp_path):
    text = known.report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    content = json.loads(text)
    assert content["format_version"] == 1
    assert "images" not in content
    assert len(json.loads(known.report.to_json(images=True))["images"]) == 10
    assert content["rows"][-1]["milliseconds"] is None  # an oracle's: NaN is not JSON
    assert str(known.root) not in known.report.to_json(images=True)
    known.report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for mine, theirs in zip(rows, known.report.rows, strict=True):
        assert mine["method"] == theirs["method"]
        assert float(mine["f1"]) == pytest.approx(theirs["f1"], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.json"]


def shown(report) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    return console.file.getvalue()


def test_table_shows_every_method_and_kind(known):
    text = shown(known.report)
    assert all(name in text for name in (*METHODS, "bright", "dim", "AU-PRO"))
    assert f"{known.report.row('otsu')['f1']:.3f}" in text


def test_bad_files_are_reported_skipped_and_counted(tmp_path):
    root = make_set(tmp_path)
    whole = (root / "test/bright/1.png").read_bytes()
    (root / "test/bright/1.png").write_bytes(whole[: len(whole) // 2])
    (root / "test/good/2.png").unlink()
    (root / "test/good/2.png").symlink_to("moved.png")
    write(root / "ground_truth/dim/0_mask.png", np.zeros((SIZE, SIZE + 1), np.uint8))
    (root / "ground_truth/dim/1_mask.png").write_bytes(b"no mask")
    model = BrightnessDetector()
    report = evaluate(model, root, batch_size=5)
    assert [failure["path"] for failure in report.failures] == [
        "test/good/2.png",
        "test/bright/1.png",
        "ground_truth/dim/0_mask.png",
        "ground_truth/dim/1_mask.png",
    ]
    assert "32 x 33" in report.failures[2]["reason"]
    assert (report.counts["listed"], report.counts["judged"], report.counts["failed"]) == (10, 6, 4)
    row = report.row("otsu")
    assert (row["n_defective"], row["n_nominal"]) == (3, 3)
    assert max(model.batches) > 1  # the good part of the set still goes in batches
    # Judged as if the bad images had never been there.
    for name in ("test/bright/1.png", "test/good/2.png", "test/dim/0.png", "test/dim/1.png"):
        (root / name).unlink()
    assert evaluate(model, root).row("otsu")["f1"] == row["f1"]


def test_nothing_readable_nothing_to_test_and_no_calibration_are_errors(tmp_path):
    write(tmp_path / "train/good/0.png", np.zeros((4, 4), np.uint8))
    model = BrightnessDetector()
    with pytest.raises(ValueError, match="no test images"):
        evaluate(model, load_dataset(tmp_path, "folder"))
    (tmp_path / "test/good").mkdir(parents=True)
    (tmp_path / "test/good/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 test images"):
        evaluate(model, tmp_path)
    model.nominal_statistics_ = None
    with pytest.raises(ValueError, match="calibrate"):
        evaluate(model, tmp_path)
    for argument in ({"batch_size": 0}, {"quantile": 2.0}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            evaluate(BrightnessDetector(), tmp_path, **argument)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_image_that_is_listed_twice_is_judged_twice(known, tmp_path, batch_size):
    good, bright, broken = known.data.test[0], known.data.test[4], tmp_path / "broken.png"
    broken.write_bytes(Path(bright.image).read_bytes()[:-30])
    test = (good, bright, replace(bright, image=broken, mask=None), bright, replace(bright, kind="dim", mask=None))
    report = evaluate(known.model, replace(known.data, test=test), batch_size=batch_size)
    assert report.counts == {"listed": 5, "judged": 4, "failed": 1, "without_mask": 1, "mask_outside_crop": 0}
    assert [image["kind"] for image in report.images] == ["good", "bright", "bright", "dim"]
    assert [image["f1"]["otsu"] is None for image in report.images] == [True, False, False, True]


@pytest.mark.parametrize("kind", ["all", "mean"])
def test_kinds_are_not_called_as_the_rows_over_all_of_them(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"^dataset: .*other than 'mean' and 'all', got '{kind}'"):
        evaluate(BrightnessDetector(), make_set(tmp_path, ("bright", kind)))


def test_set_without_defects_has_false_positive_rates_only(tmp_path):
    report = evaluate(BrightnessDetector(), make_set(tmp_path, kinds=()))
    assert {row["kind"] for row in report.rows} == {"all"}
    row = report.row("ttt4as_ungated")
    assert row["fpr_images_nominal"] == 1.0
    assert math.isnan(row["f1"])
    assert math.isnan(row["i_auroc"])
    assert math.isnan(report.thresholds["oracle_image_f1"])
    assert json.loads(report.to_json())["rows"][0]["f1"] is None
    assert shown(report).count(" - ") >= 5 * len(METHODS)  # undefined numbers are dashes on screen


def test_set_without_nominal_images(tmp_path):
    root = make_set(tmp_path)
    for path in (root / "test/good").iterdir():
        path.unlink()
    row = evaluate(BrightnessDetector(), root).row("thr_3std")
    assert math.isnan(row["i_auroc"])
    assert math.isnan(row["fpr_images_nominal"])
    assert 0 < row["f1"] < 1


def test_defect_without_mask_counts_for_the_image_ranking_only(tmp_path):
    root = make_set(tmp_path)
    with_all = evaluate(BrightnessDetector(), root)
    (root / "ground_truth/dim/0_mask.png").unlink()
    report = evaluate(BrightnessDetector(), load_dataset(root, "folder"))
    assert report.counts["without_mask"] == 1
    assert report.row("otsu")["i_auroc"] == with_all.row("otsu")["i_auroc"]
    f1 = [e["f1"]["otsu"] for e in with_all.images if e["label"] and e["image"] != "test/dim/0.png"]
    assert report.row("otsu")["f1"] == pytest.approx(np.mean(f1))


def test_defect_outside_the_crop_is_counted_and_no_part_of_the_means(tmp_path):
    root = make_set(tmp_path)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[0, :] = 255
    write(root / "ground_truth/dim/0_mask.png", mask)
    report = evaluate(BrightnessDetector(), root)
    assert report.counts["mask_outside_crop"] == 1
    whole = report.row("otsu")
    assert whole["n_marked"] == whole["n_defective"] - 1
    text = " ".join(shown(report).split())
    assert f"{whole['n_marked']} defective images of {whole['n_defective']} (0 without a mask file, 1 with" in text
    f1 = [e["f1"]["otsu"] for e in report.images if e["label"] and e["image"] != "test/dim/0.png"]
    assert report.row("otsu")["f1"] == pytest.approx(np.mean(f1))
    assert report.row("otsu")["fpr_images_nominal"] == 1.0  # Otsu marks all four nominal images; the fifth is not one
