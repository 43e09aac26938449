"""`ttt4as predict`: bad files, runs that stop and go on, what has changed since, disks and names."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .command import Run, command, environment, one_line, records, spoiled, tree, ttt4as

GOOD = ("bad ü.png", "good.png", "grey.png", "large.jpg", "rgba.png")


def test_predict_does_the_rest_and_names_the_bad_file(predicted: Run) -> None:
    output, done = predicted
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 2, done.stderr
    assert re.match(r"skipped: .*truncated\.png: .*", lines[0])
    assert re.match(r"skipped: .*link\.png: a link to no file", lines[1])
    assert [Path(record["path"]).name for record in records(output)] == [*GOOD, "good.png"]
    assert "6 done, 0 done earlier, 2 failed" in done.stdout


def test_predict_writes_files_in_the_size_of_the_image(
    predicted: Run,
) -> None:
    output, _ = predicted
    for record in records(output):
        with Image.open(record["path"]) as image:
            size = image.size
        assert (record["width"], record["height"]) == size
        with Image.open(output / record["files"]["mask"]) as image:
            assert image.size == size
            mask = np.asarray(image)
        with Image.open(output / record["files"]["map"]) as image:
            assert image.mode == "F"
            psi = np.asarray(image)
        with Image.open(output / record["files"]["overlay"]) as image:
            assert image.size == size
            assert image.mode == "RGB"
        assert set(np.unique(mask)) <= {0, 255}
        assert record["mask_area"] == (mask > 0).sum() == sum(region["area"] for region in record["regions"])
        assert record["mask_share"] == pytest.approx(record["mask_area"] / mask.size)
        assert not (mask[np.isnan(psi)] > 0).any()
        # 80 of 96 pixels are seen along each side.
        assert np.isfinite(psi).mean() == pytest.approx((80 / 96) ** 2, abs=0.02)
        assert all(spent >= 0 for spent in record["milliseconds"].values())
        assert {"decode", "backbone", "knn", "map", "ttt4as", "write"} <= set(record["milliseconds"])


def test_predict_finds_the_defects(predicted: Run) -> None:
    found = {(Path(r["path"]).parent.name, Path(r["path"]).name): r for r in records(predicted[0])}
    nominal = found["one", "good.png"]
    assert (nominal["label"], nominal["status"], nominal["mask_area"], nominal["regions"]) == (
        "nominal",
        "nominal",
        0,
        [],
    )
    for name in ("bad ü.png", "grey.png", "rgba.png"):
        record = found["one", name]
        assert record["label"] == "defective"
        assert record["score"] > 1.2 * nominal["score"]
        with Image.open(predicted[0] / record["files"]["mask"]) as image:
            mask = np.asarray(image) > 0
        truth = np.zeros_like(mask)
        truth[40:60, 30:56] = True
        assert (mask & truth).sum() > 0.3 * truth.sum()
        assert (mask & ~truth).sum() < 0.5 * mask.sum()
        peak = record["regions"][0]
        assert 30 <= peak["peak_x"] < 56
        assert 40 <= peak["peak_y"] < 60


def test_predict_tells_images_of_the_same_name_apart(predicted: Run) -> None:
    same = [record for record in records(predicted[0]) if Path(record["path"]).name == "good.png"]
    assert len(same) == 2
    assert not set(same[0]["files"].values()) & set(same[1]["files"].values())
    assert [record["label"] for record in same] == ["nominal", "defective"]


def test_predict_agrees_with_the_library(work: Path, predicted: Run) -> None:
    from ttt4as_fast import TTT4AS, PatchCore

    model = PatchCore.load(work / "m.safetensors")
    by_name = {Path(record["path"]).name: record for record in records(predicted[0])}
    path = work / "one" / "bad ü.png"
    out = model.predict([path])
    assert by_name["bad ü.png"]["score"] == pytest.approx(float(out.pred_score[0]), rel=1e-4)
    mask = TTT4AS(image_threshold=model.image_threshold_)(out.anomaly_map, out.features, out.pred_score).pred_mask[0]
    with Image.open(predicted[0] / by_name["bad ü.png"]["files"]["mask"]) as image:
        placed = np.asarray(image) > 0
    assert (placed[8:88, 8:88] != mask).mean() < 0.002  # batches round differently: a pixel on the edge may flip


def test_predict_a_second_time_does_nothing_but_retry(work: Path, predicted: Run) -> None:
    output, _ = predicted
    before = {name: time for name, time in tree(output).items() if name != "run.json"}
    done = ttt4as("predict", work / "m.safetensors", work / "one", work / "two [b]", "-o", output, code=1)
    assert "0 done, 6 done earlier, 2 failed" in done.stdout
    assert {name: time for name, time in tree(output).items() if name != "run.json"} == before


def test_predict_does_again_what_changed(work: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(work / "one" / "good.png", tmp_path / f"{name}.png")
    arguments = ("predict", work / "m.safetensors", tmp_path, "-o", tmp_path / "o")
    assert "2 done" in ttt4as(*arguments).stdout
    Image.fromarray(spoiled(101)).save(tmp_path / "a.png")
    assert "1 done, 1 done earlier" in ttt4as(*arguments).stdout
    assert {record["name"]: record["label"] for record in records(tmp_path / "o")} == {"a": "defective", "b": "nominal"}


def test_predict_refuses_to_mix_settings(work: Path, predicted: Run) -> None:
    output, _ = predicted
    before = tree(output)
    done = ttt4as("predict", work / "m.safetensors", work / "one", "-o", output, "--percentile", 98, code=2)
    assert "other settings" in one_line(done)
    assert tree(output) == before


def test_predict_overwrites_when_told(work: Path, tmp_path: Path) -> None:
    one, model = work / "one" / "grey.png", work / "m.safetensors"
    ttt4as("predict", model, one, "-o", tmp_path / "o")
    first = (tmp_path / "o" / "masks" / "grey.png").read_bytes()
    ttt4as(
        "predict",
        model,
        one,
        "-o",
        tmp_path / "o",
        "--overwrite",
        "--no-gate",
        "--neighbor-radius",
        12,
        "--no-overlays",
    )
    (record,) = records(tmp_path / "o")
    assert "overlay" not in record["files"]
    assert not list((tmp_path / "o" / "overlays").iterdir())
    assert (tmp_path / "o" / "masks" / "grey.png").read_bytes() != first


def test_predict_stops_and_goes_on(work: Path, tmp_path: Path) -> None:
    """Killed outright after the first results, the run leaves whole files; the second does the rest, once."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(60):
        Image.fromarray(spoiled(200 + i)).save(many / f"{i}.png")
    arguments = ("predict", work / "m.safetensors", many, "-o", tmp_path / "out", "--batch-size", 1)
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = tmp_path / "out" / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = lines.read_bytes().count(b"\n")
    assert 3 <= n_before < 60
    before = {name: time for name, time in tree(tmp_path / "out" / "masks").items() if not name.startswith(".")}
    done = ttt4as(*arguments)
    assert f"{60 - n_before} done, {n_before} done earlier, 0 failed" in done.stdout
    found = records(tmp_path / "out")
    assert len({record["path"] for record in found}) == len(found) == 60
    after = tree(tmp_path / "out" / "masks")
    assert len(after) == 60  # no temporary files
    for record in found[:n_before]:
        name = Path(record["files"]["mask"]).name
        assert after[name] == before[name]
    for path in sorted((tmp_path / "out").rglob("*.png")):
        with Image.open(path) as image:
            image.load()


