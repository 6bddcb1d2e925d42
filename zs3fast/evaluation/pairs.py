"""Binary masks of the classes asked for: what ClsCLIP's protocols score."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zs3fast.labels.refinement import Pamr

if TYPE_CHECKING:
    from zs3fast.models.clsclip import ClsCLIP
    from zs3fast.proposals import BoxProposer


class PairSegmenter:
    """Masks of the classes asked for, by a model with one sigmoid mask a class.

    mask = sigmoid(logits, upsampled to the image) > threshold; the model sees the image squashed to its square
    input.

    Args:
        model: a ClsCLIP; put in eval mode.
        text_embeddings: [C, D], a row for each class of the dataset.
        threshold: between 0 and 1; the protocols keep it at 0.5.
        size: (H, W) of the masks; None: the image's.
        refine: steps of refinement of the scores, see `zs3fast.labels.refinement`; 0: none.
    """

    def __init__(
        self,
        model: ClsCLIP,
        text_embeddings: Tensor,
        threshold: float = 0.5,
        size: tuple[int, int] | None = None,
        refine: int = 0,
    ):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold}")
        self.model = model.eval()
        self.like = next(model.parameters())
        self.text_embeddings = text_embeddings.to(self.like.device)
        self.threshold, self.size, self.refine = threshold, size, refine

    @torch.no_grad()
    def __call__(self, image: np.ndarray, classes: Sequence[int], path: Path | None = None) -> Tensor:
        """Bool [P, H, W] on the model's device for an image uint8 [H, W, 3] and P class indices; no path is needed."""
        from zs3fast.inference.predictors import squash  # which brings the proposers

        model, size = self.model, self.size or image.shape[:2]
        pixels = squash(image, model.image_size, model.pixel_mean, model.pixel_std).to(self.like)
        out = model(pixels[None], self.text_embeddings[list(classes)])
        return _refined(model.class_scores(out, size)[0], pixels, self.refine) > self.threshold


class ZoomingPairSegmenter:
    """Masks of the classes asked for by ClsCLIP+: the OR over the boxes that a detector finds for each class.

    Args:
        model, text_embeddings, threshold, refine: as for `PairSegmenter`.
        class_names: a word for each row of `text_embeddings`, to find its boxes by.
        boxes: finds boxes in an image.
        no_box: what a class without boxes gets: "whole_image", plain ClsCLIP; "empty", nothing.
    """

    def __init__(
        self,
        model: ClsCLIP,
        text_embeddings: Tensor,
        class_names: Sequence[str],
        boxes: BoxProposer,
        no_box: str = "whole_image",
        threshold: float = 0.5,
        refine: int = 0,
    ):
        from zs3fast.models.clsclip_plus import ClsCLIPPlus

        plain = PairSegmenter(model, text_embeddings, threshold)
        self.plus = ClsCLIPPlus(plain.model, no_box=no_box)
        self.text_embeddings, self.threshold, self.refine = plain.text_embeddings, threshold, refine
        self.class_names, self.boxes = list(class_names), boxes

    def __call__(self, image: np.ndarray, classes: Sequence[int], path: Path | None = None) -> Tensor:
        """Bool [P, H, W] on the model's device; `path` is the image's, for boxes that lie in files."""
        from zs3fast.inference.predictors import normalise

        model, device = self.plus.model, self.text_embeddings.device
        found = self.boxes(image, None if path is None else os.fspath(path)).to(device)
        pixels = normalise(image, model.pixel_mean, model.pixel_std).to(device)
        words = [self.class_names[c] for c in classes]
        scores = self.plus.class_scores(pixels, self.text_embeddings[list(classes)], found, words)
        return _refined(scores, pixels, self.refine) > self.threshold


def _refined(scores: Tensor, image: Tensor, steps: int) -> Tensor:
    """Scores [P, H, W] after refinement beside a normalised image [3, h, w]."""
    return Pamr(image.float(), steps)(scores) if steps else scores


class BoxPairSegmenter:
    """Masks of the classes asked for that are the detector's boxes themselves (ClsCLIP's table 6); none: empty.

    Args:
        class_names: a word for each class, to find its boxes by.
        boxes: finds boxes in an image.
    """

    def __init__(self, class_names: Sequence[str], boxes: BoxProposer):
        self.class_names, self.boxes = list(class_names), boxes

    def __call__(self, image: np.ndarray, classes: Sequence[int], path: Path | None = None) -> Tensor:
        """Bool [P, H, W]: pixels whose centre lies in a box of the class."""
        from zs3fast.proposals import boxes_for_class

        found = self.boxes(image, None if path is None else os.fspath(path))
        y, x = (torch.arange(side) + 0.5 for side in image.shape[:2])
        masks = torch.zeros(len(classes), *image.shape[:2], dtype=torch.bool)
        for mask, c in zip(masks, classes):
            for x0, y0, x1, y1 in boxes_for_class(found, self.class_names[c]).boxes.tolist():
                mask |= ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
        return masks


def group_by_image(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, dict[int, int]]]:
    """Pairs (image, class) as (image, {class: how often}), in the order in which images first occur.

    One pass over an image then serves all its classes, and a pair that is drawn twice is segmented once.
    """
    groups: dict[int, Counter[int]] = {}
    for image, class_index in pairs:
        groups.setdefault(image, Counter())[class_index] += 1
    return [(image, dict(classes)) for image, classes in groups.items()]
