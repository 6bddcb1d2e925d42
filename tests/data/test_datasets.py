"""Every dataset in every layout that is read, on small trees; the real samples where they are."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.trees import folders, grey_png, palette_mask, picture, stripes, voc, write_image, write_list
from zs3fast.data import list_datasets, open_dataset
from zs3fast.data.coco import raw_table
from zs3fast.data.folds import COCO_80_CATEGORIES, COCO_80_NAMES, fold_classes
from zs3fast.data.layouts import read_ids
from zs3fast.text import class_names

REAL = os.environ.get("ZS3FAST_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="ZS3FAST_DATA, the folder with real samples, is not set")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))


def row(sample) -> list[int]:
    """The stripes of a mask, one value each; all rows are alike."""
    assert sample.labels.dtype == np.int32 and (sample.labels == sample.labels[0]).all()
    values = sample.labels[0]
    return [int(values[0]), *(int(b) for a, b in zip(values, values[1:]) if a != b)]


def test_the_names():
    assert list_datasets() == [
        "ade150",
        "ade847",
        "cityscapes",
        "coco171",
        "coco20i",
        "coco_object",
        "context59",
        "context60",
        "pc459",
        "voc20",
        "voc21",
        "voc5i",
    ]


# PASCAL VOC ----------------------------------------------------------------------------------------------------------


def test_voc20(tmp_path):
    place = voc(tmp_path)
    dataset = open_dataset("voc20", place, "train")
    assert dataset.ids == ["a", "b", "c"] and len(dataset) == 3
    assert (dataset.name, dataset.split, dataset.num_classes, dataset.ignore_index) == ("voc20", "train", 20, 255)
    assert dataset.seen == list(range(15)) and dataset.unseen == [15, 16, 17, 18, 19]
    assert dataset.background is None
    assert dataset.class_names == class_names("voc20")
    assert dataset.image_path(2) == place / "JPEGImages/c.jpg"
    assert dataset.label_path(0) == place / "SegmentationClass/a.png"
    assert dataset.label_path(2) == place / "SegmentationClassAug/c.png"
    sample = dataset[1]
    assert sample.id == "b" and sample.image.shape == (12, 16, 3) and sample.image.dtype == np.uint8
    assert np.array_equal(sample.image, np.asarray(Image.open(dataset.image_path(1))))
    assert row(sample) == [255, 1, 19, 255]  # 0, 2, 20, 255 on disk
    assert open_dataset("voc20", place, "val").ids == ["d", "e"]


@pytest.mark.parametrize("above", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_root_may_be_above(tmp_path, above):
    voc(tmp_path)
    assert len(open_dataset("voc20", str(tmp_path / above), "val")) == 2


@pytest.mark.parametrize(
    "lists", [("train", "aug", "val"), ("train_aug", "val"), ("train", "train_aug", "val"), ("train", "val")]
)
def test_training_lists_of_voc_agree(tmp_path, lists):
    """mmsegmentation's train.txt + aug.txt, DeepLab's train_aug.txt, and no list of the augmented masks at all."""
    voc(tmp_path, lists=lists)
    assert open_dataset("voc20", tmp_path, "train").ids == ["a", "b", "c"]


def test_deeplab_lists_hold_paths(tmp_path):
    place = voc(tmp_path, lists=("val",))
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in "ac"]
    write_list(place / "ImageSets/SegmentationAug/train_aug.txt", [*lines, ""])
    assert open_dataset("voc20", tmp_path, "train").ids == ["a", "c"]


def test_masks_beyond_the_lists_are_training_masks_unless_they_are_val(tmp_path):
    place = voc(tmp_path, lists=("train", "val"))
    palette_mask(place / "SegmentationClassAug/d.png", stripes((0, 1)))
    assert open_dataset("voc20", tmp_path, "train").ids == ["a", "b", "c"]


def test_voc5i_prefers_the_augmented_masks_and_keeps_background(tmp_path):
    place = voc(tmp_path)
    palette_mask(place / "SegmentationClassAug/d.png", stripes((0, 7, 255)))
    dataset = open_dataset("voc5i", tmp_path, "val", fold=1)
    assert dataset.label_path(0) == place / "SegmentationClassAug/d.png"
    assert row(dataset[0]) == [20, 6, 255]
    assert dataset.label_path(1) == place / "SegmentationClass/e.png"
    assert dataset.num_classes == 21 and dataset.class_names[20] == "background" and dataset.background == 20
    assert dataset.class_names[10] == "dining table" and dataset.class_names[19] == "tv monitor"
    assert dataset.unseen == [5, 6, 7, 8, 9]
    assert dataset.seen == [0, 1, 2, 3, 4, *range(10, 20)]


def test_another_year_is_not_taken_for_voc_2012(tmp_path):
    place = voc(tmp_path)
    place.rename(place.parent / "VOC2010")
    with pytest.raises(ValueError, match="does not hold PASCAL VOC 2012"):
        open_dataset("voc20", tmp_path, "val")
    with pytest.raises(ValueError, match="does not hold PASCAL VOC 2012"):
        open_dataset("voc20", place.parent / "VOC2010", "val")


@pytest.mark.parametrize("name", ["VOC2012b", "VOC2012_aug", "VOC20"])
def test_a_folder_may_be_called_like_a_year(tmp_path, name):
    place = voc(tmp_path)
    place = place.rename(place.parent / name)
    assert len(open_dataset("voc20", place, "val")) == 2


# COCO ----------------------------------------------------------------------------------------------------------------


def test_raw_coco_ids_map_to_171_classes():
    """Spot values from COCO-Stuff's own list: id - 1 on disk, eleven ids unused."""
    table = raw_table()
    known = {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush", 91: "banner", 181: "wood"}
    names = class_names("coco171")
    assert {raw: names[table[raw]] for raw in known} == known
    assert np.flatnonzero(table == -1).tolist()[:11] == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert sorted(table[(table >= 0) & (table < 171)].tolist()) == list(range(171))
    assert table[255] == 255 and (table[182:255] == -1).all()
    assert [table[i - 1] for i in COCO_80_CATEGORIES] == list(range(80))


def coco_tree(root: Path, split="train", suffix=".png", values=(0, 12, 91, 181, 255)) -> Path:
    mask = stripes(values)
    return folders(root, f"images/{split}2017", f"annotations/{split}2017", {"000000000009": mask}, suffix)


def test_coco171_raw(tmp_path):
    coco_tree(tmp_path / "coco_stuff164k")
    dataset = open_dataset("coco171", tmp_path, "train")
    assert dataset.ids == ["000000000009"] and row(dataset[0]) == [0, 11, 80, 170, 255]
    assert len(dataset.seen) == 156
    assert dataset.unseen == [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]


def test_coco171_mapped_masks_come_first(tmp_path):
    """Both forms lie in one folder once mmsegmentation's converter has run."""
    root = coco_tree(tmp_path, values=(181,))
    coco_tree(root, suffix="_labelTrainIds.png", values=(3, 170, 255))
    dataset = open_dataset("coco171", root, "train")
    assert dataset.ids == ["000000000009"] and row(dataset[0]) == [3, 170, 255]


@pytest.mark.parametrize("labels", ["annotations_detectron2", "stuffthingmaps_detectron2", "stuffthingmaps"])
def test_coco171_other_layouts(tmp_path, labels):
    values, expected = ((12, 255), [11, 255]) if labels == "stuffthingmaps" else ((12, 170, 255), [12, 170, 255])
    folders(tmp_path / "coco", "val2017", f"{labels}/val2017", {"7": stripes(values)})
    assert row(open_dataset("coco171", tmp_path, "val")[0]) == expected


def test_coco20i_of_hsnet(tmp_path):
    masks = {"COCO_val2014_000000000042": stripes((0, 1, 80, 255))}
    folders(tmp_path / "COCO2014", "val2014", "annotations/val2014", masks)
    dataset = open_dataset("coco20i", tmp_path, "val", fold=3)
    assert row(dataset[0]) == [80, 0, 79, 255]
    assert dataset.num_classes == 81 and dataset.background == 80
    assert len(dataset.seen) == 60 and len(dataset.unseen) == 20


def test_coco20i_out_of_coco_stuff(tmp_path, caplog):
    coco_tree(tmp_path, "val", values=(12, 91, 89, 255))
    with caplog.at_level(logging.WARNING, "zs3fast"):
        dataset = open_dataset("coco20i", tmp_path, "val", fold=0)
    assert "not that of the published COCO-20i" in caplog.text
    assert row(dataset[0]) == [11, 80, 79, 255]


# Context -------------------------------------------------------------------------------------------------------------


def context_tree(root: Path) -> Path:
    place = folders(root / "VOC2010", "JPEGImages", "SegmentationClassContext", {"x": stripes((0, 1, 59, 255))})
    folders(place, "JPEGImages", "SegmentationClassContext", {"y": stripes((5, 3))})
    for split, ids in {"train": ["y"], "val": ["x"]}.items():
        write_list(place / f"ImageSets/SegmentationContext/{split}.txt", ids)
    return place


def test_context(tmp_path):
    context_tree(tmp_path)
    full, things = (open_dataset(name, tmp_path, "val") for name in ("context60", "context59"))
    assert full.ids == things.ids == ["x"]
    assert row(full[0]) == [0, 1, 59, 255] and row(things[0]) == [255, 0, 58, 255]
    assert full.unseen == [1, 7, 8, 15, 20, 25, 32, 34, 49, 55] and len(full.seen) == 50
    assert things.unseen == [0, 6, 7, 14, 19, 24, 31, 33, 48, 54] and len(things.seen) == 49
    assert open_dataset("context59", tmp_path / "VOC2010", "train").ids == ["y"]


def test_context59_of_detectron2(tmp_path):
    masks = {"x": stripes((0, 58, 255))}
    context_tree(tmp_path / "both")  # mmsegmentation's layout but for the list, and detectron2's
    folders(tmp_path / "both/VOC2010", "JPEGImages", "annotations_detectron2/pc59_val", masks)
    (tmp_path / "both/VOC2010/ImageSets/SegmentationContext/val.txt").unlink()
    assert row(open_dataset("context59", tmp_path / "both", "val")[0]) == [0, 58, 255]
    folders(tmp_path / "one/VOC2010", "JPEGImages", "annotations_detectron2/pc59_val", masks)
    folders(tmp_path / "two/pascal_ctx_d2", "images/validation", "annotations_ctx59/validation", masks)
    for root in ("one", "two"):
        assert row(open_dataset("context59", tmp_path / root, "val")[0]) == [0, 58, 255]
    with pytest.raises(ValueError, match="SegmentationClassContext"):
        open_dataset("context60", tmp_path / "one", "val")


PC459_LINES = [f"{i}: name {i}" for i in range(1, 460)]


def pc459_tree(root: Path) -> Path:
    masks = {"x": stripes((0, 300, 458, 65535), dtype=np.uint16)}
    place = folders(root / "VOC2010", "JPEGImages", "annotations_detectron2/pc459_val", masks, ".tif")
    write_list(place / "labels.txt", PC459_LINES)
    return place


def test_pc459(tmp_path):
    pc459_tree(tmp_path)
    dataset = open_dataset("pc459", tmp_path, "val")
    assert row(dataset[0]) == [0, 300, 458, 65535]
    assert dataset.ignore_index == 65535 and dataset.num_classes == 459
    assert dataset.class_names[0] == "name 1" and dataset.class_names[458] == "name 459"
    assert dataset.unseen == [] and dataset.seen == list(range(459))


def test_pc459_apart_from_voc(tmp_path):
    masks = {"x": stripes((7, 65535), dtype=np.uint16)}
    folders(tmp_path / "pascal_ctx_d2", "images/training", "annotations_ctx459/training", masks, ".tif")
    (tmp_path / "pc459.json").write_text(json.dumps([f"n{i}" for i in range(459)]))
    dataset = open_dataset("pc459", tmp_path, "train")
    assert row(dataset[0]) == [7, 65535] and dataset.class_names[458] == "n458"


# Class files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (PC459_LINES[:-1], "expected all numbers of 1..459, got none with 459"),
        ([*PC459_LINES[:-1], "1: again"], "expected each number once, got"),
        ([*PC459_LINES, "460: more"], "expected numbers up to 459, got 460"),
        ([f"name {i}" for i in range(10)], "expected 459 class names, got 10"),
    ],
)
def test_bad_class_files(tmp_path, lines, message):
    place = pc459_tree(tmp_path)
    write_list(place / "labels.txt", lines)
    with pytest.raises(ValueError, match=rf"labels.txt.*({message})"):
        open_dataset("pc459", tmp_path, "val")


