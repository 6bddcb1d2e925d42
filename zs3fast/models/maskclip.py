"""CLIP as it is, patches compared with text, nothing trained: MaskCLIP (ECCV 2022) and those who came after it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast import ops
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.dense_clip import DenseClipViT
from zs3fast.encoders.open_clip_weights import load_clip_weights
from zs3fast.models.base import FeatureModel
from zs3fast.models.registry import register_model
from zs3fast.types import ImageFeatures, SegmentationOutput
from zs3fast.utils.precision import without_autocast


@register_model("maskclip")
class MaskCLIP(FeatureModel):
    """Every patch takes the class whose text is most like it.

        mask_logits[c] = logit_scale * cos(patch, text[c]),   scores = softmax over classes of upsample(mask_logits)

    All weights are CLIP's own, so the method works as soon as `pretrained` names some. Classes compete: everything in
    the image needs a name on the list, if only one that a Segmenter takes as `background`.

    Args:
        clip: open_clip ViT name or configuration dict.  pretrained: open_clip tag, path or None (random weights).
        image_size: side in pixels of a window; None: twice the size CLIP was trained at (448 for most).
        attention: of the last block; "value" is MaskCLIP's, the others' are "sclip", "clearclip", "naclip", "rcs",
            "scclip", and for comparison "sclip_reduced", "kk", "nonly", "vanilla": see `DenseClipViT`.
        residual: keep the last block's residual connections and MLP.  None: as the method does.
        std, tau, lam, c: numbers of the methods that have them, see `DenseClipViT`.
        logit_scale: of the softmax over classes; CLIP's is 100.
        quick_gelu: see `vision_config`.
        options: see `ZeroShotModel`; no class is seen in training, so `seen` is empty by default, and there is no
            calibration: `seen_offset` must be 0.
    """

    encoder: DenseClipViT
    templates = "multi"
    protocol = "averaged_windows"
    training_free = True
    published_windows: ClassVar[str | None] = None  # its protocol, see inference/window_protocols.py

    def __init__(
        self,
        *,
        clip: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | None = None,
        image_size: int | None = None,
        attention: str | None = None,
        residual: bool | None = None,
        std: float = 5.0,
        tau: float = 2.0,
        lam: float = 0.3,
        c: float = 0.3,
        logit_scale: float = 100.0,
        quick_gelu: bool | None = None,
        **options: Any,
    ):
        attention = self.check_attention(attention)
        if options.get("seen_offset"):
            raise ValueError(f"seen_offset: MaskCLIP has no calibration, expected 0, got {options['seen_offset']}")
        if not 0 < logit_scale < math.inf:
            raise ValueError(f"logit_scale: expected a positive number, got {logit_scale}")
        vision = vision_config(clip, pretrained, quick_gelu)
        if image_size is None:
            image_size = 2 * vision.grid * vision.patch_size
        if image_size < vision.patch_size or image_size % vision.patch_size:
            raise ValueError(f"image_size: expected a multiple of the patch size {vision.patch_size}, got {image_size}")
        if options.get("seen") is None:
            options["seen"] = ()
        super().__init__(clip=clip, pretrained=pretrained, image_size=image_size, **options)
        self.logit_scale = float(logit_scale)
        numbers = {"std": std, "tau": tau, "lam": lam, "c": c}
        self.encoder = DenseClipViT(vision, attention=attention, residual=residual, **numbers)
        self._architecture.update(attention=attention, residual=residual, quick_gelu=vision.quick_gelu, **numbers)
        if pretrained is not None:
            load_clip_weights(self.encoder, clip, pretrained)

    @classmethod
    def check_attention(cls, attention: str | None) -> str:
        """The attention of the last block: MaskCLIP's where none is named."""
        return "value" if attention is None else attention

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "logit_scale": self.logit_scale}

    def decode(self, features: ImageFeatures, text_embeddings: Tensor) -> SegmentationOutput:
        """Compare every patch with every class.

        Args:
            features: of images normalised with CLIP's statistics; pixels past the last whole patch are left out.
            text_embeddings: [C, D].
        Returns:
            mask_logits [B, C, h, w], before the softmax over classes, float32 at least; `global_token` [B, D] is CLIP's
            embedding of the image.
        """
        text = self.check_text(text_embeddings)
        with without_autocast(text.device):  # bfloat16 would round logits to steps of 1/8
            patches, text = _widened(features.patch_tokens), F.normalize(_widened(text), dim=-1)
            masks = self.logit_scale * (text @ patches.transpose(1, 2)).unflatten(-1, features.grid_size)
        return SegmentationOutput(masks, features.global_token, features.patch_tokens)

    def class_scores(self, out: SegmentationOutput, size: tuple[int, int]) -> Tensor:
        """Probabilities [B, C, H, W]: softmax over classes of the logits, upsampled bilinearly to `size` = (H, W)."""
        return F.interpolate(out.mask_logits, size=size, mode="bilinear", align_corners=False).softmax(1)

    def predict_labels(
        self, out: SegmentationOutput, size: tuple[int, int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Labels [B, H, W], always equal to `class_scores(out, size).argmax(1)`, without the scores."""
        # The op compares sigmoids, and those of logits like CLIP's all round to 1. A shift of each patch and a scale
        # change no argmax. These leave a pixel's best in -75..0, where sigmoids keep apart what logits do: the best
        # class of its nearest patch, which weighs 1/4 at least, is 0 there and -100 or more at the other patches.
        below = (out.mask_logits - out.mask_logits.amax(1, keepdim=True)) * (50 / self.logit_scale)
        return ops.masks_to_labels(below, size, dtype=dtype)

    def loss(self, *_: Any, **__: Any) -> NoReturn:
        """Raises: nothing in this method is trained."""
        raise TypeError(
            "loss: MaskCLIP has nothing to train, its weights are all CLIP's own; the other methods learn from masks"
        )


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
