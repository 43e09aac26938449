"""What a run leaves behind for each image - mask, anomaly map, overlay, one line of JSON - written so that it can stop.

Every file is written whole, the line of JSON last; a line is complete or absent. A run started again reads the lines,
skips the images they name, unless their input files have changed since, and does the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .io import absolute, atomic_path, check_folder, naming

if TYPE_CHECKING:
    from PIL import Image

MAP_FORMATS = ("tiff", "npy", "none")
_KINDS = ("masks", "maps", "overlays")
_FORMAT_VERSION = 1
_STRIP = 1 << 20  # pixels that an overlay works on at a time


# ---------------------------------------------------------------- one image


def regions(mask: np.ndarray, anomaly_map: np.ndarray) -> list[dict[str, Any]]:
    """The connected regions of a mask (neighbours across corners count), highest peak first.

    Parameters
    ----------
    mask : numpy.ndarray
        (H, W) bool.
    anomaly_map : numpy.ndarray
        (H, W) floats, the same grid. Read inside the mask only.

    Returns
    -------
    list of dict
        ``x``, ``y``, ``width``, ``height``: bounding box in pixels, from the top left corner; ``area``: pixels;
        ``peak_score``: largest value of the map in the region, and ``peak_x``, ``peak_y``: where it is.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    from scipy import ndimage

    mask, anomaly_map = np.asarray(mask, dtype=bool), np.asarray(anomaly_map)
    if mask.ndim != 2 or mask.shape != anomaly_map.shape:
        raise ValueError(f"mask: expected (H, W) like anomaly_map, got {mask.shape} and {anomaly_map.shape}")
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    found = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == i
        scores = np.where(inside, anomaly_map[rows, columns], -np.inf)
        peak_y, peak_x = np.unravel_index(int(np.argmax(scores)), scores.shape)
        found.append(
            {
                "x": columns.start,
                "y": rows.start,
                "width": columns.stop - columns.start,
                "height": rows.stop - rows.start,
                "area": int(np.count_nonzero(inside)),
                "peak_score": float(scores[peak_y, peak_x]),
                "peak_x": int(columns.start + peak_x),
                "peak_y": int(rows.start + peak_y),
            }
        )
    return sorted(found, key=lambda region: -region["peak_score"])


def mask_summary(mask: np.ndarray, anomaly_map: np.ndarray) -> dict[str, Any]:
    """``mask_area`` (pixels), ``mask_share`` and ``regions`` of a mask (H, W) and the map on the same grid."""
    area = int(np.count_nonzero(mask))
    return {"mask_area": area, "mask_share": area / mask.size, "regions": regions(mask, anomaly_map)}


def overlay(
    image: Image.Image, anomaly_map: np.ndarray, mask: np.ndarray, scale: tuple[float, float] | None
) -> Image.Image:
    """The image with the anomaly map over it and the outline of the mask.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB, width x height.
    anomaly_map : numpy.ndarray
        (height, width) floats; NaN where the model did not look, which is shown darkened.
    mask : numpy.ndarray
        (height, width) bool.
    scale : (float, float) or None
        Scores shown as transparent and as the full colour: the same for all images, or they do not compare. None
        leaves the map out.

    Returns
    -------
    PIL.Image.Image
        RGB, the size of `image`.
    """
    from matplotlib import colormaps
    from PIL import Image
    from scipy import ndimage

    picture = np.array(image.convert("RGB"))
    rows = max(1, _STRIP // picture.shape[1])
    for start in range(0, len(picture), rows):
        strip, scores = picture[start : start + rows].astype(np.float32), anomaly_map[start : start + rows]
        seen = np.isfinite(scores)
        if scale is not None:
            low, high = scale
            share = np.clip((np.where(seen, scores, low) - low) / max(high - low, 1e-12), 0, 1)
            colour = colormaps["inferno"](share)[..., :3].astype(np.float32) * 255
            weight = (0.7 * share)[..., None].astype(np.float32)
            strip = (1 - weight) * strip + weight * colour
        strip[~seen] *= 0.4
        picture[start : start + rows] = np.clip(np.rint(strip), 0, 255)
    thickness = max(1, round(min(mask.shape) / 256))
    picture[mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=thickness, border_value=1)] = (0, 229, 255)
    return Image.fromarray(picture)