def test_class_files_with_a_background_and_with_synonyms(tmp_path):
    place = pc459_tree(tmp_path)
    write_list(place / "labels.txt", ["0: empty", *PC459_LINES])
    assert open_dataset("pc459", tmp_path, "val").class_names[0] == "name 1"
    write_list(place / "labels.txt", [f"name {i}, synonym" for i in range(459)])
    assert open_dataset("pc459", tmp_path, "val").class_names[3] == "name 3, synonym"


def test_pc459_knows_its_names(tmp_path):
    """Labels 1..459 of labels.txt are mask values 0..458."""
    (pc459_tree(tmp_path) / "labels.txt").unlink()
    names = open_dataset("pc459", tmp_path, "val").class_names
    assert names == class_names("pc459") and len(set(names)) == 459
    spots = {1: "accordion", 63: "casette recorder", 189: "ground", 255: "money", 308: "pottedplant", 427: "tvmonitor"}
    assert all(names[label - 1] == name for label, name in spots.items()) and names[458] == "wool"
    assert names == sorted(names)
    objects = [{"tvmonitor": "tvmonitor", "diningtable": "table"}.get(name, name) for name in class_names("voc20")]
    assert set(objects) <= set(names)  # PASCAL's own objects are among them


# ADE20K --------------------------------------------------------------------------------------------------------------


