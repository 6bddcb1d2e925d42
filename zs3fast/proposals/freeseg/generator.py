"""FreeSeg's proposal generator: images and class texts in, masks and class scores out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.proposals.freeseg.decoder import MaskedDecoder
from zs3fast.proposals.freeseg.interaction import TextInteraction, TextKeys
from zs3fast.proposals.freeseg.pixel_decoder import PixelDecoder
from zs3fast.proposals.freeseg.resnet import DeepLabResNet
from zs3fast.utils.weight_cache import WeightCache

TEMPERATURE = 100.0


class FreeSegGenerator(nn.Module):
    """ResNet -> pixel decoder -> text interaction -> masked decoder -> mask logits, and class scores by cosine.

    Args:
        backbone, pixel_decoder, interaction, decoder: arguments of the four parts; empty: the published sizes, for text
            of width 512.
    """

    def __init__(
        self,
        *,
        backbone: dict[str, Any] | None = None,
        pixel_decoder: dict[str, Any] | None = None,
        interaction: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone = DeepLabResNet(**(backbone or {}))
        self.pixel_decoder = PixelDecoder(self.backbone.channels, **(pixel_decoder or {}))
        self.interaction = TextInteraction(**(interaction or {}))
        self.decoder = MaskedDecoder(**(decoder or {}))
        self.non_object_embedding = nn.Parameter(torch.randn(1, self.embed_dim))
        self._text = WeightCache()

    @property
    def embed_dim(self) -> int:
        """E, the width of the text."""
        return self.interaction.layer_norm_k.normalized_shape[0]

    def forward(self, images: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [B, Nq, h4, w4] at a quarter of the images, raw, and class scores [B, Nq, C + 1].

        class_scores = softmax(100 cos(class head, [text; non-object])), last column = no object.

        Args:
            images: [B, 3, H, W], ImageNet-normalised.
            text_embeddings: [C, E]; normalised here. The masks depend on it too.
        """
        text, keys = self._text.get([text_embeddings, *self._text_weights()], lambda: self._prepare(text_embeddings))
        maps, mask_features = self.pixel_decoder(self.backbone(images))
        *maps, mask_features = self.interaction([*maps, mask_features], keys)
        mask_logits, embeddings = self.decoder(maps, mask_features)
        return mask_logits, (TEMPERATURE * F.normalize(embeddings, dim=-1) @ text.t()).softmax(-1)

    def _prepare(self, text_embeddings: Tensor) -> tuple[Tensor, list[TextKeys]]:
        """[text; non-object] as unit vectors [C + 1, E], and what the maps attend to: one more than the decoder's."""
        text = F.normalize(torch.cat([text_embeddings, self.non_object_embedding.to(text_embeddings)]), dim=-1)
        return text, self.interaction.text_keys(text, len(self.decoder.level_embed.weight) + 1)

    def _text_weights(self) -> list[Tensor]:
        return [self.non_object_embedding, *self.interaction.parameters()]
