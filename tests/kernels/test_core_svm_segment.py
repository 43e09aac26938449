"""The C++ core beyond parity: any input shape and dtype through its bindings, threads, memory, and what it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ttt4as_fast import kernels
from ttt4as_fast.kernels import dispatch, native
from ttt4as_fast.kernels.linear_svm import LOSSES
from ttt4as_fast.kernels.linear_svm import reference as svm_reference

from .cases import smooth_map, structured_features

pytestmark = pytest.mark.skipif(isinstance(dispatch.native_core(), str), reason="the C++ core is not built")

finite = st.floats(-1e6, 1e6, width=32)
anything = st.one_of(finite, st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 1e30]))
dtypes = st.sampled_from([np.float16, np.float32, np.float64])


def strided(array: np.ndarray, how: str) -> np.ndarray:
    """The same values in another memory layout."""
    if how == "reversed":
        return array[..., ::-1].copy()[..., ::-1]
    if how == "sliced":
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    return np.asfortranarray(array) if how == "fortran" else array


layouts = st.sampled_from(["plain", "reversed", "sliced", "fortran"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_segment_takes_anything_or_says_why_not(data):
    height, width = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    shape = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    values = data.draw(st.sampled_from([finite, anything]))
    with np.errstate(over="ignore"):
        anomaly_map = data.draw(hnp.arrays(np.float64, (height, width), elements=values)).astype(data.draw(dtypes))
        features = data.draw(hnp.arrays(np.float64, shape, elements=values)).astype(data.draw(dtypes))
    map_layout, features_layout = data.draw(layouts), data.draw(layouts)
    anomaly_map, features = strided(anomaly_map, map_layout), strided(features, features_layout)
    options = {
        "percentile": data.draw(st.floats(0, 100)),
        "neighbor_radius": data.draw(st.integers(0, 40)),
        "n_nominal": data.draw(st.integers(1, 200)),
        "C": 10.0 ** data.draw(st.integers(-8, 4)),
        "loss": data.draw(st.sampled_from(["squared_hinge", "hinge"])),
        "nominal_sampling": data.draw(st.sampled_from(["grid", "random"])),
        "max_iter": data.draw(st.sampled_from([1, 3, 200])),
    }
    if not (np.isfinite(anomaly_map).all() and np.isfinite(features).all()):
        with pytest.raises(ValueError, match="expected finite values"):
            kernels.segment(anomaly_map, features, backend="cpu", **options)
        return
    got = kernels.segment(anomaly_map, features, backend="cpu", **options)
    assert got.pred_mask.shape == (height, width)
    assert np.isfinite(got.decision_map).all()
    np.testing.assert_array_equal(got.pred_mask, got.decision_map > 0)
    assert set(np.unique(got.pseudo_labels)) <= {-1, 0, 1}
    # Channels side by side are added in another order than channels apart, which may show in the last bits.
    plain = features if features_layout == "fortran" else np.ascontiguousarray(features)
    again = kernels.segment(np.ascontiguousarray(anomaly_map), plain, backend="cpu", **options)
    np.testing.assert_array_equal(got.pseudo_labels, again.pseudo_labels)
    np.testing.assert_array_equal(got.decision_map, again.decision_map)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fit_takes_anything_or_says_why_not(data):
    n, d = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 12))
    values = data.draw(st.sampled_from([finite, anything]))
    with np.errstate(over="ignore"):
        X = data.draw(hnp.arrays(np.float64, (n, d), elements=values)).astype(data.draw(dtypes))
    X = strided(X, data.draw(layouts))
    y = np.arange(n) % 2
    options = {
        "C": 10.0 ** data.draw(st.integers(-8, 4)),
        "loss": data.draw(st.sampled_from(["squared_hinge", "hinge"])),
    }
    if not np.isfinite(X).all():
        with pytest.raises(ValueError, match="expected finite values"):
            kernels.fit_linear_svm(X, y, backend="cpu", **options)
        return
    fit = kernels.fit_linear_svm(X, y, backend="cpu", **options)
    assert np.isfinite(fit.coef).all() and np.isfinite(fit.intercept)
    if fit.converged:
        assert fit.gap <= 1e-4


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=40), elements=st.floats(-3, 3, width=16)),
    dtypes,
    layouts,
    st.floats(0, 100),
    st.integers(0, 60),
)
def test_peaks_equal_the_reference_to_the_bit(maps, dtype, layout, percentile, radius):
    maps = strided(maps.astype(dtype), layout)
    expected = kernels.local_maxima(maps, percentile, backend="reference")
    got = kernels.local_maxima(maps, percentile, backend="cpu")
    np.testing.assert_array_equal(got, expected)
    grown = kernels.dilate(got, radius, backend="cpu")
    np.testing.assert_array_equal(grown, kernels.dilate(expected, radius, backend="reference"))


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
@pytest.mark.parametrize("C", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize(("n", "d"), [(60, 7), (200, 300), (700, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_objective_is_the_optimum(rng, n, d, C, loss, dtype):
    y = rng.integers(0, 2, n) * 2.0 - 1
    X = (rng.normal(size=(n, d)) + 0.4 * y[:, None] * (np.arange(d) < 5) + 1).astype(dtype)
    weight = rng.uniform(0, 2, n)
    weight[:3] = 0
    fit = kernels.fit_linear_svm(X, y, C=C, loss=loss, sample_weight=weight, max_iter=20_000, backend="cpu")
    assert fit.converged
    value = svm_reference.objective(X, y, fit.coef, fit.intercept, C, loss, weight)
    from sklearn.svm import LinearSVC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = LinearSVC(C=C, loss=loss, tol=1e-8, max_iter=20_000, dual=True, random_state=0).fit(X, y, weight)
    best = svm_reference.objective(X, y, peer.coef_[0], peer.intercept_[0], C, loss, weight)
    assert value <= best * (1 + 1.1e-4)


@pytest.mark.parametrize("n", [60, 1500])
def test_values_at_the_end_of_the_range_are_told_apart(rng, n):
    """Sums of products of such values leave float32; the solver scales them."""
    y = np.repeat([1, -1], n // 2)
    X = (rng.standard_normal((n, 20)) + 0.5 * y[:, None]).astype(np.float32)
    X *= np.float32(3.3e38 / np.abs(X).max())
    svm = kernels.fit_linear_svm(X, y, backend="cpu")
    decision = X.astype(np.float64) @ svm.coef.astype(np.float64) + svm.intercept
    assert np.mean((decision > 0) == (y > 0)) > 0.9


def test_a_warm_start_ends_where_a_cold_one_does(rng):
    X = rng.normal(size=(300, 50)).astype(np.float32)
    y = np.where(X[:, 0] + 0.5 * rng.normal(size=300) > 0, 1.0, -1.0)
    options = {"C": 0.01, "loss": "squared_hinge", "tol": 1e-6, "max_iter": 1000}
    from ttt4as_fast.kernels.linear_svm import cpu

    cold = cpu.fit(X, y, **options)
    warm = cpu.fit(X, y, **options, initial=np.append(cold.coef, cold.intercept))
    assert warm.converged and warm.n_iter <= cold.n_iter
    np.testing.assert_allclose(warm.coef, cold.coef, atol=1e-5)


@pytest.mark.parametrize(
    ("apart", "C", "route"),
    [(8.0, 10.0, "working_set"), (1.0, 10.0, "newton"), (1.0, 1.0, "newton"), (1.0, 1e-3, "newton")],
)
def test_large_problems_go_where_they_are_cheap(rng, apart, C, route):
    """Classes that lie apart need few samples; among others the working set gives up."""
    y = rng.integers(0, 2, 3000) * 2.0 - 1
    X = rng.normal(size=(3000, 24)).astype(np.float32)
    X[:, 0] += apart / 2 * y
    coef, intercept, *_, converged, _, taken, _ = native.core().fit_linear_svm(X, y, C, "squared_hinge", 1e-6, 1000)
    assert converged and taken == route
    best = svm_reference.fit(X.astype(float), y, C=C, loss="squared_hinge", tol=1e-9, max_iter=100_000)
    found = [svm_reference.objective(X, y, *w, C, "squared_hinge") for w in ((coef, intercept), best[:2])]
    assert found[0] <= found[1] * (1 + 1e-6)


def test_a_warm_start_without_violators_forgets_the_fit_before(rng):
    """Nobody violates where the start's margins are far too wide: the set begins empty, whatever the last one held."""
    y = np.where(rng.random(200) < 0.5, 1.0, -1.0)
    X = (0.1 * rng.normal(size=(200, 30)) + y[:, None]).astype(np.float32)
    other = rng.normal(size=(400, 30)).astype(np.float32)
    fit = native.core().fit_linear_svm
    cold = fit(X, y, 0.1, "squared_hinge", 1e-6, 1000, route="working_set")
    fit(other, np.where(other[:, 0] > 0, 1.0, -1.0), 10.0, "squared_hinge", 1e-6, 1000, route="working_set")
    start = 1e3 * np.append(cold[0], cold[1])
    stopped = fit(X, y, 0.1, "squared_hinge", 1e-6, 1, None, start, route="working_set")
    np.testing.assert_array_equal(stopped[0], 0.0)
    warm = fit(X, y, 0.1, "squared_hinge", 1e-6, 1000, None, start, route="working_set")
    assert warm[4]
    np.testing.assert_allclose(warm[0], cold[0], atol=1e-4)