def test_ade150(tmp_path):
    place = tmp_path / "ADEChallengeData2016"
    folders(place, "images/validation", "annotations/validation", {"ADE_val_1": stripes((0, 1, 150, 255))})
    dataset = open_dataset("ade150", tmp_path, "val")
    assert row(dataset[0]) == [255, 0, 149, 255]
    assert dataset.unseen == [] and len(dataset.seen) == 150


def ade847_tree(root: Path, training: int = 11) -> Path:
    """Class 0 in all training images, class 846 in all but one."""
    place = root / "ADE20K_2021_17_01"
    for part, count in {"training": training, "validation": 1}.items():
        masks = {
            f"{part}_{i}": stripes((0, 65535) if i == 1 else (0, 846, 65535), dtype=np.uint16) for i in range(count)
        }
        folders(place, f"images_detectron2/{part}", f"annotations_detectron2/{part}", masks, ".tif")
    write_list(place / "class_names.txt", [f"name {i}" for i in range(847)])
    return place


def test_ade847_and_its_split(tmp_path):
    """572 seen and 275 unseen, whatever part of the images is there."""
    ade847_tree(tmp_path, training=2)
    for split in ("train", "val"):
        dataset = open_dataset("ade847", tmp_path, split)
        assert row(dataset[0]) == [0, 846, 65535] and dataset.ignore_index == 65535
        assert (len(dataset.seen), len(dataset.unseen)) == (572, 275)
    names = class_names("ade847")
    rare = {names[c] for c in dataset.unseen}
    assert {
        "catwalk",
        "ferris wheel",
        "beds",
        "stadium",
        "urinal",
        "hammer",
        "adding machine, totalizer, totaliser",
    } <= rare
    assert (
        not {"wall", "controls", "forest", "skeleton", "iron", "star", "videocassette recorder, vcr"} & rare
    )  # 11 and more
    assert dataset.unseen == sorted(dataset.unseen)


