"""ClsCLIP+ (2023): ClsCLIP looks again at the boxes of a detector (section 3.4, eq. 9).

    Q_c = boxes whose class word is the asked one,   O(pixel) = OR over m in Q_c of ClsCLIP(crop_m, c)(pixel)

An OR of thresholded masks is the threshold of the largest score, so scores are kept and the maximum is taken: the same
numbers serve masks, scores and labels. A detector that has seen the asked classes in training, as one trained on COCO
has those of VOC, makes this no zero-shot method in the strict sense.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.models.clsclip import ClsCLIP
from zs3fast.proposals.boxes import ALIASES, boxes_for_class, make_boxes, unknown_words
from zs3fast.types import BoxProposals
from zs3fast.utils.options import one_of

logger = logging.getLogger("zs3fast")

NO_BOX = ("whole_image", "empty")
SMALLEST_BOX, ENLARGED_BOX = 4, 16  # pixels a side: boxes below the first are grown to the second
Window = tuple[int, int, int, int]
Words = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class ZoomPlan:
    """Where to look for what.

    windows: x0 y0 x1 y1 of each crop, whole pixels inside the image, all different.
    pairs:   (window, class), sorted; a window that serves several classes is cut and encoded once.
    """

    windows: tuple[Window, ...]
    pairs: tuple[tuple[int, int], ...]


class ClsCLIPPlus:
    """ClsCLIP on the boxes of one image.

    Args:
        model: a ClsCLIP; its weights are used as they are, on crops instead of images. Put in eval mode.
        crop_margin: context, added on each side of a box as a share of its width or height.
        no_box: a class without boxes, or one that the detector has no word for: "whole_image", plain ClsCLIP; "empty",
            background (eq. 9 to the letter).
        aliases: groups of words of one meaning, as in `zs3fast.proposals.boxes_for_class`.
    """

    def __init__(
        self,
        model: ClsCLIP,
        *,
        crop_margin: float = 0.1,
        no_box: str = "whole_image",
        aliases: Sequence[Sequence[str]] = ALIASES,
    ):
        if not 0 <= crop_margin < float("inf"):
            raise ValueError(f"crop_margin: expected a share of at least 0, got {crop_margin}")
        self.model = model.eval()
        self.crop_margin = crop_margin
        self.no_box = one_of("no_box", no_box, NO_BOX)
        self.aliases = aliases
        self._told: set[str] = set()

    def plan(self, boxes: BoxProposals, class_words: Words) -> ZoomPlan:
        """The crops of an image and what is asked of each.

        Args:
            boxes: checked again here, as `zs3fast.proposals.make_boxes` does.
            class_words: C classes, a word or a sequence of synonyms each.
        """
        boxes = make_boxes(boxes.boxes, boxes.names, boxes.image_size, scores=boxes.scores, vocabulary=boxes.vocabulary)
        self._tell_unknown(class_words, boxes)
        height, width = boxes.image_size
        index: dict[Window, int] = {}
        pairs = set()
        for c, word in enumerate(class_words):
            windows = zoom_windows(boxes_for_class(boxes, word, self.aliases).boxes, boxes.image_size, self.crop_margin)
            if not windows and self.no_box == "whole_image":
                windows = [(0, 0, width, height)]
            pairs |= {(index.setdefault(window, len(index)), c) for window in windows}
        return ZoomPlan(tuple(index), tuple(sorted(pairs)))

    def _tell_unknown(self, class_words: Words, boxes: BoxProposals) -> None:
        unknown = [
            word for word in unknown_words(class_words, boxes.vocabulary, self.aliases) if word not in self._told
        ]
        if unknown:
            self._told.update(unknown)
            logger.warning("the detector has no word for %s: no_box=%r applies", ", ".join(unknown), self.no_box)

    @torch.no_grad()
    def class_scores(self, image: Tensor, text_embeddings: Tensor, boxes: BoxProposals, class_words: Words) -> Tensor:
        """Largest score of every class at every pixel over its crops, 0 outside all of them.

        Args:
            image: [3, H, W], normalised, at the image's own size.
            text_embeddings: [C, D], as for the model.
            boxes, class_words: as for `plan`; boxes in pixels of `image`.
        Returns:
            [C, H, W] float32.
        """
        scores = torch.zeros(len(class_words), *image.shape[-2:], device=image.device)
        for c, (x0, y0, x1, y1), crop in self._crops(image, text_embeddings, boxes, class_words):
            region = scores[c, y0:y1, x0:x1]
            torch.maximum(region, crop, out=region)
        return scores

    def predict_masks(
        self, image: Tensor, text_embeddings: Tensor, boxes: BoxProposals, class_words: Words, threshold: float = 0.5
    ) -> Tensor:
        """The published answer, bool [C, H, W]: the OR over the crops' masks, `class_scores` > `threshold`."""
        return self.class_scores(image, text_embeddings, boxes, class_words) > threshold

    @torch.no_grad()
    def predict_labels(
        self,
        image: Tensor,
        text_embeddings: Tensor,
        boxes: BoxProposals,
        class_words: Words,
        threshold: float | None = 0.5,
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 and their scores float32, both [H, W]: argmax and maximum of `class_scores`, without those.

        Args:
            threshold: pixels whose best score is not above it are background, -1; None: no background.
        """
        best = torch.zeros(image.shape[-2:], device=image.device)
        labels = torch.zeros(image.shape[-2:], dtype=torch.int64, device=image.device)
        for c, (x0, y0, x1, y1), crop in self._crops(image, text_embeddings, boxes, class_words):
            score, label = best[y0:y1, x0:x1], labels[y0:y1, x0:x1]
            better = (crop > score) | ((crop == score) & (c < label))  # of equals the lowest class, as argmax has it
            score.copy_(torch.where(better, crop, score))
            label.masked_fill_(better, c)
        if threshold is not None:
            labels = torch.where(best > threshold, labels, -1)
        return labels, best

    def _crops(
        self, image: Tensor, text_embeddings: Tensor, boxes: BoxProposals, class_words: Words
    ) -> Iterator[tuple[int, Window, Tensor]]:
        """(class, window, scores of its pixels) of every pair, in batches of windows that fit the model's memory."""
        self._check(image, text_embeddings, boxes, class_words)
        plan, side = self.plan(boxes, class_words), self.model.image_size
        like = next(self.model.parameters())
        at_once = self.model.pairs_at_once(like.new_empty(0, 3, side, side))
        for first in range(0, len(plan.windows), at_once):
            windows = plan.windows[first : first + at_once]
            pairs = [(w, c) for w, c in plan.pairs if first <= w < first + len(windows)]
            asked = torch.tensor(pairs, device=image.device) - torch.tensor([first, 0], device=image.device)
            crops = torch.cat([squash(image[None, :, y0:y1, x0:x1], side) for x0, y0, x1, y1 in windows])
            masks = self.model(crops.to(like.dtype), text_embeddings, asked).mask_logits.float()
            for (w, c), mask in zip(pairs, masks):
                x0, y0, x1, y1 = plan.windows[w]
                size = (y1 - y0, x1 - x0)
                logits = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)
                yield c, plan.windows[w], logits[0, 0].sigmoid_()

    def _check(self, image: Tensor, text_embeddings: Tensor, boxes: BoxProposals, class_words: Words) -> None:
        if not isinstance(boxes, BoxProposals):
            raise TypeError(
                f"boxes: expected BoxProposals, got {type(boxes).__name__}; see zs3fast.proposals.make_boxes"
            )
        if isinstance(class_words, str):
            raise TypeError(f"class_words: expected a sequence of words, got the string {class_words!r}")
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image: expected a normalised floating-point image [3, H, W], got {got}")
        if tuple(image.shape[1:]) != tuple(boxes.image_size):
            raise ValueError(
                f"boxes: expected an image of H x W = {' x '.join(map(str, boxes.image_size))}, "
                f"got one of {image.shape[1]} x {image.shape[2]}"
            )
        if len(class_words) != len(text_embeddings):
            raise ValueError(
                f"class_words: expected a word for each of {len(text_embeddings)} text_embeddings, "
                f"got {len(class_words)}"
            )


def squash(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, h, w] -> [B, 3, side, side], bilinear, averaging where they shrink; the aspect ratio is lost."""
    return F.interpolate(images.float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def zoom_windows(boxes: Tensor, image_size: tuple[int, int], margin: float) -> list[Window]:
    """Boxes [K, 4] with context: grown by `margin` of their sides on each side, to whole pixels, inside the image.

    Sides under 4 pixels are grown to 16 first. Every window holds its box; repeated windows are kept once.
    """
    height, width = image_size
    windows = []
    for x0, y0, x1, y1 in boxes.tolist():
        (left, right), (top, bottom) = _grown(x0, x1, margin), _grown(y0, y1, margin)
        windows.append((max(left, 0), max(top, 0), min(right, width), min(bottom, height)))
    return list(dict.fromkeys(windows))


def _grown(low: float, high: float, margin: float) -> tuple[int, int]:
    if high - low < SMALLEST_BOX:
        middle = (low + high) / 2
        low, high = middle - ENLARGED_BOX / 2, middle + ENLARGED_BOX / 2
    more = margin * (high - low)
    return math.floor(low - more), math.ceil(high + more)
