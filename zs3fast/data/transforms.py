"""Training augmentation of the published recipes, every draw from the NumPy generator that is handed in.

ZegCLIP, TagCLIP and CLIP-RC share one recipe ("zegclip"), with OpenCV's arithmetic; MAFT ("maft") and ClsCLIP
("clsclip") resize with Pillow's antialiased bilinear filter, MAFT as its training library does, ClsCLIP by our choice.
MAFT's and ClsCLIP's images are resized only where the crop looks. "flip" is for `zs3fast.data.world`, whose scenes are
drawn at random and whose classes are told apart by colour: it jitters and resizes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zs3fast.data.colour import colour_jitter
from zs3fast.data.resize import resize_bilinear, resize_nearest
from zs3fast.utils.constants import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from zs3fast.data.datasets import Sample

# Of RGB in 0..1, as the models' `pixel_mean` and `pixel_std`.
_TRIES = 10  # redraws of a crop that breaks its rule


class Transform(Protocol):
    """(sample, rng) -> (images float32 [3, S, S] normalised, labels int64 [S, S])."""

    crop_size: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]: ...


def train_transform(
    recipe: str,
    crop_size: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    ignore_index: int = 255,
) -> Transform:
    """The training augmentation of a recipe.

    Args:
        recipe: "zegclip" (TagCLIP and CLIP-RC too), "maft", "clsclip" or "flip".
        crop_size: S; 512, 640, 352 or 128 by default. The range of sizes an image is resized to scales with it.
        mean, std: normalisation of RGB in 0..1; ImageNet's for "zegclip", CLIP's for the others.
        ignore_index: the dataset's; it is also what padding is labelled.
    """
    if recipe not in _RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(_RECIPES)}, got {recipe!r}")
    kind, default_size, default_mean, default_std = _RECIPES[recipe]
    size = default_size if crop_size is None else crop_size
    if size < 1:
        raise ValueError(f"crop_size: expected at least 1, got {size}")
    mean, std = default_mean if mean is None else mean, default_std if std is None else std
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"mean, std: expected three values each, std above 0, got {mean} and {std}")
    return kind(size, mean, std, ignore_index)


class _Recipe:
    """What the recipes share: the size, the normalisation by table, the padding."""

    pad_level: int | None = None  # pixel value of the padding before normalisation; None: 0 after it

    def __init__(self, crop_size: int, mean: Sequence[float], std: Sequence[float], ignore_index: int) -> None:
        self.crop_size = crop_size
        self.ignore_index = ignore_index
        levels = np.arange(256) / 255
        self._normalised = [((levels - m) / s).astype(np.float32) for m, s in zip(mean, std)]

    def _finish(self, image: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Normalise, and pad right and bottom to S x S."""
        height, width = labels.shape
        images = np.empty((3, self.crop_size, self.crop_size), np.float32)
        padded = np.full((self.crop_size, self.crop_size), self.ignore_index, np.int64)
        for channel, table in enumerate(self._normalised):
            if labels.shape != padded.shape:
                images[channel] = 0 if self.pad_level is None else table[self.pad_level]
            images[channel, :height, :width] = table[image[..., channel]]
        padded[:height, :width] = labels
        return torch.from_numpy(images), torch.from_numpy(padded)


class ZegclipTransform(_Recipe):
    """ZegCLIP's recipe: resize by 0.5..2, crop under the 75 % rule, flip, jitter, normalise, pad.

    r ~ U(0.5, 2); the image is scaled by min(int(4 S r) / long side, int(S r) / short side). A crop is accepted if
    it holds more than one class and the largest covers under 75 % of the labelled pixels; it is redrawn at most ten
    times and the last draw is kept.
    """

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        short, long = sorted(sample.labels.shape)
        ratio = rng.uniform(0.5, 2)
        factor = min(int(4 * self.crop_size * ratio) / long, int(self.crop_size * ratio) / short)
        size = _scaled(sample.labels.shape, factor)
        whole = resize_nearest(sample.labels, size)
        for _ in range(_TRIES + 1):
            window = top, left, height, width = _draw_window(size, self.crop_size, rng)
            labels = whole[top : top + height, left : left + width]
            if varied(labels, self.ignore_index):
                break
        image = resize_bilinear(sample.image, size, window)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return self._finish(colour_jitter(image, rng), labels)


class MaftTransform(_Recipe):
    """MAFT's recipe: a short side of 0.5..1.5 S in steps of S / 10 (long side at most 4 S), crop, jitter, flip, pad.

    Padding is grey (128) before normalisation. No rule restricts the crop.
    """

    pad_level = 128

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        short, long = sorted(sample.labels.shape)
        target = int(rng.integers(5, 15, endpoint=True)) * self.crop_size // 10
        factor = min(target / short, 4 * self.crop_size / long)
        size = _scaled(sample.labels.shape, factor)
        window = _draw_window(size, self.crop_size, rng)
        top, left, height, width = window
        scale_y, scale_x = sample.labels.shape[0] / size[0], sample.labels.shape[1] / size[1]
        box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
        image = colour_jitter(_antialiased(sample.image, (height, width), box), rng, largest_hue=18)
        labels = _nearest_centre(sample.labels, (height, width), box)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return self._finish(image, labels)


