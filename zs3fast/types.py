"""What one stage hands to the next: frozen dataclasses with named fields, never positions in a tuple."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageFeatures:
    """What an image encoder knows of a batch of images.

    global_token:  [B, D] unit vectors, one an image.
    patch_tokens:  [B, N, D] unit vectors, row-major over the patch grid.
    grid_size:     (h, w) with h * w = N.
    region_tokens: [B, M, D] unit vectors, or None for encoders without regions.
    """

    global_token: Tensor
    patch_tokens: Tensor
    grid_size: tuple[int, int]
    region_tokens: Tensor | None = None


@dataclass(frozen=True)
class SegmentationOutput:
    """What a model says of a batch of images, still on the patch grid.

    mask_logits:   [B, C, h, w] pre-sigmoid.
    global_token:  [B, D].
    patch_tokens:  [B, N, D].
    trusty_logits: [B, 1, h, w] pre-sigmoid, sigmoid = P(pixel is unseen); None without a trusty token.
    region_tokens: [B, M, D] or None.
    recovery_losses: [2] CLIP-RC's unweighted recovery terms (queries, patches) in training mode, else None.
    """

    mask_logits: Tensor
    global_token: Tensor
    patch_tokens: Tensor
    trusty_logits: Tensor | None = None
    region_tokens: Tensor | None = None
    recovery_losses: Tensor | None = None


torch.export.register_dataclass(ImageFeatures)
torch.export.register_dataclass(SegmentationOutput)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a Segmenter says of one picture, at the picture's own size.

    labels:      NumPy int32 [H, W]: indices into `class_names`; -1 = unlabelled (below `min_score`, or background).
    class_names: the names given, in the order given.
    scores:      NumPy float32 [H, W]: calibrated score of the winning class, background classes included.
    image:       NumPy uint8 [H, W, 3]: the picture as it was read.
    nan_pixels:  pixels whose winning score is not a number; anything above 0 means broken weights or inputs.
    source:      the picture's path, or None.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    scores: np.ndarray
    image: np.ndarray
    nan_pixels: int = 0
    source: str | None = None

    def overlay(self) -> Image:
        """The picture under its class colours as a PIL image, with a legend of the classes present, largest first."""
        from zs3fast import rendering

        return rendering.overlay(self.image, self.labels, self.class_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the labels as a PNG of class indices; an existing file is replaced whole, or left as it was.

        Up to 255 classes: 8 bits with a palette, 255 = unlabelled. More: 16 bits, 65535 = unlabelled.
        """
        from zs3fast import rendering

        rendering.save_labels(self.labels, path, len(self.class_names))

    def to_dict(self) -> dict[str, Any]:
        """A summary that JSON can hold: size, and every class with its index, pixels, percent and mean score."""
        classes = []
        for index, name in enumerate(self.class_names):
            mask = self.labels == index
            pixels = int(mask.sum())
            score = float(self.scores[mask].mean(dtype=np.float64)) if pixels else float("nan")
            classes.append(
                {
                    "index": index,
                    "name": name,
                    "pixels": pixels,
                    "percent": round(100 * pixels / self.labels.size, 4),
                    "mean_score": round(score, 6) if np.isfinite(score) else None,
                }
            )
        height, width = self.labels.shape
        return {
            "source": self.source,
            "height": height,
            "width": width,
            "classes": classes,
            "unlabelled_pixels": int((self.labels < 0).sum()),
            "nan_pixels": self.nan_pixels,
        }
