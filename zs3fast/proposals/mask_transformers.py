"""Mask2Former and MaskFormer as proposers: their queries, before any closed-set post-processing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zs3fast.proposals.frames import (
    DIVISOR,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LONG_SIDE,
    SHORT_SIDE,
    generator_input,
    resize_batch,
)
from zs3fast.types import Proposals


def all_layers(model: nn.Module) -> dict[str, bool]:
    """Arguments that a MaskFormer with losses at every layer cannot do without: the library reads those layers anew."""
    config: Any = model.config
    needed = getattr(config, "model_type", None) == "maskformer" and config.use_auxiliary_loss
    return {"output_hidden_states": True} if needed else {}


class TransformersMaskProposer:
    """One mask, and probabilities over the closed label set, a query.

    class_scores = softmax(class_queries_logits), last column = no object; mask_logits = masks_queries_logits, raw, at a
    quarter of the padded frame. Images are resized and padded here (MAFT's frame), not by the library's processor;
    its semantic post-processing, which resizes masks to 384 x 384 first, is not used.

    Args:
        model: Mask2FormerForUniversalSegmentation or MaskFormerForInstanceSegmentation, or one with their outputs.
        classes: False: its masks alone, for weights whose class scores mean nothing.
        mean, std: what the weights were trained with, for pixels in 0..255.
        short_side, long_side, divisor: the frame, see `resize_for_proposer`.
        network_side: what the short side is resized to for the network alone; None: nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        divisor: int = DIVISOR,
        network_side: int | None = None,
    ) -> None:
        self.model, self.classes = model.eval(), classes
        self.mean, self.std = tuple(mean), tuple(std)
        self.frame = {"short_side": short_side, "long_side": long_side, "divisor": divisor}
        self.scale = 1.0 if network_side is None else network_side / short_side
        config: Any = model.config  # the library's own
        names = config.id2label
        self.class_names = tuple(str(names[index]) for index in range(len(names)))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        """Proposals of all images, run as one batch padded to its largest member; `names` are not used."""
        frames = resize_batch(pictures, **self.frame)
        weight = next(self.model.parameters())
        pixels = generator_input(frames, self.mean, self.std).to(weight)
        if self.scale != 1:  # as `clip_input` does it
            size = tuple(max(1, round(side * self.scale)) for side in pixels.shape[2:])
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        out = self.model(pixel_values=pixels, **all_layers(self.model))
        mask_logits = out.masks_queries_logits.float()
        class_scores = out.class_queries_logits.float().softmax(dim=-1)
        if not bool(torch.isfinite(mask_logits).all() & torch.isfinite(class_scores).all()):
            raise ValueError("the mask proposer's output is not finite: its weights or their precision are broken")
        return Proposals(
            mask_logits=mask_logits,
            masks=None,
            valid=torch.ones(mask_logits.shape[:2], dtype=torch.bool, device=mask_logits.device),
            padded_size=frames[0].padded_size,
            image_sizes=tuple(frame.image_size for frame in frames),
            original_sizes=tuple(frame.original_size for frame in frames),
            class_scores=class_scores if self.classes else None,
            class_names=self.class_names if self.classes else None,
        )
