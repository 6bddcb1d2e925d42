"""TagCLIP: ZegCLIP's structure with a learned trusty token in the class list that marks pixels of unseen classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
from zs3fast.types import ImageFeatures, SegmentationOutput
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
        trusty_loss: "focal" (the official code) or "dice" (the paper: of P(seen) against 1 on seen pixels, journal
            eq. 11-12; ignored pixels are in no sum).
        trusty_polarity: "unseen": sigmoid(trusty_logits) = P(unseen), the official code's; "seen" negates the output of
            weights trained the other way round, so that `trusty_logits` always has the first meaning.
        trusty_target: "unseen": pixels of unseen classes; "not_seen": ignored pixels too (background undifferentiated).
        unseen_labels: "separate": self-training fills unseen pixels with pseudo labels; "merged": they are ignored.
        layout: a letter a decoder layer, joined by "_": "a" mixes the queries by self-attention first, "n" does not.
        descriptor: "qms_q" (default) or an ablation, see `zs3fast.heads.variants`.
        class_prediction: weigh every mask by the probability that its class is there at all (preprint eq. 7-8, 11,
            journal eq. 5-6): a linear layer on the last decoder layer's tokens, and a loss "cls" of its own. In neither
            official model; where the equations are silent, this is our reading.
        decoder_heads, decoder_width: heads and FFN width (None: 4 D) of the decoder.
        options: see `SegmentationModel`.

    The trusty target needs the true location of unseen pixels in training images, which ZegCLIP's inductive training
    does not use. Where a dataset marks them as unknown, as the papers' protocols do, this is allowed; where unseen
    classes are merged into background it is a leak.
    """

    default_loss_weights = {"mask": 20.0, "dice": 1.0, "trusty": 10.0, "cls": 1.0}

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
        class_prediction: bool = False,
        decoder_heads: int = 8,
        decoder_width: int | None = None,
        **options: Any,
    ):
        letters = str(layout).split("_")
        if any(letter not in ("a", "n") for letter in letters):
            raise ValueError(f"layout: expected letters a and n joined by '_', got {layout!r}")
        if descriptor == "learnable" and trusty_token:
            raise ValueError(
                "trusty_token: expected False for descriptor 'learnable', which has no row for it, got True"
            )
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
            class_prediction=class_prediction,
            decoder_heads=decoder_heads,
            decoder_width=decoder_width,
        )
        dim = self.embed_dim
        self.trusty_token = nn.Parameter(torch.empty(1, dim)) if trusty_token else None
        self._class_list_cache = WeightCache()
        if descriptor == "qms_q":
            self.descriptor: nn.Module = RelationshipDescriptor(dim)
        else:
            self.descriptor = build_variant(descriptor, dim, decoder_heads, self.num_classes, self.dropout)
        learners = [TrustyLearner(dim, decoder_heads, self.dropout) if letter == "a" else None for letter in letters]
        sizes = (dim, decoder_heads, len(letters), decoder_width or 4 * dim)
        self.decoder = OneWayDecoder(*sizes, learners, dropout=self.dropout, tokens=class_prediction)
        self.class_prediction = nn.Linear(dim, 1) if class_prediction else None
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

    def decode(self, features: ImageFeatures, text_embeddings: Tensor) -> SegmentationOutput:
        class_list = self._class_list(self.check_text(text_embeddings))
        queries = self.descriptor(class_list, features.global_token)
        masks, class_logits = self._masks(queries, features.patch_tokens)
        masks = masks.unflatten(-1, features.grid_size)
        trusty = None
        if self.trusty_token is not None:
            masks, trusty = masks[:, :-1], masks[:, -1:]
            trusty = -trusty if self.trusty_polarity == "seen" else trusty
        return SegmentationOutput(
            masks, features.global_token, features.patch_tokens, trusty, class_logits=class_logits
        )

    def _masks(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mask logits [B, C, N], and class logits [B, C] where they weigh the masks.

        The product sigmoid(P) sigmoid(m) is handed on as the logit it has, P + m - log(1 + e^P + e^m), so that losses,
        upsampling and calibration treat it like any mask.
        """
        if self.class_prediction is None:
            masks: Tensor = self.decoder(queries, patches)
            return masks, None
        tokens, masks = self.decoder.with_tokens(queries, patches)
        logits: Tensor = self.class_prediction(tokens)  # [B, C, 1]
        both = torch.stack([torch.zeros_like(masks), logits.expand_as(masks), masks])
        return logits + masks - both.logsumexp(0), logits.squeeze(-1)

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
            target, ignored = self._trusty_target(labels, classes, ignore_index)
            terms["trusty"] = self._trusty_term(out.trusty_logits, target, ignored, mask.num_masks)
        if out.class_logits is not None:
            terms["cls"] = self._class_term(out, labels, mapped, classes, ignore_index)
        return terms

    def _trusty_target(self, labels: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Bool [B, H, W] each: the pixels that count as unseen, and those that are neither."""
        unseen = targets.unseen_pixels(labels, self.seen, classes, ignore_index)
        ignored = labels == ignore_index
        if self.trusty_target == "not_seen":
            return unseen | ignored, torch.zeros_like(ignored)
        return unseen, ignored

    def _trusty_term(self, trusty_logits: Tensor, target: Tensor, ignored: Tensor, num_masks: Tensor) -> Tensor:
        """Loss of the trusty map against `target`, the unseen pixels; divided by the mask losses' normaliser."""
        if self.trusty_loss == "focal":
            labels = torch.where(target, 0, 255)
            return ops.mask_loss(trusty_logits, labels, num_masks=num_masks, validate=False).focal
        # Dice does not survive complements, so it is taken in the paper's polarity: P(seen), the sigmoid of minus the
        # logits, against 1 on seen pixels. One mask an image. Its sum is that over seen pixels and that over unseen
        # ones, as the op sums what a channel has on the pixels of its label: the ignored are in none.
        kinds = torch.where(target, 1, 0).masked_fill(ignored, 255)
        both = (-trusty_logits).expand(-1, 2, -1, -1)
        _, overlap, _, wanted = torch.ops.zs3fast.mask_loss(both, kinds, 0.25, 2.0)
        predicted = overlap.sum(1)
        out: Tensor = (1 - (2 * overlap[:, 0] + 1) / (predicted + wanted[:, 0] + 1)).sum() / num_masks
        return out

    def _class_term(
        self, out: SegmentationOutput, labels: Tensor, mapped: Tensor, classes: int, ignore_index: int
    ) -> Tensor:
        """Binary cross entropy of "class c has a pixel in the image"; the trusty token stands for what its map marks,
        pixels of unseen classes, or with the other polarity those of seen ones."""
        assert out.class_logits is not None
        channels = out.mask_logits.shape[1]
        present = targets.present_classes(mapped, channels).float()
        if self.trusty_token is not None:
            marked, ignored = self._trusty_target(labels, classes, ignore_index)
            marked = ~(marked | ignored) if self.trusty_polarity == "seen" else marked
            present = torch.cat([present, marked.flatten(1).any(1, keepdim=True).to(present)], 1)
        return F.binary_cross_entropy_with_logits(out.class_logits.float(), present)
