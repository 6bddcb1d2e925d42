"""Datasets by name: the known ones, the painted world, and those of one's own."""

from __future__ import annotations

import os
from pathlib import Path

from zs3fast.data.datasets import SegmentationDataset
from zs3fast.data.folds import fold_classes
from zs3fast.data.registered import is_file_name, registered, registered_source
from zs3fast.data.sources import FOLDED, PAINTED, SOURCES, SPLITS
from zs3fast.text import unseen_classes
from zs3fast.utils.options import did_you_mean

_PUBLISHED_SPLITS = ("ade847", "coco171", "context59", "context60", "voc20")


def list_datasets() -> list[str]:
    """Names of datasets on disk that `open_dataset` knows; it also knows "world", which is on none."""
    return list(SOURCES)


def open_dataset(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    fold: int | None = None,
    check_files: bool = True,
) -> SegmentationDataset:
    """The pairs of a dataset under a folder, in any of the layouts it is commonly kept in.

    Args:
        name: one of `list_datasets()`, "world" (`zs3fast.data.world`), a name of `register_dataset`, or a YAML file.
        root: the dataset's own folder (VOCdevkit/VOC2012, coco_stuff164k, ADEChallengeData2016, ...) or one above;
            None for "world", which is painted when it is read, and where a description of one's own says it.
        split: "train" or "val"; of "world" also "test". VOC's training set is the augmented one (10,582 images).
        fold: 0..3 for voc5i and coco20i, and for those only.
        check_files: whether every image and label map must be there.
    Raises:
        ValueError: an unknown name, split or fold; a root that holds no known layout of the dataset.
        FileNotFoundError: no such root, or (with `check_files`) a missing file, the first one named.
    """
    if name == PAINTED:
        return _open_world(root, split, fold)
    own = registered_source(name, root, split) if split in SPLITS else None
    if own is not None:
        if fold is not None:
            raise ValueError(f"fold: expected None for {name}, which has none, got {fold}")
        source, place = own
        return _with_files(SegmentationDataset(name, split, source, place, None, _unseen_of), check_files)
    if name not in SOURCES and name not in registered() and not is_file_name(name):
        known = (*SOURCES, *registered(), PAINTED)
        raise ValueError(
            f"name: expected one of {', '.join(known)}, or a YAML file that describes a dataset, got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    if split not in SPLITS:
        raise ValueError(f"split: expected train or val, got {split!r}")
    if fold is not None or name in FOLDED:
        fold_classes(name, fold)
    if root is None:
        raise ValueError(f"root: expected the folder of {name}, got None")
    root = Path(root)
    source = SOURCES[name](root, split)
    return _with_files(SegmentationDataset(name, split, source, root, fold, _unseen_of), check_files)


def _unseen_of(dataset: SegmentationDataset) -> list[int]:
    """Unseen classes of a known dataset: of the published split, of the fold, or none."""
    if dataset._source.unseen is not None:
        return list(dataset._source.unseen)
    if dataset.name in FOLDED:
        return fold_classes(dataset.name, dataset.fold)
    return unseen_classes(dataset.name) if dataset.name in _PUBLISHED_SPLITS else []


def _with_files(dataset: SegmentationDataset, check_files: bool) -> SegmentationDataset:
    """The dataset, if every image and label map is there or it does not matter."""
    absent = dataset.missing() if check_files else []
    if absent:
        more = f", and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise FileNotFoundError(f"{dataset.name} {dataset.split}: no file {absent[0][1]}{more}")
    return dataset


def _open_world(root: str | os.PathLike[str] | None, split: str, fold: int | None) -> SegmentationDataset:
    from zs3fast.data.world import WorldDataset

    if root is not None or fold is not None:
        raise ValueError(f"root, fold: {PAINTED} has neither, expected None, got {root} and {fold}")
    return WorldDataset(split)
