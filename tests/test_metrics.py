"""Metrics against scikit-learn, torchmetrics and the definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, ndimage
from sklearn import metrics as sk
from torchmetrics import functional as tm

from ttt4as_fast import metrics

# Scores with and without ties, and a type whose rounding makes ties of its own.
SCORES = {
    "distinct": lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    "ties": lambda rng, shape: rng.integers(0, 7, shape).astype(np.float32),
    "half": lambda rng, shape: rng.standard_normal(shape).astype(np.float16),
    "double": lambda rng, shape: rng.standard_normal(shape),
    "constant": lambda rng, shape: np.zeros(shape, np.float32),
}


def random_set(kind: str, shape: tuple[int, int, int] = (7, 23, 17), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps that know something of masks with several regions, some touching only at corners; two images nominal."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.5, 1.5))
    masks = noise > np.quantile(noise, 0.9)
    masks[:2] = False
    maps = SCORES[kind](rng, shape)
    return (maps + masks.astype(maps.dtype)).astype(maps.dtype) if kind != "constant" else maps, masks


def aupro_by_definition(maps: np.ndarray, masks: np.ndarray, max_fpr: float) -> float:
    """The curve point by point, one threshold for every distinct score, regions found by flooding."""
    regions = []
    for place, mask in enumerate(masks):
        left = {tuple(p) for p in np.argwhere(mask)}
        while left:
            region, border = [], [left.pop()]
            while border:
                r, c = border.pop()
                region.append((place, r, c))
                near = {(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
                left -= near
                border += near
            regions.append(tuple(np.array(region).T))
    fprs, pros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        fprs.append(above[~masks].mean())
        pros.append(np.mean([above[region].mean() for region in regions]))
    grid = np.unique(np.append([f for f in fprs if f < max_fpr], max_fpr))
    # At a rate that several points share the curve rises; the area sees the last before and the first after.
    area = 0.0
    for low, high in itertools.pairwise(grid):
        start = max(i for i, f in enumerate(fprs) if f <= low)
        stop = start + 1
        slope = (pros[stop] - pros[start]) / (fprs[stop] - fprs[start])
        left, right = pros[start], pros[start] + slope * (high - fprs[start])
        area += (high - low) * (left + right) / 2
    return area / max_fpr


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("n", [2, 3, 101])
def test_auroc_is_that_of_scikit_learn(kind, n):
    rng = np.random.default_rng(n)
    scores, labels = SCORES[kind](rng, n), rng.random(n) < 0.4
    labels[:2] = (True, False)
    assert metrics.auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores.astype(float)), abs=1e-12)


@pytest.mark.parametrize("kind", SCORES)
def test_pixel_auroc_is_that_of_scikit_learn_and_torchmetrics(kind):
    maps, masks = random_set(kind)
    found = metrics.pixel_auroc(maps, masks)
    assert found == pytest.approx(sk.roc_auc_score(masks.ravel(), maps.ravel().astype(float)), abs=1e-12)
    # torchmetrics squashes logits when it sees values outside [0, 1]; a monotone map into it changes no ranking.
    squeezed = torch.tensor(maps.ravel().astype(float)) / 20 + 0.5
    theirs = tm.auroc(squeezed, torch.tensor(masks.ravel().astype(int)), task="binary")
    assert found == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("max_fpr", [0.01, 0.05, 0.3, 1.0])
def test_aupro_is_its_definition(kind, max_fpr):
    maps, masks = random_set(kind, (4, 13, 11))
    assert masks.any()
    assert metrics.aupro(maps, masks, max_fpr) == pytest.approx(aupro_by_definition(maps, masks, max_fpr), abs=1e-10)


def test_aupro_of_one_region_is_a_partial_roc_area():
    maps, masks = random_set("distinct", (1, 30, 30))
    masks[:] = False
    masks[0, 4:9, 5:12] = True
    fpr, tpr, _ = sk.roc_curve(masks.ravel(), maps.ravel(), drop_intermediate=False)
    inside = fpr < 0.3
    x, y = np.append(fpr[inside], 0.3), np.append(tpr[inside], np.interp(0.3, fpr, tpr))
    assert metrics.aupro(maps, masks) == pytest.approx(integrate.trapezoid(y, x) / 0.3, abs=1e-9)
    assert metrics.aupro(maps, masks, 1.0) == pytest.approx(metrics.pixel_auroc(maps, masks), abs=1e-12)


def test_regions_count_alike_and_touch_at_corners():
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 0:10, 0:10] = True  # found at once
    masks[0, 10, 10] = True  # touches the large one at a corner: the same region
    masks[0, 15, 15] = True  # a region of its own, never found
    maps = np.zeros((1, 20, 20), np.float32)
    maps[0, 0:11, 0:11] = masks[0, 0:11, 0:11]
    maps[0, 15, 15] = -1.0
    # The large region is at once complete, the small one never: 1/2 everywhere.
    assert metrics.aupro(maps, masks) == pytest.approx(0.5, abs=1e-12)


def test_perfect_inverted_and_blind_maps():
    masks = np.zeros((2, 9, 9), bool)
    masks[1, 2:5, 2:5] = True
    perfect = masks.astype(np.float32)
    assert (metrics.pixel_auroc(perfect, masks), metrics.aupro(perfect, masks)) == (1.0, 1.0)
    assert (metrics.pixel_auroc(-perfect, masks), metrics.aupro(-perfect, masks)) == (0.0, 0.0)
    blind = np.full_like(perfect, 3.0)
    assert metrics.pixel_auroc(blind, masks) == 0.5
    assert metrics.aupro(blind, masks) == pytest.approx(0.15, abs=1e-12)  # the diagonal: 0.3 / 2


def test_maps_of_different_sizes_and_order_of_images():
    maps, masks = random_set("ties")
    parts = [(psi[: 20 - i], mask[: 20 - i]) for i, (psi, mask) in enumerate(zip(maps, masks, strict=True))]
    flat = np.concatenate([psi.ravel() for psi, _ in parts]), np.concatenate([mask.ravel() for _, mask in parts])
    first = metrics.pixel_auroc(*zip(*parts, strict=True))
    assert first == pytest.approx(sk.roc_auc_score(flat[1], flat[0]), abs=1e-12)
    backwards = list(zip(*parts[::-1], strict=True))
    assert metrics.pixel_auroc(*backwards) == pytest.approx(first, abs=1e-14)
    forwards = list(zip(*parts, strict=True))
    assert metrics.aupro(*backwards) == pytest.approx(metrics.aupro(*forwards), abs=1e-13)


def test_tensors_are_taken():
    maps, masks = random_set("distinct")
    assert metrics.aupro(torch.tensor(maps), torch.tensor(masks)) == metrics.aupro(maps, masks)
    assert metrics.auroc(torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 1.0


def test_one_pixel_and_missing_classes_are_nan():
    one = np.ones((1, 1, 1), np.float32)
    for mask in (True, False):
        masks = np.full((1, 1, 1), mask)
        assert math.isnan(metrics.pixel_auroc(one, masks))
        assert math.isnan(metrics.aupro(one, masks))
        assert math.isnan(metrics.auroc([1.0], [mask]))
    assert math.isnan(metrics.auroc([], []))
    assert math.isnan(metrics.auroc(torch.empty(0), torch.empty(0, dtype=torch.bool)))
    assert math.isnan(metrics.pixel_auroc([], []))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused(value):
    maps, masks = random_set("distinct")
    maps[3, 2, 1] = value
    for metric in (metrics.pixel_auroc, metrics.aupro):
        with pytest.raises(ValueError, match=r"maps\[3\]: expected finite values.*\(2, 1\)"):
            metric(maps, masks)
    with pytest.raises(ValueError, match="scores: expected finite"):
        metrics.auroc([0.0, value], [0, 1])


def test_shapes_and_values_are_checked():
    maps, masks = random_set("distinct")
    with pytest.raises(ValueError, match=r"masks\[0\]: expected the shape of its map, \(23, 17\), got \(22, 17\)"):
        metrics.aupro(maps, masks[:, 1:])
    with pytest.raises(ValueError, match="masks: expected as many as maps, 7, got 6"):
        metrics.pixel_auroc(maps, masks[1:])
    with pytest.raises(ValueError, match=r"maps: expected shape \(N, H, W\)"):
        metrics.pixel_auroc(maps[0], masks[0])
    with pytest.raises(ValueError, match=r"masks\[2\]: expected booleans or 0 and 1"):
        metrics.pixel_auroc(maps, masks * 255)
    with pytest.raises(ValueError, match="labels: expected shape"):
        metrics.auroc([1.0, 2.0], [1])
    for bad in (0.0, 1.1, -1):
        with pytest.raises(ValueError, match="max_fpr"):
            metrics.aupro(maps, masks, bad)
    with pytest.raises(ValueError, match="pred_mask: expected the shape of gt_mask"):
        metrics.precision_recall_f1(masks[0], masks[0, 1:])
    with pytest.raises(ValueError, match="non-empty mask"):
        metrics.precision_recall_f1(masks, masks)
    with pytest.raises(ValueError, match="as many as gt_masks, 7, got 6"):
        metrics.mask_metrics(masks[1:], masks)


def test_what_is_no_array_and_what_has_holes_is_named():
    truth = np.eye(4, dtype=bool)
    masked = np.ma.masked_equal(np.eye(4), 0)
    for maps, masks, name in ((None, [truth], "maps"), ([truth * 1.0], 3, "masks")):
        with pytest.raises(TypeError, match=rf"{name}: expected shape \(N, H, W\) or N arrays"):
            metrics.pixel_auroc(maps, masks)
    for maps, masks, name in (
        ([masked], [truth], r"maps\[0\]"),
        (masked[None], truth[None], "maps"),
        ([truth * 1.0], [masked > 0], r"masks\[0\]"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected an array without masked values, got 12"):
            metrics.pixel_auroc(maps, masks)
    with pytest.raises(TypeError, match="scores: expected an array without masked values"):
        metrics.auroc(masked[0], truth[0])
    with pytest.raises(TypeError, match="labels: expected an array without masked values"):
        metrics.auroc(np.arange(4.0), masked[0])


def test_scores_beyond_the_integers_of_float32():
    assert metrics.auroc([2**24, 2**24 + 1], [0, 1]) == 1.0


def test_image_metrics_are_those_of_scikit_learn_and_torchmetrics():
    _, truths = random_set("distinct")
    predictions = np.roll(truths, 1, axis=2)
    for predicted, truth in zip(predictions, truths, strict=True):
        p, r, f1, _ = sk.precision_recall_fscore_support(
            truth.ravel(), predicted.ravel(), average="binary", zero_division=0
        )
        assert metrics.precision_recall_f1(predicted, truth) == pytest.approx((p, r, f1), abs=1e-12)
        theirs = tm.classification.binary_f1_score(torch.tensor(predicted), torch.tensor(truth))
        assert metrics.precision_recall_f1(predicted, truth)[2] == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("predicted", "marked", "expected"),
    [
        ([0, 0], [0, 0], (0, 0, 0)),
        ([1, 0], [0, 0], (0, 0, 0)),
        ([0, 0], [1, 0], (0, 0, 0)),
        ([0, 1], [1, 0], (0, 0, 0)),
        ([1, 1], [1, 0], (0.5, 1, 2 / 3)),
        ([1, 0], [1, 0], (1, 1, 1)),
    ],
)
def test_conventions_of_empty_masks(predicted, marked, expected):
    assert metrics.precision_recall_f1(np.array([predicted]), np.array([marked])) == pytest.approx(expected)


def test_mask_metrics_of_a_set():
    _, truths = random_set("distinct")
    predictions = np.roll(truths, 1, axis=2)
    predictions[0, :2] = True  # a false alarm on one of the two nominal images: 2 rows of 23
    found = metrics.mask_metrics(predictions, truths)
    defective = [i for i, truth in enumerate(truths) if truth.any()]
    flat = [(predictions[i].ravel(), truths[i].ravel()) for i in defective]
    assert found["precision"] == pytest.approx(np.mean([sk.precision_score(t, p, zero_division=0) for p, t in flat]))
    assert found["recall"] == pytest.approx(np.mean([sk.recall_score(t, p) for p, t in flat]))
    assert found["f1"] == pytest.approx(np.mean([sk.f1_score(t, p) for p, t in flat]))
    assert found["iou"] == pytest.approx(np.mean([sk.jaccard_score(t, p) for p, t in flat]))
    assert found["pooled_f1"] == pytest.approx(sk.f1_score(truths.ravel(), predictions.ravel()))
    assert found["pooled_iou"] == pytest.approx(sk.jaccard_score(truths.ravel(), predictions.ravel()))
    assert found["fpr_pixels_nominal"] == pytest.approx(1 / 23)
    assert found["fpr_images_nominal"] == 0.5


def test_labels_tell_a_defect_outside_the_crop_from_a_nominal_image():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    found = metrics.mask_metrics([full, full, empty], [full, empty, empty], labels=[1, 1, 0])
    assert (found["f1"], found["recall"]) == (1.0, 1.0)  # the second image has no pixel to be recalled
    assert (found["fpr_images_nominal"], found["fpr_pixels_nominal"]) == (0.0, 0.0)  # and is not nominal
    assert metrics.mask_metrics([full, full, empty], [full, empty, empty])["fpr_images_nominal"] == 0.5


def test_sets_that_lack_a_class_and_the_empty_set():
    empty, full = np.zeros((1, 1), bool), np.ones((1, 1), bool)
    nominal = metrics.mask_metrics([full], [empty])
    assert all(math.isnan(nominal[name]) for name in ("precision", "recall", "f1", "iou"))
    assert (nominal["fpr_pixels_nominal"], nominal["pooled_f1"], nominal["pooled_iou"]) == (1.0, 0.0, 0.0)
    defective = metrics.mask_metrics([full], [full])
    assert (defective["f1"], defective["pooled_f1"]) == (1.0, 1.0)
    assert math.isnan(defective["fpr_pixels_nominal"])
    assert math.isnan(defective["fpr_images_nominal"])
    assert all(math.isnan(value) for value in metrics.mask_metrics([], []).values())


def test_aupro_up_to_a_part_of_a_pixel():
    """The limit is 1.5 of 3 nominal pixels; the first of them lies above the defect."""
    maps, masks = np.array([[[3.0, 1.0, 0.0, 2.0]]]), np.array([[[0, 0, 0, 1]]], bool)
    assert metrics.aupro(maps, masks, 0.5) == pytest.approx(1 / 3)
