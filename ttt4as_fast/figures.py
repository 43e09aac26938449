"""Figures: rows of images with their anomaly maps, masks and ground truth, in the order of the paper's Fig. 1.

matplotlib is used through its objects only: no pyplot, no global state, no display.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .io import atomic_path
from .kernels.arrays import as_float_array, check_float, to_numpy
from .metrics import as_mask, mask_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRUTH = "#00b140"
_MASK = "#1f3b73"
_PAPER = "#f4f4f4"


def comparison(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray],
    anomaly_maps: Sequence[np.ndarray],
    masks: Mapping[str, Sequence[np.ndarray]],
    gt_masks: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    scale: tuple[float, float] = (0.0, 1.0),
    scale_label: str = "anomaly score",
    title: str | None = None,
) -> None:
    """Draw one row an image: input, anomaly score, each method's mask with its F1, ground truth.

    The outline of the ground truth stands on the anomaly score and on the masks. The colours of the anomaly score mean
    the same in all rows.

    Parameters
    ----------
    path : path-like
        File to write; its suffix (``.png``, ``.pdf``, ``.svg``) is the format.
    images : sequence of arrays or tensors
        (H, W) or (H, W, 3), uint8 or floats in [0, 1]. Sizes may differ between rows.
    anomaly_maps : sequence of arrays or tensors
        (H, W) floats; NaN where there is no score.
    masks : mapping of str to sequence of arrays or tensors
        Column title -> (H, W) of bool or {0, 1} for each image.
    gt_masks : sequence of arrays or tensors
        (H, W) of bool or {0, 1}.
    labels : sequence of str, optional
        Written beside the rows.
    scale : (float, float)
        Scores at the ends of the colour bar. Default (0, 1).
    scale_label : str
        What the colour bar counts.
    title : str, optional
        Above the figure.

    Raises
    ------
    ValueError, TypeError
        No images, columns of different lengths, a panel of another size than its image, an image or a mask of other
        values, or a `scale` that is empty or none.
    """
    columns = {"anomaly_maps": anomaly_maps, "gt_masks": gt_masks, **{f"masks[{k!r}]": v for k, v in masks.items()}}
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
    for name, column in columns.items():
        if len(column) != len(images):
            raise ValueError(f"{name}: expected one for each of {len(images)} images, got {len(column)}")
        for i, picture in enumerate(column):
            if np.shape(picture) != np.shape(images[i])[:2]:
                raise ValueError(f"{name}[{i}]: expected shape {np.shape(images[i])[:2]}, got {np.shape(picture)}")
    try:
        low, high = scale
    except (TypeError, ValueError):
        raise TypeError(f"scale: expected (lowest, highest), got {scale!r}") from None
    low, high = check_float(low, "scale[0]", -np.inf), check_float(high, "scale[1]", -np.inf)
    if not low < high:
        raise ValueError(f"scale: expected lowest < highest, got {scale!r}")
    images = [np.asarray(to_numpy(x)) for x in images]
    anomaly_maps = [to_numpy(as_float_array(x, f"anomaly_maps[{i}]", (2,))) for i, x in enumerate(anomaly_maps)]
    for i, image in enumerate(images):
        _check_image(image, f"images[{i}]")
    gt_masks = [as_mask(mask, f"gt_masks[{i}]") for i, mask in enumerate(gt_masks)]
    masks = {k: [as_mask(mask, f"masks[{k!r}][{i}]") for i, mask in enumerate(masks[k])] for k in masks}
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    n_rows, n_columns = len(images), 3 + len(masks)
    # In inches: square panels of one size, a strip on the left for the labels, one below for colour bar and legend.
    side, gap, left, right, top, bottom = 1.5, 0.06, 0.3 if labels is not None else 0.08, 0.08, 0.28, 0.55
    top += 0.3 if title else 0.0
    width = left + n_columns * side + (n_columns - 1) * gap + right
    height = top + n_rows * side + (n_rows - 1) * gap + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    if title:
        figure.text(0.5, 1 - 0.17 / height, title, ha="center", va="center", fontsize=10, parse_math=False)

    def panel(row: int, column: int) -> Axes:
        x = left + column * (side + gap)
        y = height - top - row * (side + gap) - side
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color="0.55", linewidth=0.5)
        return axes

    for row, (image, anomaly_map, gt) in enumerate(zip(images, anomaly_maps, gt_masks, strict=True)):
        panels = [panel(row, column) for column in range(n_columns)]
        white = 255 if image.dtype == np.uint8 else 1
        panels[0].imshow(image, cmap="gray", vmin=0, vmax=white, interpolation="antialiased")
        _scale_bar(panels[0], image.shape[1])
        panels[1].imshow(anomaly_map, cmap="inferno", vmin=low, vmax=high)
        panels[1].set_facecolor("0.8")  # where there is no score
        for axes, method in zip(panels[2:], masks, strict=False):
            _show_mask(axes, masks[method][row])
            f1 = mask_counts(masks[method][row], gt).f1
            _note(axes, f"F1 {f1:.2f}", masks[method][row] | gt)
        _show_mask(panels[-1], gt)
        _note(panels[-1], f"{100 * np.mean(gt):.1f} % of the pixels", gt)
        for axes in panels[1:-1]:
            _outline(axes, gt)
        if labels is not None:
            panels[0].set_ylabel(labels[row], fontsize=9, labelpad=4, parse_math=False)
        if row == 0:
            for axes, name in zip(panels, ["Input", "Anomaly score", *masks, "Ground truth"], strict=True):
                axes.set_title(name, fontsize=9, pad=5, parse_math=False)

    bar = figure.add_axes(((left + side + gap) / width, (bottom - 0.17) / height, side / width, 0.08 / height))
    scores = ScalarMappable(Normalize(low, high), "inferno")
    colours = figure.colorbar(scores, cax=bar, orientation="horizontal", extend="both", extendfrac=0.03)
    colours.set_label(scale_label, fontsize=7, labelpad=2, parse_math=False)
    colours.ax.tick_params(labelsize=7, length=2, pad=1.5)
    colours.outline.set_linewidth(0.5)
    _legend(figure, 1 - right / width, (bottom - 0.13) / height)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=200, format=Path(path).suffix[1:] or "png")


def _check_image(image: np.ndarray, name: str) -> None:
    """Refuse what would be drawn all white: floats up to 255, and integers of 64 bits, which look like them."""
    if image.ndim != 2 and image.shape[2:] != (3,):
        raise ValueError(f"{name}: expected shape (H, W) or (H, W, 3), got {image.shape}")
    if image.dtype == np.uint8:
        return
    if image.dtype.kind != "f":
        raise TypeError(f"{name}: expected uint8 or floats in [0, 1], got {image.dtype}")
    if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN fails too
        raise ValueError(f"{name}: expected values in [0, 1], got {image.min():g} to {image.max():g}")


def _show_mask(axes: Axes, mask: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(
        np.asarray(mask, dtype=float), cmap=ListedColormap([_PAPER, _MASK]), vmin=0, vmax=1, interpolation="nearest"
    )


def _outline(axes: Axes, gt: np.ndarray) -> None:
    """The border of a mask, also where it meets the image's edge."""
    gt = np.pad(np.asarray(gt, dtype=float), 1)
    if gt.any():
        at = np.arange(-1, gt.shape[0] - 1), np.arange(-1, gt.shape[1] - 1)
        axes.contour(at[1], at[0], gt, levels=[0.5], colors=["white"], linewidths=2.0)
        axes.contour(at[1], at[0], gt, levels=[0.5], colors=[_TRUTH], linewidths=1.1)
        axes.set_xlim(-0.5, gt.shape[1] - 2.5)
        axes.set_ylim(gt.shape[0] - 2.5, -0.5)


