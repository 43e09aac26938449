"""The folder layouts of the public anomaly detection sets: which images there are, of what kind, with which mask.

A layout is a function ``root -> Dataset`` that knows where a set keeps its images and masks and reads no pixel that it
does not need; `load_dataset` picks one by name or by looking. `read_image` and the like, from `images`, stand here too.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .images import (
    IMAGE_SUFFIXES,
    ImageError,
    contents,
    image_size,
    images_in,
    list_images,
    natural_key,
    read_image,
    read_mask,
    shorten,
)
from .kernels.arrays import check_option

__all__ = [
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "Dataset",
    "ImageError",
    "Sample",
    "image_size",
    "list_images",
    "load_dataset",
    "read_image",
    "read_mask",
]

NOMINAL_NAMES = ("good", "ok", "normal", "nominal")
NOMINAL_KIND = "good"
MASK_FOLDERS = ("ground_truth", "masks")

# Where a set comes without a split, every fifth (Kolektor) or tenth (VisA) nominal image is kept for testing.
_KOLEKTOR_TEST_STEP = 5
_VISA_TEST_STEP = 10


@dataclass(frozen=True)
class Sample:
    """One image of a set: its path, `label` (0 nominal, 1 defective), kind of defect and mask (None: there is none)."""

    image: Path
    label: int
    kind: str = NOMINAL_KIND
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A set on disk. `train` and `validation` hold nominal images only; `validation` is empty in most layouts."""

    name: str
    layout: str
    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of defect among the test images, sorted."""
        return tuple(sorted({sample.kind for sample in self.test if sample.label}, key=natural_key))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def load_dataset(root: str | os.PathLike[str], layout: str = "auto") -> Dataset:
    """The images of a set on disk, with labels, kinds of defect and masks.

    Parameters
    ----------
    root : path-like
        The folder of one category (``screw``, not ``mvtec_ad``).
    layout : str, default "auto"
        ``"auto"`` takes the first of the following that fits:

        - ``"visa"``: ``Data/Images/{Normal,Anomaly}``, ``Data/Masks/Anomaly``. Kinds come from ``image_anno.csv``, the
          split from ``../split_csv/1cls.csv``; without the latter every tenth nominal image is kept for testing.
        - ``"mvtec_3d"``: ``{train,validation,test}/<kind>/rgb``, ``test/<kind>/gt``. The point clouds are not read.
        - ``"btad"``: ``train/ok``, ``test/{ok,ko}``, ``ground_truth/ko``; the suffix of a mask may differ from its
          image's.
        - ``"kolektor"``: KolektorSDD (``kos01/Part0.jpg``, ``Part0_label.bmp``; it comes without a split: every fifth
          nominal image and all defective ones are for testing) or KolektorSDD2 (``{train,test}/10000.png``,
          ``10000_GT.png``; the defective images of its training part are left out). Here the masks are read, since
          they are the labels.
        - ``"mvtec_ad"``: ``train/good``, ``test/<kind>``, ``ground_truth/<kind>/<image>_mask.png`` (or without
          ``_mask``). Every defective image must have its mask.
        - ``"folder"``: only images, which are then nominal training images; or ``good/`` beside one folder a kind of
          defect; or ``train/`` (images, or a ``good`` folder) with an optional ``test/<kind>``. ``ok``, ``normal`` and
          ``nominal`` stand for ``good``. Masks are found in ``ground_truth/<kind>`` or ``masks/<kind>`` and may be
          missing.

    Returns
    -------
    Dataset
        Paths are absolute if `root` is. Images are in natural order within each kind, nominal ones first.

    Raises
    ------
    FileNotFoundError
        `root` is no folder.
    ValueError
        No layout fits, the named layout does not, it holds no training image, or a mask is missing; a plain folder has
        images of its own beside ``good`` or ``train``; a table of VisA's cannot be read.
    ImageError
        A Kolektor mask cannot be read.
    """
    check_option(layout, "layout", ("auto", *_LAYOUTS))
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: expected a folder, got {str(root)!r}, which is no folder")
    if layout == "auto":
        layout = _detect(root) or _raise_unknown(root)
    elif not _LAYOUTS[layout].fits(root):
        raise ValueError(
            f"root: {str(root)!r} has not the layout {layout!r}: "
            f"looked for {_LAYOUTS[layout].signs}; found {contents(root)}"
        )
    dataset = _LAYOUTS[layout].load(root)
    if not dataset.train:
        raise ValueError(f"root: {str(root)!r} (layout {layout!r}) holds no nominal training images")
    return dataset


def _detect(root: Path) -> str | None:
    return next((name for name, layout in _LAYOUTS.items() if layout.fits(root)), None)


def _raise_unknown(root: Path) -> NoReturn:
    looked_for = "\n".join(f"  {name}: {layout.signs}" for name, layout in _LAYOUTS.items())
    categories = [folder.name for folder in _folders_in(root) if _detect(folder)]
    hint = f"\nEach of {shorten(categories)} has a layout of its own: pass one of them." if categories else ""
    raise ValueError(
        f"root: no known layout in {str(root)!r}, which holds {contents(root)}. Looked for\n{looked_for}{hint}"
    )


def _name(root: Path) -> str:
    return root.resolve().name


def _mvtec_ad(root: Path) -> Dataset:
    masks = root / "ground_truth"
    train = _nominal(root / "train" / "good")
    test = []
    for folder in _nominal_first(_folders_in(root / "test")):
        defective = folder.name != "good"
        for image in images_in(folder):
            mask = _find_mask(masks / folder.name, image) if defective else None
            test.append(Sample(image, int(defective), folder.name, mask))
    return Dataset(_name(root), "mvtec_ad", root, train, _require_masks(test, masks))


def _mvtec_ad_fits(root: Path) -> bool:
    if not ((root / "train" / "good").is_dir() and (root / "test").is_dir()):
        return False
    defects = [folder for folder in _folders_in(root / "test") if folder.name != "good"]
    return (root / "ground_truth").is_dir() or not defects


def _mvtec_3d(root: Path) -> Dataset:
    test = []
    for folder in _nominal_first(_folders_in(root / "test")):
        defective = folder.name != "good"
        for image in images_in(folder / "rgb"):
            mask = _find_mask(folder / "gt", image) if defective else None
            test.append(Sample(image, int(defective), folder.name, mask))
    return Dataset(
        _name(root),
        "mvtec_3d",
        root,
        _nominal(root / "train" / "good" / "rgb"),
        _require_masks(test, root / "test"),
        _nominal(root / "validation" / "good" / "rgb"),
    )


def _btad(root: Path) -> Dataset:
    masks = root / "ground_truth" / "ko"
    test = [*_nominal(root / "test" / "ok")]
    test += [Sample(image, 1, "ko", _find_mask(masks, image)) for image in images_in(root / "test" / "ko")]
    return Dataset(_name(root), "btad", root, _nominal(root / "train" / "ok"), _require_masks(test, masks))


def _visa(root: Path) -> Dataset:
    masks = root / "Data" / "Masks" / "Anomaly"
    kinds = _visa_kinds(root)
    nominal = _nominal(root / "Data" / "Images" / "Normal")
    defective = [
        Sample(image, 1, kinds.get(image.name, "anomaly"), _find_mask(masks, image))
        for image in images_in(root / "Data" / "Images" / "Anomaly")
    ]
    _require_masks(defective, masks)
    split_file = root.parent / "split_csv" / "1cls.csv"
    if not split_file.is_file():
        train = tuple(s for place, s in enumerate(nominal) if place % _VISA_TEST_STEP != _VISA_TEST_STEP - 1)
        test = (*nominal[_VISA_TEST_STEP - 1 :: _VISA_TEST_STEP], *defective)
        return Dataset(_name(root), "visa", root, train, test)
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    split = _visa_split(split_file, _name(root))
    for sample in (*nominal, *defective):
        # Normal/0000.JPG and Anomaly/000.JPG: the folder belongs to the key.
        part = split.get((sample.image.parent.name, sample.image.name))
        if part in parts and not (part == "train" and sample.label):
            parts[part].append(sample)
    return Dataset(_name(root), "visa", root, tuple(parts["train"]), tuple(parts["test"]))


def _visa_kinds(root: Path) -> dict[str, str]:
    """File name -> kind for the defective images; several kinds in one image are joined by "+"."""
    file = root / "image_anno.csv"
    if not file.is_file():
        return {}
    kinds = {}
    for row in _rows(file, ("image", "label")):
        if row["label"] != "normal":
            kinds[Path(row["image"]).name] = "+".join(part.strip() for part in row["label"].split(","))
    return kinds


def _visa_split(file: Path, category: str) -> dict[tuple[str, str], str]:
    split = {}
    for row in _rows(file, ("object", "split", "image")):
        if row["object"] == category:
            image = Path(row["image"])
            split[image.parent.name, image.name] = row["split"]
    if not split:
        raise ValueError(f"root: {str(file)!r} lists no images of {category!r}")
    return split


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"root: {str(file)!r} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}"
                )
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise ValueError(f"root: {str(file)!r} lacks {' or '.join(columns)} in line {reader.line_num}")
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"root: {str(file)!r} cannot be read as CSV in UTF-8 ({error})") from error


def _kolektor(root: Path) -> Dataset:
    if (root / "train").is_dir():
        train, test = (_labelled(root / part, "_GT") for part in ("train", "test"))
        return Dataset(
            _name(root),
            "kolektor",
            root,
            tuple(s for s in train if not s.label),
            tuple(sorted(test, key=lambda s: s.label)),
        )
    samples = [sample for folder in _folders_in(root) for sample in _labelled(folder, "_label")]
    nominal = [sample for sample in samples if not sample.label]
    defective = [sample for sample in samples if sample.label]
    train = [s for place, s in enumerate(nominal) if place % _KOLEKTOR_TEST_STEP != _KOLEKTOR_TEST_STEP - 1]
    test = nominal[_KOLEKTOR_TEST_STEP - 1 :: _KOLEKTOR_TEST_STEP] + defective
    return Dataset(_name(root), "kolektor", root, tuple(train), tuple(test))


def _labelled(folder: Path, suffix: str) -> list[Sample]:
    """Images whose label is whether their mask marks anything; the mask's stem is the image's with `suffix`."""
    samples = []
    for image in images_in(folder):
        if image.stem.endswith(suffix):
            continue
        mask = _find_mask(folder, image, (suffix,))
        if mask is None:
            raise ValueError(f"root: no mask {image.stem + suffix}.* for {str(image)!r}, which its label comes from")
        marked = bool(read_mask(mask).any())
        samples.append(Sample(image, 1, "defect", mask) if marked else Sample(image, 0))
    return samples


def _kolektor_fits(root: Path) -> bool:
    if any(path.stem.endswith("_GT") for path in images_in(root / "train")):
        return (root / "test").is_dir()
    return any(path.stem.endswith("_label") for folder in _folders_in(root)[:3] for path in images_in(folder))


def _folder(root: Path) -> Dataset:
    if own := images_in(root):
        below = root / "train"
        beside = _nominal_folder(root) or _nominal_folder(below) or (below if images_in(below) else None)
        if beside:  # a preview, perhaps, that must not become all there is to train on
            raise ValueError(
                f"root: expected nominal images either in {str(root)!r} or in {str(beside)!r}, got both; move "
                f"{shorten([path.name for path in own])}, or pass the folder of the nominal ones"
            )
        return Dataset(_name(root), "folder", root, _nominal(root), ())
    if (root / "train").is_dir():
        train, test_root = _nominal(_nominal_folder(root / "train") or root / "train"), root / "test"
        if images_in(test_root):
            raise ValueError(
                f"root: the images in {str(test_root)!r} have no label: sort them into test/good and test/<kind>"
            )
    else:
        train, test_root = _nominal(_nominal_folder(root) or root), root
    test = []
    for folder in _nominal_first(_folders_in(test_root)) if test_root.is_dir() else ():
        nominal = folder.name.lower() in NOMINAL_NAMES
        if folder.name in MASK_FOLDERS or (nominal and test_root == root):
            continue
        for image in images_in(folder):
            masks = (_find_mask(root / name / folder.name, image) for name in MASK_FOLDERS)
            mask = None if nominal else next((path for path in masks if path), None)
            test.append(Sample(image, int(not nominal), NOMINAL_KIND if nominal else folder.name, mask))
    return Dataset(_name(root), "folder", root, train, tuple(test))


def _folder_fits(root: Path) -> bool:
    return bool(
        images_in(root) or images_in(root / "train") or _nominal_folder(root / "train") or _nominal_folder(root)
    )


@dataclass(frozen=True)
class _Layout:
    load: Callable[[Path], Dataset]
    fits: Callable[[Path], bool]
    signs: str


def _has(*folders: str) -> Callable[[Path], bool]:
    return lambda root: all((root / folder).is_dir() for folder in folders)


# In the order of detection: the particular before the general.
_LAYOUTS = {
    "visa": _Layout(_visa, _has("Data/Images/Normal"), "Data/Images/Normal/"),
    "mvtec_3d": _Layout(_mvtec_3d, _has("train/good/rgb", "test"), "train/good/rgb/ and test/"),
    "btad": _Layout(_btad, _has("train/ok", "test/ko"), "train/ok/ and test/ko/"),
    "kolektor": _Layout(_kolektor, _kolektor_fits, "train/*_GT.* and test/, or <folder>/*_label.*"),
    "mvtec_ad": _Layout(_mvtec_ad, _mvtec_ad_fits, "train/good/, test/ and ground_truth/"),
    "folder": _Layout(_folder, _folder_fits, "images, or good/, train/good/ or train/ with images"),
}
LAYOUTS = tuple(_LAYOUTS)


# ---------------------------------------------------------------------------------------------------------------------
# Looking into folders


def _folders_in(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(found, key=natural_key)


def _nominal(folder: Path) -> tuple[Sample, ...]:
    return tuple(Sample(image, 0) for image in images_in(folder))


def _nominal_folder(root: Path) -> Path | None:
    if not root.is_dir():
        return None
    folders = (folder for folder in _folders_in(root) if folder.name.lower() in NOMINAL_NAMES)
    return next((folder for folder in folders if images_in(folder)), None)


def _nominal_first(folders: list[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: folder.name.lower() not in NOMINAL_NAMES)


def _find_mask(folder: Path, image: Path, endings: tuple[str, ...] = ("_mask", "")) -> Path | None:
    """The mask of `image` in `folder`: its stem with one of `endings`, whatever the suffix. PNG first, as masks are."""
    suffixes = (".png", image.suffix, *IMAGE_SUFFIXES)
    for ending in endings:
        for suffix in dict.fromkeys((*suffixes, *map(str.upper, suffixes))):
            path = folder / f"{image.stem}{ending}{suffix}"
            if os.path.lexists(path) and not path.is_dir():  # a broken link too: reading it says what is wrong
                return path
    return None


def _require_masks(samples: list[Sample], where: Path) -> tuple[Sample, ...]:
    missing = [sample.image for sample in samples if sample.label and sample.mask is None]
    if missing:
        raise ValueError(
            f"root: {len(missing)} of {sum(s.label for s in samples)} defective images have no mask "
            f"under {str(where)!r}, the first of them {str(missing[0])!r} (layout 'folder' takes a set without masks)"
        )
    return tuple(samples)
