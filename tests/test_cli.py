"""The command line as its users meet it: exit codes, one-line errors, files on disk, runs that stop and go on."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

COMMANDS = ("demo", "fit", "predict", "evaluate", "segment", "serve", "info", "bench")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TTT4AS_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **more}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ttt4as_fast", *map(str, arguments)]


@dataclass
class Done:
    """How an invocation ended."""

    stdout: str
    stderr: str


def ttt4as(*arguments: object, code: int = 0, **environ: str) -> Done:
    """Run the command in this process and check its exit code; an exception that reaches the top fails the test."""
    from ttt4as_fast.cli import app

    with warnings.catch_warnings():  # the command replaces warnings.showwarning
        result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="ttt4as", env={"COLUMNS": "120", **environ})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stdout + result.stderr
    return Done(result.stdout, result.stderr)


Run = tuple[Path, Done]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text("utf-8").splitlines()]


def tree(folder: Path) -> dict[str, int]:
    """Files below a folder with their times of change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- help, versions, wrong usage


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    text = ttt4as(name, "--help").stdout
    assert "Examples" in text
    assert f"ttt4as {name}" in text
    assert len(text.splitlines()) > 8


def test_help_shows_brackets_as_they_are() -> None:
    assert "pip install 'ttt4as_fast[serve]'" in " ".join(ttt4as("serve", "--help").stdout.split())


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys\ntry:\n    from ttt4as_fast.cli import main; sys.argv = ['ttt4as', '--help']; main()\n"
    code += "except SystemExit: pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert all(name in done.stdout for name in COMMANDS)
    assert not loaded & {"torch", "timm", "numba", "scipy", "sklearn", "skimage", "matplotlib", "cupy"}


