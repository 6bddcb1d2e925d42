"""ZegCLIP (CVPR 2023): deep visual prompts, relationship descriptor, one-way decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs3fast.heads.one_way import OneWayDecoder
from zs3fast.heads.relationship import RelationshipDescriptor
from zs3fast.models.base import SegmentationModel
from zs3fast.models.registry import register_model
from zs3fast.types import ImageFeatures, SegmentationOutput


@register_model("zegclip")
class ZegCLIP(SegmentationModel):
    """Class queries from text and image; masks from the last decoder layer's scores.

    Args:
        decoder_layers, decoder_heads, decoder_width: depth, heads and FFN width (None: 4 D) of the decoder.
        options: see `SegmentationModel`.
    """

    default_loss_weights = {"mask": 100.0, "dice": 1.0}

    def __init__(
        self, *, decoder_layers: int = 3, decoder_heads: int = 8, decoder_width: int | None = None, **options: Any
    ):
        super().__init__(**options)
        dim = self.embed_dim
        self.descriptor = RelationshipDescriptor(dim)
        self.decoder = OneWayDecoder(dim, decoder_heads, decoder_layers, decoder_width or 4 * dim, dropout=self.dropout)
        self._architecture.update(
            decoder_layers=decoder_layers, decoder_heads=decoder_heads, decoder_width=decoder_width
        )
        self._init_decoder()

    @torch.no_grad()
    def _init_decoder(self) -> None:
        """As shipped: torch's defaults, every layer starts as a copy of the first."""
        first = self.decoder.layers[0].state_dict()
        for layer in self.decoder.layers[1:]:
            layer.load_state_dict({name: first[name] for name in layer.state_dict()})

    def decode(self, features: ImageFeatures, text_embeddings: Tensor) -> SegmentationOutput:
        queries = self.descriptor(self.check_text(text_embeddings), features.global_token)
        masks = self.decoder(queries, features.patch_tokens).unflatten(-1, features.grid_size)
        return SegmentationOutput(masks, features.global_token, features.patch_tokens)
