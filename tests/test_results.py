"""Results on disk: placement in the file's pixels, regions, overlays, and folders whose runs may stop at any point."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ttt4as_fast import results
from ttt4as_fast.results import ResultFolder, overlay, regions, write_map, write_mask

# ---------------------------------------------------------------- one image


def test_regions_measure_each_blob() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:5, 3:9] = True
    mask[5, 9] = True  # touches the first by a corner
    mask[19, 29] = True
    psi = np.zeros((20, 30), np.float32)
    psi[4, 7], psi[19, 29], psi[0, 0] = 2.0, 3.0, 9.0
    assert regions(mask, psi) == [
        {"x": 29, "y": 19, "width": 1, "height": 1, "area": 1, "peak_score": 3.0, "peak_x": 29, "peak_y": 19},
        {"x": 3, "y": 2, "width": 7, "height": 4, "area": 19, "peak_score": 2.0, "peak_x": 7, "peak_y": 4},
    ]
    assert regions(np.zeros((4, 4), bool), np.zeros((4, 4))) == []


def test_regions_agree_with_scikit_image() -> None:
    measure = pytest.importorskip("skimage.measure")
    rng = np.random.default_rng(1)
    mask, psi = rng.random((60, 47)) > 0.6, rng.random((60, 47))
    ours = sorted(
        (r["y"], r["x"], r["y"] + r["height"], r["x"] + r["width"], r["area"], r["peak_score"])
        for r in regions(mask, psi)
    )
    theirs = measure.regionprops(measure.label(mask, connectivity=2), psi)
    assert ours == sorted((*r.bbox, int(r.area), float(r.intensity_max)) for r in theirs)


def test_regions_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match="mask"):
        regions(np.zeros((4, 4), bool), np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"mask: expected \(H, W\)"):
        regions(np.ones((1, 2, 2), bool), np.ones((1, 2, 2)))


@pytest.mark.parametrize("strip", [1, 64 * 7, 1 << 20])
def test_overlay_shows_map_outline_and_what_was_not_seen(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    monkeypatch.setattr(results, "_STRIP", strip)
    image = Image.new("RGB", (64, 48), (100, 100, 100))
    psi = np.zeros((48, 64), np.float32)
    psi[10:20, 10:20] = 1.0
    psi[:, 60:] = np.nan
    mask = np.zeros((48, 64), bool)
    mask[10:20, 10:20] = True
    shown = np.asarray(overlay(image, psi, mask, (0.0, 1.0)))
    outline = mask.copy()
    outline[11:19, 11:19] = False
    np.testing.assert_array_equal((shown == (0, 229, 255)).all(2), outline)
    assert shown[15, 15, 0] > 180  # the hot end of the colour map
    assert tuple(shown[30, 30]) == (100, 100, 100)  # the cold end is transparent
    assert tuple(shown[30, 62]) == (40, 40, 40)
    without = np.asarray(overlay(image, psi, mask, None))
    assert tuple(without[15, 15]) == (100, 100, 100)


def test_overlay_scale_is_not_the_images_own() -> None:
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    nothing = np.zeros((8, 8), bool)
    faint = np.asarray(overlay(image, np.full((8, 8), 0.1, np.float32), nothing, (0.0, 1.0)), dtype=int)
    strong = np.asarray(overlay(image, np.full((8, 8), 0.9, np.float32), nothing, (0.0, 1.0)), dtype=int)
    assert np.abs(faint - 100).max() < 20 < np.abs(strong - 100).max()
    top, beyond = (np.asarray(overlay(image, np.full((8, 8), x, np.float32), nothing, (0.0, 1.0))) for x in (1.0, 5.0))
    np.testing.assert_array_equal(beyond, top)
    elsewhere = overlay(image, np.full((8, 8), 8.6, np.float32), nothing, (5.0, 9.0))
    np.testing.assert_array_equal(np.asarray(elsewhere), strong)


@pytest.mark.parametrize("suffix", [".tiff", ".npy"])
def test_maps_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    psi = np.random.default_rng(0).normal(size=(33, 17)).astype(np.float32)
    psi[0] = np.nan
    write_map(tmp_path / f"a{suffix}", psi)
    if suffix == ".npy":
        back = np.load(tmp_path / "a.npy")
    else:
        with Image.open(tmp_path / "a.tiff") as file:
            assert file.mode == "F"
            back = np.asarray(file)
    np.testing.assert_array_equal(back, psi)
    assert back.dtype == np.float32


def test_masks_are_0_and_255(tmp_path: Path) -> None:
    mask = np.eye(5, dtype=bool)
    write_mask(tmp_path / "m.png", mask)
    with Image.open(tmp_path / "m.png") as file:
        np.testing.assert_array_equal(np.asarray(file), mask * np.uint8(255))


# ---------------------------------------------------------------- folders


def finish(folder: ResultFolder, key: str, name: str, **more: Any) -> None:
    """What a run does for an image: its files, then its line."""
    mask = f"masks/{name}.png"
    (folder.folder / mask).write_bytes(b"png")
    folder.add({"path": key, "name": name, "files": {"mask": mask}, "inputs": {key: [1, 0]}, **more})


def start(folder: ResultFolder, wanted: dict[str, str]) -> list[tuple[str, str]]:
    """As a run starts, on the files that `finish` says it used."""
    return folder.start(wanted, {key: {key: [1, 0]} for key in wanted})


def keys(folder: Path) -> list[str]:
    return [json.loads(line)["path"] for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted = {"/x/a.png": "a", "/x/b.png": "b", "/x/c.png": "c"}
    with ResultFolder(tmp_path / "out" / "deep", {"k": 1}) as folder:
        assert start(folder, wanted) == [("/x/a.png", "a"), ("/x/b.png", "b"), ("/x/c.png", "c")]
        finish(folder, "/x/a.png", "a")
    with ResultFolder(tmp_path / "out" / "deep", {"k": 1}, {"version": "2"}) as folder:
        assert start(folder, wanted) == [("/x/b.png", "b"), ("/x/c.png", "c")]
        finish(folder, "/x/b.png", "b")
    run = json.loads((tmp_path / "out" / "deep" / "run.json").read_text("utf-8"))
    assert run == {"format_version": 1, "settings": {"k": 1}, "version": "2"}
    assert keys(tmp_path / "out" / "deep") == ["/x/a.png", "/x/b.png"]


@pytest.mark.parametrize("now", ["grown", "newer", "another", "of an older version"])
def test_what_changed_since_is_done_again(tmp_path: Path, now: str) -> None:
    sources = {"a": {"/m": [8, 1], "/f": [9, 2]}, "b": {"/m": [8, 1], "/f": [9, 2]}}
    with ResultFolder(tmp_path, {}) as folder:
        for name in sources:
            finish(folder, name, name, inputs=sources[name])
        assert folder.start({"a": "a", "b": "b"}, sources) == []
        if now == "of an older version":
            del folder.records["a"]["inputs"]
            folder._rewrite()
    changed = {"grown": {"/m": [8, 1], "/f": [10, 2]}, "newer": {"/m": [8, 3], "/f": [9, 2]}}
    changed["another"] = {"/m": [8, 1], "/g": [9, 2]}
    with ResultFolder(tmp_path, {}) as folder:
        assert folder.start({"a": "a", "b": "b"}, {**sources, "a": changed.get(now, sources["a"])}) == [("a", "a")]
    assert keys(tmp_path) == ["b"]
    assert not (tmp_path / "masks" / "a.png").exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_is_dropped(tmp_path: Path, cut: int) -> None:
    with ResultFolder(tmp_path, {}) as folder:
        finish(folder, "/a.png", "a")
        finish(folder, "/b.png", "b")
    text = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(text[:-cut])
    with ResultFolder(tmp_path, {}) as folder:
        assert [key for key, _ in start(folder, {"/a.png": "a", "/b.png": "b"})] == ["/b.png"]
        finish(folder, "/b.png", "b")
    assert (tmp_path / "results.jsonl").read_bytes() == text


def test_a_lost_file_is_done_again(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}) as folder:
        finish(folder, "/a.png", "a")
    (tmp_path / "masks" / "a.png").unlink()
    with ResultFolder(tmp_path, {}) as folder:
        assert start(folder, {"/a.png": "a"}) == [("/a.png", "a")]
    assert keys(tmp_path) == []


def test_same_names_do_not_collide(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}) as folder:
        todo = start(folder, {"/x/0.png": "0", "/y/0.png": "0", "/y/0.PNG": "0", "/y/1.png": "1"})
        names = [name for _, name in todo]
        assert len({name.casefold() for name in names}) == 4
        assert names[3] == "1"
        assert all(name.startswith("0-") for name in names[:3])
        for key, name in todo:
            finish(folder, key, name)
    with ResultFolder(tmp_path, {}) as folder:
        # A later run meets a name that an earlier one took.
        ((_, later),) = start(folder, {"/z/1.png": "1", "/x/0.png": "0"})
        assert later not in names
        assert later.startswith("1-")


def test_names_are_short_enough_for_a_file_system(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}) as folder:
        for key, name in start(folder, {"/x/a": "ü" * 250, "/y/a": "ü" * 250}):
            finish(folder, key, name)
    assert len(list((tmp_path / "masks").iterdir())) == 2


def test_overwrite_redoes_the_given_and_keeps_the_others(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {"k": 1}) as folder:
        finish(folder, "/a.png", "a")
        finish(folder, "/b.png", "b")
    with ResultFolder(tmp_path, {"k": 1}, overwrite=True) as folder:
        assert start(folder, {"/a.png": "a"}) == [("/a.png", "a")]
        assert keys(tmp_path) == ["/b.png"]
        assert not (tmp_path / "masks" / "a.png").exists()
        finish(folder, "/a.png", "a")
    assert keys(tmp_path) == ["/b.png", "/a.png"]


def test_other_settings_are_refused_or_drop_everything(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {"k": 1, "t": (1, 2)}) as folder:
        finish(folder, "/a.png", "a")
    with ResultFolder(tmp_path, {"k": 1, "t": (1, 2)}):
        pass
    with pytest.raises(ValueError, match="other settings"), ResultFolder(tmp_path, {"k": 2}):
        pass
    assert keys(tmp_path) == ["/a.png"]
    with ResultFolder(tmp_path, {"k": 2}, overwrite=True) as folder:
        assert start(folder, {"/b.png": "b"}) == [("/b.png", "b")]
    assert keys(tmp_path) == []
    assert not (tmp_path / "masks" / "a.png").exists()
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["settings"] == {"k": 2}


def test_files_that_no_run_wrote_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "000.png").write_bytes(b"someone's ground truth")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not of an earlier run"), ResultFolder(tmp_path, {}, overwrite=overwrite):
            pass
    assert (tmp_path / "masks" / "000.png").read_bytes() == b"someone's ground truth"
    assert not (tmp_path / "run.json").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    expected = "output: expected a folder to write to, got '.*o' "
    with pytest.raises(NotADirectoryError, match=expected), ResultFolder(tmp_path / "file" / "o", {}):
        pass

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=f"{expected}.*[Rr]ead-only"), ResultFolder(tmp_path / "o", {}):
        pass
    assert not (tmp_path / "o").exists()


def test_a_doctored_line_does_not_reach_out_of_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "precious.png").write_bytes(b"x")
    with ResultFolder(out, {"k": 1}) as folder:
        folder.add(
            {"path": "/a", "name": "a", "files": {"mask": "../precious.png", "map": str(tmp_path / "precious.png")}}
        )
    with ResultFolder(out, {"k": 2}, overwrite=True):
        pass
    assert (tmp_path / "precious.png").exists()


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"path": 1}\n', b"\xff\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: bytes) -> None:
    with ResultFolder(tmp_path, {}):
        pass
    (tmp_path / "results.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match="line 1"), ResultFolder(tmp_path, {}):
        pass
    assert (tmp_path / "results.jsonl").read_bytes() == line


def test_temporary_files_of_a_killed_run_go(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}):
        pass
    (tmp_path / "maps" / ".a-0123456789abcdef.tiff").write_bytes(b"half")
    (tmp_path / "maps" / ".gitkeep").write_bytes(b"")
    with ResultFolder(tmp_path, {}):
        pass
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [".gitkeep"]


def test_results_of_hidden_images_stay(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}) as folder:
        finish(folder, "/x/.cam-1.png", ".cam-1")
    with ResultFolder(tmp_path, {}) as folder:
        assert start(folder, {"/x/.cam-1.png": ".cam-1"}) == []
    assert (tmp_path / "masks" / ".cam-1.png").is_file()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with ResultFolder(tmp_path, {}):
        with pytest.raises(OSError, match="another run"), ResultFolder(tmp_path, {}):
            pass
    with ResultFolder(tmp_path, {}):
        pass


def test_names_that_are_not_utf8_become_json(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/x/\xff.png")
    with ResultFolder(tmp_path, {}) as folder:
        folder.add({"path": odd, "name": "a", "files": {}})
        folder.add({"path": "/x/größe.png", "name": "b", "files": {}})
    with ResultFolder(tmp_path, {}) as folder:
        assert set(folder.records) == {odd, "/x/größe.png"}
    assert "größe" in (tmp_path / "results.jsonl").read_text("utf-8")


def test_a_result_holds_no_nan(tmp_path: Path) -> None:
    with ResultFolder(tmp_path, {}) as folder, pytest.raises(ValueError, match="JSON"):
        folder.add({"path": "/a", "name": "a", "files": {}, "score": float("nan")})
    assert not (tmp_path / "results.jsonl").exists() or not (tmp_path / "results.jsonl").read_bytes()