def test_version() -> None:
    from ttt4as_fast import __version__

    assert ttt4as("--version").stdout.strip() == f"ttt4as {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--texture", "wood"],
        ["demo", "--seed", "-1"],
        ["fit"],
        ["predict", "m"],
        ["fit", ".", "--model", "m", "--validation-share", "1.5"],
        ["segment", "a", "b", "--output", "o", "--loss", "cubic"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ttt4as(*arguments, code=2).stderr.strip()
    assert not list(tmp_path.iterdir())


def one_line(done: Done) -> str:
    """The only line on stderr, which starts with ``error:``."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_info_names_every_operation_and_variable() -> None:
    found = json.loads(ttt4as("info", "--json", TTT4AS_BACKEND="reference").stdout)
    assert {"bilinear", "knn", "coreset", "peaks", "linear_svm", "segment"} <= set(found["backends"]["cpu"])
    assert all(backends["reference"] is None for backends in found["backends"]["cpu"].values())
    assert "gpu" in found["backends"]["cuda"]["knn"]  # and why not
    assert found["environment"]["TTT4AS_BACKEND"]["value"] == "reference"
    assert found["versions"]["torch"]
    text = ttt4as("info").stdout
    for word in ("linear_svm", "TTT4AS_NUM_THREADS", "usable", found["versions"]["torch"]):
        assert word in text


# ---------------------------------------------------------------- segment


def arrays(folder: Path, n: int | None = None, seed: int = 0) -> tuple[Path, Path]:
    rng = np.random.default_rng(seed)
    psi = 0.1 * rng.random((n or 1, 48, 56), dtype=np.float32)
    deep = rng.normal(size=(n or 1, 12, 12, 14)).astype(np.float32)
    psi[:, 20:26, 30:38] += 1
    deep[:, :3, 5:7, 7:10] += 4
    folder.mkdir(exist_ok=True)
    np.save(folder / "maps.npy", psi if n else psi[0])
    np.save(folder / "features.npy", deep if n else deep[0])
    return folder / "maps.npy", folder / "features.npy"


def test_segment_is_the_method(tmp_path: Path) -> None:
    from ttt4as_fast import TTT4AS

    maps, features = arrays(tmp_path / "in")
    ttt4as("segment", maps, features, "-o", tmp_path / "out", "--percentile", 98, "--n-nominal", 64, "-C", 0.01)
    (record,) = records(tmp_path / "out")
    mask = np.load(tmp_path / "out" / record["files"]["array"])
    expected = TTT4AS(percentile=98, n_nominal=64, C=0.01)(np.load(maps), np.load(features))
    np.testing.assert_array_equal(mask, expected.pred_mask)
    assert mask.any()
    with Image.open(tmp_path / "out" / record["files"]["mask"]) as image:
        np.testing.assert_array_equal(np.asarray(image), mask * np.uint8(255))
    assert record["status"] == expected.status == "ok"
    assert record["mask_area"] == mask.sum() == sum(region["area"] for region in record["regions"])


def test_segment_robust(tmp_path: Path) -> None:
    from ttt4as_fast import TTT4AS

    maps, features = arrays(tmp_path / "in")
    ttt4as("segment", maps, features, "-o", tmp_path / "out", "--preset", "robust", "-C", 0.01)
    (record,) = records(tmp_path / "out")
    expected = TTT4AS(preset="robust", C=0.01)(np.load(maps), np.load(features))
    np.testing.assert_array_equal(np.load(tmp_path / "out" / record["files"]["array"]), expected.pred_mask)
    done = ttt4as("segment", maps, features, "-o", tmp_path / "b", "--preset", "robust", "--percentile", 90, code=2)
    assert "percentile" in done.stderr


def test_the_robust_preset_takes_the_nominal_level_of_the_model() -> None:
    from types import SimpleNamespace

    from ttt4as_fast import TTT4AS, cli

    paper = TTT4AS().get_params()
    params = {option: paper[argument] for option, argument in cli._METHOD_OPTIONS.items()}
    detector = SimpleNamespace(nominal_statistics_=SimpleNamespace(level=3.5))
    for preset, level in (("paper", None), ("robust", 3.5)):
        context = SimpleNamespace(params={**params, "preset": preset})
        assert cli._segmenter(context, None, detector).get_params().get("nominal_level") == level
    assert cli._segmenter(SimpleNamespace(params={**params, "preset": "robust"}), None).options.nominal_level is None


def test_segment_batches_npz_and_gates(tmp_path: Path) -> None:
    maps, features = arrays(tmp_path / "in", 3)
    psi = np.load(maps)
    psi[1] *= 0.2
    np.savez(tmp_path / "both.npz", anomaly_map=psi, features=np.load(features), other=np.zeros(1))
    both = tmp_path / "both.npz"
    done = ttt4as("segment", both, both, "-o", tmp_path / "out", "--image-threshold", 0.9, "--json")
    found = records(tmp_path / "out")
    assert [json.loads(line) for line in done.stdout.splitlines()] == found
    assert [record["status"] for record in found] == ["ok", "nominal", "ok"]
    assert found[1]["mask_area"] == 0
    assert [record["name"] for record in found] == ["both_0000", "both_0001", "both_0002"]


def test_segment_folders_report_what_is_wrong_and_do_the_rest(tmp_path: Path) -> None:
    for name in ("maps", "features"):
        (tmp_path / name).mkdir()
    for i in range(3):
        maps, features = arrays(tmp_path / "in", seed=i)
        shutil.copy(maps, tmp_path / "maps" / f"{i}.npy")
        shutil.copy(features, tmp_path / "features" / f"{i}.npy")
    (tmp_path / "maps" / "1.npy").write_bytes((tmp_path / "maps" / "1.npy").read_bytes()[:200])
    np.save(tmp_path / "maps" / "lonely.npy", np.zeros((4, 4)))
    np.save(tmp_path / "maps" / "3.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "features" / "3.npy", np.zeros((4, 4, 4)))
    done = ttt4as("segment", tmp_path / "maps", tmp_path / "features", "-o", tmp_path / "out", code=1)
    assert [record["name"] for record in records(tmp_path / "out")] == ["0", "2"]
    for word in ("1.npy", "lonely.npy", "3.npy"):
        assert re.search(f"skipped: .*{re.escape(word)}", done.stderr), done.stderr


def test_segment_counts_files_without_their_other_half(tmp_path: Path) -> None:
    for name in ("maps", "features"):
        (tmp_path / name).mkdir()
    maps, features = arrays(tmp_path / "in")
    for copy in ("maps/a.npy", "maps/b.npy"):
        shutil.copy(maps, tmp_path / copy)
    for copy in ("features/a.npy", "features/c.npy"):
        shutil.copy(features, tmp_path / copy)
    done = ttt4as("segment", tmp_path / "maps", tmp_path / "features", "-o", tmp_path / "o", code=1)
    assert "1 done, 0 done earlier, 2 failed" in done.stdout
    for name in ("maps/b.npy", "features/c.npy"):
        assert f"skipped: {tmp_path / name}: no file of the same name in the other folder" in done.stderr


def test_segment_does_again_what_changed(tmp_path: Path) -> None:
    maps, features = arrays(tmp_path / "in")
    other = tmp_path / "other.npy"
    shutil.copy(features, other)

    def run(path: Path) -> str:
        return ttt4as("segment", maps, path, "-o", tmp_path / "o").stdout

    assert "1 done, 0 done earlier" in run(features)
    assert "0 done, 1 done earlier" in run(features)
    np.save(features, -np.load(features))
    assert "1 done, 0 done earlier" in run(features)
    assert "1 done, 0 done earlier" in run(other)
    assert "0 done, 1 done earlier" in run(other)
    assert len(records(tmp_path / "o")) == 1


@pytest.mark.parametrize("case", ["absent", "mixed", "text", "objects", "shapes", "names"])
def test_segment_names_what_it_cannot_take(tmp_path: Path, case: str) -> None:
    maps, features = arrays(tmp_path / "in")
    if case == "absent":
        maps = tmp_path / "no such.npy"
    if case == "mixed":
        maps = maps.parent
    if case == "text":
        maps.write_text("hello")
    if case == "objects":
        np.save(maps, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    if case == "shapes":
        np.save(features, np.zeros((3, 4)))
    if case == "names":
        maps = tmp_path / "x.npz"
        np.savez(maps, a=np.zeros((4, 4)), b=np.zeros((4, 4)))
    code = 2 if case in ("absent", "mixed") else 1
    done = ttt4as("segment", maps, features, "-o", tmp_path / "out", code=code)
    assert maps.name in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- fit and predict


def texture(seed: int, side: int = 96) -> np.ndarray:
    """A grainy stripe pattern: the nominal look of these tests."""
    rng = np.random.default_rng(seed)
    stripes = 110 + 50 * np.sin((np.arange(side) + rng.integers(12)) * 2 * np.pi / 12)
    picture = stripes[None, :, None] + rng.normal(0, 6, (side, side, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def spoiled(seed: int, side: int = 96) -> np.ndarray:
    picture = texture(seed, side)
    picture[40:60, 30:56] = np.random.default_rng(seed).integers(0, 255, (20, 26, 3), dtype=np.uint8)
    return picture


def labelled(work: Path, dataset: Path, n: int) -> Path:
    """A data set with `n` test images of each kind."""
    shutil.copytree(work / "train", dataset / "train")
    truth = np.zeros((96, 96), np.uint8)
    truth[40:60, 30:56] = 255
    for kind in ("test/good", "test/noise", "ground_truth/noise"):
        (dataset / kind).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(texture(300 + i)).save(dataset / "test/good" / f"{i:03d}.png")
        Image.fromarray(spoiled(310 + i)).save(dataset / "test/noise" / f"{i:03d}.png")
        Image.fromarray(truth).save(dataset / "ground_truth/noise" / f"{i:03d}_mask.png")
    return dataset


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, a model fitted on them through the command, and test images of every kind."""
    folder = tmp_path_factory.mktemp("cli work") / "größe 1"
    for name in ("train/good", "one", "two [b]"):
        (folder / name).mkdir(parents=True)
    for i in range(16):
        Image.fromarray(texture(i)).save(folder / "train/good" / f"{i}.png")
    Image.fromarray(texture(100)).save(folder / "one" / "good.png")
    Image.fromarray(spoiled(101)).save(folder / "one" / "bad ü.png")
    Image.fromarray(spoiled(102)[..., 0]).save(folder / "one" / "grey.png")
    Image.fromarray(np.dstack([spoiled(103), np.full((96, 96), 255, np.uint8)])).save(folder / "one" / "rgba.png")
    Image.fromarray(spoiled(104)[:, :80]).resize((250, 301)).save(folder / "one" / "large.jpg", quality=95)
    Image.fromarray(spoiled(105)).save(folder / "two [b]" / "good.png")
    whole = (folder / "one" / "good.png").read_bytes()
    (folder / "one" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "one" / "notes.txt").write_text("no image")
    done = ttt4as(
        "fit", folder, "--model", folder / "m.safetensors", "--image-size", 96, "--crop-size", 80, "--seed", 3
    )
    assert "13 images to train on, 3 to validate, 0 skipped" in done.stdout
    return folder


GOOD = ("bad ü.png", "good.png", "grey.png", "large.jpg", "rgba.png")


@pytest.fixture(scope="module")
def predicted(work: Path) -> Run:
    done = ttt4as("predict", work / "m.safetensors", work / "one", work / "two [b]", "-o", work / "out", code=1)
    return work / "out", done


def test_predict_does_the_rest_and_names_the_bad_file(predicted: Run) -> None:
    output, done = predicted
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert re.match(r"skipped: .*truncated\.png: .*", lines[0])
    assert [Path(record["path"]).name for record in records(output)] == [*GOOD, "good.png"]
    assert "6 done, 0 done earlier, 1 failed" in done.stdout


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
    assert "0 done, 6 done earlier, 1 failed" in done.stdout
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
        ((model, image, "-o", tmp_path / "file" / "below"), "file"),
        ((model, image, "-o", tmp_path / "o", "--percentile", "-3"), "percentile"),
        ((model, image, "-o", tmp_path / "o", "--svm-c", "-1"), "C"),
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


def test_debug_shows_the_traceback(work: Path) -> None:
    wrong = ("predict", work / "absent", work / "one", "-o", work / "never")
    for arguments, more in ((("--debug", *wrong), {}), (wrong, {"TTT4AS_DEBUG": "1"})):
        done = subprocess.run(
            command(*arguments), cwd="/", env=environment(**more), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr


@pytest.mark.parametrize("off", ["0", ""])
def test_debug_can_be_off(tmp_path: Path, off: str) -> None:
    one_line(ttt4as("predict", tmp_path / "absent", tmp_path, "-o", tmp_path / "never", code=2, TTT4AS_DEBUG=off))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output(work: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    image = work / "one" / "grey.png"
    assert "locked" in one_line(
        ttt4as("predict", work / "m.safetensors", image, "-o", tmp_path / "locked" / "o", code=2)
    )
    assert "locked" in one_line(ttt4as("fit", work, "-m", tmp_path / "locked" / "m.safetensors", code=2))


def test_fit_says_what_is_wrong(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "single").mkdir()
    shutil.copy(work / "one" / "good.png", tmp_path / "single")
    new, good = tmp_path / "m.safetensors", work / "train" / "good"
    before = (work / "m.safetensors").stat().st_mtime_ns
    cases = [
        ((tmp_path / "absent", "-m", new), "absent"),
        ((work / "m.safetensors", "-m", new), "m.safetensors"),
        ((tmp_path / "empty", "-m", new), "empty"),
        ((tmp_path / "bad", "-m", new), "none of the 1 images"),
        ((tmp_path / "single", "-m", new), "left to train on"),
        ((good, "-m", work / "m.safetensors"), "--overwrite"),
        ((good, "-m", tmp_path), "is a folder"),
        ((good, "-m", new, "--backbone", "abacus"), "abacus"),
        ((good, "-m", new, "--image-size", "64", "--crop-size", "80"), "crop_size"),
        ((good, "-m", new, "--weights", tmp_path / "w.pth"), "w.pth"),
    ]
    for arguments, word in cases:
        assert word in ttt4as("fit", *arguments, code=2).stderr, arguments
    assert not new.exists()
    assert (work / "m.safetensors").stat().st_mtime_ns == before


def test_fit_calibrates_on_the_validation_part_of_a_set(work: Path, tmp_path: Path) -> None:
    from ttt4as_fast import PatchCore

    train, validation = (tmp_path / "3d" / part / "good" / "rgb" for part in ("train", "validation"))
    shutil.copytree(work / "train" / "good", train)
    validation.mkdir(parents=True)
    (tmp_path / "3d" / "test").mkdir()
    for i in range(4):
        Image.fromarray(texture(400 + i)).save(validation / f"{i}.png")
    model, size = tmp_path / "m.safetensors", ("--image-size", 64, "--crop-size", 56)
    done = ttt4as("fit", tmp_path / "3d", "-m", model, *size)
    assert "16 images to train on, 4 to validate, 0 skipped" in done.stdout
    expected = PatchCore(image_size=64, crop_size=56).fit(train).calibrate(validation)
    assert PatchCore.load(model).image_threshold_ == expected.image_threshold_
    done = ttt4as("fit", tmp_path / "3d", "-m", tmp_path / "without", *size, "--validation-share", 0)
    assert "16 images to train on, 0 to validate, 0 skipped" in done.stdout
    for path in validation.iterdir():
        path.write_bytes(b"\x89PNG")
    done = ttt4as("fit", tmp_path / "3d", "-m", tmp_path / "never", *size, code=2)
    assert "none of the 4 validation images" in done.stderr


def test_fit_skips_bad_files_and_may_go_without_validation(work: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(work / "train" / "good", mixed)
    shutil.copy(work / "one" / "truncated.png", mixed)
    model = tmp_path / "new folder" / "m.safetensors"
    done = ttt4as("fit", mixed, "-m", model, "--image-size", 64, "--validation-share", 0, code=1)
    assert "16 images to train on, 0 to validate, 1 skipped" in done.stdout
    assert "truncated.png" in done.stderr
    assert [path.name for path in model.parent.iterdir()] == ["m.safetensors"]
    image = work / "one" / "grey.png"
    assert "--no-gate" in one_line(ttt4as("predict", model, image, "-o", tmp_path / "o", code=2))
    assert "--no-gate" in one_line(ttt4as("serve", model, "--port", 0, code=2))
    assert "--validation-share > 0" in one_line(ttt4as("evaluate", model, mixed, "-o", tmp_path / "r", code=2))
    assert not (tmp_path / "r").exists()
    ttt4as("predict", model, image, "-o", tmp_path / "o", "--no-gate", "--map-format", "npy")
    (record,) = records(tmp_path / "o")
    assert record["label"] is None
    assert np.load(tmp_path / "o" / record["files"]["map"]).dtype == np.float32


def test_weights_that_moved_can_be_named(work: Path, tmp_path: Path) -> None:
    import timm
    import torch

    before, now, model = tmp_path / "w.pth", tmp_path / "elsewhere.pth", tmp_path / "m.safetensors"
    torch.save(timm.create_model("resnet18", pretrained=False, num_classes=0).state_dict(), before)
    small = ("--image-size", 64, "--coreset-ratio", 0.05)
    ttt4as("fit", work / "train" / "good", "-m", model, "--backbone", "resnet18", "--weights", before, *small)
    before.rename(now)
    image, port = work / "one" / "grey.png", socket.create_server(("127.0.0.1", 0))
    commands = {
        "predict": ((model, image, "-o", tmp_path / "o"), 0),
        "evaluate": ((model, labelled(work, tmp_path / "set", 1), "-o", tmp_path / "r"), 0),
        "serve": ((model, "--port", port.getsockname()[1]), 2),
    }
    with port:
        for name, (arguments, code) in commands.items():
            assert "--weights" in one_line(ttt4as(name, *arguments, code=2))
            done = ttt4as(name, *arguments, "--weights", now, code=code)
            assert code == 0 or "cannot listen" in one_line(done)  # it came as far as the port, which is taken


def test_fit_and_predict_are_the_same_twice(work: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    ttt4as("fit", work / "train" / "good", "-m", model, "--image-size", 96, "--crop-size", 80, "--seed", 3)
    assert model.read_bytes() == (work / "m.safetensors").read_bytes()


# ---------------------------------------------------------------- evaluate


def test_evaluate_writes_its_tables(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / "set", 3)
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r 1")
    report = json.loads((tmp_path / "r 1" / "report.json").read_text("utf-8"))
    assert len(report["images"]) == 6
    methods = {row["method"]: row for row in report["rows"] if row["kind"] == "all"}
    assert methods["ttt4as"]["i_auroc"] == 1.0
    assert methods["ttt4as"]["f1"] > 0.4
    assert (tmp_path / "r 1" / "report.csv").read_text("utf-8").startswith("dataset,")
    assert "AU-PRO" in done.stdout
    (dataset / "test/good" / "000.png").write_bytes(b"\x89PNG")
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r 2", code=1)
    assert "000.png" in done.stderr
    one_line(ttt4as("evaluate", work / "m.safetensors", tmp_path / "absent", "-o", tmp_path / "r", code=2))
    below = tmp_path / "r 1" / "report.csv" / "below"
    assert str(below) in one_line(ttt4as("evaluate", work / "m.safetensors", dataset, "-o", below, code=2))
    assert (
        "layout" in ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path, "--layout", "x", code=2).stderr
    )


def test_bench_masks_takes_moved_weights_with_a_model_alone(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / "set", 1)
    other = tmp_path / "weights.bin"
    other.write_bytes(b"no weights")
    common = ("bench", "masks", dataset, "-o", tmp_path / "r", "--threads", 1, "--weights", other)
    assert "give --model" in one_line(ttt4as(*common, code=2))
    assert "weights" in ttt4as(*common, "--model", work / "m.safetensors", code=2).stderr


def test_evaluate_says_when_the_set_cannot_tell_masks_apart(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / "set", 2)
    shutil.rmtree(dataset / "ground_truth")
    shutil.rmtree(dataset / "test" / "good")
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r", "--layout", "folder")
    said = " ".join(done.stderr.split())
    assert "warning: dataset: no defective image has a mask" in said
    assert "warning: dataset: no good images" in said


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_who_has_had_enough_is_no_error() -> None:
    process = subprocess.Popen(command("info"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() != 0


def test_demo_runs(tmp_path: Path) -> None:
    done = ttt4as("demo", "--texture", "brick", "--output", tmp_path / "d", "--seed", 1)
    summary = json.loads((tmp_path / "d" / "summary.json").read_text("utf-8"))
    assert summary["f1_ttt4as"] > summary["f1_threshold"]
    assert f"f1_ttt4as {summary['f1_ttt4as']:.3f}" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("place", ["predict", "evaluate", "segment", "serve", "TTT4AS", "TTT4ASPostProcessor"])
def test_the_method_has_the_same_defaults_everywhere(place: str) -> None:
    from ttt4as_fast import TTT4AS, cli
    from ttt4as_fast.kernels.segment import SegmentOptions

    if place == "TTT4ASPostProcessor":
        pytest.importorskip("anomalib")
        from ttt4as_fast.integrations.anomalib import TTT4ASPostProcessor as function
    else:
        function = TTT4AS if place == "TTT4AS" else getattr(cli, place)
    parameters = inspect.signature(function).parameters
    for option in fields(SegmentOptions):
        if option.name == "image_threshold" and place in ("evaluate", "TTT4ASPostProcessor"):
            continue  # judged with and without; the host's
        default = parameters["svm_c" if option.name == "C" and "svm_c" in parameters else option.name].default
        assert getattr(default, "value", default) == option.default, option.name