def test_ade847_knows_its_names(tmp_path):
    """Those of a class file go first; the package's are detectron2's, in the order of the label values."""
    place = ade847_tree(tmp_path, training=11)
    assert open_dataset("ade847", tmp_path, "val").class_names[3] == "name 3"
    (place / "class_names.txt").unlink()
    names = open_dataset("ade847", tmp_path, "val").class_names
    assert names == class_names("ade847") and len(set(names)) == 847
    known = {0: "wall", 99: "aircraft carrier, carrier, flattop, attack aircraft carrier", 165: "horse, equus caballus"}
    known |= {312: "grille door", 468: "alembic", 560: "mechanical shovel", 716: "card game, cards"}
    known |= {803: "videocassette recorder, vcr", 846: "adding machine, totalizer, totaliser"}
    assert {index: names[index] for index in known} == known
    assert not any(name != " ".join(name.split()) for name in names)


# Folds ---------------------------------------------------------------------------------------------------------------

PASCAL_FOLDS = [
    "aeroplane, bicycle, bird, boat, bottle",
    "bus, car, cat, chair, cow",
    "dining table, dog, horse, motorbike, person",
    "potted plant, sheep, sofa, train, tv monitor",
]
COCO_FOLDS = [
    "person, airplane, boat, parking meter, dog, elephant, backpack, suitcase, sports ball, skateboard, wine glass, "
    "spoon, sandwich, hot dog, chair, dining table, mouse, microwave, refrigerator, scissors",
    "bicycle, bus, traffic light, bench, horse, bear, umbrella, frisbee, kite, surfboard, cup, bowl, orange, pizza, "
    "couch, toilet, remote, oven, book, teddy bear",
    "car, train, fire hydrant, bird, sheep, zebra, handbag, skis, baseball bat, tennis racket, fork, banana, broccoli, "
    "donut, potted plant, tv, keyboard, toaster, clock, hair drier",
    "motorcycle, truck, stop sign, cat, cow, giraffe, tie, snowboard, baseball glove, bottle, knife, apple, carrot, "
    "cake, bed, laptop, cell phone, sink, vase, toothbrush",
]


