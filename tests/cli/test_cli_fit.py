"""`ttt4as fit` and `ttt4as evaluate`: a model and its calibration, and the tables of a data set."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
from PIL import Image

from .command import labelled, one_line, records, texture, ttt4as


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
        ((good, "-m", new, "--seed", 2**32), "--seed"),
        ((good, "-m", tmp_path / "bad" / "a.png" / "m"), "model: expected a folder to write to"),
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


def test_fit_takes_the_smallest_size_that_its_help_names(work: Path, tmp_path: Path) -> None:
    done = ttt4as("fit", work / "train" / "good", "-m", tmp_path / "m", "--image-size", 8)
    assert "13 images to train on" in done.stdout


def test_fit_skips_bad_files_and_may_go_without_validation(work: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(work / "train" / "good", mixed)
    shutil.copy(work / "one" / "truncated.png", mixed)
    (mixed / "link.png").symlink_to("moved.png")
    model = tmp_path / "new folder" / "m.safetensors"
    done = ttt4as("fit", mixed, "-m", model, "--image-size", 64, "--validation-share", 0, code=1)
    assert "16 images to train on, 0 to validate, 2 skipped" in done.stdout
    assert "truncated.png" in done.stderr and "link.png: a link to no file" in done.stderr
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


def test_evaluate_writes_its_tables(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / "set", 3)
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r 1")
    report = json.loads((tmp_path / "r 1" / "report.json").read_text("utf-8"))
    assert len(report["images"]) == 6
    assert {"torch", "commit", "measured"} <= report["environment"].keys()
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


def test_evaluate_takes_names_that_are_not_utf8(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / os.fsdecode(b"gr\xf6\xdfe"), 2)
    for kinds in (dataset / "test", dataset / "ground_truth"):
        (kinds / "noise").rename(kinds / os.fsdecode(b"ger\xe4usch"))
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r")
    assert "ger\\udce4usch" in done.stdout
    with open(tmp_path / "r" / "report.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["dataset"] for row in rows} == {"gr\\udcf6\\udcdfe"}
    assert {row["kind"] for row in rows} == {"ger\\udce4usch", "mean", "all"}


def test_evaluate_says_when_the_set_cannot_tell_masks_apart(work: Path, tmp_path: Path) -> None:
    dataset = labelled(work, tmp_path / "set", 2)
    shutil.rmtree(dataset / "ground_truth")
    shutil.rmtree(dataset / "test" / "good")
    done = ttt4as("evaluate", work / "m.safetensors", dataset, "-o", tmp_path / "r", "--layout", "folder")
    said = " ".join(done.stderr.split())
    assert "warning: dataset: no defective image has a mask" in said
    assert "warning: dataset: no good images" in said
