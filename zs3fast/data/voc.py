"""PASCAL VOC 2012: the 20 classes without background, all 21, and PASCAL-5i, where background is a negative."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from zs3fast.data.folds import PASCAL_5I_NAMES
from zs3fast.data.layouts import Source, find_root, names_in, read_ids, value_table
from zs3fast.text import class_names

_PREFIXES = ("VOC2012", "VOCdevkit/VOC2012")
_AUGMENTED = ("Segmentation/train_aug.txt", "Segmentation/trainaug.txt", "SegmentationAug/train_aug.txt")
_MASKS = ("SegmentationClass", "SegmentationClassAug")


def voc20(root: Path, split: str) -> Source:
    """VOC with 0 (background) and 255 ignored; masks of SegmentationClass before SegmentationClassAug."""
    table = value_table({k: k - 1 for k in range(1, 21)}, (0, 255), 255)
    return _source(root, split, class_names("voc20"), table, _MASKS)


def voc21(root: Path, split: str) -> Source:
    """VOC with background as class 0, scored like any other; 255 is ignored."""
    table = value_table({k: k for k in range(21)}, (255,), 255)
    return _source(root, split, class_names("voc21"), table, _MASKS)


def voc5i(root: Path, split: str) -> Source:
    """VOC with background as class 20, behind the 20 that are asked for; SegmentationClassAug before the other."""
    table = value_table({k: (k - 1) % 21 for k in range(21)}, (255,), 255)
    return _source(root, split, (*PASCAL_5I_NAMES, "background"), table, _MASKS[::-1])


def _source(root: Path, split: str, names: tuple[str, ...] | list[str], table: np.ndarray, masks: tuple) -> Source:
    place = find_root(root, _PREFIXES, _is_voc, "PASCAL VOC 2012: JPEGImages and ImageSets/Segmentation/val.txt")
    stems = [{name[:-4] for name in names_in(place / folder) if name.endswith(".png")} for folder in masks]
    ids = read_ids(place / "ImageSets/Segmentation/val.txt") if split == "val" else _training_ids(place)
    choice = np.array([0 if i in stems[0] or i not in stems[1] else 1 for i in ids], np.uint8)
    patterns = tuple(str(place / folder / "{}.png") for folder in masks)
    return Source(ids, str(place / "JPEGImages" / "{}.jpg"), patterns, tuple(names), table, 255, choice)


def _is_voc(place: Path) -> bool:
    name = place.resolve().name
    if re.fullmatch(r"VOC20\d\d", name) and name != "VOC2012":  # another year, with other lists
        return False
    return (place / "JPEGImages").is_dir() and (place / "ImageSets/Segmentation/val.txt").is_file()


def _training_ids(place: Path) -> list[str]:
    """The 10,582 training images: a train_aug list; else train.txt and aug.txt; else train.txt and all other masks."""
    lists = place / "ImageSets"
    for name in _AUGMENTED:
        if (lists / name).is_file():
            return read_ids(lists / name)
    train = lists / "Segmentation/train.txt"
    if not train.is_file():
        raise ValueError(f"root: {lists} holds none of {', '.join(_AUGMENTED)}, Segmentation/train.txt")
    ids = read_ids(train)
    aug = lists / "Segmentation/aug.txt"
    if aug.is_file():
        return ids + read_ids(aug)
    used = {*ids, *read_ids(lists / "Segmentation/val.txt")}
    extra = {name[:-4] for name in names_in(place / "SegmentationClassAug") if name.endswith(".png")}
    return ids + sorted(extra - used)
