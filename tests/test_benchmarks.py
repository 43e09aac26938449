"""The benchmark suite run small: files and pages that say what was measured, where, and what was not."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "ttt4as_fast.benchmarks", reason="this copy was installed without the benchmark suite: reinstall it"
)

from ttt4as_fast import TTT4AS
from ttt4as_fast.benchmarks import (
    cpu,
    digest,
    gate,
    growth,
    headline,
    integrations,
    latency,
    machine,
    measure,
    report,
    results_file,
    suites,
    svg,
    workloads,
)
from ttt4as_fast.benchmarks import masks as masks_suite
from ttt4as_fast.io import plain

ROOT = Path(__file__).resolve().parents[1]
TINY = workloads.Workload("tiny", 96, 14, 112, "nothing")


# ---------------------------------------------------------------- runs on tiny sizes


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
    assert report.page({"cpu": content}).count(">4x<") == 1


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
    sizes_of_hosts = integrations.Plan(
        *(0.05, 0, None, "tiny"),
        samples=(60, 96),
        bank=(300, 152),
        training_images=4,
        batch=2,
        side=96,
        clients=2,
        requests=4,
    )
    results_file.save(integrations.run(sizes_of_hosts, 1, progress=watched), folder)
    patch.undo()
    assert steps[-1][1] == steps[-1][2]
    return folder


def test_runners_leave_what_was_measured_where(results: Path) -> None:
    contents = results_file.load(results)
    assert set(contents) == {"headline", "cpu", "growth", "latency", "integrations"}
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
        *("segment", "segment_robust", "linear_svm", "knn", "coreset", "peaks", "bilinear")
    }


def test_every_host_is_measured_or_named(results: Path) -> None:
    content = results_file.load(results)["integrations"]
    measured = {row["host"] for row in content["rows"]}
    assert measured | set(content["absent_peers"]) == {host.name for host in integrations.HOSTS}
    assert {"scikit-learn", "PyTorch"} <= measured and not measured & set(content["absent_peers"])
    for row in content["rows"]:
        assert row["speedup"]["ratio"] > 0 and row["gate"]["passed"] and row["stock"] != row["switched"]
    with pytest.raises(ValueError, match="hosts: expected a pattern that matches one of anomalib"):
        integrations.run(pattern="nonsense")


def test_masks_of_a_host_are_held_to_the_reference() -> None:
    scene = workloads.scene(TINY, 2, seed=3)
    masks = TTT4AS()(scene.anomaly_map, scene.features).pred_mask
    assert integrations.check_masks(scene.anomaly_map, scene.features, masks)
    masks[1, 0, 0] ^= True
    refused = integrations.check_masks(scene.anomaly_map, scene.features, masks)
    assert not refused and refused.detail == "1 pixels differ"


def test_a_suite_is_kept_while_nothing_changed(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = results_file.load(results)["headline"]
    path = results_file.save({**content, "commit": "0123456789ab"}, tmp_path)
    monkeypatch.setattr(machine, "unchanged_since", lambda commit: commit == "0123456789ab")
    assert suites.is_current(path, 1) and not suites.is_current(path, 2)
    assert not suites.is_current(tmp_path / "cpu.json", 1)
    (row,) = content["rows"]
    failed = {**row, "gate": {**row["gate"], "passed": False}}
    for change in ({"commit": "0123456789ab+"}, {"commit": None}, {"commit": "ba9876543210"}, {"rows": [failed]}):
        assert not suites.is_current(results_file.save({**content, "commit": "0123456789ab", **change}, tmp_path), 1)
    path.write_text("{", "utf-8")
    assert not suites.is_current(path, 1)


def test_all_suites_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are real ones; this one is cheap and writes no result."""
    monkeypatch.setattr(suites.Suite, "command", property(lambda suite: ("cpu", "--help")))
    said: list[str] = []
    found = suites.run(suites.chosen("head|cpu"), tmp_path, 1, say=said.append)
    assert [(outcome.suite.name, outcome.status) for outcome in found] == [
        ("headline", "measured"),
        ("cpu", "measured"),
    ]
    assert said[0].startswith("headline: what test-time training adds") and said[-1].startswith("cpu: measured")
    assert sum(suite.minutes for suite in suites.SUITES) <= 35