def test_what_a_thread_keeps_from_one_fit_changes_nothing_in_the_next(rng):
    problems = []
    for n, d, dtype in ((900, 130, np.float32), (40, 400, np.float32), (300, 20, np.float64), (2000, 60, np.float32)):
        y = np.where(rng.random(n) < 0.3, 1.0, -1.0)
        problems += [(rng.normal(size=(n, d)).astype(dtype) + y[:, None].astype(dtype), y, loss) for loss in LOSSES]

    def fits(order):
        return {i: kernels.fit_linear_svm(*problems[i][:2], C=0.1, loss=problems[i][2], backend="cpu") for i in order}

    first, second = fits(range(len(problems))), fits(reversed(range(len(problems))))
    for i, fit in first.items():
        np.testing.assert_array_equal(fit.coef, second[i].coef)
        assert fit[1:] == second[i][1:]


def test_equal_on_any_number_of_threads_and_instruction_sets_agree(rng, tmp_path):
    """Bits do not depend on threads; instruction sets differ by rounding only."""
    np.save(tmp_path / "map.npy", smooth_map(rng, 90, 80))
    np.save(tmp_path / "features.npy", structured_features(rng, 300, 28, 28))  # the samples touch a part of the grid
    script = (
        "import numpy as np, sys; from ttt4as_fast import kernels\n"
        "out = kernels.segment(np.load('map.npy'), np.load('features.npy'), backend='cpu')\n"
        "np.save(sys.argv[1], out.decision_map)\n"
    )
    decisions = {}
    for isa in ("generic", "avx2", "avx512"):
        for threads in ("1", "3"):
            name = f"{isa}{threads}.npy"
            environment = {**os.environ, "TTT4AS_ISA": isa, "TTT4AS_NUM_THREADS": threads}
            subprocess.run([sys.executable, "-c", script, name], cwd=tmp_path, env=environment, check=True)
            decisions[isa, threads] = np.load(tmp_path / name)
        np.testing.assert_array_equal(decisions[isa, "1"], decisions[isa, "3"])
        np.testing.assert_allclose(decisions[isa, "1"], decisions["generic", "1"], atol=1e-4)


