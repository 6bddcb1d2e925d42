"""COCO-Stuff 164k with 171 classes, COCO-Object, and COCO-20i on its 80 things."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from zs3fast.data.folds import COCO_80_NAMES
from zs3fast.data.layouts import INVALID, Folders, Source, find_folders, folder_source, value_table
from zs3fast.text import class_names

logger = logging.getLogger("zs3fast")

_STUFF_ROOTS = ("coco_stuff164k", "coco-stuff", "coco", "COCO")
_FEW_SHOT_ROOTS = ("COCO2014", "coco2014")
_TRAIN_IDS = "_labelTrainIds.png"

# Of the ids 1..182 of COCO-Stuff, which no class has.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


def raw_table() -> np.ndarray:
    """Int32 [256] of COCO-Stuff's masks as published: id - 1, with gaps, and 255 -> 0..170, and 255."""
    used = (i for i in range(1, 183) if i not in _UNUSED_IDS)
    return value_table({raw - 1: index for index, raw in enumerate(used)}, (255,), 255)


def train_id_table() -> np.ndarray:
    """Int32 [256] of masks that were mapped before: 0..170, and 255."""
    return value_table({k: k for k in range(171)}, (255,), 255)


def coco171(root: Path, split: str) -> Source:
    """COCO-Stuff 164k: masks mapped before (`*_labelTrainIds.png`, detectron2's) if there are any, else raw ones."""
    place, layout = find_folders(root, _STUFF_ROOTS, _stuff_layouts(split), f"COCO-Stuff 164k, {split}")
    return folder_source(place, layout, class_names("coco171"), 255)


def coco_object(root: Path, split: str) -> Source:
    """COCO-Object: COCO 2017's things as 1..80 out of COCO-Stuff's masks, all stuff as class 0, the background."""
    place, layout = find_folders(root, _STUFF_ROOTS, _stuff_layouts(split), f"COCO-Object, {split}")
    table = layout.table
    things = np.where((table == INVALID) | (table == 255), table, np.where(table < 80, table + 1, 0)).astype(np.int32)
    return folder_source(place, replace(layout, table=things), class_names("coco_object"), 255)


def coco20i(root: Path, split: str) -> Source:
    """COCO-20i: HSNet's masks on COCO 2014 (0 background, 1..80), or things out of COCO-Stuff's masks on COCO 2017.

    Background (and stuff) is class 80, behind the 80 that are asked for.
    """
    year = f"{split}2014"
    few_shot = value_table({k: (k - 1) % 81 for k in range(81)}, (255,), 255)
    layouts = [
        Folders(year, f"annotations/{year}", few_shot),
        *(_things_of(layout) for layout in _stuff_layouts(split)),
    ]
    roots = (*_FEW_SHOT_ROOTS, *_STUFF_ROOTS)
    place, layout = find_folders(root, roots, layouts, f"COCO-20i, {split}")
    if layout is not layouts[0]:
        logger.warning(
            "coco20i: %s holds COCO 2017, whose split is not that of the published COCO-20i numbers (COCO 2014)", place
        )
    return folder_source(place, layout, (*COCO_80_NAMES, "background"), 255)


def _stuff_layouts(split: str) -> list[Folders]:
    year = f"{split}2017"
    mapped, raw = train_id_table(), raw_table()
    layouts = []
    for images in (f"images/{year}", year):
        layouts += [
            Folders(images, f"annotations/{year}", mapped, _TRAIN_IDS),
            Folders(images, f"annotations_detectron2/{year}", mapped),
            Folders(images, f"stuffthingmaps_detectron2/{year}", mapped),
            Folders(images, f"annotations/{year}", raw, not_suffix=_TRAIN_IDS),
            Folders(images, f"stuffthingmaps/{year}", raw, not_suffix=_TRAIN_IDS),
        ]
    return layouts


def _things_of(layout: Folders) -> Folders:
    """The layout with its 91 stuff classes as background."""
    table = layout.table
    things = np.where((table == INVALID) | (table == 255), table, np.minimum(table, 80)).astype(np.int32)
    return Folders(layout.images, layout.labels, things, layout.label_suffix, layout.not_suffix)
