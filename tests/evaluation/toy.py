"""Test sets small enough to count by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["cat", "dog", "sofa", "sky"]
SEEN, UNSEEN = [0, 1, 3], [2]


@dataclass(frozen=True)
class Sample:
    """As `zs3fast.data.Sample`, whose room brings open_clip: seconds in every process of a test."""

    image: np.ndarray
    labels: np.ndarray
    id: str


class ToyDataset:
    """Images whose red channel tells the labels, at sizes of their own; the labels of image 0 are all ignored."""

    name, split, ignore_index, class_names, seen, unseen = "toy", "val", 255, NAMES, SEEN, UNSEEN
    num_classes = len(NAMES)

    def __init__(self, count=7, seed=0):
        rng = np.random.default_rng(seed)
        self.samples = []
        for index in range(count):
            size = (5 + index, 9 - index % 3)
            labels = rng.integers(0, self.num_classes, size).astype(np.int32)
            labels[rng.random(size) < 0.1] = 255
            if index == 0:
                labels[:] = 255
            image = np.repeat(rng.integers(0, 256, (*size, 1), np.uint8), 3, axis=2)
            self.samples.append(Sample(image, labels, f"image{index}"))
        self.ids = [sample.id for sample in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def image_path(self, index):
        return Path(f"/nowhere/{self.ids[index]}.png")


def toy_labels(image):
    """A segmenter of sorts: labels from the image alone, a few pixels without any."""
    labels = image[..., 0].astype(np.int32) % 5
    return np.where(labels == 4, -1, labels)


def toy_masks(image, classes):
    labels = toy_labels(image)
    return np.stack([(labels == c) | (image[..., 0] % 7 == c) for c in classes])


PAIRS = [(1, 2), (2, 0), (1, 3), (4, 2), (1, 2), (6, 1), (5, 0)]


def brute_force_table(pairs, classes, ignore=255):
    """Counts [C, C + 1] one pixel at a time."""
    table = np.zeros((classes, classes + 1), np.int64)
    for prediction, target in pairs:
        for p, t in zip(np.ravel(prediction), np.ravel(target)):
            if t != ignore:
                table[t, p] += 1  # p = -1 is the last column
    return table


def voc_tree(root: Path, count=3, seed=0) -> Path:
    """A VOC2012 folder of smooth images with every kind of label: background, void, all sorts of classes."""
    rng = np.random.default_rng(seed)
    place = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (place / folder).mkdir(parents=True)
    ids = [f"2007_{index:06d}" for index in range(count)]
    for index, name in enumerate(ids):
        size = (70 + 8 * index, 90 - 10 * index)
        photo = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        photo.save(place / "JPEGImages" / f"{name}.jpg")
        coarse = rng.choice([0, 1, 5, 16, 17, 20, 255], (3, 3)).astype(np.uint8)
        coarse[0] = (1, 16, 5)
        mask = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)
        mask.save(place / "SegmentationClass" / f"{name}.png")
    (place / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids) + "\n")
    (place / "ImageSets/Segmentation/train.txt").write_text("")
    return place
