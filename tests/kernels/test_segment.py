"""The whole method: the reference against a second, dense statement of it; every backend against the reference."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import LinearSVC

from ttt4as_fast import TTT4AS, kernels
from ttt4as_fast.kernels.segment import SegmentOptions
from ttt4as_fast.kernels.segment.inputs import gate
from ttt4as_fast.segmenter import PRESETS

from .cases import DTYPES, assert_range, smooth_map, structured_features, tensor

OPERATION = "segment"
CLOSE = 1e-4  # masks may differ only where |decision| is below this
CASES = [  # (H, W), (C, h, w)
    ((224, 224), (64, 28, 28)),
    ((97, 101), (13, 11, 7)),
    ((64, 64), (1, 64, 64)),  # the score-only shape
    ((33, 47), (5, 40, 50)),  # map smaller than the features
    ((61, 60), (40, 1, 1)),
    ((20, 300), (16, 1, 19)),
]


def dense_statement(anomaly_map, features, percentile=99.0, radius=5, n_nominal=100, C=1e-3, loss="squared_hinge"):
    """The method written once more, from torch and liblinear's dual solver: decision, labels."""
    height, width = anomaly_map.shape
    values = torch.from_numpy(anomaly_map.astype(np.float64))[None, None]
    peak = (F.max_pool2d(values, 3, 1, 1) == values) & (values >= np.percentile(values.numpy(), percentile))
    grown = F.max_pool2d(peak.double(), 2 * radius + 1, 1, radius)[0, 0].numpy() > 0
    step = max(1, math.floor(math.sqrt(height * width / n_nominal)))
    labels = grown.astype(np.int8)
    for r in range(step // 2, height, step):
        for c in range(step // 2, width, step):
            labels[r, c] = 1 if grown[r, c] else -1
    dense = F.interpolate(torch.from_numpy(features.astype(np.float64))[None], (height, width), mode="bilinear")[0]
    dense = dense.numpy().reshape(len(features), -1).T
    used = labels.ravel() != 0
    svm = LinearSVC(C=C, loss=loss, tol=1e-9, dual=True, max_iter=500_000, random_state=0)
    svm.fit(dense[used], labels.ravel()[used])
    return svm.decision_function(dense).reshape(height, width), labels


def assert_close_masks(got, decision, labels):
    np.testing.assert_array_equal(got.pseudo_labels, labels)
    assert np.abs(got.decision_map - decision).max() < CLOSE * 20
    np.testing.assert_array_equal(got.pred_mask, got.decision_map > 0)
    differ = got.pred_mask != (decision > 0)
    assert (np.abs(decision[differ]) < CLOSE).all()


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
@pytest.mark.parametrize(("size", "shape"), CASES, ids=str)
def test_masks_match_a_dense_statement(backend, rng, size, shape, loss):
    anomaly_map, features = smooth_map(rng, *size), structured_features(rng, *shape)
    got = kernels.segment(anomaly_map, features, loss=loss, tol=1e-8, max_iter=100_000, backend=backend)
    assert got.status == "ok"
    assert got.pred_mask.dtype == bool
    assert got.decision_map.dtype == np.float32
    assert got.pseudo_labels.dtype == np.int8
    assert_close_masks(got, *dense_statement(anomaly_map, features, loss=loss))


@pytest.mark.parametrize("scale", [1.0, 2.0**60], ids=["", "enormous"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [96, 24], ids=["by products", "by vectors"])
def test_hinge_of_a_map_of_noise(rng, channels, layout, dtype, scale):
    """Thousands of support vectors: what the C++ core solves by coordinate descent, in two ways."""
    anomaly_map = rng.random((60, 52)).astype(dtype)
    features = structured_features(rng, channels, 13, 11).astype(dtype) * dtype(scale)
    if layout == "channels_last":
        features = np.ascontiguousarray(features.transpose(1, 2, 0)).transpose(2, 0, 1)
    options = {"percentile": 80.0, "C": 0.01 / scale**2, "loss": "hinge"}
    got = kernels.segment(
        anomaly_map, features, tol=1e-8, max_iter=20_000, neighbor_radius=1, n_nominal=2000, backend="cpu", **options
    )
    assert got.status == "ok"
    decision, labels = dense_statement(anomaly_map, features, radius=1, n_nominal=2000, **options)
    assert (labels == 1).sum() > 1000
    assert_close_masks(got, decision, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 95.0},
        {"radius": 0},
        {"radius": 1, "n_nominal": 500},
        {"n_nominal": 1},
        {"n_nominal": 10**6},
        {"C": 1.0},
        {"C": 30.0},
    ],
    ids=str,
)
def test_options_match_a_dense_statement(backend, rng, options):
    anomaly_map, features = smooth_map(rng, 90, 110), structured_features(rng, 24, 14, 14)
    want = dense_statement(anomaly_map, features, **options)
    renamed = {"neighbor_radius" if name == "radius" else name: value for name, value in options.items()}
    got = kernels.segment(anomaly_map, features, tol=1e-9, max_iter=1_000_000, backend=backend, **renamed)
    if options.get("C", 0) < 10:
        assert_close_masks(got, *want)
    np.testing.assert_array_equal(got.pseudo_labels, want[1])
    assert np.mean(got.pred_mask != (want[0] > 0)) < 2e-3


def test_default_tolerance_moves_few_pixels(backend, rng):
    anomaly_map, features = smooth_map(rng, 224, 224), structured_features(rng, 96, 28, 28)
    got = kernels.segment(anomaly_map, features, backend=backend)
    decision, _ = dense_statement(anomaly_map, features)
    assert np.mean(got.pred_mask != (decision > 0)) < 1e-3


def test_the_score_as_the_only_feature(backend, rng):
    """Table 6 of the paper."""
    anomaly_map = smooth_map(rng, 80, 80)
    got = kernels.segment(anomaly_map, anomaly_map[None], C=10.0, tol=1e-8, max_iter=10**6, backend=backend)
    marked, rest = anomaly_map[got.pred_mask], anomaly_map[~got.pred_mask]
    assert len(marked)
    assert marked.min() > rest.max() - 1e-5  # a one-feature linear classifier is a threshold


def test_random_sampling(backend, rng):
    anomaly_map, features = smooth_map(rng, 70, 90), structured_features(rng, 12, 9, 9)
    options = {"nominal_sampling": "random", "n_nominal": 37, "backend": backend}
    one = kernels.segment(anomaly_map, features, **options)
    assert (one.pseudo_labels == -1).sum() == 37
    np.testing.assert_array_equal(kernels.segment(anomaly_map, features, **options).pred_mask, one.pred_mask)
    other = kernels.segment(anomaly_map, features, random_state=1, **options)
    assert (other.pseudo_labels != one.pseudo_labels).any()
    reference = kernels.segment(anomaly_map, features, **{**options, "backend": "reference"})
    np.testing.assert_array_equal(one.pseudo_labels, reference.pseudo_labels)


def test_grid_step_rounds_down(backend):
    anomaly_map = np.arange(30 * 40, dtype=np.float32).reshape(30, 40)
    labels = kernels.segment(anomaly_map, np.ones((1, 3, 3)), n_nominal=100, neighbor_radius=0, backend=backend)
    rows, cols = np.nonzero(labels.pseudo_labels == -1)
    step = math.floor(math.sqrt(30 * 40 / 100))
    assert set(rows) <= set(range(step // 2, 30, step))
    assert len(rows) == len(range(step // 2, 30, step)) * len(range(step // 2, 40, step))
    assert set(cols) == set(range(step // 2, 40, step))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_kind_and_layout(backend, rng, dtype, channels_last):
    maps = torch.from_numpy(np.stack([smooth_map(rng, 50, 60) for _ in range(2)]))
    features = tensor(np.stack([structured_features(rng, 16, 7, 8) for _ in range(2)]), dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    got = kernels.segment(maps, features, tol=1e-8, backend=backend)
    assert all(isinstance(x, torch.Tensor) for x in (got.pred_mask, got.decision_map, got.pseudo_labels))
    assert got.status == ["ok", "ok"]
    want = kernels.segment(maps.numpy(), features.double().numpy(), tol=1e-8, backend="reference")
    assert np.abs(got.decision_map.numpy() - want.decision_map).max() < CLOSE
    np.testing.assert_array_equal(got.pseudo_labels.numpy(), want.pseudo_labels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_map_dtypes(backend, rng, dtype):
    anomaly_map, features = tensor(smooth_map(rng, 50, 60), dtype), tensor(structured_features(rng, 8, 7, 8), "float32")
    got = kernels.segment(anomaly_map, features, backend=backend)
    want = kernels.segment(anomaly_map.double().numpy(), features.numpy(), backend="reference")
    np.testing.assert_array_equal(got.pseudo_labels.numpy(), want.pseudo_labels)


def batch(rng, size=5):
    maps = np.stack([smooth_map(rng, 64, 72) for _ in range(size)])
    return maps, np.stack([structured_features(rng, 20, 9, 8) for _ in range(size)])


def test_an_image_is_the_same_in_any_batch_and_order(backend, rng):
    maps, features = batch(rng)
    together = kernels.segment(maps, features, backend=backend)
    backwards = kernels.segment(maps[::-1], features[::-1], backend=backend)
    for i in range(len(maps)):
        alone = kernels.segment(maps[i], features[i], backend=backend)
        for field in ("pred_mask", "decision_map", "pseudo_labels"):
            np.testing.assert_array_equal(getattr(alone, field), getattr(together, field)[i])
            np.testing.assert_array_equal(getattr(alone, field), getattr(backwards, field)[len(maps) - 1 - i])


def test_many_threads_at_once(backend, rng):
    maps, features = batch(rng, 3)
    want = [kernels.segment(m, f, backend=backend).decision_map for m, f in zip(maps, features, strict=True)]
    failures: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 3, 6):
            got = kernels.segment(maps[i], features[i], backend=backend).decision_map
            if not np.array_equal(got, want[i]):
                failures.append(int(i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_count_changes_nothing(backend, rng, threads):
    maps, features = batch(rng)
    want = kernels.segment(maps, features, backend=backend).decision_map
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        np.testing.assert_array_equal(kernels.segment(maps, features, backend=backend).decision_map, want)
    finally:
        torch.set_num_threads(before)


def test_a_map_of_the_same_area_and_another_count_have_grids_of_their_own(backend, rng):
    features = structured_features(rng, 4, 5, 5)
    for shape, n in (((30, 50), 100), ((50, 30), 100), ((50, 30), 40)):
        psi = smooth_map(rng, *shape)
        got, want = (kernels.segment(psi, features, n_nominal=n, backend=name) for name in (backend, "reference"))
        np.testing.assert_array_equal(got.pseudo_labels, want.pseudo_labels)


@pytest.mark.parametrize("preset", PRESETS)
def test_warmup_on_a_host_is_a_call_and_has_no_graph(preset, rng):
    psi, features = smooth_map(rng, 30, 30), structured_features(rng, 4, 5, 5)
    assert TTT4AS(preset).warmup(psi, features) is False
    features[0, 2, 3] = np.nan
    with pytest.raises(ValueError, match="features: expected finite values"):
        TTT4AS(preset).warmup(psi, features)


def test_degenerate_images(backend, rng):
    features = structured_features(rng, 4, 5, 5)
    constant = kernels.segment(np.full((30, 30), 3.0, np.float32), features, backend=backend)
    psi = smooth_map(rng, 30, 30)
    everywhere, far = (kernels.segment(psi, features, neighbor_radius=n, backend=backend) for n in (40, 2**63 - 1))
    single = kernels.segment(np.ones((1, 1)), np.ones((2, 1, 1)), backend=backend)
    for got in (constant, everywhere, far, single):
        assert got.status == "degenerate"
        assert not got.pred_mask.any()
        assert not got.decision_map.any()
        assert (got.pseudo_labels == 1).all()


def test_one_bad_image_does_not_touch_the_others(backend, rng):
    maps, features = batch(rng, 3)
    want = kernels.segment(maps, features, backend=backend)
    maps[1] = 7.0
    got = kernels.segment(maps, features, backend=backend)
    assert got.status == ["ok", "degenerate", "ok"]
    np.testing.assert_array_equal(got.decision_map[[0, 2]], want.decision_map[[0, 2]])


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
def test_gate(backend, rng, as_tensor):
    maps, features = batch(rng, 3)
    scores = np.array([0.2, 0.5, 0.9])
    if as_tensor:
        maps, features, scores = (torch.from_numpy(x) for x in (maps, features, scores))
    got = kernels.segment(maps, features, pred_score=scores, image_threshold=0.5, backend=backend)
    assert got.status == ["nominal", "ok", "ok"]
    assert not got.pred_mask[0].any()
    assert not got.pseudo_labels[0].any()
    # A threshold that float32 rounds to the score itself: compared in float64, the score lies below or above it.
    for score, threshold in ((0.7, 0.7), (0.1, 0.1)):
        at = np.full(3, score, np.float32)
        status = kernels.segment(
            maps,
            features,
            pred_score=torch.from_numpy(at) if as_tensor else at,
            image_threshold=threshold,
            backend=backend,
        ).status
        assert (status[0] == "nominal") == (float(np.float32(score)) < threshold)
    by_maximum = kernels.segment(maps, features, image_threshold=float(maps[1].max()), backend=backend)
    assert by_maximum.status == ["nominal" if m.max() < maps[1].max() else "ok" for m in maps]
    one = kernels.segment(maps[0], features[0], pred_score=0.1, image_threshold=0.5, backend=backend)
    assert one.status == "nominal"


def test_not_converged_is_said(backend, rng):
    got = kernels.segment(
        smooth_map(rng, 64, 64), structured_features(rng, 30, 16, 16), C=1e4, tol=1e-12, max_iter=1, backend=backend
    )
    assert got.status == "not_converged"
    assert np.isfinite(got.decision_map).all()
    np.testing.assert_array_equal(got.pred_mask, got.decision_map > 0)


def test_scale_of_the_map_changes_nothing(backend, rng):
    anomaly_map, features = smooth_map(rng, 64, 64), structured_features(rng, 10, 8, 8)
    exact = anomaly_map.astype(np.float64)  # where neither a product nor a sum rounds two pixels to one value
    want = kernels.segment(exact, features, backend=backend)
    for other in (exact * 2**20, exact * 1024 - 4096, exact * 2**-60):
        got = kernels.segment(other, features, backend=backend)
        assert got.status == want.status == "ok"
        np.testing.assert_array_equal(got.pseudo_labels, want.pseudo_labels)
        np.testing.assert_array_equal(got.decision_map, want.decision_map)


def test_estimator_is_the_operation(backend, rng):
    anomaly_map, features = smooth_map(rng, 64, 64), structured_features(rng, 10, 8, 8)
    options = {"percentile": 97.0, "neighbor_radius": 2, "n_nominal": 60, "C": 0.1, "loss": "hinge"}
    got = TTT4AS(**options, backend=backend)(anomaly_map, features)
    want = kernels.segment(anomaly_map, features, backend=backend, **options)
    np.testing.assert_array_equal(got.decision_map, want.decision_map)


DEFAULTS = {
    "percentile": 99.0,
    "neighbor_radius": 5,
    "n_nominal": 100,
    "C": 1e-3,
    "loss": "squared_hinge",
    "nominal_sampling": "grid",
    "random_state": 0,
    "image_threshold": None,
    "tol": 1e-4,
    "max_iter": 1000,
}


def test_defaults_are_those_of_the_design():
    assert asdict(SegmentOptions()) == DEFAULTS
    assert TTT4AS().get_params() == {"preset": "paper", **DEFAULTS, "backend": "auto"}


def test_the_estimator_keeps_every_option():
    given = dict(zip(DEFAULTS, (90.0, 1, 7, 2.0, "hinge", "random", 3, 0.5, 1e-2, 9), strict=True))
    assert all(given[name] != default for name, default in DEFAULTS.items())
    assert TTT4AS(**given, backend="reference").get_params() == {"preset": "paper", **given, "backend": "reference"}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("percentile", 0.0, 100.0),
        ("neighbor_radius", 0, None),
        ("n_nominal", 1, None),
        ("random_state", 0, None),
        ("max_iter", 1, None),
    ],
)
def test_ranges_end_where_they_say(name, low, high):
    assert_range("paper", name, low, high)


@pytest.mark.parametrize("name", ["C", "tol"])
def test_what_must_be_above_zero(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a number in "):
        TTT4AS(**{name: 0.0})


GOOD = {"anomaly_map": np.zeros((8, 8)), "features": np.zeros((3, 2, 2))}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"anomaly_map": np.zeros(8)}, ValueError, "anomaly_map: expected 2 or 3 dimensions, got shape (8,)"),
        ({"features": np.zeros((2, 2))}, ValueError, "features: expected 3 dimensions, got shape (2, 2)"),
        ({"features": np.zeros((1, 3, 2, 2))}, ValueError, "features: expected 3 dimensions"),
        ({"features": np.zeros((0, 2, 2))}, ValueError, "features: expected no empty axis"),
        (
            {"features": torch.zeros((3, 2, 2))},
            TypeError,
            "features: expected the kind of anomaly_map (ndarray), got Tensor",
        ),
        ({"anomaly_map": np.full((8, 8), np.nan)}, ValueError, "anomaly_map: expected finite values"),
        ({"features": np.full((3, 2, 2), np.inf)}, ValueError, "features: expected finite values"),
        (
            {"anomaly_map": np.zeros((2, 8, 8)), "features": np.zeros((3, 3, 2, 2))},
            ValueError,
            "features: expected a batch of 2",
        ),
        ({"pred_score": [1.0, 2.0]}, ValueError, "pred_score: expected one score an image (1)"),
        ({"pred_score": np.nan, "image_threshold": 1.0}, ValueError, "pred_score: expected finite values"),
        (
            {"pred_score": "0.5"},
            TypeError,
            "pred_score: expected dtype float16, bfloat16, float32, float64 or an integer",
        ),
        ({"pred_score": [1j]}, TypeError, "pred_score: expected dtype"),
        ({"pred_score": torch.tensor(1j)}, TypeError, "pred_score: expected dtype"),
        ({"pred_score": 10**400}, TypeError, "pred_score: expected dtype"),
        ({"pred_score": [[1.0]]}, ValueError, "pred_score: expected 0 or 1 dimensions, got shape (1, 1)"),
        ({"percentile": 101}, ValueError, "percentile: expected a number in [0, 100]"),
        ({"neighbor_radius": -1}, ValueError, "neighbor_radius: expected an integer >= 0, got -1"),
        ({"n_nominal": 0}, ValueError, "n_nominal"),
        ({"n_nominal": 2**63}, ValueError, f"n_nominal: expected an integer >= 1 and < 2**63, got {2**63}"),
        ({"image_threshold": -np.inf}, ValueError, "image_threshold: expected a number in (-inf, inf), got -inf"),
        ({"C": -1}, ValueError, "C: expected a number in (0, inf)"),
        ({"loss": "l2"}, ValueError, "loss: expected one of"),
        ({"nominal_sampling": "all"}, ValueError, "nominal_sampling: expected one of 'grid', 'random', got 'all'"),
        ({"image_threshold": "x"}, TypeError, "image_threshold"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"max_iter": 1.5}, TypeError, "max_iter"),
        ({"radius": 3}, TypeError, "radius: unknown option; segment takes percentile, neighbor_radius"),
    ],
    ids=lambda x: str(list(x))[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(backend, change, error, says):
    with pytest.raises(error) as caught:
        kernels.segment(**{**GOOD, **change}, backend=backend)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("segment", [kernels.segment, kernels.segment_robust])
def test_a_value_that_is_not_finite_is_where_the_caller_finds_it(backend, segment, kind):
    psi, deep = np.zeros((8, 8)), np.zeros((3, 2, 2))
    for name, x, place in (("anomaly_map", psi, (3, 4)), ("features", deep, (2, 0, 1))):
        x[place] = np.nan
        for single in (True, False):
            given = [kind(x if single else x[None]) for x in (psi, deep)]
            says = f"{name}: expected finite values, got nan at {place if single else (0, *place)} (1 non-finite"
            with pytest.raises(ValueError, match=re.escape(says)):
                segment(*given, backend=backend)
        x[place] = 0
    with pytest.raises(ValueError, match=r"^pred_score: expected finite values, got nan \(1 non-finite in all\)$"):
        segment(kind(psi), kind(deep), pred_score=np.nan, image_threshold=1.0, backend=backend)


def test_a_score_on_the_host_is_checked_beside_a_map_on_a_device():
    maps, scores = torch.empty((2, 4, 4), device="meta"), torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match=r"^pred_score: expected finite values, got nan at \(1,\)"):
        gate(maps, scores, 0.5)


def test_a_status_names_an_image_only_of_a_batch():
    for codes, says in ((4, "got others$"), ([0, 4], r"got others in image \[1\] of the batch$")):
        empty = np.zeros((*np.shape(codes), 2, 2))
        with pytest.raises(ValueError, match=says):
            _ = kernels.Segmentation(empty, empty, empty, np.array(codes, np.int8)).status


def test_a_neighbourhood_beyond_the_shorter_side(backend, rng):
    psi = rng.random((6, 200), dtype=np.float32) * 1e-3
    psi[3, 100] = 1
    deep = np.ones((2, 3, 9), np.float32) * np.arange(9, dtype=np.float32)
    got = kernels.segment(psi, deep, neighbor_radius=60, percentile=100, backend=backend)
    assert (got.pseudo_labels == 1).sum() == 6 * 121
