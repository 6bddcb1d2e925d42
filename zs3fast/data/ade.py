"""ADE20K: the 150 classes of the scene parsing benchmark, and the full set with 847."""

from __future__ import annotations

from pathlib import Path

from zs3fast.data.class_files import read_class_names
from zs3fast.data.layouts import Folders, Source, find_folders, folder_source, value_table
from zs3fast.text import class_names

_SPLITS = {"train": "training", "val": "validation"}


def ade150(root: Path, split: str) -> Source:
    """Masks with 0 ("other") and 255 ignored and k -> k - 1."""
    part = _SPLITS[split]
    table = value_table({k: k - 1 for k in range(1, 151)}, (0, 255), 255)
    layouts = [Folders(f"images/{part}", f"annotations/{part}", table)]
    prefixes = ("ADEChallengeData2016", "ade/ADEChallengeData2016")
    place, layout = find_folders(root, prefixes, layouts, f"ADE20K-150, {split}")
    return folder_source(place, layout, class_names("ade150"), 255)


def ade847(root: Path, split: str) -> Source:
    """16-bit masks 0..846, 65535 ignored, as detectron2's preparation writes them; names from a class file, or ours."""
    part = _SPLITS[split]
    table = value_table({k: k for k in range(847)}, (65535,), 65535)
    layouts = [
        Folders(images, f"annotations_detectron2/{part}", table, suffix)
        for images in (f"images_detectron2/{part}", f"images/{part}")
        for suffix in (".tif", ".tiff", ".png")
    ]
    prefixes = ("ADE20K_2021_17_01", "ade/ADE20K_2021_17_01")
    place, layout = find_folders(root, prefixes, layouts, f"ADE20K-847, {split}")
    return folder_source(place, layout, read_class_names("ade847", place, class_names("ade847")), 65535)
