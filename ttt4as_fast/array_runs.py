"""The method alone over files of anomaly maps and features that any detector has written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .io import absolute, atomic_path
from .kernels.arrays import device_of, to_numpy
from .kernels.segment import OPERATION
from .progress import Progress, silent
from .results import ResultFolder, inputs, mask_summary, write_mask

if TYPE_CHECKING:
    from .kernels.arrays import Array
    from .runs import OnError
    from .segmenter import TTT4AS


def array_pairs(
    maps: str | os.PathLike[str], features: str | os.PathLike[str]
) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Files of anomaly maps with the files of their features: one of each, or folders matched by stem.

    Returns
    -------
    pairs : list of (pathlib.Path, pathlib.Path)
    alone : list of pathlib.Path
        Files with none of the same name in the other folder.

    Raises
    ------
    FileNotFoundError, ValueError
        A path does not exist, a file and a folder, or folders without a pair.
    """
    maps, features = Path(maps), Path(features)
    for path in (maps, features):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    if maps.is_dir() != features.is_dir():
        raise ValueError(f"expected two files or two folders, got {str(maps)!r} and {str(features)!r}")
    if not maps.is_dir():
        return [(maps, features)], []
    left, right = _arrays_in(maps), _arrays_in(features)
    pairs = [(left[stem], right[stem]) for stem in sorted(left.keys() & right.keys())]
    if not pairs:
        raise ValueError(f"no NPY or NPZ files with the same name in {str(maps)!r} and {str(features)!r}")
    alone = {**left, **right}
    return pairs, [alone[stem] for stem in sorted(left.keys() ^ right.keys())]


def _arrays_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".npy", ".npz") and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"expected one file a name, got {str(found[path.stem])!r} and {str(path)!r}")
            found[path.stem] = path
    return found


