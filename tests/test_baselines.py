"""Thresholds from nominal maps, Otsu's, and the oracle against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy import stats as distributions
from skimage.filters import threshold_otsu

from ttt4as_fast import baselines, metrics
from ttt4as_fast.baselines import NominalStatistics


@pytest.fixture
def stats() -> NominalStatistics:
    rng = np.random.default_rng(0)
    return NominalStatistics.from_maps(rng.random((20, 5, 7), dtype=np.float32), np.arange(20, dtype=np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# NominalStatistics


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mean_and_std_are_numpys_in_float64(offset):
    maps = np.random.default_rng(1).random((50, 4, 3)).astype(np.float32) + np.float32(offset)
    found = NominalStatistics.from_maps(maps, np.zeros(50))
    np.testing.assert_allclose(found.mean, maps.astype(np.float64).mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(found.std, maps.astype(np.float64).std(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found.maxima, maps.max(axis=(1, 2)))
    assert found.mean.dtype == found.std.dtype == found.maxima.dtype == found.scores.dtype == np.float32


def test_arrays_go_out_and_come_back(stats):
    again = NominalStatistics.from_arrays(stats.arrays())
    for name, array in stats.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), array)
    parts = stats.arrays()
    del parts["maxima"]
    with pytest.raises(ValueError, match="none named maxima"):
        NominalStatistics.from_arrays(parts)
    with pytest.raises(ValueError, match="arrays: expected mean and std"):
        NominalStatistics.from_arrays({**stats.arrays(), "std": np.zeros((5, 6))})


def test_one_nominal_image_has_no_spread():
    found = NominalStatistics.from_maps(np.full((1, 1, 1), 2.0), [5.0])
    assert (found.std.item(), found.max_threshold(), found.quantile_threshold(0.5)) == (0.0, 2.0, 2.0)
    assert found.image_threshold() == np.nextafter(np.float32(5), np.float32(9))


def test_scalar_thresholds(stats):
    assert stats.max_threshold() == stats.maxima.max()
    assert stats.quantile_threshold(1.0) == stats.max_threshold()
    assert stats.quantile_threshold(0.3) == pytest.approx(np.quantile(stats.maxima, 0.3), rel=1e-6)
    np.testing.assert_array_equal(stats.mean_std_threshold(2), stats.mean + np.float32(2) * stats.std)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.1, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("n", [1, 7, 20, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_image_threshold_is_the_smallest_that_keeps_the_rate(rate, n, ties):
    scores = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    scores = np.round(scores) if ties else scores
    found = NominalStatistics.from_maps(np.zeros((n, 1, 1)), scores)
    threshold = found.image_threshold(rate)
    assert np.float32(threshold) == threshold
    assert np.mean(scores >= threshold) <= rate + 1e-9
    smaller = np.nextafter(np.float32(threshold), np.float32(-np.inf))
    assert np.mean(scores >= smaller) > rate


def with_scores(scores):
    return NominalStatistics.from_maps(np.zeros((len(scores), 1, 1)), np.asarray(scores, np.float32))


def test_the_tail_is_followed_to_the_rate():
    found = with_scores(np.arange(20))  # the upper quarter: 15 to 19, counted from 14, by 3 on average
    assert found.image_threshold(0.01, extrapolate=True) == pytest.approx(14 + 3 * np.log(25), rel=1e-6)
    shifted = with_scores(np.arange(20) * 2.0 - 100)
    assert shifted.image_threshold(0.05, extrapolate=True) == pytest.approx(-72 + 6 * np.log(5), rel=1e-6)
    equal = with_scores([3.0] * 8)
    assert equal.image_threshold(extrapolate=True) == np.nextafter(np.float32(3), np.float32(9))
    for rate in (0.0, 0.25, 0.5):
        assert found.image_threshold(rate, extrapolate=True) == found.image_threshold(rate)
    four = with_scores([1, 2, 5, 9])  # the upper two: counted from 2, by 5 on average
    assert four.image_threshold(0.01, extrapolate=True) == pytest.approx(2 + 5 * np.log(50), rel=1e-6)
    few = with_scores([1, 2, 5])
    assert few.image_threshold(extrapolate=True) == few.image_threshold()


@pytest.mark.parametrize("name", ["norm", "gumbel_r", "expon", "uniform"])
def test_few_scores_keep_the_rate_on_new_images_only_by_the_tail(name):
    of_this_kind = getattr(distributions, name)()
    draws = of_this_kind.rvs((400, 32), random_state=0)
    rates = [
        np.mean([of_this_kind.sf(with_scores(x).image_threshold(0.01, extrapolate=tail)) for x in draws])
        for tail in (False, True)
    ]
    assert rates[0] > 0.02 > rates[1]


def test_statistics_refuse_bad_input(stats):
    with pytest.raises(ValueError, match="scores: expected one a map, 2, got 3"):
        NominalStatistics.from_maps(np.zeros((2, 3, 3)), np.zeros(3))
    maps = np.zeros((2, 3, 3))
    maps[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"^maps: expected finite values, got nan at \(1, 0, 2\)"):
        NominalStatistics.from_maps(maps, np.zeros(2))
    for sign in (1, -1):
        with pytest.raises(ValueError, match="maps: expected values within float32, got"):
            NominalStatistics.from_maps(np.full((2, 3, 3), sign * 1e39), np.zeros(2))
        with pytest.raises(ValueError, match="scores: expected values within float32, got"):
            NominalStatistics.from_maps(np.zeros((2, 3, 3)), np.full(2, sign * 1e39))
    with pytest.raises(TypeError, match="extrapolate: expected a bool, got 'no'"):
        stats.image_threshold(extrapolate="no")
    with pytest.raises(ValueError, match="maps"):
        NominalStatistics.from_maps(np.zeros((0, 3, 3)), np.zeros(0))
    with pytest.raises(ValueError, match="maps: expected 3 dimensions"):
        NominalStatistics.from_maps(np.zeros((3, 3)), np.zeros(3))
    for call in (stats.image_threshold, stats.quantile_threshold):
        for bad in (-0.1, 1.1, np.nan):
            with pytest.raises(ValueError, match="expected a number"):
                call(bad)
    with pytest.raises(ValueError, match="false_alarm_rate"):
        stats.image_threshold(1.0)
    with pytest.raises(ValueError, match="k: expected"):
        stats.mean_std_threshold(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Masks

MASKS = {
    "mean_std": lambda maps, stats: baselines.mean_std_mask(maps, stats, 1.5),
    "max_nominal": baselines.max_nominal_mask,
    "quantile_nominal": lambda maps, stats: baselines.quantile_nominal_mask(maps, stats, 0.5),
    "otsu": lambda maps, stats: baselines.otsu_mask(maps),
}


def test_masks_are_what_is_above_the_threshold(stats):
    psi = np.random.default_rng(2).random((5, 7), dtype=np.float32) * 1.1
    np.testing.assert_array_equal(baselines.mean_std_mask(psi, stats, 1), psi > stats.mean + stats.std)
    np.testing.assert_array_equal(baselines.max_nominal_mask(psi, stats), psi > stats.maxima.max())
    threshold = np.quantile(stats.maxima, 0.5)
    np.testing.assert_array_equal(baselines.quantile_nominal_mask(psi, stats, 0.5), psi > threshold)
    np.testing.assert_array_equal(baselines.otsu_mask(psi), psi > threshold_otsu(psi))
    assert not baselines.max_nominal_mask(np.full((1, 1), stats.max_threshold(), np.float32), stats).any()


@pytest.mark.parametrize("method", MASKS)
def test_batch_is_its_images_and_the_kind_stays(stats, method):
    maps = np.random.default_rng(3).random((4, 5, 7), dtype=np.float32) * 1.2
    batch = MASKS[method](maps, stats)
    assert batch.dtype == bool
    assert 0 < batch.sum() < batch.size
    for psi, mask in zip(maps, batch, strict=True):
        np.testing.assert_array_equal(MASKS[method](psi, stats), mask)
    tensor = MASKS[method](torch.tensor(maps), stats)
    assert tensor.dtype == torch.bool
    np.testing.assert_array_equal(tensor.numpy(), batch)


@pytest.mark.parametrize("method", MASKS)
def test_masks_refuse_bad_maps(stats, method):
    maps = np.zeros((2, 5, 7), np.float32)
    maps[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"maps: expected finite values.*\(1, 2, 3\)"):
        MASKS[method](maps, stats)
    with pytest.raises(ValueError, match="maps: expected 2 or 3 dimensions"):
        MASKS[method](np.zeros(3), stats)


@pytest.mark.parametrize("method", ["mean_std", "max_nominal", "quantile_nominal"])
def test_thresholds_are_not_rounded_to_float16(method):
    below = NominalStatistics.from_maps(np.full((2, 3, 4), 1.9999), np.ones(2))
    psi = np.full((3, 4), 2.0, np.float16)
    assert MASKS[method](psi, below).all()
    assert MASKS[method](torch.from_numpy(psi), below).all()


def test_mean_std_needs_the_size_of_its_statistics(stats):
    with pytest.raises(ValueError, match=r"maps: expected \(H, W\) as in stats, \(5, 7\)"):
        baselines.mean_std_mask(np.zeros((7, 5)), stats)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4)])
def test_otsu_of_a_constant_map_is_empty(shape):
    assert not baselines.otsu_mask(np.full(shape, 2.5, np.float32)).any()


def with_one(value: float, rest: float, dtype: str) -> np.ndarray:
    psi = np.full((8, 8), rest, dtype)
    psi[2, 5] = value
    return psi


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "psi",
    [
        with_one(np.nextafter(np.float32(1), np.float32(2)), 1, "f4"),
        with_one(np.nextafter(1, 2), 1, "f8"),
        with_one(3e38, -3e38, "f4"),
        with_one(1.7e308, -1.7e308, "f8"),
        with_one(65504, -65504, "f2"),
        with_one(1e-44, 0, "f4"),
        with_one(5e-324, 0, "f8"),
        with_one(3e38, 2e38, "f4"),
    ],
    ids=["neighbours", "neighbours8", "ends", "ends8", "ends2", "subnormal", "subnormal8", "large"],
)
def test_otsu_of_every_finite_map_marks_its_peak(psi):
    expected = psi == psi.max()
    np.testing.assert_array_equal(baselines.otsu_mask(psi), expected)
    np.testing.assert_array_equal(baselines.otsu_mask(np.stack([psi, np.ones_like(psi)]))[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Oracle


def mean_image_f1(maps, masks, threshold: float) -> float:
    pairs = [(psi > threshold, mask) for psi, mask in zip(maps, masks, strict=True) if mask.any()]
    return float(np.mean([metrics.precision_recall_f1(*pair)[2] for pair in pairs]))


def pooled_f1(maps, masks, threshold: float) -> float:
    return metrics.mask_metrics([psi > threshold for psi in maps], masks)["pooled_f1"]


OBJECTIVES = {"image_f1": mean_image_f1, "pooled_f1": pooled_f1}


def random_set(seed: int, shape: tuple[int, int, int], ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 2, 2))
    masks = noise > np.quantile(noise, 0.85)
    masks[0] = False
    maps = noise + 0.1 * rng.standard_normal(shape) + 0.2 * rng.standard_normal((shape[0], 1, 1))
    return (np.round(maps, 1) if ties else maps).astype(np.float32), masks


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("seed", "shape"), [(0, (4, 9, 11)), (1, (2, 31, 17)), (2, (9, 16, 16)), (3, (3, 3, 3))])
def test_oracle_is_the_best_of_all_thresholds(objective, ties, seed, shape):
    maps, masks = random_set(seed, shape, ties)
    assert masks.any()
    threshold, f1 = baselines.oracle_threshold(maps, masks, objective)
    assert OBJECTIVES[objective](maps, masks, threshold) == pytest.approx(f1, abs=1e-12)
    below = np.nextafter(np.unique(maps), np.float32(-np.inf))
    assert f1 == pytest.approx(max(OBJECTIVES[objective](maps, masks, t) for t in below), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_oracle_finds_the_best_where_one_round_of_its_search_is_not_enough(objective, monkeypatch):
    monkeypatch.setattr(baselines, "_GRID", 4)
    for seed, ties in itertools.product(range(5), (False, True)):
        maps, masks = random_set(seed, (5, 21, 19), ties)
        _, f1 = baselines.oracle_threshold(maps, masks, objective)
        below = np.nextafter(np.unique(maps[masks]), np.float32(-np.inf))
        assert f1 == pytest.approx(max(OBJECTIVES[objective](maps, masks, t) for t in below), abs=1e-12)


def test_oracle_looks_between_its_best_place_and_the_one_before(monkeypatch):
    monkeypatch.setattr(baselines, "_GRID", 3)
    maps = np.array([[[9.0, 8.0, *np.linspace(7.1, 7.9, 20), 7.0, 6.0, 5.0]]])
    masks = np.isin(maps, [9.0, 8.0, 7.0, 6.0, 5.0])
    assert baselines.oracle_threshold(maps, masks)[1] == pytest.approx(4 / 7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_oracle_of_separable_maps_is_perfect(dtype):
    masks = np.zeros((3, 6, 5), bool)
    masks[1, 2:4, 1:3] = True
    maps = np.where(masks, 1.0, 0.999).astype(dtype)
    for objective in OBJECTIVES:
        threshold, f1 = baselines.oracle_threshold(maps, masks, objective)
        assert f1 == 1.0
        np.testing.assert_array_equal(maps > threshold, masks)


def test_oracle_refuses_maps_of_several_dtypes():
    maps = [np.zeros((2, 2), np.float32), np.zeros((2, 2))]
    with pytest.raises(ValueError, match="maps: expected arrays of one dtype, got float32 and float64"):
        baselines.oracle_threshold(maps, [np.ones((2, 2), bool)] * 2)


def test_oracle_objectives_differ_where_images_differ():
    # A high scorer among the nominal images matters to the pooled F1 only.
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, 0, 0], maps[0, 1, 1], maps[1] = 3, 1, 2
    assert baselines.oracle_threshold(maps, masks)[1] == 1.0
    assert baselines.oracle_threshold(maps, masks, "pooled_f1")[1] == pytest.approx(2 / 3)


def test_oracle_without_defects_or_of_one_pixel():
    for objective in OBJECTIVES:
        result = baselines.oracle_threshold(np.zeros((2, 3, 3)), np.zeros((2, 3, 3), bool), objective)
        assert all(math.isnan(value) for value in result)
        threshold, f1 = baselines.oracle_threshold(np.full((1, 1, 1), 7.0), np.ones((1, 1, 1), bool), objective)
        assert threshold < 7
        assert f1 == 1.0
    assert math.isnan(baselines.oracle_threshold([], [])[0])


def test_oracle_refuses_bad_input():
    with pytest.raises(ValueError, match="objective"):
        baselines.oracle_threshold(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), "f2")
    with pytest.raises(ValueError, match=r"maps\[0\]: expected finite"):
        baselines.oracle_threshold(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2), bool))


def test_level_is_saved_and_may_be_absent() -> None:
    maps = np.random.default_rng(0).random((4, 30, 20), dtype=np.float32)
    stats = NominalStatistics.from_maps(maps, np.arange(4.0))
    assert stats.level == np.float32(np.quantile(maps.astype(np.float64), 0.999))
    assert NominalStatistics.from_arrays(stats.arrays()).level == stats.level
    parts = stats.arrays()
    del parts["level"]
    assert NominalStatistics.from_arrays(parts).level is None
    with pytest.raises(ValueError, match="level"):
        NominalStatistics.from_arrays({**stats.arrays(), "level": np.zeros(2)})


def test_the_papers_threshold_is_three_deviations():
    zeros, ones = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    stats = NominalStatistics(zeros, ones, np.ones(1), np.ones(1))
    assert baselines.mean_std_mask(np.array([[2.9, 3.1]]), stats).tolist() == [[False, True]]


def test_scores_are_finite():
    with pytest.raises(ValueError, match="scores: expected finite"):
        NominalStatistics.from_maps(np.zeros((2, 3, 3)), [1.0, np.nan])