def test_tables_of_the_screen(results: Path) -> None:
    contents = results_file.load(results)
    assert "passed" in _text(headline.table(contents["headline"]))
    assert "recipe" in _text(headline.stage_table(contents["headline"]))
    assert "exponent" in _text(growth.table(contents["growth"]))
    assert all(_text(one) for one in latency.tables(contents["latency"]))
    assert "paper's recipe" in _text(cpu.table(contents["cpu"]))
    assert "ttt.LinearSVC" in _text(integrations.table(contents["integrations"]))


# ---------------------------------------------------------------- masks and the paper


def test_the_papers_figures_agree_with_their_own_means() -> None:
    """A figure copied wrongly would move its row's mean away from the printed one."""
    tables = json.loads(masks_suite.PAPER.read_text("utf-8"))["tables"]
    assert [table["table"] for table in tables] == [1] * 5 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 5 + [6] * 2
    for table in tables:
        for name, printed in table["metrics"].items():
            each = [value for category, value in printed.items() if category != "mean"]
            assert len(each) == (15 if table["dataset"] == "MVTec AD" else 10)
            assert np.mean(each) == pytest.approx(printed["mean"], abs=1.1e-3), (table["table"], table["part"], name)


def test_the_papers_rows_of_a_category() -> None:
    rows = masks_suite.paper_rows("screw")
    ours = next(row for row in rows if (row["table"], row["part"]) == (1, "e"))
    assert (ours["precision"], ours["recall"], ours["f1"]) == (0.086, 0.771, 0.149)
    assert len(rows) == 5 + 3 + 5 + 2
    assert len(masks_suite.paper_rows("Cable Gland")) == 6
    assert masks_suite.paper_rows("mean") == [] and masks_suite.paper_rows("unheard of") == []


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
    return masks_suite.run(root, image_size=64, crop_size=64)


def test_masks_compares_every_method(masks: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in masks["rows"]}
    assert {"thr_1std", "otsu", "ttt4as", "ttt4as_robust", "oracle_image_f1"} <= set(rows)
    assert ("mebin" in rows) == ("anomalib MEBin" not in masks["absent_peers"])
    assert rows["oracle_image_f1"]["f1"] >= max(rows[name]["f1"] for name in ("thr_3std", "max_nominal"))
    assert masks["suite"] == "masks-screw" and len(masks["paper"]) == 15
    shown = [_text(one) for one in masks_suite.tables(masks)]
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
    contents["masks-screw"] = plain(masks)
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
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nstale numbers\n<!-- bench:end -->\nafter\n", "utf-8")
    written = report.write(results, tmp_path / "out", readme)
    assert [path.name for path in written] == ["report.html", "digest.md", "README.md"]
    text = readme.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale numbers" not in text
    assert digest.block_of(text).strip() == written[1].read_text("utf-8").strip()
    assert len(report.write(results, tmp_path / "out", readme)) == 2  # nothing to change
    readme.write_text("no marks", "utf-8")
    with pytest.raises(ValueError, match="readme: expected one <!-- bench:begin -->"):
        report.write(results, tmp_path / "out", readme)
    digest_text = written[1].read_text("utf-8")
    assert "96 x 14 x 14 -> 112 x 112" in digest_text and "| knn |" in digest_text
    for block in digest_text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    with pytest.raises(FileNotFoundError, match="no result files"):
        report.write(tmp_path / "out", tmp_path / "again")


def test_the_readme_says_what_the_committed_results_say() -> None:
    readme = ROOT / "README.md"
    committed = report.load(ROOT / "benchmarks" / "results")
    assert digest.block_of(readme.read_text("utf-8")) == f"\n{digest.digest(committed)}", (
        "ttt4as bench --report DIR --output benchmarks/results --readme README.md"
    )


def test_the_readme_opens_with_the_committed_figures() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").partition("## ")[0].split())
    results = ROOT / "benchmarks" / "results"
    rows = json.loads((results / "headline.json").read_text("utf-8"))["rows"]
    for numbers, digits, unit in (
        ([row["recipe"]["p50"] for row in rows], 0, "ms"),
        ([row["ours"]["p50"] for row in rows], 2, "ms"),
        ([row["speedup"]["ratio"] for row in rows], 0, "times less"),
    ):
        assert f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f} {unit}" in text
    f1 = {}
    for name in ("screw", "magnetic_tile"):
        table = csv.DictReader((results / f"{name}.csv").read_text("utf-8").splitlines())
        f1[name] = {row["method"]: f"{float(row['f1']):.3f}" for row in table if row["kind"] == "all"}
        against = f"{f1[name]['ttt4as_ungated']} against {f1[name]['thr_3std']} on {name.replace('_', ' ')}s"
        assert against in text
    assert f"with it F1 is {f1['screw']['ttt4as']} and {f1['magnetic_tile']['ttt4as']}" in text


