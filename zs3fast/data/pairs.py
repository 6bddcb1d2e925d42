"""The (image, class) pairs that PASCAL-5i and COCO-20i are tested on (ClsCLIP section 9)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zs3fast.data.presence import class_pixels

if TYPE_CHECKING:
    from zs3fast.data.datasets import SegmentationDataset

# The few-shot lists of PASCAL-5i leave out objects that are smaller; those of COCO-20i are not known to.
FEW_SHOT_PIXELS = {"voc5i": 2 * 32 * 32}


def test_pairs(
    dataset: SegmentationDataset,
    classes: Sequence[int],
    episodes: str | int = "all",
    *,
    min_pixels: int | None = None,
    draw: str | None = None,
    seed: int = 0,
    pair_list: str | os.PathLike[str] | None = None,
) -> list[tuple[int, int]]:
    """(image index, class index) of every question of a test; the class asked for is in the image.

    Args:
        dataset: its label maps are read once and cached.
        classes: the classes asked for, usually `dataset.unseen`.
        episodes: "all" pairs, in the order of the images; or a number of them, as the few-shot protocols draw.
        min_pixels: pairs with fewer pixels of the class are left out; 2048 for voc5i, as its few-shot lists do, else 1.
        draw: how a number of episodes is drawn: "cycle" goes through the pairs over and over (voc5i's protocol, and
            the default), "uniform" draws a class, then one of its images, from `seed` (coco20i's, and its default).
        pair_list: a few-shot list file with lines "2007_000033__01" (id and class number from 1) to take the pairs from
            instead; `min_pixels` is not applied to it.
    """
    classes = sorted(set(classes))
    if not classes or not all(0 <= c < dataset.num_classes for c in classes):
        raise ValueError(f"classes: expected some of 0..{dataset.num_classes - 1}, got {list(classes)}")
    if episodes != "all" and (not isinstance(episodes, int) or episodes < 1):
        raise ValueError(f"episodes: expected 'all' or a number from 1, got {episodes!r}")
    draw = draw or ("uniform" if dataset.name == "coco20i" else "cycle")
    if draw not in ("cycle", "uniform"):
        raise ValueError(f"draw: expected cycle or uniform, got {draw!r}")
    if pair_list is not None:
        pairs = [pair for pair in _read_list(Path(pair_list), dataset) if pair[1] in classes]
    else:
        least = FEW_SHOT_PIXELS.get(dataset.name, 1) if min_pixels is None else max(1, min_pixels)
        pairs = [
            (index, c)
            for index, pixels in enumerate(class_pixels(dataset))
            for c in classes
            if pixels.get(c, 0) >= least
        ]
    if isinstance(episodes, str) or not pairs:
        return pairs
    if draw == "cycle":
        return list(islice(cycle(pairs), episodes))
    rng = np.random.default_rng(seed)
    images = {c: [index for index, other in pairs if other == c] for c in classes}
    held = [c for c in classes if images[c]]
    drawn = (held[rng.integers(len(held))] for _ in range(episodes))
    return [(images[c][rng.integers(len(images[c]))], c) for c in drawn]


vars(test_pairs)["__test__"] = False  # not a test, whatever its name says


def _read_list(path: Path, dataset: SegmentationDataset) -> list[tuple[int, int]]:
    index = {name: place for place, name in enumerate(dataset.ids)}
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, class_number = line.strip().rpartition("__")
        if name not in index or not class_number.isdigit() or not 1 <= int(class_number) <= dataset.num_classes:
            raise ValueError(
                f"pair_list: {path}, line {number}: expected ID__CLASS with an image of {dataset.name} "
                f"{dataset.split} and a class from 1, got {line!r}"
            )
        pairs.append((index[name], int(class_number) - 1))
    return pairs