def test_predict_says_what_is_wrong(work: Path, tmp_path: Path) -> None:
    model, image = work / "m.safetensors", work / "one" / "grey.png"
    data = model.read_bytes()
    broken, other, empty = tmp_path / "broken.safetensors", tmp_path / "other.safetensors", tmp_path / "empty"
    broken.write_bytes(data[: len(data) // 2])
    other.write_bytes(b"this is no model" * 10)
    empty.mkdir()
    (tmp_path / "file").write_text("x")
    cases = [
        ((broken, image, "-o", tmp_path / "o"), "broken.safetensors"),
        ((other, image, "-o", tmp_path / "o"), "other.safetensors"),
        ((tmp_path / "absent", image, "-o", tmp_path / "o"), "does not exist"),
        ((empty, image, "-o", tmp_path / "o"), "is a folder, not a file from ttt4as fit"),
        ((model, empty, "-o", tmp_path / "o"), "empty"),
        ((model, tmp_path / "nothing.png", "-o", tmp_path / "o"), "nothing.png"),
        ((model, image, "-o", tmp_path / "file"), "file"),
        ((model, image, "-o", tmp_path / "file" / "below"), "output: expected a folder to write to"),
        ((model, image, "-o", tmp_path / "o", "--percentile", "-3"), "percentile"),
        ((model, image, "-o", tmp_path / "o", "--svm-c", "-1"), "C"),
        ((model, image, "-o", tmp_path / "o", "--image-threshold", "nan"), "image_threshold: expected a number"),
        ((model, image, "-o", tmp_path / "o", "--no-gate", "--image-threshold", "nan"), "image_threshold: expected"),
        ((model, image, "-o", tmp_path / "o", "--backend", "abacus"), "abacus"),
        ((model, image, "-o", tmp_path / "o", "--device", "toaster"), "toaster"),
    ]
    for arguments, word in cases:
        assert word in ttt4as("predict", *arguments, code=2).stderr, arguments
    assert not (tmp_path / "o" / "results.jsonl").exists()


def test_predict_skips_a_named_image_that_it_may_not_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, image, openly = tmp_path / "locked.png", work / "one" / "grey.png", Image.open
    shutil.copy(image, locked)

    def refuse(path: object, *more: object) -> Image.Image:  # as the system does to all but root, who runs many tests
        if Path(str(path)) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return openly(path, *more)

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(os.fsdecode(path)) != locked)
    done = ttt4as("predict", work / "m.safetensors", locked, image, "-o", tmp_path / "o", code=1)
    assert re.search(r"skipped: .*locked\.png: .*Permission denied", done.stderr)
    assert "1 done, 0 done earlier, 1 failed" in done.stdout


def test_predict_takes_names_that_are_not_utf8(work: Path, tmp_path: Path) -> None:
    for raw in (b"bad\xff.png", b"other.png"):
        shutil.copy(work / "one" / "grey.png", tmp_path / os.fsdecode(raw))
    done = ttt4as("predict", work / "m.safetensors", tmp_path, "-o", tmp_path / "o", "--json")
    found = records(tmp_path / "o")
    assert [os.fsencode(Path(record["path"]).name) for record in found] == [b"bad\xff.png", b"other.png"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == found
    assert all((tmp_path / "o" / name).is_file() for record in found for name in record["files"].values())
    done = ttt4as("predict", work / "m.safetensors", tmp_path, "-o", tmp_path / "o")
    assert "0 done, 2 done earlier" in done.stdout


def test_predict_ends_well_where_stdout_cannot_show_a_name(work: Path, tmp_path: Path) -> None:
    arguments = command("predict", work / "m.safetensors", work / "one" / "grey.png", "-o", tmp_path / "出力")
    done = subprocess.run(arguments, env=environment(PYTHONIOENCODING="latin-1"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"1 done" in done.stdout and rb"\u51fa\u529b" in done.stdout


def test_predict_takes_the_file_that_a_path_through_a_link_leads_to(work: Path, tmp_path: Path) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    for folder, image in ((tmp_path / "far", "bad ü.png"), (tmp_path, "grey.png")):
        shutil.copy(work / "one" / image, folder / "a.png")
    ttt4as("predict", work / "m.safetensors", tmp_path / "link" / ".." / "a.png", "-o", tmp_path / "o")
    assert [record["path"] for record in records(tmp_path / "o")] == [str((tmp_path / "far" / "a.png").resolve())]


def test_predict_on_a_full_disk_names_file_and_cause(work: Path, tmp_path: Path, full_disk: None) -> None:
    output = tmp_path / "o"
    line = one_line(ttt4as("predict", work / "m.safetensors", work / "one" / "grey.png", "-o", output, code=2))
    assert "File too large" in line and str(output / "maps" / "grey.tiff") in line


def test_predict_leaves_out_a_result_that_cannot_be_encoded(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttt4as_fast import runs

    def write_map(path: Path, anomaly_map: np.ndarray) -> None:
        if path.stem == "grey":
            raise ValueError("no such colour")

    monkeypatch.setattr(runs, "write_map", write_map)
    images = (work / "one" / "grey.png", work / "one" / "rgba.png")
    done = ttt4as("predict", work / "m.safetensors", *images, "-o", tmp_path / "o", code=1)
    assert re.search(r"skipped: .*grey\.png: .*no such colour", done.stderr)
    assert "1 done, 0 done earlier, 1 failed" in done.stdout
