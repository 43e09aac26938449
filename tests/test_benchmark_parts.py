"""What the benchmark suite is made of: seeded, real inputs, a gate that refuses, measuring, peers, tracking."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "ttt4as_fast.benchmarks", reason="this copy was installed without the benchmark suite: reinstall it"
)

from ttt4as_fast import TTT4AS, installation, kernels
from ttt4as_fast.benchmarks import (
    compare,
    cpu,
    digest,
    gate,
    growth,
    latency,
    machine,
    measure,
    peers,
    presets,
    sections,
    workloads,
)

TINY = workloads.Workload("tiny", 96, 14, 112, "nothing")


@pytest.fixture(scope="module")
def scene() -> workloads.Scene:
    return workloads.scene(TINY, 2, seed=3)


# ---------------------------------------------------------------- workloads


def test_scene_has_its_shape_and_does_not_depend_on_its_neighbours(scene: workloads.Scene) -> None:
    assert scene.anomaly_map.shape == (2, 112, 112) and scene.anomaly_map.dtype == np.float32
    assert scene.features.shape == (2, 96, 14, 14) and scene.features.dtype == np.float32
    again = workloads.scene(TINY, 1, seed=3)
    np.testing.assert_array_equal(again.features[0], scene.features[0])
    np.testing.assert_array_equal(again.anomaly_map[0], scene.anomaly_map[0])
    other = workloads.scene(TINY, 1, seed=4)
    assert np.abs(other.features - scene.features[:1]).max() > 0.1


def test_scene_is_like_a_detectors() -> None:
    """Structured features, and maps that are higher on the defect: what white noise is not."""
    from ttt4as_fast.metrics import pixel_auroc

    found = workloads.scene(workloads.WORKLOADS["dinov2_vits14"], 3)
    assert found.gt_mask is not None and all(0.02 < truth.mean() < 0.07 for truth in found.gt_mask)
    assert pixel_auroc(found.anomaly_map[:1], found.gt_mask[:1]) > 0.9  # grey blobs in gravel and grass are harder
    for deep in found.features.reshape(3, 384, -1):
        values = np.linalg.svd(deep - deep.mean(1, keepdims=True), compute_uv=False) ** 2
        assert values[:20].sum() > 0.6 * values.sum()  # noise of this shape: 0.16


@pytest.mark.parametrize("workload", workloads.WORKLOADS.values(), ids=lambda workload: workload.name)
def test_workloads_are_consistent(workload: workloads.Workload) -> None:
    assert workload.channels <= workloads.MOST_CHANNELS
    assert workload.shape.startswith(f"{workload.channels} x {workload.grid}")
    assert workloads.WORKLOADS[workload.name] is workload


def test_patches_and_samples() -> None:
    patches = workloads.nominal_patches(344, 500, seed=1, grid=14)
    assert patches.shape == (500, 344) and np.isfinite(patches).all() and len(np.unique(patches, axis=0)) == 500
    assert workloads.query_patches(152, grid=14).shape == (196, 152)
    X, y = workloads.svm_samples(200, 152)
    assert X.shape == (200, 152) and (y == 1).sum() == 180 and (y == -1).sum() == 20
    with pytest.raises(ValueError, match="channels: expected at most 1536"):
        workloads.nominal_patches(2000, 10)


def test_images_of_a_data_set(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/hole"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    found = workloads.scene(TINY, 2, data=tmp_path)
    assert found.gt_mask is None and "defective test images" in found.source
    assert np.abs(found.features[0] - found.features[1]).max() > 0


# ---------------------------------------------------------------- the gate


def test_gate_passes_this_package_and_refuses_what_is_wrong(scene: workloads.Scene) -> None:
    psi, deep = scene.anomaly_map[0], scene.features[0]
    out = TTT4AS()(psi, deep)
    check = partial(gate.check_segment, psi, deep)
    assert check(out.pred_mask, out.decision_map, out.pseudo_labels)
    labels = out.pseudo_labels.copy()
    labels[0, 0] = 1 - labels[0, 0]
    refused = check(out.pred_mask, out.decision_map, labels)
    assert not refused and "1 pseudo-labels differ" in refused.detail
    assert not check(out.pred_mask, out.decision_map + 1.0, out.pseudo_labels)
    assert not check(~out.pred_mask, out.decision_map, out.pseudo_labels)


def test_gate_of_a_large_map_sees_a_wrong_decision(monkeypatch: pytest.MonkeyPatch, scene: workloads.Scene) -> None:
    monkeypatch.setattr(gate, "DENSE_PIXELS", 1000)
    psi, deep = scene.anomaly_map[0], scene.features[0]
    out = TTT4AS()(psi, deep)
    found = gate.check_segment(psi, deep, out.pred_mask, out.decision_map, out.pseudo_labels)
    assert found and "24 of 112 rows" in found.detail
    shifted = out.decision_map + 1.0
    assert not gate.check_segment(psi, deep, shifted > 0, shifted, out.pseudo_labels)


def test_gates_of_the_parts() -> None:
    rng = np.random.default_rng(0)
    bank, query = rng.random((50, 8), np.float32), rng.random((9, 8), np.float32)
    distances, indices = kernels.nearest_neighbors(query, bank, 3)
    assert gate.check_knn(query, bank, distances, indices)
    assert not gate.check_knn(query, bank, distances * 1.001, indices)
    assert not gate.check_knn(query, bank, distances, indices[:, ::-1])
    X, y = rng.standard_normal((40, 5)), np.repeat([1, -1], 20)
    optimum = gate.svm_optimum(X, y, 0.1)
    svm = kernels.fit_linear_svm(X, y, C=0.1)
    assert gate.check_svm(X, y, svm.coef, svm.intercept, 0.1, optimum)
    assert not gate.check_svm(X, y, svm.coef * 1.1, svm.intercept, 0.1, optimum)
    picks = kernels.k_center_greedy(bank, 10)
    assert gate.check_coreset(picks, picks[:5])
    assert not gate.check_coreset(picks[::-1], picks[:5])
    assert (
        gate.check_equal(bank, bank) and not gate.check_equal(bank, bank + 1) and not gate.check_equal(bank, bank[1:])
    )


# ---------------------------------------------------------------- measuring


def test_by_turns_measures_all_in_every_round() -> None:
    calls = []
    found = measure.by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, least=4)
    assert [len(timing.rounds) for timing in found.values()] == [4, 4]
    for name in "ab":  # two first calls, and at least one in each turn that warms up
        assert calls.count(name) >= 2 + 4 + len(found[name].calls)
    slow, fast = measure.Timing(((10.0,), (20.0,), (30.0,))), measure.Timing(((5.0,), (5.0,), (5.0,)))
    assert measure.ratio(slow, fast) == {"ratio": 4.0, "low": 2.8, "high": 5.2}
    assert slow.summary() == {"p20": 14.0, "p50": 20.0, "p80": 26.0, "n": 3}


def test_a_ratio_lies_in_its_band() -> None:
    """The rounds' own ratios are 1, 1 and 9 (percentiles 1 and 5.8), that of the medians is 9: the machine was busy."""
    slow, fast = measure.Timing(((9.0,), (1.0,), (9.0,))), measure.Timing(((9.0,), (1.0,), (1.0,)))
    assert measure.ratio(slow, fast) == {"ratio": 9.0, "low": 1.0, "high": 9.0}
    assert measure.ratio(fast, slow) == {"ratio": 0.111, "low": 0.111, "high": 1.0}