def _note(axes: Axes, text: str, busy: np.ndarray) -> None:
    """Text in the corner where the least is marked; the lower right one, all else equal."""
    height, width = busy.shape
    lower, right = busy[-(height // 7 + 1) :], slice(-(width // 2), None)
    upper, left = busy[: height // 7 + 1], slice(None, width // 2)
    corners = [(0.96, 0.04, lower[:, right]), (0.04, 0.04, lower[:, left])]
    corners += [(0.96, 0.96, upper[:, right]), (0.04, 0.96, upper[:, left])]
    x, y, _ = min(corners, key=lambda corner: np.count_nonzero(corner[2]))
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    across, along = ("right" if x > 0.5 else "left"), ("top" if y > 0.5 else "bottom")
    axes.text(x, y, text, transform=axes.transAxes, ha=across, va=along, fontsize=7, bbox=box)


def _scale_bar(axes: Axes, width: int) -> None:
    """A bar of a round number of pixels, about a quarter of the image."""
    from matplotlib import patheffects

    step = 10.0 ** np.floor(np.log10(max(width / 4, 1)))
    length = int(max(k * step for k in (1, 2, 5) if k * step <= max(width / 4, 1)))
    dark = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    x, y = 0.05, 0.06
    bar = [x, x + length / width]
    axes.plot(
        bar,
        [y, y],
        transform=axes.transAxes,
        color="white",
        linewidth=2.2,
        solid_capstyle="butt",
        path_effects=[patheffects.withStroke(linewidth=4, foreground="black")],
    )
    axes.text(x, y + 0.035, f"{length} px", transform=axes.transAxes, color="white", fontsize=7, path_effects=dark)


def _legend(figure: Figure, x: float, y: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], color=_TRUTH, linewidth=1.5, label="outline of the ground truth"),
            Patch(facecolor=_MASK, label="marked as anomalous"),
        ],
        loc="center right",
        bbox_to_anchor=(x, y),
        ncols=2,
        frameon=False,
        fontsize=7,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
    )