def test_many_callers_at_once_get_the_same(rng):
    anomaly_map, features = smooth_map(rng, 64, 64), structured_features(rng, 32, 8, 8)
    expected = kernels.segment(anomaly_map, features, backend="cpu").decision_map
    wrong = []

    def call() -> None:
        for _ in range(20):
            if not np.array_equal(kernels.segment(anomaly_map, features, backend="cpu").decision_map, expected):
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_threadpoolctl_and_torch_limit_the_core():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    import torch

    core = native.core()
    core.set_num_threads(7)
    try:
        with threadpoolctl.threadpool_limits(3):
            assert core.max_threads() == 3
        assert core.max_threads() == 7
        assert any(module["internal_api"] == "ttt4as" for module in threadpoolctl.threadpool_info())
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert native.threads() == 2
        finally:
            torch.set_num_threads(before)
    finally:
        core.set_num_threads(0)


def test_a_long_fit_hears_ctrl_c(rng):
    handled, in_time = threading.Event(), []

    def handler(*_):
        handled.set()
        raise KeyboardInterrupt

    def press():
        signal.raise_signal(signal.SIGINT)  # Python calls the handler on the main thread, when that looks
        in_time.append(handled.wait(20))

    before = signal.signal(signal.SIGINT, handler)
    thread = threading.Timer(0.2, press)
    X, y = rng.standard_normal((2000, 256)), np.where(rng.random(2000) < 0.5, 1, -1)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            kernels.fit_linear_svm(X, y, C=1e6, loss="hinge", max_iter=20_000, backend="cpu")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert in_time == [True]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_batch_hears_ctrl_c(rng, threads):
    maps, features = rng.random((40_000, 16, 16), dtype=np.float32), rng.standard_normal((1, 64, 4, 4))
    features = np.broadcast_to(features.astype(np.float32), (len(maps), 64, 4, 4))
    found, order = [], np.arange(256)
    segment = partial(
        native.core().segment, candidates=order, limit=50, C=1.0, loss="hinge", tol=1e-6, max_iter=1000, threads=threads
    )
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        found.extend(map(segment, [maps], [features], [99.0], [1]))  # no Python in between: a result would be kept
    timer.join()
    assert not found


