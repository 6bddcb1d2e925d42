"""The world as a dataset: label maps by index for zero-shot segmentation, captions by position for a CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zs3fast.data.datasets import Sample, SegmentationDataset
from zs3fast.data.layouts import Source, value_table
from zs3fast.data.world.captions import caption
from zs3fast.data.world.scenes import SMALLEST, Scene, draw, part_map, random_scene
from zs3fast.data.world.vocabulary import CLASS_NAMES, CLASSES, UNSEEN

VERSION = 2  # of everything that changes a pixel or a word: it is part of every seed
SPLITS = {"train": 10_000, "val": 500, "test": 1_000}
_THINGS_ODDS = (0.6, 0.25, 0.15)  # of one, two and three things in a captioned scene: one alone teaches most
_GROUNDS_ODDS = (0.65, 0.35)
_STREAMS = ("train", "val", "test", "captions")


class WorldDataset(SegmentationDataset):
    """Scenes of the procedural world with exact label maps, painted when they are asked for.

    64 classes, 48 seen and 16 unseen; scenes hold 2 to 4 things on 1 to 3 grounds, and no pixel is ignored. As in the
    other zero-shot datasets, label maps name the unseen classes and training leaves them out. A scene depends on
    (`VERSION`, split, index, size) alone.

    Args:
        split: "train" (10,000 scenes), "val" (500) or "test" (1,000).
        size: (H, W) of the images.  length: use only the first so many scenes, or more of them.
    """

    def __init__(self, split: str, *, size: tuple[int, int] = (96, 96), length: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if min(size) < SMALLEST:
            raise ValueError(f"size: expected at least {SMALLEST} pixels a side, got {size}")
        length = SPLITS[split] if length is None else length
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        ids = [f"world_{split}_{index:06d}" for index in range(length)]
        table = value_table({c: c for c in range(len(CLASSES))}, (255,), 255)
        super().__init__("world", split, Source(ids, "{}.png", ("{}_labels.png",), CLASS_NAMES, table, 255), Path())
        self.size = size

    @property
    def unseen(self) -> list[int]:
        """Combinations of words that training never sees together; every word is part of seen classes."""
        return list(UNSEEN)

    def scene(self, index: int) -> Scene:
        """What lies where in a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        return random_scene(_generator(self.split, 0, index), self.size, things=(2, 4), grounds=(1, 3))

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        image, parts = draw(scene)
        return Sample(image, class_labels(scene, parts), self.ids[index])

    def read_labels(self, index: int) -> np.ndarray:
        """Int32 [H, W] labels of a sample, without painting its image."""
        scene = self.scene(index)
        return class_labels(scene, part_map(scene))

    def missing(self) -> list[tuple[str, Path]]:
        """None: no sample is a file."""
        return []

    def stamps(self) -> Iterator[str]:
        """What the label maps depend on, for the key of what is cached about them."""
        yield f"version {VERSION}, {len(self)} scenes of {self.size}"


class CaptionSet(Dataset[dict[str, Any]]):
    """Endless (scene, caption) pairs of all 192 combinations, by position: the data of a contrastive training.

    Scenes hold one thing, or two or three, on one ground or two; pixels and things are of the same size as in
    `WorldDataset`, whose scenes are larger. A pair depends on (`VERSION`, seed, position, size) alone.

    Args:
        size: side in pixels.  seed: at least 0.
    Returns (indexed by a position):
        {"images": uint8 [3, size, size], "caption": str}
    """

    def __init__(self, size: int = 64, seed: int = 0) -> None:
        if size < SMALLEST:
            raise ValueError(f"size: expected at least {SMALLEST}, got {size}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.size = size
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position < 0:
            raise IndexError(f"position: expected at least 0, got {position}")
        rng = _generator("captions", self.seed, position)
        things, grounds = (int(rng.choice(len(odds), p=odds)) + 1 for odds in (_THINGS_ODDS, _GROUNDS_ODDS))
        scene = random_scene(rng, (self.size,) * 2, things=(things,) * 2, grounds=(grounds,) * 2, all_combinations=True)
        image, parts = draw(scene)
        return {"images": torch.from_numpy(image).permute(2, 0, 1), "caption": caption(scene, parts, rng)}


def class_labels(scene: Scene, parts: np.ndarray) -> np.ndarray:
    """Int32 [H, W] class indices of a part map."""
    out: np.ndarray = np.array([CLASSES.index(concept) for concept in scene.concepts], np.int32)[parts]
    return out


def _generator(stream: str, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng((VERSION, _STREAMS.index(stream), seed, index))
