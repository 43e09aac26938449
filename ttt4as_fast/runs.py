"""The jobs behind the commands `fit` and `predict`, free of terminals.

A job that meets a file it cannot read reports it through `on_error` and goes on with the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import ImageError, read_image
from .io import absolute, check_folder
from .kernels.arrays import check_float, check_int, check_option, to_numpy
from .progress import Progress, silent
from .results import (
    MAP_FORMATS,
    ResultFolder,
    inputs,
    mask_summary,
    overlay,
    write_image,
    write_map,
    write_mask,
)

if TYPE_CHECKING:
    from PIL import Image

    from .patchcore import PatchCore
    from .segmenter import TTT4AS

OnError = Callable[[str, str], None]  # (path, reason)


# ---------------------------------------------------------------- fit


def nominal_images(folder: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """The nominal images that `folder` stands for: its own, else those of the set it is.

    Returns
    -------
    training : list of pathlib.Path
    validation : list of pathlib.Path
        The set's own validation part; empty where it has none, as most have.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, ValueError
        No such folder, or nothing in it that a layout of `ttt4as_fast.datasets` takes for nominal images.
    """
    from .datasets import load_dataset

    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {str(folder)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder, got the file {str(folder)!r}")
    dataset = load_dataset(folder)
    return [sample.image for sample in dataset.train], [sample.image for sample in dataset.validation]


def split_nominal(paths: Sequence[Path], validation_share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """A seeded split into training and validation images, each in the order of `paths`.

    Parameters
    ----------
    paths : sequence of pathlib.Path
    validation_share : float
        In [0, 0.9]. Rounded to whole images, at least one unless it is 0.
    seed : int

    Raises
    ------
    ValueError
        No image is left to train on, or a share out of range.
    """
    share = check_float(validation_share, "validation_share", 0.0, 0.9)
    n = max(1, round(share * len(paths))) if share > 0 else 0
    if len(paths) - n < 1:
        raise ValueError(
            f"validation_share: expected images left to train on, got {len(paths)} in all and {n} to validate; "
            "give more images, or a share of 0"
        )
    chosen = set(np.random.default_rng(check_int(seed, "seed", 0)).permutation(len(paths))[:n].tolist())
    training = [path for i, path in enumerate(paths) if i not in chosen]
    return training, [path for i, path in enumerate(paths) if i in chosen]


def readable(paths: Sequence[Path], on_error: OnError, progress: Progress = silent) -> list[Path]:
    """Those of `paths` that decode completely; the others are reported. Nothing is kept in memory."""
    good = []
    for i, path in enumerate(paths):
        try:
            read_image(path)
            good.append(path)
        except ImageError as error:
            on_error(str(path), error.reason)
        progress("checking images", i + 1, len(paths))
    return good


def fit(
    model: PatchCore,
    paths: Sequence[Path],
    output: str | os.PathLike[str],
    validation_share: float = 0.2,
    seed: int = 0,
    on_error: OnError = lambda path, reason: None,
    progress: Progress = silent,
    validation: Sequence[Path] = (),
) -> dict[str, Any]:
    """Fit a detector on nominal images, calibrate it on others, and save it.

    Parameters
    ----------
    model : PatchCore
        Not fitted yet.
    paths : sequence of pathlib.Path
        Nominal images.
    output : path-like
        Model file, made whole or not at all. Its folder is made if absent.
    validation_share : float
        In [0, 0.9], default 0.2: of `paths`, held out for the nominal statistics and the image threshold where there
        is no `validation`. 0: no calibration at all, and the model neither thresholds nor gates.
    seed : int
        Of the split.
    on_error : callable
        Called as ``on_error(path, reason)`` for a file that cannot be read.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.
    validation : sequence of pathlib.Path
        Nominal images to calibrate on instead of a share of `paths`, all of which are then trained on.

    Returns
    -------
    dict
        Counts, the image threshold (None without validation) and seconds.

    Raises
    ------
    ValueError
        None of the images, or of those for validation, can be read, or too few are left.
    OSError
        The model cannot be written.
    """
    output = Path(output)
    check_folder(output.parent, "output")
    own = list(validation) if check_float(validation_share, "validation_share", 0.0, 0.9) > 0 else []
    good = set(readable([*paths, *own], on_error, progress))
    training, held_out = [path for path in paths if path in good], [path for path in own if path in good]
    for name, found, given in (("", training, paths), (" validation", held_out, own)):
        if given and not found:
            raise ValueError(f"none of the {len(given)}{name} images can be read")
    if not own:
        training, held_out = split_nominal(training, validation_share, seed)
    began = time.perf_counter()
    model.fit(training, progress=progress)
    if held_out:
        model.calibrate(held_out, progress=progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save(output)
    return {
        "model": str(output),
        "n_training": len(training),
        "n_validation": len(held_out),
        "n_failed": len(paths) + len(own) - len(training) - len(held_out),
        "memory_bank": list(model.memory_bank_.shape),
        "image_threshold": model.image_threshold_,
        "seconds": round(time.perf_counter() - began, 1),
    }


# ---------------------------------------------------------------- predict


def overlay_scale(model: PatchCore) -> tuple[float, float] | None:
    """Scores shown as transparent and in full colour: from the nominal mean to as far beyond the nominal maximum.

    None for a model without nominal statistics. The highest score of any nominal image lies in the middle.
    """
    stats = model.nominal_statistics_
    if stats is None:
        return None
    typical, highest = float(stats.mean.mean()), stats.max_threshold()
    return typical, typical + 2 * max(highest - typical, 1e-6)


def predict(
    model: PatchCore,
    segmenter: TTT4AS,
    paths: Sequence[Path],
    folder: ResultFolder,
    label_threshold: float | None = None,
    map_format: str = "tiff",
    draw_overlay: bool = True,
    batch_size: int = 8,
    on_error: OnError = lambda path, reason: None,
    on_result: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = silent,
) -> dict[str, int]:
    """Mark the anomalous pixels of image files, and write what each gives to `folder` before the next batch is read.

    Memory: one batch, however many images there are.

    Parameters
    ----------
    model : PatchCore
        Fitted.
    segmenter : TTT4AS
        Its ``image_threshold``, if any, gates.
    paths : sequence of pathlib.Path
        Image files. Those that `folder` holds a result of, and that have not changed since, are skipped.
    folder : ResultFolder
        Entered.
    label_threshold : float, optional
        Image score from which an image is labelled ``"defective"``, else ``"nominal"``; without it the label is null.
    map_format : {"tiff", "npy", "none"}
        How anomaly maps are written. NaN where the model did not look: outside its centre crop.
    draw_overlay : bool
        Whether overlays are written.
    batch_size : int
        Images the model takes at once, >= 1.
    on_error, on_result, progress : callable, optional
        ``on_error(path, reason)``, ``on_result(record)``, ``progress(stage, done, total)``.

    Returns
    -------
    dict
        ``done``, ``skipped`` and ``failed``: images.

    Raises
    ------
    OSError
        A result cannot be written. What was written before stands.
    """
    check_option(map_format, "map_format", MAP_FORMATS)
    batch_size = check_int(batch_size, "batch_size", 1)
    given = {absolute(path): path for path in paths}
    sources = {key: inputs([key]) for key in given}
    todo = folder.start({key: path.stem for key, path in given.items()}, sources)
    count = {"done": 0, "skipped": len(given) - len(todo), "failed": 0}
    scale = overlay_scale(model) if draw_overlay else None
    for start in range(0, len(todo), batch_size):
        loaded = []
        for key, name in todo[start : start + batch_size]:
            began = time.perf_counter()
            try:
                loaded.append((key, name, read_image(key), 1e3 * (time.perf_counter() - began)))
            except ImageError as error:
                on_error(str(given[key]), error.reason)
                count["failed"] += 1
        if loaded:
            outcome = predict_batch(model, segmenter, [image for _, _, image, _ in loaded], label_threshold)
            for (key, name, image, read), one in zip(loaded, outcome, strict=True):
                one["milliseconds"]["decode"] += read
                try:
                    record = _write_result(model, folder, key, name, image, one, map_format, draw_overlay, scale)
                    record["inputs"] = sources[key]
                    folder.add(record)
                except ValueError as error:  # what this image gives cannot be encoded; a full disk concerns all
                    on_error(str(given[key]), f"its result cannot be written ({error})")
                    count["failed"] += 1
                    continue
                on_result(record)
                count["done"] += 1
        progress("predicting", min(start + batch_size, len(todo)), len(todo))
    return count


def predict_batch(
    model: PatchCore, segmenter: TTT4AS, images: list[Image.Image], label_threshold: float | None
) -> Iterator[dict[str, Any]]:
    """Detector and method on decoded images, without touching a disk.

    Parameters
    ----------
    model, segmenter, label_threshold
        As for `predict`.
    images : list of PIL.Image.Image
        At least one; any sizes and modes.

    Yields
    ------
    dict
        For each image ``anomaly_map`` and ``pred_mask``, both (crop_size, crop_size), which
        `PatchCore.inverse_transform_mask` and `inverse_transform_map` bring to the pixels of the image; ``score``,
        ``label``, ``status`` and ``milliseconds``: its share of the batch, by stage.
    """
    prediction = model.predict(images, batch_size=len(images), keep_on_device=segmenter.runs_on_cuda)
    began = time.perf_counter()
    out = segmenter(prediction.anomaly_map, prediction.features, prediction.pred_score)
    masks, maps, scores = map(to_numpy, (out.pred_mask, prediction.anomaly_map, prediction.pred_score))
    spent = {**prediction.milliseconds, "ttt4as": 1e3 * (time.perf_counter() - began)}
    for i, status in enumerate(out.status):
        score = float(scores[i])
        label = None if label_threshold is None else "defective" if score >= label_threshold else "nominal"
        yield {
            "anomaly_map": maps[i],
            "pred_mask": masks[i],
            "score": score,
            "label": label,
            "status": status,
            "milliseconds": {stage: total / len(images) for stage, total in spent.items()},
        }


def _write_result(
    model: PatchCore,
    folder: ResultFolder,
    key: str,
    name: str,
    image: Image.Image,
    one: dict[str, Any],
    map_format: str,
    draw_overlay: bool,
    scale: tuple[float, float] | None,
) -> dict[str, Any]:
    """Write the files of one image and return its record."""
    began = time.perf_counter()
    size = (image.height, image.width)
    mask = model.inverse_transform_mask(one.pop("pred_mask"), size)
    anomaly_map = model.inverse_transform_map(one.pop("anomaly_map"), size)
    files = {"mask": f"masks/{name}.png"}
    write_mask(folder.folder / files["mask"], mask)
    if map_format != "none":
        files["map"] = f"maps/{name}.{map_format}"
        write_map(folder.folder / files["map"], anomaly_map)
    if draw_overlay:
        files["overlay"] = f"overlays/{name}.png"
        write_image(folder.folder / files["overlay"], overlay(image, anomaly_map, mask, scale))
    record = {"path": key, "name": name, "width": image.width, "height": image.height, **one}
    record.update(mask_summary(mask, anomaly_map), files=files)
    record["milliseconds"]["write"] = 1e3 * (time.perf_counter() - began)
    record["milliseconds"] = {stage: round(spent, 3) for stage, spent in record["milliseconds"].items()}
    return record