def test_peak_memory_counts_what_is_freed() -> None:
    peak = measure.peak_mebibytes(lambda: np.ones(64 << 17).sum())  # 64 MiB, gone again
    if peak is None:
        pytest.skip("this kernel does not tell the high-water mark")
    assert 60 < peak < 100


def test_peak_memory_is_not_told_where_the_process_has_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_windows(name: None) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(measure.ctypes, "CDLL", on_windows)
    assert measure.peak_mebibytes(lambda: None) is None


def test_peak_memory_counts_what_calls_keep() -> None:
    core = machine._core()
    rng = np.random.default_rng(0)
    anomaly_map, features = rng.random((64, 64), np.float32), rng.random((512, 28, 28), np.float32)
    call = partial(kernels.segment, anomaly_map, features, loss="hinge", n_nominal=4000)
    call()
    if core is None or measure.peak_mebibytes(call) is None:
        pytest.skip("no C++ core, or this kernel does not tell the high-water mark")
    core.release_memory()
    call()
    held = core.release_memory() / 2**20
    call()
    assert held > 4 and measure.peak_mebibytes(call) > held / 2  # not all of it is written
    (point,) = growth._by_bank(growth.Plan(bank=(2000,)))
    assert measure.peak_mebibytes(point.ours) > 1  # a thread's scratch, which the index keeps