def test_a_browser_finds_nothing_wrong(results: Path, masks: dict[str, Any], tmp_path: Path) -> None:
    """Needs node, Chromium, and playwright-core and axe-core where NODE_PATH says."""
    node, chromium = shutil.which("node"), shutil.which("chromium") or shutil.which("chromium-browser")
    modules = Path(os.environ.get("NODE_PATH", "nowhere"))
    absent = [name for name in ("playwright-core", "axe-core") if not (modules / name).is_dir()]
    if node is None or chromium is None or absent:
        pytest.skip(f"no browser to judge the page: node {node}, chromium {chromium}, not in NODE_PATH: {absent}")
    contents = {**results_file.load(results), "masks-screw": plain(masks)}
    text = report.page(contents)
    pages = {
        "good": text,
        "bad": text.replace("--ink: #1b1f24", "--ink: #b0b0b0").replace("--c1: #0b61c4", "--c1: #eee"),
    }
    found = {}
    for name, content in pages.items():
        (tmp_path / f"{name}.html").write_text(content, "utf-8")
        command = [
            node,
            str(ROOT / "tests" / "report_page.mjs"),
            str(tmp_path / f"{name}.html"),
            str(tmp_path),
            chromium,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        found[name] = json.loads(done.stdout)
    assert found["good"] == []
    assert any("color-contrast" in line for line in found["bad"])
    assert any("text.null" in line for line in found["bad"]) and any("part c1" in line for line in found["bad"])


def test_svg_refuses_what_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="positive"):
        svg.log_log("t", "x", "y", [svg.Line("a", [(1, 0.0)], 1)])
    assert svg.short(1536) == "1.54k" and svg.short(0.25) == "0.25"


# ---------------------------------------------------------------- the command


def _invoke(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from ttt4as_fast.cli import app

    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="ttt4as", env={"COLUMNS": "120"})


def test_the_command_reports_from_files(results: Path, tmp_path: Path) -> None:
    done = _invoke("--report", tmp_path, "--output", results)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file() and (tmp_path / "digest.md").is_file()
    assert str(results) in done.stdout


def test_the_command_reports_of_no_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = _invoke("--report", tmp_path / "report", "--output", tmp_path / "empty")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: output: no result files in ")
    assert not (tmp_path / "report").exists()


def test_the_command_refuses_wrong_usage(tmp_path: Path) -> None:
    assert _invoke("latency", "--workload", "nonsense").exit_code == 2
    assert _invoke("masks", tmp_path / "nowhere", "--threads", 1).exit_code == 2
    assert _invoke("--quick", "--readme", tmp_path / "README.md").exit_code == 2
    assert _invoke("all", "--suites", "nonsense").exit_code == 2
    before = _invoke("--threads", 1, "latency", "--workload", "nonsense")
    assert before.exit_code == 2 and before.stderr == "error: threads: expected after 'latency', got before it\n"
    for name in ("all", "cpu", "growth", "latency", "integrations", "masks"):
        assert "Examples" in _invoke(name, "--help").stdout


@pytest.mark.parametrize("name", ["", "all", "cpu", "growth", "latency", "integrations", "masks"])
def test_a_folder_that_cannot_be_written_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def pin(threads: int) -> dict[str, int]:
        raise AssertionError("it began to measure")

    monkeypatch.setattr(machine, "pin", pin)
    (tmp_path / "file").write_text("")
    words = [name] * bool(name) + [tmp_path] * (name == "masks")
    done = _invoke(*words, "--output", tmp_path / "file" / "below")
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith("error: output: expected a folder to write to")


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
    return machine.describe({"torch": 1}, machine.Watch())


def _text(table: Any) -> str:
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(width=220, file=stream).print(table)
    return stream.getvalue()