@pytest.mark.parametrize("fold", range(4))
def test_fold_memberships(tmp_path, fold):
    voc(tmp_path)
    names = open_dataset("voc5i", tmp_path, "val", fold=fold).class_names
    assert ", ".join(names[c] for c in fold_classes("voc5i", fold)) == PASCAL_FOLDS[fold]
    assert ", ".join(COCO_80_NAMES[c] for c in fold_classes("coco20i", fold)) == COCO_FOLDS[fold]


@pytest.mark.parametrize("fold", [None, 4, -1, "0", 1.0, True])
def test_folds_that_do_not_exist(tmp_path, fold):
    voc(tmp_path)
    with pytest.raises(ValueError, match=r"fold: expected one of voc5i's, 0..3, got"):
        open_dataset("voc5i", tmp_path, "val", fold=fold)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    voc(tmp_path)
    with pytest.raises(ValueError, match="name: expected one of ade150, .*, got 'voc22'"):
        open_dataset("voc22", tmp_path, "val")
    with pytest.raises(ValueError, match="split: expected train or val, got 'test'"):
        open_dataset("voc20", tmp_path, "test")
    with pytest.raises(ValueError, match="fold: expected voc5i or coco20i, which have folds, got voc20"):
        open_dataset("voc20", tmp_path, "val", fold=0)
    with pytest.raises(FileNotFoundError, match="root: no folder .*nowhere"):
        open_dataset("voc20", tmp_path / "nowhere", "val")
    for name in list_datasets():
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="root: .*empty .*does not hold"):
            open_dataset(name, tmp_path / "empty", "val", fold=0 if name in ("voc5i", "coco20i") else None)


