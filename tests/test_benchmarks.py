"""The benchmark suite: seeded, real inputs; a gate that refuses; files and pages that say what was measured."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "ttt4as_fast.benchmarks", reason="this copy was installed without the benchmark suite: reinstall it"
)

from ttt4as_fast import TTT4AS, kernels
from ttt4as_fast.benchmarks import (
    binarisers,
    compare,
    cpu,
    gate,
    growth,
    headline,
    latency,
    machine,
    measure,
    peers,
    report,
    results_file,
    svg,
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
    monkeypatch.setattr(gate, "_DENSE_PIXELS", 1000)
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
    assert gate.check_coreset(bank, picks, picks[:5])
    assert not gate.check_coreset(bank, picks[::-1], picks[:5])
    assert (
        gate.check_equal(bank, bank) and not gate.check_equal(bank, bank + 1) and not gate.check_equal(bank, bank[1:])
    )


def test_a_row_that_missed_has_no_ratio() -> None:
    timing = measure.Timing(((2.0, 2.0),))
    arguments = ("knn", "shape", "peer", "1.0", timing, measure.Timing(((8.0,),)))
    passed = cpu._row(*arguments, gate.Verdict(True, "equal"), 3.0)
    failed = cpu._row(*arguments, gate.Verdict(False, "3 neighbours wrong"), 3.0)
    assert passed["speedup"]["ratio"] == 4.0 and passed["met"] is True
    assert failed["speedup"] is None and failed["met"] is None
    content = results_file.result("cpu", "t", _about(), [passed, failed])
    assert not results_file.all_passed(content) and results_file.all_passed({**content, "rows": [passed]})
    text = _text(cpu.table(content))
    assert "4x" in text and "FAILED: 3 neighbours wrong" in text
    assert report.page({"cpu": content}).count("4x (4 to 4)") == 1


# ---------------------------------------------------------------- measuring


def test_by_turns_measures_all_in_every_round() -> None:
    calls = []
    found = measure.by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, least=4)
    assert [len(timing.rounds) for timing in found.values()] == [4, 4]
    assert calls.count("a") == 2 + len(found["a"].calls) and calls.count("b") == 2 + len(found["b"].calls)
    slow, fast = measure.Timing(((10.0,), (20.0,), (30.0,))), measure.Timing(((5.0,), (5.0,), (5.0,)))
    assert measure.ratio(slow, fast) == {"ratio": 4.0, "low": 2.8, "high": 5.2}
    assert slow.summary() == {"p20": 14.0, "p50": 20.0, "p80": 26.0, "n": 3}


def test_peak_memory_counts_what_is_freed() -> None:
    peak = measure.peak_mebibytes(lambda: np.ones(64 << 17).sum())  # 64 MiB, gone again
    if peak is None:
        pytest.skip("this kernel does not tell the high-water mark")
    assert 60 < peak < 100


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


# ---------------------------------------------------------------- runs on tiny sizes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of result files, made by the runners."""
    folder = tmp_path_factory.mktemp("results")
    patch = pytest.MonkeyPatch()
    patch.setitem(workloads.WORKLOADS, "tiny", TINY)
    patch.setitem(headline._BACKBONES, "tiny", "efficientnet_lite0")
    patch.setattr(growth, "BASE", TINY)
    patch.setattr(growth, "AXES", {name: growth.AXES[name] for name in ("map", "batch", "bank")})
    patch.setattr(latency, "_WARM_UP", 2)
    patch.setattr(latency, "_COLD_RUNS", 1)
    steps: list[tuple[str, int, int]] = []
    watched: Any = lambda *step: steps.append(step)  # noqa: E731
    content = headline.run(("tiny",), 1, 0.05, bank=300, progress=watched)
    results_file.save(content, folder)
    plan = cpu.Plan(
        seconds=0.05,
        calls=20,
        scenes=(("tiny", 1.0),),
        svm=((60, 96),),
        svm_c=(1e-3,),
        knn=((300, 152),),
        coreset=((400, 30),),
        coreset_channels=152,
        maps=(96,),
    )
    results_file.save(cpu.run(plan, 1, "segment|svm|knn|coreset|peaks|bilinear", watched), folder)
    sizes = growth.Plan((56, 112), (48, 96), (7, 14), (50, 100), (1, 2), (100, 300), seconds=0.0)
    results_file.save(growth.run(sizes, 1, watched), folder)
    results_file.save(latency.run("tiny", 1, 20, 1000.0, (1, 2), 0.05, progress=watched), folder)
    patch.undo()
    assert steps[-1][1] == steps[-1][2]
    return folder


