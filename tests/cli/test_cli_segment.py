"""`ttt4as segment`: arrays and folders of them to masks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .command import command, environment, records, ttt4as


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


def folders(root: Path, names: Sequence[str], others: Sequence[str] | None = None) -> tuple[Path, Path]:
    """Folders of maps and of features, with an image under each of the names; of the features under `others`."""
    made = root / "maps", root / "features"
    for kind, (folder, own) in enumerate(zip(made, (names, others or names), strict=True)):
        folder.mkdir()
        for i, name in enumerate(own):
            shutil.copy(arrays(root / "in", seed=i)[kind], folder / name)
    return made


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

    from ttt4as_fast import TTT4AS, cli_options

    paper = TTT4AS().get_params()
    params = {option: paper[argument] for option, argument in cli_options.METHOD_OPTIONS.items()}
    detector = SimpleNamespace(nominal_statistics_=SimpleNamespace(level=3.5))
    for preset, level in (("paper", None), ("robust", 3.5)):
        context = SimpleNamespace(params={**params, "preset": preset})
        assert cli_options.segmenter_of(context, None, detector).get_params().get("nominal_level") == level
    without = cli_options.segmenter_of(SimpleNamespace(params={**params, "preset": "robust"}), None)
    assert without.options.nominal_level is None


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_segment_names_a_device_that_is_none(tmp_path: Path, preset: str) -> None:
    maps, features = arrays(tmp_path / "in")
    done = ttt4as("segment", maps, features, "-o", tmp_path / "out", "--preset", preset, "--device", "toaster", code=2)
    assert "device: expected" in done.stderr and "toaster" in done.stderr


def test_segment_takes_arrays_of_the_other_byte_order_to_a_device(tmp_path: Path) -> None:
    maps, features = arrays(tmp_path / "in")
    for path in (maps, features):
        x = np.load(path)
        np.save(path, x.astype(x.dtype.newbyteorder()))
    for device in ("cpu", "cpu:0"):  # by way of tensors the second
        ttt4as("segment", maps, features, "-o", tmp_path / device, "--device", device)
    one, other = (np.load(tmp_path / device / "masks" / "maps.npy") for device in ("cpu", "cpu:0"))
    np.testing.assert_array_equal(one, other)


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
    maps, features = folders(tmp_path, [f"{i}.npy" for i in range(3)])
    (maps / "1.npy").write_bytes((maps / "1.npy").read_bytes()[:200])
    np.save(maps / "lonely.npy", np.zeros((4, 4)))
    np.save(maps / "3.npy", np.full((4, 4), np.nan))
    np.save(features / "3.npy", np.zeros((4, 4, 4)))
    done = ttt4as("segment", maps, features, "-o", tmp_path / "out", code=1)
    assert [record["name"] for record in records(tmp_path / "out")] == ["0", "2"]
    for word in ("1.npy", "lonely.npy", "3.npy"):
        assert re.search(f"skipped: .*{re.escape(word)}", done.stderr), done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_segment_does_not_wait_for_the_writer_of_a_pipe(tmp_path: Path) -> None:
    maps, features = folders(tmp_path, ["good.npy"])
    for folder in (maps, features):
        os.mkfifo(folder / "a.npy")
    done = subprocess.run(
        command("segment", maps, features, "-o", tmp_path / "out"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"{maps / 'a.npy'}: not a regular file" in done.stderr
    assert [record["name"] for record in records(tmp_path / "out")] == ["good"]


def test_segment_counts_files_without_their_other_half(tmp_path: Path) -> None:
    maps, features = folders(tmp_path, ["a.npy", "b.npy"], ["a.npy", "c.npy"])
    done = ttt4as("segment", maps, features, "-o", tmp_path / "o", code=1)
    assert "1 done, 0 done earlier, 2 failed" in done.stdout
    for name in ("maps/b.npy", "features/c.npy"):
        assert f"skipped: {tmp_path / name}: no file of the same name in the other folder" in done.stderr


def test_segment_takes_suffixes_in_capitals_too(tmp_path: Path) -> None:
    ttt4as("segment", *folders(tmp_path, ["A.NPY"], ["A.npy"]), "-o", tmp_path / "o")
    assert [record["name"] for record in records(tmp_path / "o")] == ["A"]


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


def test_segment_forgets_the_images_that_a_file_no_longer_holds(tmp_path: Path) -> None:
    maps, features = arrays(tmp_path / "in", 3)
    kept, its = arrays(tmp_path / "kept")
    for pair in ((maps, features), (kept, its)):
        ttt4as("segment", *pair, "-o", tmp_path / "o")
    for path in (maps, features):
        np.save(path, np.load(path)[:2])
    done = ttt4as("segment", maps, features, "-o", tmp_path / "o")
    assert "2 done, 0 done earlier, 0 failed; 3 of 3 marked" in done.stdout
    found = records(tmp_path / "o")
    assert sorted(record["path"] for record in found) == [f"{maps}[0]", f"{maps}[1]", str(kept)]
    named = {name for record in found for name in record["files"].values()}
    assert {f"masks/{path.name}" for path in (tmp_path / "o" / "masks").iterdir()} == named


def test_segment_writes_the_lines_anew_once_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt4as_fast.results import ResultFolder

    arguments = ("segment", *folders(tmp_path, [f"{i}.npy" for i in range(4)]), "-o", tmp_path / "o")
    ttt4as(*arguments)
    rewrite, written = ResultFolder._rewrite, []
    monkeypatch.setattr(ResultFolder, "_rewrite", lambda self: written.append(rewrite(self)))
    assert "4 done, 0 done earlier" in ttt4as(*arguments, "--overwrite").stdout
    assert len(written) == 1
    assert len(records(tmp_path / "o")) == 4


@pytest.mark.parametrize("case", ["absent", "mixed", "text", "objects", "shapes", "empty", "names"])
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
    if case == "empty":
        np.save(maps, np.zeros((0, 48, 56)))
        np.save(features, np.zeros((0, 12, 12, 14)))
    if case == "names":
        maps = tmp_path / "x.npz"
        np.savez(maps, a=np.zeros((4, 4)), b=np.zeros((4, 4)))
    code = 2 if case in ("absent", "mixed") else 1
    done = ttt4as("segment", maps, features, "-o", tmp_path / "out", code=code)
    assert maps.name in done.stderr
    assert "pickle" not in done.stderr  # which NumPy takes any file for, and says how to load it unsafely
    assert done.stderr.count(f"{maps}: ") == (code == 1)
    assert len(done.stderr.strip().splitlines()) == 1
