"""Which classes each image of a dataset holds: read off all its label maps once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zs3fast.text import cache_dir
from zs3fast.utils.files import replacing

if TYPE_CHECKING:
    from zs3fast.data.datasets import SegmentationDataset

logger = logging.getLogger("zs3fast")

_FORMAT = 1


def class_pixels(dataset: SegmentationDataset) -> list[dict[int, int]]:
    """For every image, {class index: pixels} of the classes in it, ignored pixels aside.

    Kept as JSON in `<cache>/data`, under a key made of the paths, sizes and times of all label maps and what their
    values mean: a changed mask is read again. A cache that cannot be written only warns.
    """
    key = _key(dataset)
    path = cache_dir() / "data" / f"{Path(dataset.name).stem}_{dataset.split}_{key[:16]}.json"
    stored = _read(path, key)
    if stored is None:
        logger.info("reading the label maps of %s %s, %d of them, once", dataset.name, dataset.split, len(dataset))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            counts = list(pool.map(lambda index: _count(dataset, index), range(len(dataset))))
        stored = [[int(n) for c in np.flatnonzero(row) for n in (c, row[c])] for row in counts]
        _write(path, key, stored)
    return [dict(zip(flat[::2], flat[1::2])) for flat in stored]


def images_per_class(dataset: SegmentationDataset) -> np.ndarray:
    """Int64 [C]: in how many images each class occurs."""
    counts = np.zeros(dataset.num_classes, np.int64)
    for pixels in class_pixels(dataset):
        counts[list(pixels)] += 1
    return counts


def _count(dataset: SegmentationDataset, index: int) -> np.ndarray:
    labels = dataset.read_labels(index)
    return np.bincount(labels[labels != dataset.ignore_index], minlength=dataset.num_classes)


def _key(dataset: SegmentationDataset) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {dataset.name} {dataset.split}".encode())
    digest.update(dataset._source.table.tobytes())
    if dataset._source.palette is not None:
        digest.update(repr(dataset._source.palette).encode())
    for stamp in dataset.stamps():
        digest.update(f"\n{stamp}".encode())
    return digest.hexdigest()


def _read(path: Path, key: str) -> list[list[int]] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is unreadable (%s): reading the label maps again", path, error)
        return None
    return stored["pictures"] if isinstance(stored, dict) and stored.get("key") == key else None


def _write(path: Path, key: str, images: list[list[int]]) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "pictures": images}), encoding="utf-8")
    except OSError as error:
        logger.warning("what the label maps hold was not cached in %s: %s", path.parent, error)
