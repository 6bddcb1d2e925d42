"""The images with the lowest scores, to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from zs3fast.evaluation.drawing import panels
from zs3fast.evaluation.evaluate import ItemScore, Report
from zs3fast.evaluation.protocols import LabelledImages
from zs3fast.utils.rendering import UNLABELLED


@dataclass(frozen=True, eq=False)
class WorstImage:
    """One of the images with the lowest IoU, to be looked at.

    panels: image, truth, prediction, mistakes.  classes: (index, pixels in the truth, pixels in the prediction) of
    what is there, largest first.
    """

    item: ItemScore
    panels: list[Image.Image]
    classes: list[tuple[int, int, int]]


def worst_images(
    report: Report, dataset: LabelledImages, labels: Callable[[np.ndarray, ItemScore], np.ndarray], count: int
) -> list[WorstImage]:
    """The images with the lowest IoU, segmented again to be shown.

    Args:
        labels: (image, item) -> label map [H, W], -1 for none; for pairs the asked class where its mask is.
    """
    found = []
    for item in report.worst(count):
        sample = dataset[item.image]
        prediction = np.asarray(labels(sample.image, item))
        ignored = sample.labels == dataset.ignore_index
        asked = ~ignored if item.class_index is None else sample.labels == item.class_index
        truth = np.where(asked, sample.labels, UNLABELLED)
        amounts = [(np.bincount(part[part >= 0], minlength=dataset.num_classes)) for part in (truth, prediction)]
        present = np.flatnonzero(amounts[0] + amounts[1])
        classes = sorted(((int(c), int(amounts[0][c]), int(amounts[1][c])) for c in present), key=lambda c: -max(c[1:]))
        found.append(WorstImage(item, panels(sample.image, truth, prediction, ignored, dataset.num_classes), classes))
    return found