def mask_image(mask: np.ndarray) -> Image.Image:
    """A bool (H, W) as an 8-bit image of 0 and 255."""
    from PIL import Image

    return Image.fromarray(mask.astype(np.uint8) * 255)


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image as its suffix says (.png or .tiff), whole or not at all; `options` are Pillow's.

    It is encoded in memory: libtiff takes no path that is not UTF-8, and says of a full disk neither that nor where.
    """
    encoded = io.BytesIO()
    image.save(encoded, format=path.suffix[1:], **options)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a bool (H, W) as an 8-bit PNG of 0 and 255, whole or not at all."""
    write_image(path, mask_image(mask))


def write_map(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a float32 (H, W) as TIFF (one 32-bit float sample a pixel) or NPY, by suffix, whole or not at all."""
    from PIL import Image

    values = np.ascontiguousarray(anomaly_map, dtype=np.float32)
    if path.suffix == ".npy":
        with atomic_path(path) as temporary:
            np.save(temporary, values)
    else:
        write_image(path, Image.fromarray(values), compression="tiff_lzw")


# ---------------------------------------------------------------- the folder of a run


Inputs = dict[str, list[int]]  # absolute path -> size in bytes and time of change in nanoseconds


def inputs(paths: Sequence[str | os.PathLike[str]]) -> Inputs:
    """Size and time of change of the files that a result is made from; taken before they are read.

    By them a later run notices that a file has changed. A missing file is left out: reading it raises the error.
    """
    found = {}
    for path in paths:
        try:
            state = os.stat(path)
        except OSError:
            continue
        found[absolute(path)] = [state.st_size, state.st_mtime_ns]
    return found


class ResultFolder:
    """The output folder of a run: which images are done, what their files are called, and the lines of JSON.

    ``results.jsonl`` has a line for each finished image, with the `inputs` it comes from, ``run.json`` the settings;
    the images' files lie in ``masks/``, ``maps/`` and ``overlays/``. To be used as a context manager; meanwhile a
    second run on the same folder is refused (where the system has POSIX locks).

    Parameters
    ----------
    folder : path-like
        Created, with its parents, if absent.
    settings : dict
        What the results depend on, as JSON. A folder with results of other settings is refused.
    about : dict, optional
        Recorded in ``run.json`` beside the settings and not compared: versions, paths.
    overwrite : bool
        Do images again that are done; with other settings, drop the earlier results first. Default False.

    Raises
    ------
    ValueError
        The folder holds results of other settings, or files in the places above that no run wrote.
    OSError
        The folder cannot be made or written, or another run is writing to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: dict[str, Any],
        about: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.settings = json.loads(json.dumps(settings))  # tuples as they come back from the file: lists
        self.records: dict[str, dict[str, Any]] = {}
        self._about = about or {}

    def __enter__(self) -> ResultFolder:
        check_folder(self.folder, "output")
        if not (self.folder / "run.json").exists():
            for name in (*_KINDS, "results.jsonl"):
                path = self.folder / name
                if path.is_file() or (path.is_dir() and any(path.iterdir())):
                    raise ValueError(f"output: {str(path)!r} is not of an earlier run; choose another folder")
        for name in ("", *_KINDS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            self._read()
            with atomic_path(self.folder / "run.json") as temporary:
                run = {"format_version": _FORMAT_VERSION, "settings": self.settings, **self._about}
                temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def lines(self) -> Path:
        """``results.jsonl``."""
        return self.folder / "results.jsonl"

    def _read(self) -> None:
        """Read what earlier runs finished; drop half a line, lost files and what `overwrite` says to drop."""
        text = self.lines.read_bytes() if self.lines.exists() else b""
        records = []
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # the run was killed while it wrote this one
            try:
                record = json.loads(line)
                record["path"], record["name"], record["files"].items()
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(
                    f"output: line {number} of {str(self.lines)!r} is not a result; choose another folder"
                ) from None
            records.append(record)
        known = {name for record in records for name in record["files"].values()}
        for kind in _KINDS:
            for path in (self.folder / kind).glob(".*-*"):
                # A killed run's temporary file, not the result of a hidden image.
                if path.suffix in (".png", ".tiff", ".npy") and f"{kind}/{path.name}" not in known:
                    path.unlink()
        same = not records or self._earlier_settings() == self.settings
        if not same and not self.overwrite:
            raise ValueError(
                f"output: {str(self.folder)!r} holds results of another model or other settings (see its run.json); "
                "choose another folder, or overwrite to drop them"
            )
        for record in records:
            if same and all((self.folder / name).is_file() for name in record["files"].values()):
                self.records[record["path"]] = record
            else:
                self._remove_files(record)
        kept = b"".join(map(_line, self.records.values()))
        if kept != text:
            self._rewrite()

    def _earlier_settings(self) -> Any:
        run = self.folder / "run.json"
        try:
            return json.loads(run.read_text(encoding="utf-8"))["settings"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"output: {str(run)!r} is not of an earlier run; choose another folder") from None

    def _remove_files(self, record: dict[str, Any]) -> None:
        for name in record["files"].values():
            path = Path(name)
            if len(path.parts) == 2 and path.parts[0] in _KINDS:  # a doctored line must not reach out of the folder
                (self.folder / path).unlink(missing_ok=True)

    def _rewrite(self) -> None:
        with atomic_path(self.lines) as temporary:
            temporary.write_bytes(b"".join(map(_line, self.records.values())))

    def start(self, wanted: Mapping[str, str], sources: Mapping[str, Inputs]) -> list[tuple[str, str]]:
        """The images still to do with the names of their files, in order; those done from the same files are left out.

        Where a name is taken - ``a/000.png`` and ``b/000.png`` - a digest of the image's key is appended, so that no
        image writes over another's files, in this run or a later one.

        Parameters
        ----------
        wanted : mapping of str to str
            What identifies an image (its absolute path: ``path`` in its record) -> the name its files should have.
        sources : mapping of str to dict
            The same keys -> what `inputs` says of the files that the image is made from.

        Returns
        -------
        list of (str, str)
        """
        done = wanted.keys() & self.records.keys()
        self.drop([key for key in done if self.is_stale(key, sources[key])])
        names = {key: _shortened(name) for key, name in wanted.items()}
        count = Counter(name.casefold() for name in names.values())
        taken = {record["name"].casefold() for record in self.records.values()}
        todo = []
        for key, name in names.items():
            if key in self.records:
                continue
            if name.casefold() in taken or count[name.casefold()] > 1:
                name = f"{name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:10]}"
            taken.add(name.casefold())
            todo.append((key, name))
        return todo

    def is_stale(self, key: str, source: Inputs) -> bool:
        """Whether the result that there is of an image is to be made again, now that its input files are `source`."""
        return self.overwrite or self.records[key].get("inputs") != source

    def drop(self, keys: Collection[str]) -> None:
        """Remove results with their files. It writes all lines anew: call it once for many."""
        for key in keys:
            self._remove_files(self.records.pop(key))
        if keys:
            self._rewrite()

    def add(self, record: dict[str, Any]) -> None:
        """Append the line of a finished image, whose files are in place."""
        with naming(self.lines), open(self.lines, "ab") as file:
            file.write(_line(record))
        self.records[record["path"]] = record


def _shortened(name: str) -> str:
    """`name`, short enough to take a digest and a suffix within the 255 bytes of a file name."""
    while len(os.fsencode(name)) > 200:
        name = name[:-1]
    return name


def _line(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8
        text = json.dumps(record, allow_nan=False).encode("ascii")
    return text + b"\n"


def _lock(folder: Path) -> IO[bytes]:
    """An open file that holds the folder's lock until it is closed or the process ends, however it ends."""
    file = open(folder / ".lock", "ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        file.close()
        raise BlockingIOError(f"output: another run is writing to {str(folder)!r}") from None
    return file


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