def load_array(path: Path, names: Sequence[str]) -> np.ndarray:
    """The array in an NPY file (memory-mapped), or the one in an NPZ file that is alone or called one of `names`.

    Raises
    ------
    ValueError
        Not such a file, a pipe, damaged, with Python objects in it, or with several arrays of other names.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # to open a pipe would be to wait for its writer
        raise ValueError(f"{path}: not a regular file")
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        if not is_archive:  # `numpy.load` would take any other file for a pickle, and say so
            return np.lib.format.open_memmap(path, mode="r")
        with np.load(path, allow_pickle=False) as content:
            found = [name for name in names if name in content.files] or content.files
            if len(found) == 1:
                return content[found[0]]
            listed = ", ".join(content.files) or "none"
    # zipfile and NumPy's header parser raise whatever they meet in a damaged file.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as NPY or NPZ ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path}: expected one array, or one called {' or '.join(names)}; it holds {listed}")


def segment(
    segmenter: TTT4AS,
    pairs: Sequence[tuple[Path, Path]],
    folder: ResultFolder,
    on_error: OnError = lambda path, reason: None,
    on_result: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = silent,
    device: str = "cpu",
) -> dict[str, int]:
    """Test-time training alone, on anomaly maps and features that any detector has written.

    Memory: one image at a time; batches in NPY files are not loaded whole.

    Parameters
    ----------
    segmenter : TTT4AS
    pairs : sequence of (pathlib.Path, pathlib.Path)
        As from `array_pairs`. Each holds (H, W) and (C, h, w), or (B, H, W) and (B, C, h, w).
    folder : ResultFolder
        Entered. Masks are written as PNG and as NPY (bool). A result whose maps and features have not changed since
        is kept.
    on_error, on_result, progress : callable, optional
        As for `ttt4as_fast.runs.predict`. A pair that cannot be used is reported and skipped.
    device : str
        Where arrays are put for a preset that has a backend for CUDA: ``"cpu"`` (default), ``"cuda"`` or ``"cuda:N"``.

    Returns
    -------
    dict
        ``done``, ``skipped`` and ``failed``: images, or pairs that could not be read.
    """
    place = _placer(segmenter, device)
    count = {"done": 0, "skipped": 0, "failed": 0}
    sources = [inputs(pair) for pair in pairs]
    now = {absolute(pair[0]): source for pair, source in zip(pairs, sources, strict=True)}
    # All at once, since all lines are written anew; and all of a file's, which may hold fewer images than it did.
    earlier = {key: _file_of(record) for key, record in folder.records.items()}
    folder.drop([key for key, file in earlier.items() if file in now and folder.is_stale(key, now[file])])
    for number, (pair, source) in enumerate(zip(pairs, sources, strict=True)):
        try:
            images = list(_images_of(*pair, pair[0].stem))
        except ValueError as error:
            on_error(str(pair[0]), str(error).removeprefix(f"{pair[0]}: "))  # that of the features is named within
            count["failed"] += 1
            continue
        by_key = {key: (name, anomaly_map, features) for key, name, anomaly_map, features in images}
        todo = folder.start({key: name for key, (name, _, _) in by_key.items()}, dict.fromkeys(by_key, source))
        count["skipped"] += len(by_key) - len(todo)
        for key, name in todo:
            _, anomaly_map, features = by_key[key]
            try:
                record = _segment_one(segmenter, folder, key, name, place(anomaly_map), place(features))
            except (ValueError, TypeError) as error:
                on_error(key, str(error))
                count["failed"] += 1
                continue
            record["inputs"] = source
            folder.add(record)
            on_result(record)
            count["done"] += 1
            if len(pairs) == 1:
                progress("segmenting", count["done"], len(todo))
        if len(pairs) > 1:
            progress("segmenting", number + 1, len(pairs))
    return count


def _placer(segmenter: TTT4AS, device: str) -> Callable[[np.ndarray], Array]:
    """A function that copies a view of an array to where the segmenter takes it."""
    if device != "cpu":  # torch is not needed otherwise
        import torch

        from .backbones import resolve_device

        target = resolve_device(device)
        if segmenter.runs_on_cuda:
            with device_of(torch.empty(0, device=target)):
                OPERATION.resolve(segmenter.backend, target.type)
            return lambda x: torch.from_numpy(np.array(x, x.dtype.newbyteorder("="))).to(target)
    OPERATION.resolve(segmenter.backend, "cpu")  # a wrong backend is no fault of the files
    return np.array


def _images_of(maps: Path, features: Path, name: str) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(key, name, anomaly map, features) of each image in a pair of files; arrays are views."""
    psi = load_array(maps, ("anomaly_map", "anomaly_maps", "maps"))
    deep = load_array(features, ("features",))
    key = absolute(maps)
    if psi.ndim == 2 and deep.ndim == 3:
        yield key, name, psi, deep
    elif psi.ndim == 3 and deep.ndim == 4 and len(psi) == len(deep) > 0:
        digits = max(4, len(str(len(psi) - 1)))
        for i, (one, its) in enumerate(zip(psi, deep, strict=True)):
            yield f"{key}[{i}]", f"{name}_{i:0{digits}d}", one, its
    else:
        raise ValueError(
            "expected shapes (H, W) and (C, h, w), or (B, H, W) and (B, C, h, w) with B >= 1; "
            f"got {psi.shape} and {deep.shape} in {str(features)!r}"
        )


def _file_of(record: dict[str, Any]) -> str:
    """The file of anomaly maps that a result is from, whose name `_images_of` made its path of; "" if it says none."""
    path = record["path"]
    return next((file for file in record.get("inputs") or () if path == file or path.startswith(f"{file}[")), "")


def _segment_one(
    segmenter: TTT4AS, folder: ResultFolder, key: str, name: str, anomaly_map: Array, features: Array
) -> dict[str, Any]:
    began = time.perf_counter()
    out = segmenter(anomaly_map, features)
    pred_mask, status = to_numpy(out.pred_mask), out.status
    spent = 1e3 * (time.perf_counter() - began)
    files = {"mask": f"masks/{name}.png", "array": f"masks/{name}.npy"}
    write_mask(folder.folder / files["mask"], pred_mask)
    with atomic_path(folder.folder / files["array"]) as temporary:
        np.save(temporary, pred_mask)
    height, width = anomaly_map.shape
    record = {"path": key, "name": name, "width": width, "height": height, "status": status}
    summary = mask_summary(pred_mask, to_numpy(anomaly_map))
    return {**record, **summary, "files": files, "milliseconds": {"ttt4as": round(spent, 3)}}
