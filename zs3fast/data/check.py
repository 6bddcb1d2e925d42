"""Walking a dataset: every pair is read, counted, and the broken ones are named."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zs3fast.data.datasets import SegmentationDataset
from zs3fast.data.opening import list_datasets, open_dataset
from zs3fast.data.sources import FOLDED, SPLITS

# Pairs of the published protocols.
PUBLISHED_PAIRS = {
    ("voc20", "train"): 10582,
    ("voc20", "val"): 1449,
    ("voc5i", "val"): 1449,
    ("coco171", "train"): 118287,
    ("coco171", "val"): 5000,
    ("context59", "train"): 4996,
    ("context59", "val"): 5104,
    ("context60", "train"): 4996,
    ("context60", "val"): 5104,
    ("pc459", "val"): 5104,
    ("ade150", "val"): 2000,
    ("ade847", "val"): 2000,
}


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What a walk over one split found.

    name, split, pairs: the dataset, and how many pairs its lists or folders name.
    checked:      pairs that were read.
    broken:       (id, reason) of those that cannot be used, in dataset order.
    images:       int64 [C]: sound pairs in which each class occurs.  pixels: int64 [C]: its pixels in them.
    ignored:      pixels that carry the ignore index.
    unlabelled:   images beside those of the pairs that have no label map, see `SegmentationDataset.unlabelled`.
    notes:        remarks on sound pairs, see `SegmentationDataset.notes`.
    """

    name: str
    split: str
    pairs: int
    checked: int
    broken: list[tuple[str, str]]
    images: np.ndarray = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    ignored: int
    unlabelled: list[Path]
    class_names: list[str] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def absent(self) -> list[str]:
        """Classes that occur in no sound pair."""
        return [name for name, images in zip(self.class_names, self.images) if not images]


def check_dataset(
    dataset: SegmentationDataset,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every pair of a dataset (or the first `limit`), several at a time.

    A pair is broken if a file is missing or cannot be read, if the sizes differ, or if the mask holds a value that is
    no label of the dataset. `progress` is called with (done, total).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    counts = np.zeros((2, dataset.num_classes), np.int64)
    ignored, broken = 0, []
    with _quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda index: _pair(dataset, index), range(total))
        for done, (name, result) in enumerate(zip(dataset.ids, results), 1):
            if isinstance(result, str):
                broken.append((name, result))
            else:
                counts[0] += result[:-1] > 0
                counts[1] += result[:-1]
                ignored += int(result[-1])
            if progress is not None:
                progress(done, total)
    return CheckReport(
        name=dataset.name,
        split=dataset.split,
        pairs=len(dataset),
        checked=total,
        broken=broken,
        images=counts[0],
        pixels=counts[1],
        ignored=ignored,
        unlabelled=dataset.unlabelled(),
        class_names=dataset.class_names,
        notes=list(dataset.notes.values()),
    )


def _pair(dataset: SegmentationDataset, index: int) -> np.ndarray | str:
    """Pixels of every class and, last, ignored ones; or what is wrong with the pair."""
    try:
        labels = dataset[index].labels
    except (ValueError, OSError, MemoryError) as error:
        return " ".join(str(error).split()) or "not enough memory"
    counts = np.bincount(np.where(labels == dataset.ignore_index, dataset.num_classes, labels).ravel())
    return np.pad(counts, (0, dataset.num_classes + 1 - len(counts)))


def find_datasets(root: str | os.PathLike[str], split: str | None = None) -> list[SegmentationDataset]:
    """Every dataset and split that a folder holds, files unchecked.

    PASCAL-5i and COCO-20i are looked for only where nothing else is found: they share their images with others.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root: no folder {root}")
    folded = [name for name in list_datasets() if name in FOLDED]
    for names in ([name for name in list_datasets() if name not in FOLDED], folded):
        found = []
        for name in names:
            for part in SPLITS if split is None else [split]:
                try:
                    with _quiet():
                        fold = 0 if name in FOLDED else None
                        found.append(open_dataset(name, root, part, fold=fold, check_files=False))
                except (ValueError, OSError):  # not here, or not in a known layout
                    continue
        if found:
            return found
    raise ValueError(f"root: expected {', '.join(list_datasets())} in a known layout, got {root}, which holds none")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("zs3fast")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