def test_runners_leave_what_was_measured_where(results: Path) -> None:
    contents = results_file.load(results)
    assert set(contents) == {"headline", "cpu", "growth", "latency"}
    for content in contents.values():
        assert content["format_version"] == 1 and content["versions"]["torch"] and content["machine"]["cpu"]
        assert set(content["threads"].values()) == {1}
        assert results_file.all_passed(content)
    (row,) = contents["headline"]["rows"]
    assert row["speedup"]["ratio"] > 1 and row["overhead"] > 0 and row["gate"]["passed"]
    assert set(row["detector"]) == {*headline.DETECTOR, "weights"} and set(row["ours"]["stages"]) == set(headline.PARTS)
    for timing in (row["ours"], row["recipe"], row["detector"]["knn"]):
        assert timing["p20"] <= timing["p50"] <= timing["p80"] and timing["n"] >= 3
    for axis in contents["growth"]["rows"]:
        assert len(axis["points"]) == 2 and axis["exponent_ours"] is not None
    kinds = [row["kind"] for row in contents["latency"]["rows"]]
    assert kinds.count("camera") == 2 and kinds.count("throughput") == 2 and "cold start" in kinds
    assert {row["operation"] for row in contents["cpu"]["rows"]} == {
        *("segment", "linear_svm", "knn", "coreset", "peaks", "bilinear")
    }


def test_tables_of_the_screen(results: Path) -> None:
    contents = results_file.load(results)
    assert "passed" in _text(headline.table(contents["headline"]))
    assert "recipe" in _text(headline.stage_table(contents["headline"]))
    assert "exponent" in _text(growth.table(contents["growth"]))
    assert all(_text(one) for one in latency.tables(contents["latency"]))
    assert "paper's recipe" in _text(cpu.table(contents["cpu"]))


# ---------------------------------------------------------------- masks and the paper


def test_the_papers_figures_agree_with_their_own_means() -> None:
    """A figure copied wrongly would move its row's mean away from the printed one."""
    tables = json.loads(binarisers.PAPER.read_text("utf-8"))["tables"]
    assert [table["table"] for table in tables] == [1] * 5 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 5 + [6] * 2
    for table in tables:
        for name, printed in table["metrics"].items():
            each = [value for category, value in printed.items() if category != "mean"]
            assert len(each) == (15 if table["dataset"] == "MVTec AD" else 10)
            assert np.mean(each) == pytest.approx(printed["mean"], abs=1.1e-3), (table["table"], table["part"], name)