def test_missing_files_are_named_when_a_dataset_is_opened(tmp_path):
    place = voc(tmp_path)
    (place / "JPEGImages/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"voc20 train: no file .*JPEGImages/b.jpg$"):
        open_dataset("voc20", tmp_path, "train")
    (place / "SegmentationClassAug/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.jpg, and 1 more files"):
        open_dataset("voc20", tmp_path, "train")
    dataset = open_dataset("voc20", tmp_path, "train", check_files=False)
    assert [name for name, _ in dataset.missing()] == ["b", "c"]
    with pytest.raises(FileNotFoundError, match=r"b.jpg"):
        dataset[1]
    with pytest.raises(FileNotFoundError, match=r"labels: no file .*c.png"):
        dataset[2]


def test_lists_that_name_a_pair_twice_or_nothing(tmp_path):
    place = voc(tmp_path)
    write_list(place / "ImageSets/Segmentation/val.txt", ["d", "e", "d"])
    with pytest.raises(ValueError, match="val.txt: expected each id once, got d twice"):
        open_dataset("voc20", tmp_path, "val")
    write_list(place / "ImageSets/Segmentation/val.txt", [])
    with pytest.raises(ValueError, match="val.txt: expected an id a line, got none"):
        open_dataset("voc20", tmp_path, "val")


@pytest.mark.parametrize("value", [21, 254])
def test_labels_out_of_range(tmp_path, value):
    voc(tmp_path, values={"d": (0, 1, value)})
    with pytest.raises(ValueError, match=rf"labels: .*d.png: expected labels of .*, got {value}"):
        open_dataset("voc20", tmp_path, "val")[0]


def test_sixteen_bit_labels_out_of_range(tmp_path):
    place = pc459_tree(tmp_path)
    folder = place / "annotations_detectron2/pc459_val"
    write_image(folder / "x.tif", stripes((0, 459), dtype=np.uint16))
    with pytest.raises(ValueError, match="x.tif: expected labels of .*, got 459"):
        open_dataset("pc459", tmp_path, "val")[0]
    write_image(folder / "x.tif", stripes((0, 70000), dtype=np.int32))
    with pytest.raises(ValueError, match="x.tif: expected labels of .*, got 70000"):
        open_dataset("pc459", tmp_path, "val")[0]
    context = voc(tmp_path)
    write_image(context / "SegmentationClass/d.png", stripes((0, 300), dtype=np.uint16))
    with pytest.raises(ValueError, match="d.png: expected labels of .*, got 300"):
        open_dataset("voc20", tmp_path, "val")[0]


def test_sizes_that_differ(tmp_path):
    place = voc(tmp_path)
    write_image(place / "JPEGImages/d.jpg", picture(0, (12, 17)))
    with pytest.raises(ValueError, match=r"labels: .*d.png is 16 x 12 pixels, its image .*d.jpg 17 x 12"):
        open_dataset("voc20", tmp_path, "val")[0]


def test_masks_that_are_none(tmp_path):
    place = voc(tmp_path)
    mask = place / "SegmentationClass/d.png"
    dataset = open_dataset("voc20", tmp_path, "val")
    write_image(mask, picture(0))
    with pytest.raises(ValueError, match="d.png: expected class indices in one channel, got an image of mode RGB"):
        dataset[0]
    mask.write_bytes(b"no image")
    with pytest.raises(ValueError, match="d.png is not an image"):
        dataset[0]
    palette_mask(mask, np.random.default_rng(0).integers(0, 21, (64, 64), np.uint8))
    mask.write_bytes(mask.read_bytes()[:1500])
    with pytest.raises(ValueError, match="d.png cannot be read, it may be cut off or damaged"):
        dataset[0]
    (place / "JPEGImages/e.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="e.jpg is not an image"):
        dataset[1]


def test_grey_images_become_rgb(tmp_path):
    place = voc(tmp_path)
    write_image(place / "JPEGImages/d.jpg", picture(0)[:, :, 0])
    assert open_dataset("voc20", tmp_path, "val")[0].image.shape == (12, 16, 3)


def test_a_data_loader_reads_it(tmp_path):
    voc(tmp_path)
    dataset = open_dataset("voc20", tmp_path, "train")
    for workers in (0, 1):
        got = list(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=lambda sample: sample))
        assert [sample.id for sample in got] == dataset.ids
        assert all(np.array_equal(sample.labels, dataset[i].labels) for i, sample in enumerate(got))


# Real samples --------------------------------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize(
    ("name", "split", "fold", "pairs"),
    [
        ("voc20", "train", None, 360),
        ("voc20", "val", None, 240),
        ("voc5i", "val", 0, 240),
        ("coco171", "train", None, 13),
        ("coco171", "val", None, 8),
        ("coco20i", "val", 2, 8),
        ("ade150", "train", None, 6),
        ("ade150", "val", None, 9),
    ],
)
def test_real_samples(name, split, fold, pairs):
    dataset = open_dataset(name, REAL, split, fold=fold)
    assert len(dataset) == pairs
    for index in range(0, pairs, 1 + pairs // 12):
        sample = dataset[index]
        assert sample.labels.shape == sample.image.shape[:2]
        values = set(np.unique(sample.labels).tolist())
        assert values <= {*range(dataset.num_classes), 255} and values - {255}


@needs_real
def test_real_coco_labels_mean_what_they_show():
    """000000000139: a room with chairs, a dining table, a television and people."""
    dataset = open_dataset("coco171", REAL, "val")
    present = {
        dataset.class_names[c] for c in np.unique(dataset.read_labels(dataset.ids.index("000000000139"))) if c < 255
    }
    assert {"person", "chair", "dining table", "tv", "vase", "potted plant"} <= present


# What people's folders and lists hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        ("\ufeff2007_000032\n2007_000033\n", ["2007_000032", "2007_000033"]),
        ("IMG.0001\nIMG.0002\n", ["IMG.0001", "IMG.0002"]),
        ("my dog\nmy cat\n", ["my dog", "my cat"]),
        ("2007_000032 -1\n2007_000033  1\nmy dog 0\n", ["2007_000032", "2007_000033", "my dog"]),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\n\r\n", ["a"]),
        ("JPEGImages/my dog.jpg SegmentationClass/my dog.png\n", ["my dog"]),
        ("a/IMG.0001.JPG b/IMG.0001.png\na/IMG.0002 b/IMG.0002", ["IMG.0001", "IMG.0002"]),
        ("a.jpg a.png\nb.jpeg\nc.v1.tif", ["a", "b", "c.v1"]),
        ("JPEGImages\\a.jpg\tSegmentationClass\\a.png\n", ["a"]),
        ("1\n0\n", ["1", "0"]),
        ("{}\n{0}\n", ["{}", "{0}"]),
    ],
)
def test_list_files(tmp_path, lines, ids):
    (tmp_path / "list.txt").write_bytes(lines.encode())
    assert read_ids(tmp_path / "list.txt") == ids