class ClsclipTransform(_Recipe):
    """ClsCLIP's recipe (the paper is silent; these are our defaults): random resized crop, squashed to S x S, flip.

    The crop covers U(0.5, 1) of the image at an aspect ratio of 3/4..4/3 of the image's own, log-uniform. With
    `class_index`, which must be in the image, it is redrawn up to ten times until the squashed labels keep some of
    the class; then a window of at most S x S source pixels around one of its pixels is taken, where nothing is lost.
    """

    def __call__(
        self, sample: Sample, rng: np.random.Generator, class_index: int | None = None
    ) -> tuple[Tensor, Tensor]:
        size = self.crop_size, self.crop_size
        for _ in range(_TRIES + 1):
            box = self._draw_box(sample.labels.shape, rng)
            labels = _nearest_centre(sample.labels, size, box)
            if class_index is None or (labels == class_index).any():
                break
        else:
            box = self._box_around(sample.labels == class_index, rng)
            labels = _nearest_centre(sample.labels, size, box)
        image = _antialiased(sample.image, size, box)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return self._finish(image, labels)

    @staticmethod
    def _draw_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        area, aspect = rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        height = min(size[0], max(1, round(size[0] * np.sqrt(area / aspect))))
        width = min(size[1], max(1, round(size[1] * np.sqrt(area * aspect))))
        top, left = rng.integers(0, [size[0] - height, size[1] - width], endpoint=True)
        return int(left), int(top), int(left) + width, int(top) + height

    def _box_around(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        places = np.argwhere(mask)
        if not len(places):
            raise ValueError("class_index: expected a class in the image, got one that is not")
        centre = places[rng.integers(len(places))]
        extent = np.minimum(mask.shape, self.crop_size)
        top, left = (centre - extent // 2).clip(0, mask.shape - extent)
        return int(left), int(top), int(left + extent[1]), int(top + extent[0])


class FlipTransform(_Recipe):
    """A random crop of S x S at the image's own scale, and a flip. With `class_index` the crop holds that class."""

    def __call__(
        self, sample: Sample, rng: np.random.Generator, class_index: int | None = None
    ) -> tuple[Tensor, Tensor]:
        for _ in range(_TRIES + 1):
            top, left, height, width = _draw_window(sample.labels.shape, self.crop_size, rng)
            window = np.s_[top : top + height, left : left + width]
            labels = sample.labels[window]
            if class_index is None or (labels == class_index).any():
                break
        else:
            raise ValueError(f"class_index: expected a class that a crop of the image can hold, got {class_index}")
        image = sample.image[window]
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return self._finish(image, labels)


_Make = Callable[[int, Sequence[float], Sequence[float], int], Transform]
_RECIPES: dict[str, tuple[_Make, int, Sequence[float], Sequence[float]]] = {
    "zegclip": (ZegclipTransform, 512, IMAGENET_MEAN, IMAGENET_STD),
    "maft": (MaftTransform, 640, CLIP_MEAN, CLIP_STD),
    "clsclip": (ClsclipTransform, 352, CLIP_MEAN, CLIP_STD),
    "flip": (FlipTransform, 128, CLIP_MEAN, CLIP_STD),
}


def varied(labels: np.ndarray, ignore_index: int, largest: float = 0.75) -> bool:
    """Whether more than one class is labelled and none covers `largest` or more of the labelled pixels."""
    counts = np.bincount(labels.ravel())
    counts[ignore_index:] = 0
    return bool(np.count_nonzero(counts) > 1 and int(np.max(counts)) / int(np.sum(counts)) < largest)


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def _draw_window(size: tuple[int, int], crop: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with uniform offsets, the whole of an axis that is too short."""
    height, width = min(size[0], crop), min(size[1], crop)
    top, left = rng.integers(0, [size[0] - height, size[1] - width], endpoint=True)
    return int(top), int(left), height, width


def _antialiased(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Box (left, top, right, bottom) of the image at `size`, by Pillow's bilinear filter."""
    right, bottom = min(box[2], image.shape[1]), min(box[3], image.shape[0])  # rounding may lead a hair outside
    box = box[0], box[1], right, bottom
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def _nearest_centre(labels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Box of the labels at `size`: the label under each target pixel's centre, as Pillow's nearest filter."""
    index = []
    for target, start, stop, length in zip(size, (box[1], box[0]), (box[3], box[2]), labels.shape):
        places = start + (np.arange(target) + 0.5) * ((stop - start) / target)
        index.append(places.astype(np.int64).clip(0, length - 1))
    out: np.ndarray = labels[index[0][:, None], index[1]]
    return out
