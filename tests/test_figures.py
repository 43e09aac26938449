"""Figures: columns, colours and outlines are where they should be, and wrong input is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from ttt4as_fast.figures import comparison


def panels(n: int = 2, size: tuple[int, int] = (60, 60)) -> dict:
    rng = np.random.default_rng(0)
    gt = np.zeros((n, *size), bool)
    gt[:, 20:40, 20:40] = True
    return {
        "images": [rng.random(size) for _ in range(n)],
        "anomaly_maps": [rng.random(size) for _ in range(n)],
        "masks": {"THR": list(gt), "TTT4AS": [np.zeros(size, bool)] * n},
        "gt_masks": list(gt),
    }


def draw(path: Path, **change) -> np.ndarray:
    comparison(path, **{**panels(), **change})
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def share_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels - colour).max(axis=2) <= 12).mean())


MASK, TRUTH = (0x1F, 0x3B, 0x73), (0x00, 0xB1, 0x40)


def test_masks_and_outlines_are_drawn(tmp_path: Path) -> None:
    full = draw(tmp_path / "a.png")
    nothing = [np.zeros((60, 60), bool)] * 2
    empty = draw(tmp_path / "b.png", masks={"THR": nothing, "TTT4AS": nothing})
    # THR and the ground truth are marked in one, the ground truth alone in the other.
    assert share_of(full, MASK) == pytest.approx(2 * share_of(empty, MASK), rel=0.2)
    assert share_of(full, TRUTH) > 0.001
    assert share_of(draw(tmp_path / "c.png", gt_masks=nothing), TRUTH) < share_of(full, TRUTH) / 2


def test_anomaly_scores_share_one_scale(tmp_path: Path) -> None:
    low, high = np.full((60, 60), 0.1), np.full((60, 60), 0.9)
    pixels = draw(tmp_path / "a.png", anomaly_maps=[low, high], gt_masks=[np.zeros((60, 60), bool)] * 2)
    height, width = pixels.shape[:2]
    column = int(width * 0.3)
    dark, bright = pixels[height // 3, column].sum(), pixels[2 * height // 3, column].sum()
    assert dark < 150 < 400 < bright


def test_tensors_and_masks_of_numbers_are_drawn_alike(tmp_path: Path) -> None:
    given = panels()
    numbers: dict = {name: [torch.from_numpy(x + 0.0) for x in given[name]] for name in ("images", "anomaly_maps")}
    numbers["gt_masks"] = [x.astype(np.float32) for x in given["gt_masks"]]
    numbers["masks"] = {name: [torch.from_numpy(x).float() for x in column] for name, column in given["masks"].items()}
    np.testing.assert_array_equal(draw(tmp_path / "a.png", **numbers), draw(tmp_path / "b.png"))


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    """As mathematics, ``$_$`` is an error; as text it is in the file."""
    masks = {"a$_$": panels(1)["masks"]["THR"]}
    text = {"labels": ["b$_$"], "title": "c$_$", "scale_label": "d$_$"}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        comparison(tmp_path / "f.svg", **{**panels(1), "masks": masks}, **text)
    drawn = (tmp_path / "f.svg").read_text("utf-8")
    assert all(f"{letter}$_$" in drawn for letter in "abcd")


def test_rows_may_differ_in_size_and_colour(tmp_path: Path) -> None:
    small, large = panels(1, (50, 90)), panels(1, (120, 70))
    merged = {name: small[name] + large[name] for name in ("images", "anomaly_maps", "gt_masks")}
    merged["masks"] = {name: small["masks"][name] + large["masks"][name] for name in small["masks"]}
    merged["images"][1] = np.random.default_rng(0).integers(0, 255, (120, 70, 3), dtype=np.uint8)
    merged["anomaly_maps"][0][:5] = np.nan
    assert draw(tmp_path / "ä b.png", **merged, labels=["one [b]", "two"], title="t").shape[2] == 3


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_the_suffix_is_the_format(tmp_path: Path, suffix: str) -> None:
    comparison(tmp_path / f"f.{suffix}", **panels(1))
    head = (tmp_path / f"f.{suffix}").read_bytes()[:100]
    assert {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[suffix] in head


def test_pyplot_stays_unloaded(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from ttt4as_fast.figures import comparison; z = np.zeros((8, 8))\n"
        "comparison(sys.argv[1], [z], [z], {'m': [z > 0]}, [z > 0]); print('matplotlib.pyplot' in sys.modules)"
    )
    path = tmp_path / "x.png"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images"),
        ({"gt_masks": [np.zeros((60, 60), bool)]}, "gt_masks"),
        ({"anomaly_maps": [np.zeros((60, 61))] * 2}, r"anomaly_maps\[0\]"),
        ({"anomaly_maps": [np.zeros((60, 60), complex)] * 2}, r"anomaly_maps\[0\]: .*, got complex128"),
        ({"masks": {"THR": [np.zeros((60, 60), bool)]}}, "THR"),
        ({"images": [np.zeros((60, 60), int)] * 2}, r"images\[0\]: expected uint8 or floats in \[0, 1\], got int64"),
        ({"images": [np.full((60, 60), 255.0)] * 2}, r"images\[0\]: expected values in \[0, 1\], got 255 to 255"),
        ({"images": [np.zeros((60, 60, 2))] * 2}, r"images\[0\]: expected shape \(H, W\) or \(H, W, 3\)"),
        ({"labels": ["a"]}, "labels"),
        ({"scale": (1.0, 1.0)}, "scale"),
        ({"scale": (0.0, float("nan"))}, "scale"),
        ({"scale": None}, r"scale: expected \(lowest, highest\), got None"),
        ({"gt_masks": [np.full((60, 60), 0.5)] * 2}, r"gt_masks\[0\]: expected booleans or 0 and 1"),
        ({"masks": {"THR": [np.full((60, 60), 2)] * 2}}, r"masks\['THR'\]\[0\]: expected booleans or 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw(tmp_path / "a.png", **change)
    assert not list(tmp_path.iterdir())
