"""The defect generator and the demo: what they promise about sizes, seeds, areas and the summary."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ttt4as_fast import installation
from ttt4as_fast.demo import TEXTURES, DemoPlan, load_texture, make_defects, run_demo, texture_crops

GREY = np.full((3, 64, 80), 100, np.uint8)
BRIGHT = [np.full((70, 90), 200, np.uint8)]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.04, 0.3, 0.6])
@pytest.mark.parametrize("number", [1, 3])
def test_defects_have_the_size_that_was_asked(share: float, number: int) -> None:
    images, masks = make_defects(GREY, BRIGHT, size=(share, share), number=number, seed=1)
    assert (masks.sum(axis=(1, 2)) == max(1, round(share * 64 * 80))).all()
    assert images.dtype == np.uint8
    for mask in masks:
        assert 1 <= ndimage.label(mask, np.ones((3, 3)))[1] <= number + (share > 0.1)


def test_sizes_fill_the_range() -> None:
    _, masks = make_defects(np.zeros((64, 100, 100), np.float32), [np.ones((100, 100), np.float32)], size=(0.1, 0.4))
    shares = masks.mean(axis=(1, 2))
    assert shares.min() >= 0.1
    assert shares.max() <= 0.4
    assert np.ptp(shares) > 0.25
    assert 0.22 < shares.mean() < 0.28


@pytest.mark.parametrize("softness", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("contrast", [1.0, 0.25])
def test_the_mask_is_where_the_donor_shows_by_more_than_half(softness: float, contrast: float) -> None:
    images, masks = make_defects(
        np.zeros((4, 64, 80)), [np.ones((64, 80))], size=(0.1, 0.2), contrast=contrast, softness=softness, number=2
    )
    np.testing.assert_array_equal(masks, images > contrast / 2)
    assert images.max() <= contrast + 1e-12
    deep = np.stack([ndimage.binary_erosion(mask, iterations=1 + int(softness / 2), border_value=1) for mask in masks])
    np.testing.assert_allclose(images[deep], contrast)
    far = ~np.stack(
        [ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=1 + int(softness / 2)) for mask in masks]
    )
    np.testing.assert_array_equal(images[far], 0)


def test_defects_follow_seed_and_index_only() -> None:
    images = np.random.default_rng(0).random((5, 48, 48, 3))
    donors = np.random.default_rng(1).random((2, 60, 50, 3))
    before = images.copy()
    a, m = make_defects(images, donors, seed=3)
    b, n = make_defects(images, donors, seed=3)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(m, n)
    np.testing.assert_array_equal(images, before)
    first, mask = make_defects(images[:2], donors, seed=3)
    np.testing.assert_array_equal(first, a[:2])
    np.testing.assert_array_equal(mask, m[:2])
    assert (make_defects(images, donors, seed=4)[1] != m).any()
    assert len({row.tobytes() for row in m}) == 5


def test_outlines_are_irregular() -> None:
    """A disc fills 0.785 of its bounding square; these differ from it and from each other."""
    _, masks = make_defects(np.zeros((20, 100, 100)), [np.ones((100, 100))], size=(0.05, 0.05))
    fill = [mask.sum() / (np.ptp(np.nonzero(mask)[0]) + 1) / (np.ptp(np.nonzero(mask)[1]) + 1) for mask in masks]
    assert np.std(fill) > 0.03
    assert min(fill) < 0.65


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros((3, 8), np.uint8)}, ValueError, "images"),
        ({"images": np.zeros((3, 8, 8), np.int32)}, TypeError, "images"),
        ({"donors": []}, ValueError, "donors"),
        ({"donors": [np.zeros((63, 90), np.uint8)]}, ValueError, r"donors\[0\]"),
        ({"donors": [np.zeros((70, 90))]}, ValueError, r"donors\[0\]"),
        ({"donors": [np.zeros((70, 90, 3), np.uint8)]}, ValueError, r"donors\[0\]"),
        ({"size": 0.1}, TypeError, "size"),
        ({"size": (0.2, 0.1)}, ValueError, "size"),
        ({"size": (0.0, 0.1)}, ValueError, r"size\[0\]"),
        ({"size": (0.1, 0.7)}, ValueError, r"size\[1\]"),
        ({"contrast": 0.0}, ValueError, "contrast"),
        ({"number": 0}, ValueError, "number"),
        ({"softness": -1.0}, ValueError, "softness"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"images": GREY, "donors": BRIGHT, **change}
    with pytest.raises(error, match=message):
        make_defects(arguments.pop("images"), arguments.pop("donors"), **arguments)


@pytest.mark.parametrize("name", TEXTURES)
def test_crops_come_from_areas_that_share_no_pixel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pixels that carry their own number, no number turns up in two areas."""
    numbered = np.arange(512 * 512).reshape(512, 512)
    monkeypatch.setattr("ttt4as_fast.demo.load_texture", lambda _: numbered)
    seen = [set(np.unique(texture_crops(name, area, 40, 160, seed=5))) for area in ("train", "validation", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_textures_are_photographs_and_ship_with_scikit_image() -> None:
    for name in TEXTURES:
        photograph = load_texture(name)
        assert photograph.shape == (512, 512)
        assert photograph.dtype == np.uint8
        assert photograph.std() > 20
    with pytest.raises(ValueError, match="texture"):
        load_texture("wood")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list]:
    output = tmp_path_factory.mktemp("demo") / "a b" / "größe"
    calls: list[tuple[str, int, int]] = []
    plan = DemoPlan(n_train=12, n_validation=10, n_test=4)
    summary = run_demo(output, ["brick", "brick"], seed=2, plan=plan, progress=lambda *call: calls.append(call))
    return output, summary, calls


def test_demo_marks_better_than_a_threshold(ran: tuple[Path, dict, list]) -> None:
    _, summary, _ = ran
    assert list(summary["textures"]) == ["brick"]
    assert summary["f1_ttt4as"] > summary["f1_threshold"] > 0.05
    assert summary["f1_ttt4as"] > 0.5


def test_demo_summary_is_what_it_returns_and_adds_up(ran: tuple[Path, dict, list]) -> None:
    output, summary, _ = ran
    assert json.loads((output / "summary.json").read_text("utf-8")) == json.loads(json.dumps(summary))
    defective = [row for row in summary["images"] if row["label"]]
    assert len(defective) == 4
    assert len(summary["images"]) == 8
    assert summary["f1_ttt4as"] == pytest.approx(np.mean([row["ttt4as"]["f1"] for row in defective]))
    assert summary["f1_threshold"] == pytest.approx(np.mean([row["thr"]["f1"] for row in defective]))
    assert all(0.029 < row["defect_share"] < 0.051 for row in defective)
    assert summary["seed"] == 2
    assert summary["commit"] == installation.commit() and date.fromisoformat(summary["measured"]) > date(2020, 1, 1)
    assert all(value > 0 for value in summary["milliseconds"].values())
    for row in summary["images"]:
        if not row["detected"]:
            assert row["ttt4as_gated"]["marked_share"] == 0


def test_demo_draws_its_figure(ran: tuple[Path, dict, list]) -> None:
    with Image.open(ran[0] / "figure.png") as figure:
        pixels = np.asarray(figure.convert("RGB"), dtype=int)
    assert pixels.shape[1] > 1000
    assert (pixels.std(axis=(0, 1)) > 20).all()


def test_demo_reports_progress(ran: tuple[Path, dict, list]) -> None:
    calls = ran[2]
    ends = {description: (done, total) for description, done, total in calls}
    assert {"brick: features", "brick: coreset", "brick: calibration", "brick: prediction"} <= set(ends)
    assert all(done == total for done, total in ends.values())


def test_demo_is_the_same_twice(ran: tuple[Path, dict, list], tmp_path: Path) -> None:
    again = run_demo(tmp_path, ["brick"], seed=2, plan=DemoPlan(n_train=12, n_validation=10, n_test=4))
    assert again["images"] == ran[1]["images"]


@pytest.mark.parametrize(
    ("change", "message"), [({"textures": ["wood"]}, "texture"), ({"textures": []}, "textures"), ({"seed": -1}, "seed")]
)
def test_demo_names_wrong_arguments(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "o", **change)
    assert not (tmp_path / "o").exists()


def test_demo_says_that_its_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="output: expected a folder to write to"):
        run_demo(tmp_path / "file" / "o")
