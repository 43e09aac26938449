"""The layouts of data sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ttt4as_fast.datasets import (
    LAYOUTS,
    Dataset,
    ImageError,
    Sample,
    image_size,
    load_dataset,
    read_image,
    read_mask,
)

from .image_files import write_image, write_mask


def make_mvtec_ad(root: Path) -> Path:
    for place in (0, 2, 10):
        write_image(root / f"train/good/{place}.png")
    write_image(root / "test/good/000.png")
    for kind in ("scratch", "bent"):
        write_image(root / f"test/{kind}/000.png")
        write_mask(root / f"ground_truth/{kind}/000_mask.png")
    return root


def make_mvtec_3d(root: Path) -> Path:
    for part in ("train", "validation", "test"):
        write_image(root / f"{part}/good/rgb/000.png")
        (root / f"{part}/good/xyz").mkdir()
    write_mask(root / "test/good/gt/000.png", marked=False)
    write_image(root / "test/crack/rgb/000.png")
    write_mask(root / "test/crack/gt/000.png")
    return root


def make_btad(root: Path) -> Path:
    write_image(root / "train/ok/0000.bmp")
    write_image(root / "test/ok/0000.bmp")
    write_image(root / "test/ko/0001.bmp")
    write_image(root / "test/ko/0002.png")
    write_mask(root / "ground_truth/ko/0001.png")
    write_mask(root / "ground_truth/ko/0002.bmp")
    return root


def make_visa(root: Path, split: bool = True) -> Path:
    candle = root / "candle"
    rows = ["object,split,label,image,mask", "pcb1,train,normal,pcb1/Data/Images/Normal/0003.JPG,"]
    for place in range(12):
        image = f"candle/Data/Images/Normal/{place:04d}.JPG"
        write_image(root / image)
        if place < 11:  # the twelfth is in no part of the split
            rows.append(f"candle,{'test' if place == 3 else 'train'},normal,{image},")
    annotations = ["image,label,mask"]
    for place, kind in enumerate(("melt", '"melt, chunk"')):
        image, mask = f"candle/Data/Images/Anomaly/{place:03d}.JPG", f"candle/Data/Masks/Anomaly/{place:03d}.png"
        write_image(root / image)
        write_mask(root / mask, value=place + 1)
        rows.append(f"candle,test,anomaly,{image},{mask}")
        annotations.append(f"{image},{kind},{mask}")
    annotations.append("candle/Data/Images/Normal/0000.JPG,normal,")
    (candle / "image_anno.csv").write_text("\n".join(annotations) + "\n")
    if split:
        (root / "split_csv").mkdir()
        (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return candle


def make_kolektor(root: Path) -> Path:
    for item in range(1, 3):
        for part in range(5):
            write_image(root / f"kos{item:02d}/Part{part}.jpg")
            write_mask(root / f"kos{item:02d}/Part{part}_label.bmp", marked=part == item)
    return root


def make_kolektor2(root: Path) -> Path:
    for part, marked in (("train", (False, True, False)), ("test", (True, False, True))):
        for place, one in enumerate(marked):
            write_image(root / f"{part}/1000{place}.png")
            write_mask(root / f"{part}/1000{place}_GT.png", marked=one)
    return root


def summary(samples) -> list[tuple[str, int, str, str | None]]:
    return [(s.image.name, s.label, s.kind, s.mask and s.mask.name) for s in samples]


def test_mvtec_ad(tmp_path):
    data = load_dataset(make_mvtec_ad(tmp_path / "screw"))
    assert (data.name, data.layout, data.kinds) == ("screw", "mvtec_ad", ("bent", "scratch"))
    assert [s.image.name for s in data.train] == ["0.png", "2.png", "10.png"]
    assert summary(data.test) == [
        ("000.png", 0, "good", None),
        ("000.png", 1, "bent", "000_mask.png"),
        ("000.png", 1, "scratch", "000_mask.png"),
    ]
    assert data.test[2].mask.parent.name == "scratch"


def test_mvtec_ad_without_defective_images(tmp_path):
    write_image(tmp_path / "train/good/0.png")
    write_image(tmp_path / "test/good/0.png")
    data = load_dataset(tmp_path)
    assert (data.layout, data.kinds, len(data.test)) == ("mvtec_ad", (), 1)


def test_mvtec_3d(tmp_path):
    data = load_dataset(make_mvtec_3d(tmp_path))
    assert data.layout == "mvtec_3d"
    assert summary(data.train) == summary(data.validation) == [("000.png", 0, "good", None)]
    assert summary(data.test) == [("000.png", 0, "good", None), ("000.png", 1, "crack", "000.png")]
    assert data.test[1].mask.parent.name == "gt"


def test_btad_masks_may_have_another_suffix(tmp_path):
    data = load_dataset(make_btad(tmp_path))
    assert data.layout == "btad"
    assert summary(data.test) == [
        ("0000.bmp", 0, "good", None),
        ("0001.bmp", 1, "ko", "0001.png"),
        ("0002.png", 1, "ko", "0002.bmp"),
    ]


def test_visa_with_its_split(tmp_path):
    data = load_dataset(make_visa(tmp_path))
    assert (data.name, data.layout, data.kinds) == ("candle", "visa", ("melt", "melt+chunk"))
    assert len(data.train) == 10
    assert "0011.JPG" not in {s.image.name for s in (*data.train, *data.test)}
    assert summary(data.test) == [
        ("0003.JPG", 0, "good", None),
        ("000.JPG", 1, "melt", "000.png"),
        ("001.JPG", 1, "melt+chunk", "001.png"),
    ]


def test_visa_without_its_split_keeps_every_tenth_nominal_image(tmp_path):
    data = load_dataset(make_visa(tmp_path, split=False))
    assert len(data.train) == 11
    assert [s.image.name for s in data.test] == ["0009.JPG", "000.JPG", "001.JPG"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,label\ncandle/Data/Images/Anomaly/000.JPG\n", "lacks image or label in line 2"),
        (b"image,label\n000.JPG,Kratz\xe9r\n", r"cannot be read as CSV in UTF-8 \("),
        (b"image,label\n000.JPG," + b"a" * 200_000 + b"\n", r"cannot be read as CSV in UTF-8 \("),
    ],
)
def test_visa_table_that_cannot_be_read_is_named(tmp_path, content, message):
    root = make_visa(tmp_path)
    (root / "image_anno.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^root: .*image_anno\.csv' {message}"):
        load_dataset(root)


def test_visa_split_that_does_not_know_the_category_or_lacks_a_column(tmp_path):
    root = make_visa(tmp_path)
    split = tmp_path / "split_csv/1cls.csv"
    split.write_text("object,split,label,image,mask\npcb1,train,normal,pcb1/Data/Images/Normal/0.JPG,\n")
    with pytest.raises(ValueError, match=r"1cls\.csv.*no images of 'candle'"):
        load_dataset(root)
    split.write_text("object,part\ncandle,train\n")
    with pytest.raises(ValueError, match="lacks the columns split, image"):
        load_dataset(root)
    split.write_text("")
    with pytest.raises(ValueError, match="lacks the columns object, split, image"):
        load_dataset(root)


def test_kinds_are_in_natural_order():
    test = tuple(Sample(Path("a"), 1, kind) for kind in ("cut10", "cut2"))
    assert Dataset("x", "folder", Path(), (), test).kinds == ("cut2", "cut10")


def test_kolektor_labels_come_from_the_masks(tmp_path):
    data = load_dataset(make_kolektor(tmp_path))
    assert data.layout == "kolektor"
    assert len(data.train) == 7  # eight nominal images, the fifth for testing
    assert not {s.image for s in data.train} & {s.image for s in data.test}
    assert summary(data.test) == [
        ("Part0.jpg", 0, "good", None),
        ("Part1.jpg", 1, "defect", "Part1_label.bmp"),
        ("Part2.jpg", 1, "defect", "Part2_label.bmp"),
    ]


def test_kolektor2_leaves_defective_training_images_out(tmp_path):
    data = load_dataset(make_kolektor2(tmp_path))
    assert data.layout == "kolektor"
    assert [s.image.name for s in data.train] == ["10000.png", "10002.png"]
    assert [(s.image.name, s.label) for s in data.test] == [("10001.png", 0), ("10000.png", 1), ("10002.png", 1)]


def test_kolektor_missing_and_broken_masks(tmp_path):
    make_kolektor(tmp_path)
    mask = tmp_path / "kos02/Part3_label.bmp"
    mask.write_bytes(b"BM")
    with pytest.raises(ImageError, match="Part3_label"):
        load_dataset(tmp_path)
    mask.unlink()
    with pytest.raises(ValueError, match=r"no mask Part3_label\.\*"):
        load_dataset(tmp_path)


def test_folder_of_images_only_is_nominal(tmp_path):
    write_image(tmp_path / "1.png")
    data = load_dataset(tmp_path)
    assert (data.layout, summary(data.train), data.test) == ("folder", [("1.png", 0, "good", None)], ())


@pytest.mark.parametrize("train", ["train", "train/OK", "train/normal"])
def test_folder_with_train_and_test(tmp_path, train):
    write_image(tmp_path / train / "1.png")
    write_image(tmp_path / "test/normal/2.png")
    write_image(tmp_path / "test/dent/3.png")
    write_image(tmp_path / "test/dent/4.png")
    write_mask(tmp_path / "masks/dent/3.png")
    data = load_dataset(tmp_path)
    assert data.layout == "folder"
    assert summary(data.train) == [("1.png", 0, "good", None)]
    assert summary(data.test) == [("2.png", 0, "good", None), ("3.png", 1, "dent", "3.png"), ("4.png", 1, "dent", None)]


def test_folder_with_good_beside_kinds(tmp_path):
    write_image(tmp_path / "good/1.png")
    write_image(tmp_path / "dent/3.png")
    write_mask(tmp_path / "ground_truth/dent/3_mask.png")
    data = load_dataset(tmp_path)
    assert summary(data.train) == [("1.png", 0, "good", None)]
    assert summary(data.test) == [("3.png", 1, "dent", "3_mask.png")]


def test_masks_may_have_their_suffix_in_capitals(tmp_path):
    write_image(tmp_path / "good/1.png")
    write_image(tmp_path / "dent/3.jpg")
    write_mask(tmp_path / "masks/dent/3.PNG")
    assert summary(load_dataset(tmp_path).test) == [("3.jpg", 1, "dent", "3.PNG")]


@pytest.mark.parametrize("nominal", ["good", "train", "train/ok"])
def test_folder_refuses_images_of_its_own_beside_nominal_ones(tmp_path, nominal):
    write_image(tmp_path / nominal / "1.png")
    write_image(tmp_path / "dent/3.png")
    write_image(tmp_path / "preview.png")
    with pytest.raises(ValueError, match=rf"^root: .*{nominal}', got both; move preview\.png"):
        load_dataset(tmp_path)
    (tmp_path / "preview.png").unlink()
    assert len(load_dataset(tmp_path).train) == 1


def test_folder_refuses_unlabelled_test_images(tmp_path):
    write_image(tmp_path / "train/1.png")
    write_image(tmp_path / "test/2.png")
    with pytest.raises(ValueError, match="have no label"):
        load_dataset(tmp_path)


def test_missing_mask_is_an_error_where_the_layout_promises_one(tmp_path):
    make_mvtec_ad(tmp_path)
    (tmp_path / "ground_truth/bent/000_mask.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 defective images.*bent"):
        load_dataset(tmp_path)
    data = load_dataset(tmp_path, layout="folder")
    assert [s.mask is None for s in data.test if s.label] == [True, False]


@pytest.mark.parametrize(
    ("make", "mask"),
    [
        (make_mvtec_3d, "test/crack/gt/000.png"),
        (make_btad, "ground_truth/ko/0001.png"),
        (make_visa, "Data/Masks/Anomaly/001.png"),
    ],
)
def test_a_mask_is_missed_in_the_other_layouts_too(tmp_path, make, mask):
    root = make(tmp_path)
    (root / mask).unlink()
    with pytest.raises(ValueError, match=r"1 of [12] defective images have no mask"):
        load_dataset(root)


def test_broken_link_to_a_mask_is_not_taken_for_none(tmp_path):
    root = make_mvtec_ad(tmp_path)
    for mask in (root / "ground_truth").rglob("*.png"):
        mask.unlink()
        mask.symlink_to(root / "moved")
    assert all(sample.mask for sample in load_dataset(root).test if sample.label)


def test_set_without_ground_truth_is_a_folder(tmp_path):
    write_image(tmp_path / "train/good/0.png")
    write_image(tmp_path / "test/bent/0.png")
    assert load_dataset(tmp_path).layout == "folder"
    with pytest.raises(ValueError, match=r"not the layout 'mvtec_ad'.*ground_truth"):
        load_dataset(tmp_path, layout="mvtec_ad")


def test_unknown_layouts_say_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no known layout") as caught:
        load_dataset(tmp_path)
    assert all(name in str(caught.value) for name in LAYOUTS)
    with pytest.raises(ValueError, match="layout: expected one of"):
        load_dataset(tmp_path, layout="coco")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_dataset(tmp_path / "absent")


def test_folder_of_categories_names_them(tmp_path):
    make_mvtec_ad(tmp_path / "screw")
    make_mvtec_ad(tmp_path / "bolt")
    with pytest.raises(ValueError, match="Each of bolt, screw has a layout of its own"):
        load_dataset(tmp_path)


def test_no_training_image_is_an_error(tmp_path):
    make_mvtec_ad(tmp_path)
    for path in (tmp_path / "train/good").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no nominal training images"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("mvtec_ad", make_mvtec_ad),
        ("mvtec_3d", make_mvtec_3d),
        ("btad", make_btad),
        ("visa", make_visa),
        ("kolektor", make_kolektor),
        ("kolektor", make_kolektor2),
    ],
)
def test_named_layout_gives_what_detection_gives_and_every_file_exists(tmp_path, layout, make):
    root = make(tmp_path)
    data = load_dataset(root, layout)
    assert data == load_dataset(str(root))
    for sample in (*data.train, *data.validation, *data.test):
        assert read_image(sample.image).size == (6, 4)
        if sample.label:
            assert read_mask(sample.mask, image_size(sample.image)).any()
    for other in set(LAYOUTS) - {layout, "folder", "mvtec_ad"}:
        with pytest.raises(ValueError, match="not the layout"):
            load_dataset(root, other)


DATA = Path(os.environ.get("TTT4AS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real data absent: {DATA} (set TTT4AS_DATA)")
@pytest.mark.parametrize(("folder", "sizes"), [("mvtec_ad/screw", (320, 160, 119)), ("magnetic_tile", (762, 578, 388))])
def test_real_sets_have_their_published_sizes(folder, sizes):
    data = load_dataset(DATA / folder)
    assert (len(data.train), len(data.test), sum(s.label for s in data.test)) == sizes
    for sample in data.test[::50]:
        if sample.label:
            assert read_mask(sample.mask, image_size(sample.image)).any()