def test_the_papers_rows_of_a_category() -> None:
    rows = binarisers.paper_rows("screw")
    ours = next(row for row in rows if (row["table"], row["part"]) == (1, "e"))
    assert (ours["precision"], ours["recall"], ours["f1"]) == (0.086, 0.771, 0.149)
    assert len(rows) == 5 + 3 + 5 + 2
    assert len(binarisers.paper_rows("Cable Gland")) == 6
    assert binarisers.paper_rows("mean") == [] and binarisers.paper_rows("unheard of") == []


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The masks of a small set called screw."""
    from PIL import Image

    from ttt4as_fast.demo import load_texture, make_defects, texture_crops

    root = tmp_path_factory.mktemp("masks") / "screw"
    crops = {"train": texture_crops("brick", "train", 10, 64, 0), "test": texture_crops("brick", "test", 4, 64, 0)}
    defective, truth = make_defects(crops["test"][:2], [load_texture("grass")], size=(0.05, 0.1))
    for folder, images in (("train/good", crops["train"]), ("test/good", crops["test"][2:]), ("test/hole", defective)):
        (root / folder).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / folder / f"{i:03}.png")
    (root / "ground_truth" / "hole").mkdir(parents=True)
    for i, mask in enumerate(truth):
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / "ground_truth" / "hole" / f"{i:03}_mask.png")
    return binarisers.run(root, image_size=64, crop_size=64)


def test_masks_compares_every_method(masks: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in masks["rows"]}
    assert {"thr_1std", "otsu", "ttt4as", "ttt4as_robust", "oracle_image_f1"} <= set(rows)
    assert ("mebin" in rows) == ("anomalib MEBin" not in masks["absent_peers"])
    assert rows["oracle_image_f1"]["f1"] >= max(rows[name]["f1"] for name in ("thr_3std", "max_nominal"))
    assert masks["suite"] == "masks-screw" and len(masks["paper"]) == 15
    shown = [_text(one) for one in binarisers.tables(masks)]
    assert "not measured here" in shown[1] and "0.771" in shown[1]


# ---------------------------------------------------------------- the page


class _Page(HTMLParser):
    """Checks that elements nest, and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables = 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []  # type: ignore[list-item]
        self.links += [str(found[name]) for name in ("href", "src") if name in found]
        self.tables += tag == "table"
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(results: Path, masks: dict[str, Any], tmp_path: Path) -> None:
    contents = results_file.load(results)
    contents["masks-screw"] = results_file.plain(masks)
    contents["<other>"] = {"title": "A <b>title</b>", "rows": [{"name": "<script>", "value": 1.5}]}
    text = report.page(contents)
    page = _Page(text)
    assert len(page.ids) == len(set(page.ids)) and page.tables >= 9
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "&lt;script&gt;" in text and text.count("<script>") == 1 and text.count("<svg") >= 7
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()
    assert "@media print" in text and "prefers-color-scheme: dark" in text


def test_report_and_digest_are_written(results: Path, tmp_path: Path) -> None:
    written = report.write(results, tmp_path / "out")
    assert [path.name for path in written] == ["report.html", "digest.md"]
    digest = written[1].read_text("utf-8")
    assert "96 x 14 x 14 -> 112 x 112" in digest and "| knn |" in digest
    for block in digest.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    with pytest.raises(FileNotFoundError, match="no result files"):
        report.write(tmp_path / "out", tmp_path / "again")


def test_svg_refuses_what_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="positive"):
        svg.log_log("t", "x", "y", [svg.Line("a", [(1, 0.0)], 1)])
    assert svg.short(1536) == "1.54k" and svg.short(0.25) == "0.25"


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


# ---------------------------------------------------------------- the command


def _invoke(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from ttt4as_fast.cli import app

    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="ttt4as", env={"COLUMNS": "120"})


def test_the_command_reports_from_files(results: Path, tmp_path: Path) -> None:
    done = _invoke("--report", tmp_path, "--output", results)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file() and (tmp_path / "digest.md").is_file()


def test_the_command_refuses_wrong_usage(tmp_path: Path) -> None:
    assert _invoke("latency", "--workload", "nonsense").exit_code == 2
    assert _invoke("masks", tmp_path / "nowhere", "--threads", 1).exit_code == 2
    for name in ("cpu", "growth", "latency", "masks", "report"):
        assert "Examples" in _invoke(name, "--help").stdout


def test_the_command_measures_the_headline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(headline._BACKBONES, "tiny", "efficientnet_lite0")
    monkeypatch.setattr(headline, "QUICK", ("tiny",))
    done = _invoke("--quick", "--threads", 1, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert "1 thread(s) for both sides: torch" in done.stdout and "tiny: TTT4AS" in done.stdout
    assert results_file.load(tmp_path)["headline"]["rows"][0]["workload"] == "tiny"


def test_the_command_fails_where_an_output_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(headline._BACKBONES, "tiny", "efficientnet_lite0")
    monkeypatch.setattr(headline, "QUICK", ("tiny",))
    monkeypatch.setattr(gate, "check_segment", lambda *_, **__: gate.Verdict(False, "all of it differs"))
    done = _invoke("--quick", "--threads", 1, "--output", tmp_path)
    assert done.exit_code == 1
    assert "FAILED: all of it differs" in done.stdout
    (row,) = results_file.load(tmp_path)["headline"]["rows"]
    assert row["speedup"] is None and row["overhead"] is None


# ---------------------------------------------------------------- parts


def _about() -> dict[str, Any]:
    return machine.describe({"torch": 1}, 0.0)


def _text(table: Any) -> str:
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(width=220, file=stream).print(table)
    return stream.getvalue()
