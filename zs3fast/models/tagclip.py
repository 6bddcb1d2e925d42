"""TagCLIP: ZegCLIP's structure with a learned trusty token in the class list that marks pixels of unseen classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.heads.one_way import OneWayDecoder
from zs3fast.heads.relationship import RelationshipDescriptor
from zs3fast.heads.trusty import TrustyLearner
from zs3fast.heads.variants import build_variant
from zs3fast.labels import targets
from zs3fast.models.base import SegmentationModel
from zs3fast.models.registry import register_model
from zs3fast.ops.masks_to_labels import TRUSTY_WEIGHTINGS
from zs3fast.types import SegmentationOutput
from zs3fast.utils.options import one_of
from zs3fast.utils.weight_cache import WeightCache

_TRUSTY_INIT = {"xavier": nn.init.xavier_uniform_, "zeros": nn.init.zeros_, "uniform01": nn.init.uniform_}


@register_model("tagclip")
class TagCLIP(SegmentationModel):
    """The trusty token joins the class list, self-attention mixes the queries, its mask tells seen from unseen.

    Args:
        trusty_token: False leaves the token out (VOC transductive, supervised and cross-dataset settings).
        trusty_weighting: "both" (the paper, default), "seen", "unseen" or "off": which scores the trusty map weighs.
        trusty_init: "xavier" (what the official code gives whatever its flag), "zeros" (the paper) or "uniform01".
        trusty_loss: "focal" (the official code) or "dice" (the paper).
        trusty_polarity: "unseen": sigmoid(trusty_logits) = P(unseen), the official code's; "seen" negates the output of
            weights trained the other way round, so that `trusty_logits` always has the first meaning.
        trusty_target: "unseen": pixels of unseen classes; "not_seen": ignored pixels too (background undifferentiated).
        unseen_labels: "separate": self-training fills unseen pixels with pseudo labels; "merged": they are ignored.
        layout: a letter a decoder layer, joined by "_": "a" mixes the queries by self-attention first, "n" does not.
        descriptor: "qms_q" (default) or an ablation, see `zs3fast.heads.variants`.
        decoder_heads, decoder_width: heads and FFN width (None: 4 D) of the decoder.
        options: see `SegmentationModel`.

    The trusty target needs the true location of unseen pixels in training images, which ZegCLIP's inductive training
    does not use. Where a dataset marks them as unknown, as the papers' protocols do, this is allowed; where unseen
    classes are merged into background it is a leak.
    """

    default_loss_weights = {"mask": 20.0, "dice": 1.0, "trusty": 10.0}

    def __init__(
        self,
        *,
        trusty_token: bool = True,
        trusty_weighting: str = "both",
        trusty_init: str = "xavier",
        trusty_loss: str = "focal",
        trusty_polarity: str = "unseen",
        trusty_target: str = "unseen",
        unseen_labels: str = "separate",
        layout: str = "a_n_n",
        descriptor: str = "qms_q",
        decoder_heads: int = 8,
        decoder_width: int | None = None,
        **options: Any,
    ):
        letters = layout.split("_")
        if any(letter not in ("a", "n") for letter in letters):
            raise ValueError(f"layout: expected letters a and n joined by '_', got {layout!r}")
        if descriptor == "learnable" and trusty_token:
            raise ValueError("descriptor: 'learnable' has no row for the trusty token; use it with trusty_token=False")
        super().__init__(**options)
        self.trusty_weighting = trusty_weighting
        self.trusty_loss = one_of("trusty_loss", trusty_loss, ("focal", "dice"))
        self.trusty_polarity = one_of("trusty_polarity", trusty_polarity, ("unseen", "seen"))
        self.trusty_target = one_of("trusty_target", trusty_target, ("unseen", "not_seen"))
        self.unseen_labels = one_of("unseen_labels", unseen_labels, ("separate", "merged"))
        self._architecture.update(
            trusty_token=trusty_token,
            trusty_init=one_of("trusty_init", trusty_init, tuple(_TRUSTY_INIT)),
            layout=layout,
            descriptor=descriptor,
            decoder_heads=decoder_heads,
            decoder_width=decoder_width,
        )
        dim = self.embed_dim
        self.trusty_token = nn.Parameter(torch.empty(1, dim)) if trusty_token else None
        self._class_list_cache = WeightCache()
        if descriptor == "qms_q":
            self.descriptor: nn.Module = RelationshipDescriptor(dim)
        else:
            self.descriptor = build_variant(descriptor, dim, decoder_heads, self.num_classes)
        learners = [TrustyLearner(dim, decoder_heads) if letter == "a" else None for letter in letters]
        self.decoder = OneWayDecoder(dim, decoder_heads, len(letters), decoder_width or 4 * dim, learners)
        self._init_head(trusty_init)

    @torch.no_grad()
    def _init_head(self, trusty_init: str) -> None:
        """Xavier-uniform for every matrix; biases of descriptor and self-attention 0, torch's defaults elsewhere."""
        for module in (self.descriptor, self.decoder):
            for name, parameter in module.named_parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                elif name.endswith("bias") and ("self_attn" in name or name == "q_proj.bias"):
                    nn.init.zeros_(parameter)
        if self.trusty_token is not None:
            _TRUSTY_INIT[trusty_init](self.trusty_token)

    @property
    def config(self) -> dict[str, Any]:
        names = ("trusty_weighting", "trusty_loss", "trusty_polarity", "trusty_target", "unseen_labels")
        return {**super().config, **{name: getattr(self, name) for name in names}}

    @property
    def trusty_weighting(self) -> str:
        """Which scores the trusty map weighs: "both" (the paper), "seen", "unseen" or "off"."""
        return self._trusty_weighting

    @trusty_weighting.setter
    def trusty_weighting(self, mode: str) -> None:
        self._trusty_weighting = one_of("trusty_weighting", mode, TRUSTY_WEIGHTINGS)

    def forward(self, images: Tensor, text_embeddings: Tensor) -> SegmentationOutput:
        """Images [B, 3, H, W], normalised, and text embeddings [C, D] -> mask and trusty logits and the tokens."""
        class_list = self._class_list(self.check_text(text_embeddings))
        features = self.encoder(images)
        queries = self.descriptor(class_list, features.global_token)
        masks = self.decoder(queries, features.patch_tokens).unflatten(-1, features.grid_size)
        trusty = None
        if self.trusty_token is not None:
            masks, trusty = masks[:, :-1], masks[:, -1:]
            trusty = -trusty if self.trusty_polarity == "seen" else trusty
        return SegmentationOutput(masks, features.global_token, features.patch_tokens, trusty_logits=trusty)

    def _class_list(self, text: Tensor) -> Tensor:
        """Text embeddings, then the trusty token as the last row."""
        token = self.trusty_token
        if token is None:
            return text
        out: Tensor = self._class_list_cache.get((text, token), lambda: torch.cat([text, token]))
        return out

    def _training_labels(
        self, out: SegmentationOutput, labels: Tensor, setting: str, classes: int, ignore_index: int
    ) -> Tensor:
        if setting == "transductive" and self.unseen_labels == "merged":
            unseen = targets.unseen_pixels(labels, self.seen, classes, ignore_index)
            return labels.long().masked_fill(unseen, ignore_index)
        return super()._training_labels(out, labels, setting, classes, ignore_index)

    def _loss_terms(
        self,
        out: SegmentationOutput,
        labels: Tensor,
        mapped: Tensor,
        classes: int,
        ignore_index: int,
        num_masks: Tensor | float | None,
    ) -> dict[str, Tensor]:
        mask = ops.mask_loss(out.mask_logits, mapped, ignore_index=ignore_index, num_masks=num_masks, validate=False)
        terms = {"mask": mask.focal, "dice": mask.dice}
        if out.trusty_logits is not None:
            target = targets.unseen_pixels(labels, self.seen, classes, ignore_index)
            if self.trusty_target == "not_seen":
                target = target | (labels == ignore_index)
            terms["trusty"] = self._trusty_term(out.trusty_logits, target, mask.num_masks)
        return terms

    def _trusty_term(self, trusty_logits: Tensor, target: Tensor, num_masks: Tensor) -> Tensor:
        """Loss of the trusty map against P(unseen); the trusty channel is a one-class mask with the same normaliser."""
        labels = torch.where(target, 0, 255)
        if self.trusty_loss == "focal":
            return ops.mask_loss(trusty_logits, labels, num_masks=num_masks, validate=False).focal
        # One mask an image, also where no pixel is unseen; `mask_loss` would leave those out as absent classes.
        _, overlap, predicted, wanted = torch.ops.zs3fast.mask_loss(trusty_logits, labels, 0.25, 2.0)
        out: Tensor = (1 - (2 * overlap + 1) / (predicted + wanted + 1)).sum() / num_masks
        return out
