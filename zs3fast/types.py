"""What one stage hands to the next: frozen dataclasses with named fields, never positions in a tuple."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    class_logits: [B, C] (with a trusty token [B, C + 1], it last) TagCLIP's opinion whether a class is there at all,
        where it is asked for it; `mask_logits` are then those of the product, else None.
    """

    mask_logits: Tensor
    global_token: Tensor
    patch_tokens: Tensor
    trusty_logits: Tensor | None = None
    region_tokens: Tensor | None = None
    recovery_losses: Tensor | None = None
    class_logits: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Mask proposals for a batch of images, on the proposer's padded frame (image top left, padding bottom and right).

    mask_logits:    [B, Nq, h4, w4] raw logits at the proposer's own resolution, or None.
    masks:          [B, Nq, Hp, Wp] soft masks in [0, 1] on the padded frame (0/1 allowed), or None. One of both is set;
                    `mask_logits` mean sigmoid(their bilinear upsampling to the padded frame).
    valid:          [B, Nq] bool; padding rows, where images have different counts, are False (and their masks empty).
    class_scores:   [B, Nq, K + 1] class probabilities after softmax, last column = no object, or None.
    class_names:    names of those K columns, or None where they are those of the vocabulary in use.
    quality:        [B, Nq] the proposer's own estimate in [0, 1], or None.
    padded_size:    (Hp, Wp).
    image_sizes:    the images' sizes (Hi, Wi) on that frame.  original_sizes: (Ho, Wo) of the images.
    align_corners:  how `mask_logits` reach the padded frame; True for FreeSeg only.
    """

    mask_logits: Tensor | None
    masks: Tensor | None
    valid: Tensor
    padded_size: tuple[int, int]
    image_sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]
    class_scores: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    quality: Tensor | None = None
    align_corners: bool = False

    def to(self, device: torch.device | str) -> Proposals:
        """All tensors on a device."""
        fields = ("mask_logits", "masks", "valid", "class_scores", "quality")
        moved: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t.to(device) for name in fields}
        return replace(self, **moved)


@dataclass(frozen=True)
class ProposalOutput:
    """What a model says of proposals on a batch of images.

    mask_logits:         [B, C, h, w] log(O + 1e-6), O = sum over proposals of class weight times mask on the patch
                         grid; for looking at, labels are made at full size.
    proposal_embeddings: [B, Nq, D] not normalised.
    proposal_logits:     [B, Nq, C] 100 * cosine with the text embeddings.
    proposals:           what was classified.
    text_embeddings:     [C, D] as they were given.
    image_embedding:     [B, D] of the pass without masks, not normalised; in training mode only, else None.
    """

    mask_logits: Tensor
    proposal_embeddings: Tensor
    proposal_logits: Tensor
    proposals: Proposals
    text_embeddings: Tensor
    image_embedding: Tensor | None = None


@dataclass(frozen=True)
class BoxProposals:
    """Boxes found in one image.

    boxes:      [K, 4] float, x0 y0 x1 y1 in pixels of the image.
    scores:     [K] in [0, 1].
    names:      K class words, the detector's own.
    image_size: (H, W) of the image.
    vocabulary: every word the detector knows; None: unknown.
    """

    boxes: Tensor
    scores: Tensor
    names: tuple[str, ...]
    image_size: tuple[int, int]
    vocabulary: tuple[str, ...] | None = None

    def to(self, device: torch.device | str) -> BoxProposals:
        """All tensors on a device."""
        return replace(self, boxes=self.boxes.to(device), scores=self.scores.to(device))


for _kind in (ImageFeatures, SegmentationOutput, Proposals, ProposalOutput):
    torch.export.register_dataclass(_kind, serialized_type_name=f"zs3fast.{_kind.__name__}")


@dataclass(frozen=True, eq=False)
class WindowLogits:
    """Mask logits of the windows of an image, as the model gave them, on the host.

    mask_logits:   [n, C, h, w] pre-sigmoid (pre-softmax for methods without training), a row a window; classes as they
                   compete: those shown first, then the background, and a row a name where names compete apart.
    corners:       n offsets (y, x) of the windows, in pixels of the canvas.
    window_size:   (height, width) of a window.  canvas_size: (H', W') of the resized image.
    trusty_logits: [n, 1, h, w] or None.
    """

    mask_logits: Tensor
    corners: tuple[tuple[int, int], ...]
    window_size: tuple[int, int]
    canvas_size: tuple[int, int]
    trusty_logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Details:
    """What an image's labels came from.

    scores:  (H, W) -> calibrated scores [C, H, W] of all that compete.
    windows: None for methods without windows.
    trusty:  (H, W) -> P(pixel is of an unseen class) [H, W]; None without a trusty map.
    """

    scores: Callable[[tuple[int, int]], Tensor]
    windows: WindowLogits | None = None
    trusty: Callable[[tuple[int, int]], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a Segmenter says of one image, at the image's own size.

    labels:      NumPy int32 [H, W]: indices into `class_names`; -1 = unlabelled (below `min_score`, or background). Of
                 a stream that was asked for `compact` results int8 or int16.
    class_names: the names given, in the order given.
    scores:      NumPy float32 [H, W]: calibrated score of the winning class, background classes included.
    image:       NumPy uint8 [H, W, 3]: the image as it was read.
    nan_pixels:  pixels whose winning score is not a number; anything above 0 means broken weights or inputs.
    source:      the image's path, or None.
    details:     what the labels came from, where a call asked for `details`.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    scores: np.ndarray
    image: np.ndarray
    nan_pixels: int = 0
    source: str | None = None
    details: Details | None = None

    def mask(self, of: str | int) -> np.ndarray:
        """Where a class is, bool [H, W]: a name of `class_names` (however it is spelt) or its index."""
        if isinstance(of, str):
            spelt = [" ".join(name.split()).casefold() for name in self.class_names]
            wanted = " ".join(of.split()).casefold()
            if wanted not in spelt:
                raise ValueError(f"of: expected a class of the result ({', '.join(self.class_names)}), got {of!r}")
            of = spelt.index(wanted)
        if not 0 <= of < len(self.class_names):
            raise ValueError(f"of: expected an index in 0..{len(self.class_names) - 1}, got {of}")
        return np.asarray(self.labels == of)

    def class_scores(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Calibrated scores float32 [C, H, W] of `class_names` at `size` = (H, W); None: the image's own.

        Raises:
            ValueError: the call did not ask for `details`.
        """
        scores = self._details().scores(size or (self.labels.shape[0], self.labels.shape[1]))
        return np.asarray(scores[: len(self.class_names)].float().numpy())

    @property
    def windows(self) -> WindowLogits:
        """Mask logits of each window with its corner; a ValueError without `details`, or for a method without any."""
        windows = self._details().windows
        if windows is None:
            raise ValueError("windows: expected a method that looks at windows, got a result of another")
        return windows

    def trusty_map(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """TagCLIP's P(pixel is of an unseen class), float32 [H, W]; a ValueError without `details` or such a map."""
        trusty = self._details().trusty
        if trusty is None:
            raise ValueError("trusty_map: the model has no trusty token, only TagCLIP has")
        return np.asarray(trusty(size or (self.labels.shape[0], self.labels.shape[1])).float().numpy())

    def _details(self) -> Details:
        if self.details is None:
            raise ValueError("details: expected a result of Segmenter(..., details=True), got one without")
        return self.details

    def overlay(self, *, legend: bool = True, blend: float = 0.6) -> Image:
        """The image under its class colours as a PIL image, with a legend of the classes present, largest first.

        Args:
            legend: False: the image alone, at its own size.
            blend: how much of its colour covers a class, 0 (nothing) to 1.
        """
        from zs3fast.utils import rendering

        return rendering.overlay(self.image, self.labels, self.class_names, legend=legend, blend=blend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the labels as a PNG of class indices; an existing file is replaced whole, or left as it was.

        Up to 255 classes: 8 bits with a palette, 255 = unlabelled. More: 16 bits, 65535 = unlabelled.
        """
        from zs3fast.utils import rendering

        rendering.save_labels(self.labels, path, len(self.class_names))

    def to_dict(self) -> dict[str, Any]:
        """A summary that JSON can hold: size, and every class with its index, pixels, percent and mean score."""
        from zs3fast.utils import rendering

        counts, sums = rendering.class_sums(self.labels, len(self.class_names), self.scores)
        classes = []
        for index, name in enumerate(self.class_names):
            pixels = int(counts[index])
            score = float(sums[index]) / pixels if pixels else float("nan")
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
            "unlabelled_pixels": self.labels.size - int(counts.sum()),
            "nan_pixels": self.nan_pixels,
        }
