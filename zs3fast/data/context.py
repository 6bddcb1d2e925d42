"""PASCAL Context: 59 classes, the same with background (60), and all 459."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zs3fast.data.class_files import read_class_names
from zs3fast.data.layouts import Folders, Source, find_folders, find_root, folder_source, read_ids, value_table
from zs3fast.text import class_names

_PREFIXES = ("VOC2010", "VOCdevkit/VOC2010")
_DETECTRON2 = "pascal_ctx_d2"
_SPLITS = {"train": "training", "val": "validation"}


def context59(root: Path, split: str) -> Source:
    """Context with 0 (background) ignored and k -> k - 1; detectron2's 0..58 masks where those are all there is."""
    table = value_table({k: k - 1 for k in range(1, 60)}, (0, 255), 255)
    names = class_names("context59")
    try:
        return _listed(root, split, names, table)
    except (ValueError, FileNotFoundError) as error:
        mapped = value_table({k: k for k in range(59)}, (255,), 255)
        layouts = _detectron2(split, f"pc59_{split}", "annotations_ctx59", mapped, ".png")
        try:
            place, layout = find_folders(root, (*_PREFIXES, _DETECTRON2), layouts, f"PASCAL Context 59, {split}")
        except ValueError as second:
            raise type(error)(f"{error}; nor {second}") from None
        return folder_source(place, layout, names, 255)


def context60(root: Path, split: str) -> Source:
    """Context with its mask values as they are: 0 background, 1..59."""
    return _listed(root, split, class_names("context60"), value_table({k: k for k in range(60)}, (255,), 255))


def pc459(root: Path, split: str) -> Source:
    """All 459 classes from 16-bit masks 0..458, 65535 ignored; names from its labels.txt or a class file, or ours."""
    table = value_table({k: k for k in range(459)}, (65535,), 65535)
    layouts = _detectron2(split, f"pc459_{split}", "annotations_ctx459", table, ".tif", ".tiff", ".png")
    place, layout = find_folders(root, (*_PREFIXES, _DETECTRON2), layouts, f"PASCAL Context 459, {split}")
    return folder_source(place, layout, read_class_names("pc459", place, class_names("pc459")), 65535)


def _listed(root: Path, split: str, names: list[str], table: np.ndarray) -> Source:
    """mmsegmentation's layout: SegmentationClassContext and lists of ids."""

    def holds(place: Path) -> bool:
        return (place / "SegmentationClassContext").is_dir() and (place / "JPEGImages").is_dir()

    expected = "PASCAL Context: JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext"
    place = find_root(root, _PREFIXES, holds, expected)
    listing = place / "ImageSets/SegmentationContext" / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"root: no list {listing}")
    patterns = (str(place / "SegmentationClassContext" / "{}.png"),)
    return Source(read_ids(listing), str(place / "JPEGImages" / "{}.jpg"), patterns, tuple(names), table, 255)


def _detectron2(split: str, beside: str, apart: str, table: np.ndarray, *suffixes: str) -> list[Folders]:
    """Masks beside VOC 2010 (annotations_detectron2/pc59_val), or both apart from it (pascal_ctx_d2)."""
    part = _SPLITS[split]
    return [
        folders
        for suffix in suffixes
        for folders in (
            Folders("JPEGImages", f"annotations_detectron2/{beside}", table, suffix, shared=True),
            Folders(f"images/{part}", f"{apart}/{part}", table, suffix),
        )
    ]