def test_exponent() -> None:
    assert measure.fitted_exponent([1, 10, 100], [2, 200, 20_000]) == pytest.approx(2.0)
    assert measure.fitted_exponent([1], [1]) is None


def test_pinned_threads_are_read_back() -> None:
    counts = machine.pin(1)
    assert counts["torch"] == 1 and set(counts.values()) == {1}
    with pytest.raises(ValueError, match="threads"):
        machine.pin(machine.processors() + 1)


def test_a_library_with_other_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "thread_counts", lambda: {"torch": 1, "faiss": 7})
    with pytest.raises(machine.ThreadsError, match="faiss"):
        machine.pin(1)


def test_a_blas_that_does_not_know_the_processor_is_named() -> None:
    counts = {
        "torch": 2,
        "openblas (libopenblaso, Haswell)": 2,
        "openblas (libscipy, SkylakeX)": 2,
        "openblas (old)": 2,
    }
    assert machine.outdated(counts, "avx512") == machine.outdated(counts, "amx") == ["openblas (libopenblaso, Haswell)"]
    assert machine.outdated(counts, "avx2") == machine.outdated(counts, None) == []
    content = {"machine": {"cpu": "A", "instruction_set": "avx512"}, "threads": counts, "commit": "abc"}
    said = (
        "A, 2 thread(s), commit abc, **peers with kernels older than the processor: openblas (libopenblaso, Haswell)**"
    )
    assert digest._where(content) == said
    assert digest._where(content | {"machine": {"cpu": "A"}}) == "A, 2 thread(s), commit abc"


def test_load_of_others_is_a_share() -> None:
    found = machine.load_of_others(0.05)
    assert found is None or 0.0 <= found <= 1.0


def test_latency_counts_waiting() -> None:
    import time

    found = latency.steady(lambda: time.sleep(0.004), 30, rate=500.0)  # twice as slow as the camera
    assert found["service"]["p50"] >= 4.0 and found["service"]["n"] == 30
    assert found["response"]["max"] > 10 * found["service"]["p50"]  # frames queue up
    with latency.competing_thread():
        beside = latency.back_to_back(lambda: None, 20)
    assert beside["n"] == 20 and beside["p50"] <= beside["p99"] <= beside["max"]


# ---------------------------------------------------------------- peers


def test_presets_say_where_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "evaluate", lambda benches: ({"halves": {}}, []))
    monkeypatch.setattr(presets, "draw_failures", lambda *_: None)
    watch = machine.Watch()
    presets.finish([], tmp_path, watch)
    found = json.loads((tmp_path / "presets.json").read_text("utf-8"))
    assert found.keys() == {*machine.describe({}, watch), "halves"}
    assert found["commit"] == installation.commit() and found["versions"] == machine.versions()


def test_every_peer_is_there_or_named() -> None:
    absent = peers.absent()
    for peer in peers.PEERS:
        assert (peer.why_not() is None) == (peer.name not in absent)
        assert absent.get(peer.name, "reason").strip()
    assert not {"paper's recipe", "scikit-learn LinearSVC", "SciPy", "torch.cdist", "F.interpolate"} & set(absent)
    for peer in peers.peers("segment"):
        assert version("scikit-learn") in peer.version
    with pytest.raises(ValueError, match="operation"):
        peers.peers("nonsense")


