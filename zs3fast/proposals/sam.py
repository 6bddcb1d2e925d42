"""Segment Anything as a proposer: a grid of points, three masks a point, filtered to the confident and distinct."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zs3fast.proposals._library import transformers
from zs3fast.proposals.boxes import mask_boxes
from zs3fast.proposals.frames import DIVISOR, LONG_SIDE, SHORT_SIDE, check_images, frame_size, padded_size
from zs3fast.proposals.masks import stack_masks
from zs3fast.types import Proposals


class SamProposer:
    """Automatic masks of a SamModel: binary, without classes, best first.

    For every point of a regular grid the model gives three masks with a predicted IoU. Kept are those with predicted
    IoU >= 0.88, stability >= 0.95 and at least one pixel; then box non-maximum suppression at 0.7 and the best 100 by
    predicted IoU, which becomes `quality`. The masks lie on MAFT's frame. An image of which none survives has no valid
    row, with a warning.

    Args:
        model: transformers' SamModel.
        points_per_side: the grid is points_per_side x points_per_side.
        min_iou, min_stability, nms_iou: thresholds.
        max_masks: most masks an image.
        points_per_batch: points whose masks are decoded at once; bounds the memory, changes nothing else.
        short_side, long_side, divisor: the frame, see `resize_for_proposer`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        points_per_side: int = 32,
        min_iou: float = 0.88,
        min_stability: float = 0.95,
        nms_iou: float = 0.7,
        max_masks: int = 100,
        points_per_batch: int = 64,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        divisor: int = DIVISOR,
    ) -> None:
        counts = {"points_per_side": points_per_side, "max_masks": max_masks, "points_per_batch": points_per_batch}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.model = model.eval()
        self.points_per_side, self.points_per_batch, self.max_masks = points_per_side, points_per_batch, max_masks
        self.min_iou, self.min_stability, self.nms_iou = min_iou, min_stability, nms_iou
        self.short_side, self.long_side, self.divisor = short_side, long_side, divisor
        config: Any = model.config  # the library's own
        side = int(config.vision_config.image_size)
        self.processor = transformers().SamImageProcessor(
            size={"longest_edge": side}, pad_size={"height": side, "width": side}
        )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        """Proposals of the images, run one after the other; `names` are not used."""
        check_images(pictures)
        found = [self._image_masks(image) for image in pictures]
        empty = [index for index, (masks, _) in enumerate(found) if len(masks) == 0]
        if empty:
            warnings.warn(
                f"SAM found no mask of predicted IoU >= {self.min_iou} and stability >= {self.min_stability} in "
                f"{len(empty)} of {len(pictures)} images (the first: {empty[0]}); they have no proposals",
                stacklevel=2,
            )
        masks, quality = zip(*found)
        sizes = [tuple(item.shape[1:]) for item in masks]
        originals = [image.shape[:2] for image in pictures]
        return stack_masks(masks, originals, padded_size(sizes, self.divisor), quality=quality)

    def _image_masks(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Masks [Nq, Hi, Wi] of 0 and 1, best first, and their predicted IoU [Nq], clamped to [0, 1]."""
        weight = next(self.model.parameters())
        inputs = self.processor(images=[image], return_tensors="pt")
        reshaped = [int(side) for side in inputs["reshaped_input_sizes"][0]]
        embed: Any = self.model.get_image_embeddings
        embeddings = embed(inputs["pixel_values"].to(weight))
        points = point_grid(self.points_per_side) * torch.tensor([reshaped[1], reshaped[0]], dtype=torch.float32)
        size = frame_size(image.shape[:2], self.short_side, self.long_side)
        kept = []
        for chunk in points.split(self.points_per_batch):
            prompt = chunk.to(weight).view(1, -1, 1, 2)
            out = self.model(image_embeddings=embeddings, input_points=prompt)
            if not bool(torch.isfinite(out.iou_scores).all() & torch.isfinite(out.pred_masks).all()):
                raise ValueError("SAM's output is not finite: its weights or their precision are broken")
            kept.append(
                self._filter(out.pred_masks[0].flatten(0, 1).float(), out.iou_scores[0].flatten(), reshaped, size)
            )
        masks, boxes, iou = (torch.cat(parts) for parts in zip(*kept))
        from torchvision.ops import nms

        best = nms(boxes, iou, self.nms_iou)[: self.max_masks]  # sorted by falling IoU
        return masks[best].float(), iou[best].clamp(0, 1)

    def _filter(
        self, logits: Tensor, iou: Tensor, reshaped: Sequence[int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Low-resolution logits [n, s, s] -> confident and stable masks bool [m, Hi, Wi], boxes [m, 4], IoU [m]."""
        confident = iou.float() >= self.min_iou
        logits, iou = logits[confident], iou[confident].float()
        if len(logits) == 0:
            return logits.new_zeros(0, *size, dtype=torch.bool), logits.new_zeros(0, 4), iou
        logits = self.processor.post_process_masks([logits[None]], [size], [reshaped], binarize=False)[0][0]
        stable = stability_scores(logits) >= self.min_stability
        masks, iou = logits[stable] > 0, iou[stable]
        boxes, filled = mask_boxes(masks)
        ends = boxes[filled] - boxes.new_tensor([0, 0, 1, 1])  # SAM's boxes end on the last pixel, not past it
        return masks[filled], ends.float(), iou[filled]


def point_grid(side: int) -> Tensor:
    """[side * side, 2] points (x, y) at the centres of a regular grid of cells over the unit square, row-major."""
    centres = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def stability_scores(logits: Tensor, offset: float = 1.0) -> Tensor:
    """IoU of a mask thresholded at +offset with itself thresholded at -offset: [..., H, W] -> [...].

    area(logits > offset) / area(logits > -offset); 0 where the larger mask is empty. Source: Segment Anything, 4.
    """
    inner = (logits > offset).sum(dim=(-2, -1))
    outer = (logits > -offset).sum(dim=(-2, -1))
    return inner / outer.clamp_min(1)
