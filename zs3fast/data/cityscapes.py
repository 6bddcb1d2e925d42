"""Cityscapes, finely annotated: 19 classes, all other pixels ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zs3fast.data.layouts import Source, fill, find_root, value_table
from zs3fast.text import class_names

_PREFIXES = ("cityscapes", "Cityscapes")
_IMAGE = "_leftImg8bit.png"
# The id in `*_labelIds.png` of each class; the other ids up to 33 are not evaluated.
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def cityscapes(root: Path, split: str) -> Source:
    """Images leftImg8bit/SPLIT/CITY/*_leftImg8bit.png; masks gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png if all are
    there, as the dataset's own scripts write them, else *_gtFine_labelIds.png.
    """
    place = find_root(root, _PREFIXES, lambda place: bool(_ids(place, split)), f"Cityscapes: {_layout(split)}")
    ids = _ids(place, split)
    mapped = place / "gtFine" / split / "{}_gtFine_labelTrainIds.png"
    if all(fill(str(mapped), name).is_file() for name in ids):
        masks, table = mapped, value_table({k: k for k in range(19)}, (255,), 255)
    else:
        masks, table = place / "gtFine" / split / "{}_gtFine_labelIds.png", label_id_table()
    image = str(place / "leftImg8bit" / split / ("{}" + _IMAGE))
    return Source(ids, image, (str(masks),), tuple(class_names("cityscapes")), table, 255)


def label_id_table() -> np.ndarray:
    """Int32 [256] of masks as published: 0..33 (and 255, which stands for the licence plate's -1) -> 0..18 and 255."""
    ignored = (*range(34), 255)
    return value_table({raw: index for index, raw in enumerate(_LABEL_IDS)}, ignored, 255)


def _ids(place: Path, split: str) -> list[str]:
    """CITY/NAME of every image, sorted."""
    folder = place / "leftImg8bit" / split
    if not folder.is_dir() or not (place / "gtFine" / split).is_dir():
        return []
    found = (path for path in folder.glob(f"*/*{_IMAGE}") if not path.name.startswith("."))
    return sorted(f"{path.parent.name}/{path.name[: -len(_IMAGE)]}" for path in found)


def _layout(split: str) -> str:
    return f"leftImg8bit/{split}/CITY/*{_IMAGE} with gtFine/{split}/CITY/*_gtFine_labelTrainIds.png or _labelIds.png"