def test_peers_do_what_they_are_timed_for(scene: workloads.Scene) -> None:
    psi, deep = scene.anomaly_map[0], scene.features[0]
    mask, spent = peers.recipe_stages(psi, deep)
    assert set(spent) == set(peers.STAGES) and min(spent.values()) > 0
    assert gate.check_mask(mask, TTT4AS()(psi, deep).pred_mask)
    reference = kernels.dilate(kernels.local_maxima(psi), 5)
    for peer in cpu._usable("peaks"):
        assert gate.check_equal(peer.adapter()(psi, 99.0, 5), reference)
    bank = workloads.nominal_patches(152, 300, grid=14)
    expected = kernels.nearest_neighbors(bank[:20] + 0.01, bank, 2)[1]
    for peer in cpu._usable("knn"):
        assert (peer.adapter()(bank)(bank[:20] + np.float32(0.01), 2)[1] == expected).mean() > 0.95
    for peer in cpu._usable("coreset"):
        picks = peer.adapter()(bank, 30, 0)
        assert len(np.unique(picks)) == 30
        np.testing.assert_array_equal(kernels.k_center_greedy(bank, 30, int(picks[0]))[:10], picks[:10])
    for peer in cpu._usable("binarise"):
        maps = np.ascontiguousarray(scene.anomaly_map[:, ::8, ::8])
        np.testing.assert_array_equal(peer.adapter()(maps), peer.adapter()(maps, as_it_is=True))


# ---------------------------------------------------------------- tracking


def test_a_slower_head_is_told_from_noise() -> None:
    calm = [({"a": 10.0, "b": 5.0}, {"a": 12.0, "b": 5.1}, {"a": 10.1, "b": 5.0})] * 5
    verdicts = {change.operation: change.verdict for change in compare.changes(calm)}
    assert verdicts == {"a": "slower", "b": "within noise"}
    noisy = [({"a": 10.0}, {"a": 12.0}, {"a": 14.0}), ({"a": 14.0}, {"a": 13.0}, {"a": 10.0})] * 3
    (change,) = compare.changes(noisy)
    assert change.verdict == "within noise" and change.band > 0.3
    assert compare.changes([({"a": 10.0}, {"a": 5.0}, {"a": 10.0})])[0].verdict == "faster"


def test_asv_would_run_its_own_files_only() -> None:
    """asv runs whatever is named like a benchmark in any file of the folder."""
    folder = Path(machine.__file__).parent
    named = re.compile(r"^\s*(?:def|class)\s+((?:time|timeraw|mem|peakmem|track)_\w+|Time[A-Z_]\w*)", re.MULTILINE)
    for path in folder.glob("*.py"):
        found = named.findall(path.read_text("utf-8"))
        assert bool(found) == path.name.startswith("asv_"), (path.name, found)


def test_asv_benchmarks_run() -> None:
    from ttt4as_fast.benchmarks import asv_operations, asv_segment

    for benchmark in (asv_operations.Peaks, asv_operations.LinearSVM, asv_segment.Segment):
        one = benchmark()
        sizes = [values[0] for values in one.params]
        one.setup(*sizes)
        for name in dir(one):
            if name.startswith(("time_", "peakmem_")):
                getattr(one, name)(*sizes)


def test_what_is_timed_is_called():
    found = measure.by_turns({"a": lambda: time.sleep(0.06)}, 0.0, least=1)
    assert found["a"].summary()["p50"] >= 60


def test_gpu_results_in_digest_and_report():
    """Goals that are missed are said; a row without a goal tells nobody."""
    notes = {"in_a_graph": {"p50_ms": 0.064}, "bare_bf16_product_in_a_graph": {"p50_ms": 0.0408}}
    row = {"name": "segment-1", "status": "ok", "ours": {"p50_ms": 0.5}, "ratios": {"recipe": 12.0}}
    rows = [
        row | {"goal": ">= 1000x", "goal_met": False, "notes": notes},
        row | {"name": "tiles", "goal": "a tile", "goal_met": None, "notes": {}},
        {"name": "knn", "status": "not measured"},
    ]
    content = {
        "machine": {"device": {"name": "H100"}, "commit": "abc" * 20, "torch": "2.11", "cuml": None},
        "rows": rows,
    }
    text = digest.digest({"gpu": content})
    assert "On H100, commit abcabcabcabc;" in text and "Not measured there: knn." in text
    assert "| segment-1 | 0.5 | 0.064 (bare product 0.0408) | 12x recipe | >= 1000x: **missed** |" in text
    assert "tiles" not in text and digest.gpu_graph(row) == "-"
    assert "H100, commit abcabcabcabc; torch 2.11." in sections.section("gpu", content)