def test_the_handler_of_a_signal_may_fit_within_a_fit(rng):
    X, y = rng.standard_normal((2000, 16)), np.where(rng.random(2000) < 0.5, 1.0, -1.0)

    def fit(n, epochs):  # as many of them as are asked for
        return native.core().fit_linear_svm(X[:n], y[:n], 1e6, "hinge", 1e-12, epochs, route="coordinate")[0]

    alone, within = fit(2000, 5000), []
    before = signal.signal(signal.SIGINT, lambda *_: within.append(fit(50, 10)))
    thread = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    try:
        thread.start()
        around = fit(2000, 5000)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(around, alone)
    np.testing.assert_array_equal(within, [fit(50, 10)])


def test_memory_stays_within_its_bound(rng):
    core = native.core()
    core.release_memory()
    anomaly_map, features = smooth_map(rng, 224, 224), structured_features(rng, 256, 28, 28)
    got = kernels.segment(anomaly_map, features, backend="cpu")
    kernels.segment(np.stack([anomaly_map] * 5), np.stack([features] * 5), backend="cpu")
    held = core.release_memory()
    samples = int(np.count_nonzero(got.pseudo_labels))
    one = 2 * features.nbytes + 40 * samples + anomaly_map.nbytes // 8 + (1 << 20)
    assert 0 < held <= core.max_threads() * one
    assert core.release_memory() == 0


@pytest.mark.parametrize("name", ["anomaly_map", "features"])
def test_a_side_beyond_the_limit_is_said(name):
    given = {"anomaly_map": np.ones((3, 3), np.float32), "features": np.ones((1, 3, 3), np.float32)}
    given[name] = np.broadcast_to(given[name][..., :1, :1], (*given[name].shape[:-2], 2**24 + 1, 1))
    with pytest.raises(ValueError, match=rf"^{name}: expected sides of 1 to 2\^24 .* got 16777217 x 1"):
        kernels.segment(**given, backend="cpu")