def test_list_files_that_are_none(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(.* at byte 3\)"):
        read_ids(tmp_path / "latin.txt")
    write_list(tmp_path / "twice.txt", ["a.jpg", "b", "a"])
    with pytest.raises(ValueError, match="twice.txt: expected each id once, got a twice"):
        read_ids(tmp_path / "twice.txt")


@pytest.mark.parametrize("above", ["{}", "{0}", "a{b", "{x!r:>9}", "%s"])
def test_braces_in_a_folders_name(tmp_path, above):
    """A path is no template: str.format on it raised IndexError, or read another folder."""
    voc(tmp_path / above, val=("d", "{}"))
    dataset = open_dataset("voc20", tmp_path / above, "val")
    assert dataset.ids == ["d", "{}"] and dataset[1].image.shape == (12, 16, 3)


def test_what_macos_writes_beside_files_is_no_pair(tmp_path):
    place = voc(tmp_path, lists=("train", "val"))
    (place / "SegmentationClassAug/._c.png").write_bytes(b"\0\5\x16\7")
    assert open_dataset("voc20", tmp_path, "train").ids == ["a", "b", "c"]
    root = folders(tmp_path / "ade", "images/training", "annotations/training", {"x": stripes((1, 2))})
    (root / "annotations/training/._x.png").write_bytes(b"\0\5\x16\7")
    (root / "images/training/._y.jpg").write_bytes(b"\0\5\x16\7")
    dataset = open_dataset("ade150", root, "train")
    assert dataset.ids == ["x"] and dataset.unlabelled() == []


def turned(path: Path, orientation: int) -> None:
    """Record an orientation in an image that stays stored as it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


def test_an_image_that_exif_turns_away_from_its_labels_says_exif(tmp_path):
    place = voc(tmp_path)
    turned(place / "JPEGImages/d.jpg", 6)
    dataset = open_dataset("voc20", tmp_path, "val")
    with pytest.raises(ValueError, match="d.png is 16 x 12 pixels, its image .*d.jpg 12 x 16 .*EXIF orientation is 6"):
        dataset[0]


def test_an_image_turned_by_180_degrees_is_noted_once(tmp_path, caplog):
    place = voc(tmp_path)
    for name in "de":
        turned(place / f"JPEGImages/{name}.jpg", 3)
    dataset = open_dataset("voc20", tmp_path, "val")
    assert [len(dataset[index].id) for index in range(2)] == [1, 1]
    assert [record.getMessage() for record in caplog.records if "EXIF" in record.getMessage()] == [
        f"voc20 val: {place / 'JPEGImages/d.jpg'} was turned upright, its EXIF orientation is 3; its labels are taken "
        "to be upright"
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grey_mask_of_few_bits_holds_classes(tmp_path, bits):
    """ADE raw 0, 1, 2, 5, 8 in 4 bits were read as 255, 16, 33, 84, 135: Pillow stretches greys."""
    root = folders(tmp_path, "images/training", "annotations/training", {"x": stripes((0, 1, 2, 5, 8), (4, 20))})
    grey_png(root / "annotations/training/x.png", stripes((0, 1, 2, 5, 8), (4, 20)).tolist(), bits)
    assert row(open_dataset("ade150", root, "train")[0]) == [255, 0, 1, 4, 7]


# What training-free methods are scored on -----------------------------------------------------------------------------


def test_voc21_scores_the_background(tmp_path):
    place = voc(tmp_path)
    dataset = open_dataset("voc21", place, "train")
    assert dataset.num_classes == 21 and dataset.class_names[0] == "background" and dataset.ignore_index == 255
    assert dataset.unseen == [] and dataset.seen == list(range(21)) and dataset.background is None
    assert row(dataset[1]) == [0, 2, 20, 255]  # as on disk


def test_coco_object_has_things_and_one_background(tmp_path):
    folders(tmp_path, "images/val2017", "annotations/val2017", {"1": stripes((0, 12, 89, 91, 181, 255))})
    dataset = open_dataset("coco_object", tmp_path, "val")
    assert dataset.num_classes == 81 and dataset.class_names[:2] == ["background", "person"]
    assert dataset.class_names[80] == "toothbrush"
    assert row(dataset[0]) == [1, 12, 80, 0, 255]  # person, stop sign, toothbrush, banner and wood, void


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    for city, name in (("ulm", "ulm_1_2"), ("bonn", "bonn_3_4")):
        images, masks = (tmp_path / part / "val" / city / name for part in ("leftImg8bit", "gtFine"))
        write_image(Path(f"{images}_leftImg8bit.png"), picture(0))
        write_image(Path(f"{masks}_gtFine_labelIds.png"), stripes((0, 7, 8, 33, 29)))
        if kind == "labelTrainIds":
            write_image(Path(f"{masks}_gtFine_labelTrainIds.png"), stripes((255, 0, 1, 18, 255)))
    (tmp_path / "leftImg8bit/val/ulm/._ulm_1_2_leftImg8bit.png").touch()
    dataset = open_dataset("cityscapes", tmp_path, "val")
    assert dataset.ids == ["bonn/bonn_3_4", "ulm/ulm_1_2"] and dataset.num_classes == 19
    assert dataset.label_path(0).name == f"bonn_3_4_gtFine_{kind}.png"
    assert row(dataset[0]) == [255, 0, 1, 18, 255] and dataset[1].id == "ulm/ulm_1_2"
    assert (dataset.class_names[6], dataset.class_names[18]) == ("trafficlight", "bicycle")
    with pytest.raises(ValueError, match="does not hold Cityscapes: leftImg8bit/train/CITY"):
        open_dataset("cityscapes", tmp_path, "train")


@needs_real
def test_real_samples_as_training_free_sets():
    voc21 = open_dataset("voc21", Path(REAL) / "VOCdevkit/VOC2012", "val")
    voc20 = open_dataset("voc20", Path(REAL) / "VOCdevkit/VOC2012", "val")
    with_background, without = voc21[0].labels, voc20[0].labels
    assert np.array_equal(with_background[without < 255], without[without < 255] + 1) and (with_background == 0).any()
    things = open_dataset("coco_object", Path(REAL) / "coco_stuff164k", "val")
    stuff = open_dataset("coco171", Path(REAL) / "coco_stuff164k", "val")
    for index in range(len(things)):
        mine, all_ = things[index].labels, stuff[index].labels
        assert np.array_equal(mine, np.where(all_ == 255, 255, np.where(all_ < 80, all_ + 1, 0)))
