"""The robust preset: its level against a second statement, its backends against the reference, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.svm import LinearSVC

from ttt4as_fast import TTT4AS, kernels, nn
from ttt4as_fast.kernels.segment_robust import RobustOptions, nominal_level
from ttt4as_fast.kernels.segment_robust.labels import (
    BINS,
    HEIGHTS,
    SMOOTHING,
    label,
    level,
    size_factor,
    spread,
    strata,
)

from .cases import DTYPES, assert_range, smooth_map, structured_features, tensor

OPERATION = "segment_robust"
CLOSE = 1e-4
CASES = [  # (H, W), (C, h, w)
    ((224, 224), (64, 28, 28)),
    ((97, 101), (13, 11, 7)),
    ((64, 64), (1, 64, 64)),
    ((33, 47), (5, 40, 50)),
    ((61, 60), (40, 1, 1)),
    ((1, 300), (16, 1, 19)),
    ((2, 2), (3, 2, 2)),
]


def dense_statement(psi, features, nominal=None, share=0.4, core=0.3, n_core=50, n_background=150):
    """The method once more, from torch, SciPy and liblinear's dual solver: decision, labels."""
    psi = psi.astype(np.float64)
    height, width = psi.shape
    step = max(1, round(min(height / features.shape[1], width / features.shape[2]) / 2))
    fine = max(1, step // 2)
    some = (slice(fine // 2, None, fine),) * 2
    base, peak = np.quantile(psi[some], 0.25), psi.max()
    base = psi.min() if base >= peak else base
    slope = np.sqrt(sum(np.gradient(psi, axis=a) ** 2 for a in (0, 1) if psi.shape[a] > 1))[some]
    bins = np.floor((psi[some] - base) / (peak - base) * BINS).clip(max=BINS - 1)
    kernel = np.array([1.0])
    for _ in range(SMOOTHING):
        kernel = np.convolve(kernel, [0.25, 0.5, 0.25])
    counts = np.array([(bins == b).sum() for b in range(BINS)], float)
    sums = np.array([slope[bins == b].sum() for b in range(BINS)])
    counts, sums = (np.convolve(x, kernel)[SMOOTHING:-SMOOTHING] for x in (counts, sums))
    heights = (np.arange(BINS) + 0.5) / BINS
    allowed = (counts > 0) & (heights >= HEIGHTS[0]) & (heights <= HEIGHTS[1])
    mean = [sums[b] / counts[b] if allowed[b] else -1 for b in range(BINS)]
    steepest = next(b for b in range(BINS) if mean[b] > max(mean) * (1 - 1e-9))
    wide = ((psi[some] - base) / (peak - base) > 0.75).mean() * features[0].size
    factor = np.clip((8 / max(wide, 0.5)) ** 0.3, 0.7, 1.3)
    if nominal is not None and nominal >= peak:
        factor = max(factor, 1.0)
    level = base + min(factor * heights[steepest], 0.93) * (peak - base)
    if nominal is not None and nominal < peak:
        level = 0.5 * level + 0.5 * (max(nominal, base) + factor * share * (peak - max(nominal, base)))

    def lattice(mask, spacing):
        places = [(r, c) for r in range(spacing // 2, height, spacing) for c in range(spacing // 2, width, spacing)]
        return [(r * width + c, r // spacing, c // spacing) for r, c in places if mask[r, c]]

    def thinned(found, limit):  # row / plastic number + column / its square, modulo 1, to 32 bits
        keys = [(r * 3242174889 + c * 2447445414) % 2**32 for _, r, c in found]
        return [found[i][0] for i in sorted(range(len(found)), key=keys.__getitem__)[:limit]]

    nominal_found = lattice(psi <= level, step) or lattice(psi <= level, 1)
    top = (psi > level + core * (peak - level)) | (psi == peak)
    found = lattice(top, step)
    while len(found) < 8 and step > 1:
        step //= 2
        found = lattice(top, step)
    anomalous = thinned(found, n_core)
    weights = {pixel: min(50, len(found) / 4) / len(anomalous) for pixel in anomalous}
    parts, n_hard = [nominal_found], 0
    if len(nominal_found) > n_background:
        least = sorted(psi.flat[pixel] for pixel, _, _ in nominal_found)[-(len(nominal_found) // 8)]
        parts = [[x for x in nominal_found if (psi.flat[x[0]] >= least) == hard] for hard in (True, False)]
        n_hard = min(len(parts[0]), max(n_background // 2, n_background - len(parts[1])))
    nominal_pixels = []
    for part, limit in zip(parts[::-1], (n_background - n_hard, n_hard), strict=False):
        kept = thinned(part, limit)
        nominal_pixels += kept
        each = min(400, len(nominal_found) / 4) * len(part) / len(nominal_found) / max(len(kept), 1)
        weights.update(dict.fromkeys(kept, each))
    labels = np.zeros(psi.size, np.int8)
    labels[anomalous], labels[nominal_pixels] = 1, -1
    flat = torch.from_numpy(features.astype(np.float64))
    spread = flat.std((1, 2), correction=0, keepdim=True)
    flat = (flat - flat.mean((1, 2), keepdim=True)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    dense = F.interpolate(flat[None], (height, width), mode="bilinear")[0].numpy().reshape(len(features), -1).T
    svm = LinearSVC(C=1e-3, tol=1e-9, dual=True, max_iter=500_000, random_state=0)
    used = np.flatnonzero(labels)
    svm.fit(dense[used], labels[used], sample_weight=[weights[pixel] for pixel in used])
    decision = svm.decision_function(dense)
    high, low = (np.average(decision[some], weights=[weights[x] for x in some]) for some in (anomalous, nominal_pixels))
    if high - low > 1e-5:
        decision = 1 + 2 * (decision - high) / (high - low)
    decision = decision.reshape(height, width) + (psi - level) / (peak - level)
    return decision, labels.reshape(height, width)


@pytest.mark.parametrize("nominal", [None, 0.5, 100.0, -3.0])
@pytest.mark.parametrize(("size", "shape"), CASES, ids=str)
def test_masks_match_a_dense_statement(backend, rng, size, shape, nominal):
    psi, features = smooth_map(rng, *size), structured_features(rng, *shape)
    got = kernels.segment_robust(psi, features, nominal_level=nominal, tol=1e-8, max_iter=100_000, backend=backend)
    decision, labels = dense_statement(psi, features, nominal)
    assert got.status == "ok"
    np.testing.assert_array_equal(got.pseudo_labels, labels)
    assert np.abs(got.decision_map - decision).max() < 20 * CLOSE
    np.testing.assert_array_equal(got.pred_mask, got.decision_map > 0)
    assert (np.abs(decision[got.pred_mask != (decision > 0)]) < CLOSE).all()


@pytest.mark.parametrize(
    "options",
    [
        {"height": 0.5},
        {"base_quantile": 0.0},
        {"core": 0.0},
        {"n_core": 1, "n_background": 1},
        {"n_core": 1000, "n_background": 1000},
        {"core_weight": 1.0},
        {"background_weight": 30.0},
        {"hard_share": 0.0},
        {"hard_share": 0.1},
        {"size_exponent": 0.0},
        {"size_exponent": 0.1},
        {"standardize": False},
        {"recentre": False},
        {"score_weight": 0.0},
        {"nominal_level": 0.4, "nominal_weight": 0.0},
        {"nominal_level": 0.4, "nominal_share": 0.9},
        {"C": 1.0},
        {"loss": "hinge"},
    ],
    ids=str,
)
def test_every_option_matches_the_reference_and_changes_the_decision(backend, rng, options):
    psi, features = smooth_map(rng, 96, 80), structured_features(rng, 24, 12, 10)
    common = {"tol": 1e-10, "max_iter": 100_000}
    got = kernels.segment_robust(psi, features, **options, **common, backend=backend)
    want = kernels.segment_robust(psi, features, **options, **common, backend="reference")
    np.testing.assert_array_equal(got.pseudo_labels, want.pseudo_labels)
    assert np.abs(got.decision_map - want.decision_map).max() < 20 * CLOSE
    options.pop("nominal_weight", None)  # without weight the level says nothing: compared with it below
    plain = kernels.segment_robust(psi, features, **common, backend=backend)
    changed = kernels.segment_robust(psi, features, **options, **common, backend=backend)
    assert (changed.decision_map != plain.decision_map).any()


def test_nominal_weight_zero_leaves_the_nominal_level_out(backend, rng):
    psi, features = smooth_map(rng, 96, 80), structured_features(rng, 24, 12, 10)
    without = kernels.segment_robust(psi, features, backend=backend)
    unweighted = kernels.segment_robust(psi, features, nominal_level=0.4, nominal_weight=0.0, backend=backend)
    np.testing.assert_array_equal(without.decision_map, unweighted.decision_map)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.3, 0.6])
def test_marks_defects_of_any_size(backend, rng, share):
    """A disc of other features under a blurred, noisy map: the paper's labels lose the interior of the large ones."""
    size, cells = 160, 20
    rows, cols = np.mgrid[:size, :size]
    truth = np.hypot(rows - 80, cols - 75) < np.sqrt(share * size**2 / np.pi)
    psi = ndimage.gaussian_filter(truth.astype(float), 4) + 0.02 * rng.standard_normal((size, size))
    coarse = F.avg_pool2d(torch.from_numpy(truth.astype(np.float32))[None], size // cells)[0].numpy()
    features = (rng.standard_normal((32, cells, cells)) + 2 * rng.standard_normal((32, 1, 1)) * coarse).astype(
        np.float32
    )

    def f1(mask):
        return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())

    robust = f1(kernels.segment_robust(psi, features, backend=backend).pred_mask)
    assert robust > (0.75 if share < 0.01 else 0.9)
    if share >= 0.3:
        assert f1(kernels.segment(psi, features).pred_mask) < robust - 0.05


def test_the_scale_of_map_and_features_does_not_matter(backend, rng):
    psi, features = smooth_map(rng, 64, 64), structured_features(rng, 16, 8, 8)
    plain = kernels.segment_robust(psi, features, nominal_level=0.5, backend=backend)
    scaled = kernels.segment_robust(psi * 4 - 8, features * 1024, nominal_level=0.5 * 4 - 8, backend=backend)
    np.testing.assert_array_equal(scaled.pseudo_labels, plain.pseudo_labels)
    assert np.abs(scaled.decision_map - plain.decision_map).max() < CLOSE


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_squares_beyond_float64(backend, rng, scale):
    psi, features = smooth_map(rng, 64, 64).astype(np.float64), structured_features(rng, 16, 8, 8).astype(np.float64)
    common = {"tol": 1e-8, "max_iter": 100_000, "backend": backend}
    plain = kernels.segment_robust(psi, features, **common)
    for layout in (features, np.ascontiguousarray(features.transpose(1, 2, 0)).transpose(2, 0, 1)):
        scaled = kernels.segment_robust(psi, layout * scale, **common)
        assert np.abs(scaled.decision_map - plain.decision_map).max() < CLOSE


@pytest.mark.parametrize("exponent", [-1060, -1000, -565, 533, 665, 1000])
def test_scores_beyond_float64s_squares(backend, rng, exponent):
    psi = np.rint(smooth_map(rng, 64, 64).astype(np.float64) * 4096)  # exact where it is subnormal, too
    features = structured_features(rng, 16, 8, 8).astype(np.float64)
    for nominal in (None, 1000.0):
        plain = kernels.segment_robust(psi, features, nominal_level=nominal, backend=backend)
        usual = None if nominal is None else np.ldexp(nominal, exponent)
        scaled = kernels.segment_robust(np.ldexp(psi, exponent), features, nominal_level=usual, backend=backend)
        np.testing.assert_array_equal(scaled.decision_map, plain.decision_map)
        np.testing.assert_array_equal(scaled.pseudo_labels, plain.pseudo_labels)
    full = np.where(psi > np.median(psi), 1.7e308, -1.7e308)
    assert kernels.segment_robust(full, features, backend=backend).status == "ok"


def test_scores_too_near_each_other_for_their_map_have_no_level(backend, rng):
    psi = np.zeros((32, 32))
    psi[8:12, 8:12], psi[20, 20] = 3e-310, -1.0
    found = kernels.segment_robust(psi, structured_features(rng, 4, 8, 8).astype(np.float64), backend=backend)
    assert found.status == "degenerate"


@pytest.mark.parametrize("values", [1e-310, 5e-324])
def test_a_subnormal_channel_is_a_channel(backend, rng, values):
    psi, features = smooth_map(rng, 64, 64).astype(np.float64), structured_features(rng, 8, 8, 8).astype(np.float64)
    features[0] = np.rint(features[0] * 64)
    plain = kernels.segment_robust(psi, features, backend=backend)
    features[0] *= values
    for layout in (features, np.ascontiguousarray(features.transpose(1, 2, 0)).transpose(2, 0, 1)):
        found = kernels.segment_robust(psi, layout, backend=backend)
        assert np.abs(found.decision_map - plain.decision_map).max() < CLOSE
    features[0] = values
    assert np.isfinite(kernels.segment_robust(psi, features, backend=backend).decision_map).all()


def test_as_many_samples_as_an_integer_holds(backend, rng):
    psi, features = smooth_map(rng, 40, 40), structured_features(rng, 4, 5, 5)
    most = kernels.segment_robust(psi, features, n_core=1600, n_background=1600, backend=backend)
    more = kernels.segment_robust(psi, features, n_core=2**63 - 1, n_background=2**63 - 1, backend=backend)
    np.testing.assert_array_equal(more.decision_map, most.decision_map)


@pytest.mark.parametrize("channels", [8, 24, 64, 200])
def test_masks_of_noise_are_those_of_the_optimum(rng, channels):
    """Classes that hardly differ are stretched to means of 1 and -1, and with them what the solver leaves open."""
    psi, features = rng.random((3, 60, 60)), rng.normal(size=(3, channels, 12, 12))
    got = kernels.segment_robust(psi.astype(np.float32), features.astype(np.float32), backend="cpu")
    best = kernels.segment_robust(psi, features, tol=1e-10, max_iter=100_000, backend="reference")
    assert got.status == ["ok"] * 3
    assert (got.pred_mask != best.pred_mask).sum() <= 2


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
def test_recentred_means_are_one_and_minus_one(backend, rng, loss):
    psi, features = smooth_map(rng, 96, 80), structured_features(rng, 24, 12, 10)
    common = {"score_weight": 0.0, "loss": loss, "hard_share": 0.0, "backend": backend}  # all weights of a class alike
    got = kernels.segment_robust(psi, features, **common)
    for side in (1, -1):
        assert got.decision_map[got.pseudo_labels == side].mean() == pytest.approx(side, abs=1e-4)
    plain = kernels.segment_robust(psi, features, recentre=False, **common)
    assert np.corrcoef(plain.decision_map.ravel(), got.decision_map.ravel())[0, 1] > 1 - 1e-6


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_means_that_do_not_differ_as_they_should_are_left_alone(backend, loss, slope):
    """Equal for constant features; the wrong way round where the features serve the penalised intercept."""
    rows, cols = np.mgrid[:64, :64]
    psi = np.exp(-((rows - 30) ** 2 + (cols - 34) ** 2) / 72).astype(np.float32)
    features = 0.5 + slope * psi[None, 4::8, 4::8]
    options = {"standardize": False, "score_weight": 0.0, "loss": loss, "C": 1e-4, "backend": backend}
    got = kernels.segment_robust(psi, features, **options)
    plain = kernels.segment_robust(psi, features, recentre=False, **options)
    high, low = (plain.decision_map[plain.pseudo_labels == side].mean() for side in (1, -1))
    assert high == pytest.approx(low, abs=1e-7) if slope == 0 else high < low - 1e-4
    assert got.status == "ok"
    np.testing.assert_array_equal(got.decision_map, plain.decision_map)


@pytest.mark.parametrize(("n_wide", "factor"), [(0, 1.3), (4, 2**0.3), (8, 1.0), (20, 0.4**0.3), (90, 0.7)])
def test_a_narrow_peak_raises_the_level_and_a_wide_one_lowers_it(n_wide, factor):
    values = np.zeros(100)
    values[:n_wide] = 0.8
    assert size_factor(values, 0.0, 1.0, 100, 0.3) == pytest.approx(factor)
    assert size_factor(values, 0.0, 1.0, 100, 0.0) == 1.0
    assert size_factor(np.repeat(values, 4) * 5 - 2, -2.0, 3.0, 100, 0.3) == pytest.approx(factor)


def test_a_wide_peak_lowers_no_level_of_a_map_that_stays_below_the_nominal_one():
    rows, cols = np.mgrid[:96, :96]
    psi = np.clip(40 - np.hypot(rows - 48, cols - 48), 0, 25) / 25
    levels = {}
    for nominal, exponent in ((0.9, 0.3), (1.5, 0.3), (1.5, 0.0)):
        options = RobustOptions(nominal_level=nominal, nominal_weight=0.0, size_exponent=exponent)
        levels[nominal, exponent] = level(psi, (12, 12), options)[0]
    assert levels[0.9, 0.3] < levels[1.5, 0.3] == levels[1.5, 0.0]


@pytest.mark.parametrize("limit", [1, 7, 50, 400])
def test_samples_are_spread_evenly_over_the_plane(limit):
    """Every square of the plane holds its share of the samples, give or take a few: no stripes, no holes."""
    places = np.argwhere(np.ones((56, 56), bool))
    kept = spread(places, limit)
    assert len(kept) == len(np.unique(kept, axis=0)) == limit
    for parts in (2, 4):
        counts = np.histogram2d(*kept.T, bins=parts, range=[[0, 56]] * 2)[0]
        assert np.abs(counts - limit / parts**2).max() <= 2 + 0.1 * limit / parts**2
    np.testing.assert_array_equal(spread(places[:limit], limit), places[:limit])


def test_hard_nominal_samples_are_denser_and_weigh_less(rng):
    psi = smooth_map(rng, 224, 224)
    found = label(psi, (28, 28), RobustOptions())
    nominal = found.sides < 0
    assert found.weights[~nominal] == pytest.approx(0.25)
    assert nominal.sum() == 150
    assert found.weights[nominal].sum() == pytest.approx(400)
    light = found.weights[nominal] < found.weights[nominal].max()
    assert light.sum() == 75
    scores = psi.ravel()[found.pixels[nominal]]
    assert scores[light].min() >= scores[~light].max()


def test_strata_of_tied_scores_keep_every_sample():
    places, scores = np.argwhere(np.ones((40, 40), bool)), np.zeros(1600)
    assert [(len(part), n) for part, n in strata(places, scores, 100, 0.5)] == [(1600, 100), (0, 0)]
    scores[:30] = 1
    assert [(len(part), n) for part, n in strata(places, scores, 100, 0.5)] == [(1600, 100), (0, 0)]
    scores[:300] = 1
    assert [(len(part), n) for part, n in strata(places, scores, 100, 0.5)] == [(300, 50), (1300, 50)]


def test_batch_order_and_layout_do_not_matter(backend, rng):
    maps = np.stack([smooth_map(rng, 40, 56) for _ in range(3)])
    features = np.stack([structured_features(rng, 12, 5, 7) for _ in range(3)])
    batch = kernels.segment_robust(maps, features, nominal_level=0.6, backend=backend)
    channels_last = np.ascontiguousarray(features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    again = kernels.segment_robust(maps[::-1], channels_last[::-1], nominal_level=0.6, backend=backend)
    for i in range(3):
        one = kernels.segment_robust(maps[i], features[i], nominal_level=0.6, backend=backend)
        for field in ("pred_mask", "decision_map", "pseudo_labels"):
            np.testing.assert_array_equal(getattr(one, field), getattr(batch, field)[i])
        np.testing.assert_array_equal(again.pseudo_labels[2 - i], batch.pseudo_labels[i])
        assert np.abs(again.decision_map[2 - i] - batch.decision_map[i]).max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_dtype(backend, rng, dtype):
    psi, features = smooth_map(rng, 48, 48), structured_features(rng, 8, 6, 6)
    psi, features = tensor(psi, dtype), tensor(features, dtype)
    got = kernels.segment_robust(psi, features, tol=1e-8, backend=backend)
    want = kernels.segment_robust(
        psi.double().numpy(), features.double().numpy(), tol=1e-8, max_iter=100_000, backend="reference"
    )
    assert got.pred_mask.dtype == torch.bool
    assert got.decision_map.dtype == torch.float32
    np.testing.assert_array_equal(got.pseudo_labels.numpy(), want.pseudo_labels)
    assert np.abs(got.decision_map.numpy() - want.decision_map).max() < 1e-3


def test_statuses(backend, rng):
    maps = np.stack([smooth_map(rng, 30, 30), np.full((30, 30), 2.0, np.float32)])
    features = np.stack([structured_features(rng, 4, 5, 5)] * 2)
    got = kernels.segment_robust(maps, features, backend=backend)
    assert got.status == ["ok", "degenerate"]
    assert not got.pred_mask[1].any()
    gated = kernels.segment_robust(maps, features, pred_score=[0.1, 9.0], image_threshold=0.5, backend=backend)
    assert gated.status == ["nominal", "degenerate"]
    assert not gated.pred_mask.any()
    short = kernels.segment_robust(maps[0], features[0], max_iter=1, tol=1e-12, C=1e3, backend=backend)
    assert short.status == "not_converged"


@pytest.mark.parametrize("size", [1.0, 2.0**30])
def test_the_rounding_of_a_constant_channel_tells_nothing(backend, rng, size):
    """A unit in the last place of a large number is large itself."""
    psi, features = smooth_map(rng, 48, 48), structured_features(rng, 6, 12, 12)
    rounding = np.where(rng.random((1, 12, 12)) < 0.5, 1, 1 + 2.0**-23)
    decisions = []
    for channel in (size * rounding, np.ones((1, 12, 12))):
        deep = np.concatenate([features, channel.astype(np.float32)])
        decisions.append(kernels.segment_robust(psi, deep, backend=backend).decision_map)
    np.testing.assert_allclose(*decisions, atol=1e-4)


def test_constant_features_leave_the_score_alone(backend, rng):
    psi = smooth_map(rng, 30, 30)
    got = kernels.segment_robust(psi, np.ones((4, 5, 5), np.float32), backend=backend)
    assert np.isfinite(got.decision_map).all()
    order = np.argsort(psi, axis=None)
    assert (np.diff(got.decision_map.ravel()[order]) >= 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"anomaly_map": np.full((8, 8), np.nan)}, ValueError, "anomaly_map"),
        ({"features": np.full((2, 4, 4), np.inf)}, ValueError, "features"),
        ({"features": np.zeros((4, 4))}, ValueError, "features"),
        ({"anomaly_map": np.zeros((0, 8))}, ValueError, "anomaly_map"),
        ({"pred_score": [1.0, 2.0]}, ValueError, "pred_score"),
        ({"nominal_level": np.nan}, ValueError, "nominal_level"),
        ({"nominal_share": 1.0}, ValueError, "nominal_share"),
        ({"nominal_weight": 1.5}, ValueError, "nominal_weight"),
        ({"height": 0.0}, ValueError, "height"),
        ({"core": 1.0}, ValueError, "core"),
        ({"n_core": 0}, ValueError, "n_core"),
        ({"core_weight": 0.0}, ValueError, "core_weight"),
        ({"background_weight": -1.0}, ValueError, "background_weight"),
        ({"hard_share": 1.5}, ValueError, "hard_share"),
        ({"size_exponent": 2.5}, ValueError, "size_exponent"),
        ({"recentre": "no"}, TypeError, "recentre"),
        ({"standardize": 1}, TypeError, "standardize"),
        ({"score_weight": -1.0}, ValueError, "score_weight"),
        ({"percentile": 99.0}, TypeError, "percentile"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
    ids=str,
)
def test_bad_input(changes, error, message):
    arguments = {"anomaly_map": np.eye(8), "features": np.random.default_rng(0).random((2, 4, 4)), **changes}
    with pytest.raises(error, match=message):
        kernels.segment_robust(**arguments)


def test_nominal_level(rng):
    maps = rng.random((3, 20, 20)).astype(np.float32)
    assert nominal_level(maps) == np.float32(np.quantile(maps.astype(np.float64), 0.999))
    assert nominal_level(torch.from_numpy(maps), 1.0) == maps.max()
    with pytest.raises(ValueError, match="nominal_maps"):
        nominal_level(maps[0])


@pytest.mark.parametrize(("scale", "shift"), [(1, -(2.0**30)), (2.0**150, 0), (2.0**-160, 0)], ids=str)
def test_a_level_of_float64_maps_is_theirs(rng, scale, shift):
    """In float32 it is another, infinite or zero."""
    psi, features = smooth_map(rng, 40, 40).astype(np.float64), structured_features(rng, 6, 5, 5)
    maps = np.stack([smooth_map(rng, 40, 40, peaks=0) for _ in range(4)]).astype(np.float64)
    want = TTT4AS("robust").calibrate(maps)(psi, features)
    assert (want.pred_mask != TTT4AS("robust")(psi, features).pred_mask).any()
    found = TTT4AS("robust").calibrate(maps * scale + shift)(psi * scale + shift, features)
    assert found.status == "ok"
    np.testing.assert_array_equal(found.pred_mask, want.pred_mask)


def test_preset(rng):
    psi, features = smooth_map(rng, 40, 40), structured_features(rng, 6, 5, 5)
    maps = np.stack([smooth_map(rng, 40, 40, peaks=0) for _ in range(4)])
    segmenter = TTT4AS(preset="robust", score_weight=0.5)
    assert segmenter.calibrate(maps) is segmenter
    level = nominal_level(maps)
    want = kernels.segment_robust(psi, features, score_weight=0.5, nominal_level=level)
    np.testing.assert_array_equal(segmenter(psi, features).decision_map, want.decision_map)
    np.testing.assert_array_equal(TTT4AS(**segmenter.get_params())(psi, features).decision_map, want.decision_map)
    assert "nominal_level" in repr(segmenter)
    assert repr(TTT4AS(n_nominal=50, backend="cpu")) == "TTT4AS(preset='paper', n_nominal=50, backend='cpu')"
    module = nn.TTT4AS(preset="robust", score_weight=0.5, nominal_level=level)
    np.testing.assert_array_equal(
        module(tensor(psi[None], "float32"), tensor(features[None], "float32"))[0], want.pred_mask
    )
    with pytest.raises(ValueError, match="preset: expected one of 'paper', 'robust', got 'other'"):
        TTT4AS(preset="other")
    with pytest.raises(ValueError, match="percentile: not an option of the preset 'robust'"):
        TTT4AS(preset="robust", percentile=95.0)
    with pytest.raises(ValueError, match="core: not an option of the preset 'paper'"):
        TTT4AS(core=0.5)
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'cpu', 'reference', got 'gpu'"):
        TTT4AS(preset="robust", backend="gpu")
    kept = TTT4AS(C=np.float32(1)).options.C, TTT4AS("robust", core=np.float32(0.5)).options.core
    assert [type(x) for x in kept] == [float, float]  # Python's own numbers, which JSON takes
    assert TTT4AS().runs_on_cuda and not segmenter.runs_on_cuda
    with pytest.raises(TypeError, match="cores: unknown option"):
        TTT4AS(preset="robust", cores=0.5)
    with pytest.raises(ValueError, match="calibrate"):
        TTT4AS().calibrate(maps)


def test_a_map_most_of_which_is_its_maximum(backend, rng):
    psi = np.ones((64, 64), np.float32)
    psi[:10, :20] = 0
    got = kernels.segment_robust(psi, rng.standard_normal((8, 8, 8)).astype(np.float32), backend=backend)
    assert got.status == "ok" and np.isfinite(got.decision_map).all()
    assert (got.pseudo_labels[psi == 0] <= 0).all() and (got.pseudo_labels == 1).any()


@pytest.mark.parametrize(("kind", "lowest"), [("ramp", HEIGHTS[0]), ("step", 1 - SMOOTHING / BINS - 0.5 / BINS)])
def test_of_slopes_that_are_equal_to_within_rounding_the_lowest_is_taken(backend, kind, lowest):
    rows, cols = np.mgrid[:31.0, :23.0]
    psi = 0.3 * rows + 0.1 * cols if kind == "ramp" else (rows > 24) * 0.1
    got = kernels.segment_robust(psi, np.ones((1, 31, 23)), size_exponent=0.0, backend=backend)
    found = psi.max() - np.ptp(psi) / np.ptp(got.decision_map)  # features say nothing: the score's part is all
    base, centres = np.quantile(psi, 0.25), (np.arange(BINS) + 0.5) / BINS
    assert (found - base) / (psi.max() - base) == pytest.approx(centres[centres > lowest - 1e-9][0], rel=1e-5)


def test_a_map_that_is_constant_to_within_rounding(backend, rng):
    psi = np.ones((64, 64))
    psi[3, 3] = np.nextafter(1, 2)
    got = kernels.segment_robust(psi, rng.standard_normal((8, 8, 8)), height=0.9, size_exponent=0.0, backend=backend)
    assert got.status == "degenerate"


def test_a_core_that_rounds_to_the_peak_is_the_peak(backend, rng):
    psi = np.ones((16, 16))
    psi[3, 3] += 2 * np.finfo(float).eps
    options = {"height": 0.6, "core": 0.99, "size_exponent": 0.0}
    got = kernels.segment_robust(psi, rng.standard_normal((8, 4, 4)), **options, backend=backend)
    assert got.status == "ok"
    assert np.argwhere(got.pseudo_labels == 1).tolist() == [[3, 3]]


def test_a_lattice_without_a_nominal_place_is_the_pixel_grid(backend, rng):
    psi = np.zeros((32, 32))
    psi[2::4, 2::4] = 1
    got = kernels.segment_robust(psi, rng.standard_normal((8, 4, 4)), backend=backend)
    assert got.status == "ok" and (got.pseudo_labels == -1).sum() == 150


def test_a_flat_background_gives_as_many_samples_as_any(backend, rng):
    psi = np.zeros((112, 112))
    psi[50:60, 50:60] = 1
    got = kernels.segment_robust(psi, rng.standard_normal((8, 14, 14)), backend=backend)
    assert (got.pseudo_labels == -1).sum() == 150


@pytest.mark.parametrize("name", ["core_weight", "background_weight", "C", "tol"])
def test_what_must_be_above_zero(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a number in "):
        kernels.segment_robust(np.eye(8), np.ones((1, 4, 4)), **{name: 0.0})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("nominal_share", 0.0, 0.99),
        ("nominal_weight", 0.0, 1.0),
        ("height", 0.01, 0.99),
        ("base_quantile", 0.0, 1.0),
        ("core", 0.0, 0.99),
        ("n_core", 1, None),
        ("n_background", 1, None),
        ("hard_share", 0.0, 1.0),
        ("size_exponent", 0.0, 2.0),
        ("score_weight", 0.0, None),
        ("max_iter", 1, None),
    ],
)
def test_ranges_end_where_they_say(name, low, high):
    assert_range("robust", name, low, high)
