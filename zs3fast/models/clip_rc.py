"""CLIP-RC (CVPR 2024): region tokens in the encoder, M * C queries in a two-way decoder, a recovery loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.encoders.prompted import PromptedClipViT
from zs3fast.encoders.region_bridge import RegionBridgeClipViT
from zs3fast.heads.alignment import FeatureAlignment, region_visuals
from zs3fast.heads.recovery import RECOVERY_LOSSES, RecoveryDecoder, descriptor_l1, descriptors, recovery_loss
from zs3fast.heads.relationship import RelationshipDescriptor
from zs3fast.heads.two_way import TwoWayDecoder, region_mean_masks
from zs3fast.models.base import SegmentationModel
from zs3fast.models.registry import register_model
from zs3fast.types import ImageFeatures, SegmentationOutput
from zs3fast.utils.options import count, one_of

ALIGNMENTS = {
    "region_global": ("region", "global"),
    "region": ("region",),
    "global": ("global",),
    "none": (),
}


@register_model("clip_rc")
class ClipRC(SegmentationModel):
    """Every region token meets every class name; masks are the mean over regions of query times feature.

    Args:
        regions: M, a square number, or (rh, rw).
        update_regions: train the region tokens (a row of table 6); published: frozen.
        alignment: what joins the patches before the decoder (table 7): "region_global", "region", "global", "none".
        query_regions: False makes the C queries from the global token alone (table 5, no alignment module).
        recovery_layers: two-way layers of the recovery decoder (table 8: 0 to 3). 0: there is no decoder, the loss
            stands on the decoded queries and patches themselves; the queries' target is then what they were made of,
            the projected descriptor, which has their width (our reading). None: no recovery loss (table 5).
        recovery_loss: "l1", or of table 8 "l2" or "kd", see `heads.recovery.recovery_loss`.
        init: "official": torch's defaults with decoder layers that start as copies, as the official training has it;
            "intent": truncated normal 0.02 and zero `decoder_v` output layers, which its unused initialiser describes.
        output_gain: gains of the decoder's two last norms before training; published: 1. Masks are products of what
            these norms put out, so its square scales the first mask logits, whose deviation is near sqrt(D) at 1.
        decoder_layers, decoder_heads, decoder_width: depth, heads and FFN width (None: 4 D) of the decoder.
        query_chunk: rows of queries at a time in inference.
        options: see `SegmentationModel`.
    """

    default_loss_weights = {"mask": 100.0, "dice": 1.0, "recovery_q": 2.0, "recovery_k": 2.0}

    def __init__(
        self,
        *,
        regions: int | Sequence[int] = 16,
        update_regions: bool = False,
        alignment: str = "region_global",
        query_regions: bool = True,
        recovery_layers: int | None = 1,
        recovery_loss: str = "l1",
        init: str = "official",
        output_gain: float = 1.0,
        decoder_layers: int = 3,
        decoder_heads: int = 8,
        decoder_width: int | None = None,
        query_chunk: int | None = 8192,
        **options: Any,
    ):
        if options.get("prompt_depth") is not None:
            raise ValueError(
                f"prompt_depth: expected none, as CLIP-RC gives every layer its prompts, got {options['prompt_depth']}"
            )
        if not (isinstance(output_gain, (int, float)) and 0 < output_gain < float("inf")):
            raise ValueError(f"output_gain: expected a number above 0, got {output_gain!r}")
        self._regions = regions if isinstance(regions, int) else tuple(regions)
        self._update_regions = update_regions
        super().__init__(**options)
        self._architecture.update(
            regions=list(self._regions) if isinstance(self._regions, tuple) else regions,
            update_regions=update_regions,
            alignment=one_of("alignment", alignment, tuple(ALIGNMENTS)),
            query_regions=query_regions,
            recovery_layers=None if recovery_layers is None else count("recovery_layers", recovery_layers),
            recovery_loss=one_of("recovery_loss", recovery_loss, tuple(RECOVERY_LOSSES)),
            init=one_of("init", init, ("official", "intent")),
            output_gain=output_gain,
            decoder_layers=decoder_layers,
            decoder_heads=decoder_heads,
            decoder_width=decoder_width,
            query_chunk=query_chunk,
        )
        dim, width = self.embed_dim, decoder_width or 4 * self.embed_dim
        self.query_regions = query_regions
        self.descriptor = RelationshipDescriptor(dim)
        self.alignment = FeatureAlignment(dim, ALIGNMENTS[alignment])
        self.decoder = TwoWayDecoder(dim, decoder_heads, decoder_layers, width, query_chunk, self.dropout)
        self._init_head(init)
        for half in (self.decoder.decoder_q, self.decoder.decoder_v):
            nn.init.constant_(half.layers[-1].norm3.weight, output_gain)
        self.recovers, self.recovery_loss = recovery_layers is not None, recovery_loss
        self.recovery = None
        if recovery_layers:
            self.recovery = RecoveryDecoder(dim, decoder_heads, recovery_layers, width, self.dropout)

    def _make_encoder(self, vision: ClipVisionConfig, image_size: int, options: dict[str, Any]) -> PromptedClipViT:
        options.pop("prompt_depth")
        return RegionBridgeClipViT(
            vision, image_size, regions=self._regions, update_regions=self._update_regions, **options
        )

    @torch.no_grad()
    def _init_head(self, init: str) -> None:
        halves = self.decoder.decoder_q, self.decoder.decoder_v
        if init == "official":
            for half in halves:
                for layer in half.layers[1:]:
                    layer.load_state_dict(half.layers[0].state_dict())
            return
        for head in (self.descriptor, self.alignment, self.decoder):
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        for layer in self.decoder.decoder_v.layers:
            nn.init.zeros_(layer.linear2.weight)

    def decode(self, features: ImageFeatures, text_embeddings: Tensor) -> SegmentationOutput:
        """See `FeatureModel`; in training mode the recovery terms travel in the output's `recovery_losses`."""
        text = self.check_text(text_embeddings)
        visual = self._visuals(features)  # [B, M, D], or [B, 1, D] without query regions
        asked = self.descriptor(text, visual).flatten(1, 2)  # [B, M * C, D], region-major
        aligned = self.alignment(features, self.encoder.regions)
        queries, aligned = self.decoder(asked, aligned)
        masks = region_mean_masks(queries, aligned, visual.shape[1]).unflatten(-1, features.grid_size)
        recovery = None
        if self.training and self.recovers:
            recovery = self._recovery_losses(asked, queries, aligned, text, visual, features.patch_tokens)
        return SegmentationOutput(
            masks,
            features.global_token,
            features.patch_tokens,
            region_tokens=features.region_tokens,
            recovery_losses=recovery,
        )

    def _recovery_losses(
        self, asked: Tensor, queries: Tensor, aligned: Tensor, text: Tensor, visual: Tensor, patch_tokens: Tensor
    ) -> Tensor:
        """[2]: how far decoded queries and patches are from what CLIP said, their targets without a gradient."""
        if self.recovery is None:
            pairs = (queries, asked), (aligned, patch_tokens)
            return torch.stack([recovery_loss(self.recovery_loss, got, wanted.detach()) for got, wanted in pairs])
        recovered, patches = self.recovery(queries, aligned)
        if self.recovery_loss == "l1":
            of_queries = descriptor_l1(recovered, text, visual)
        else:
            of_queries = recovery_loss(self.recovery_loss, recovered, descriptors(text, visual).detach())
        return torch.stack([of_queries, recovery_loss(self.recovery_loss, patches, patch_tokens.detach())])

    def _visuals(self, features: ImageFeatures) -> Tensor:
        return region_visuals(features) if self.query_regions else features.global_token.unsqueeze(1)

    def _loss_terms(
        self,
        out: SegmentationOutput,
        labels: Tensor,
        mapped: Tensor,
        classes: int,
        ignore_index: int,
        num_masks: Tensor | float | None,
    ) -> dict[str, Tensor]:
        terms = super()._loss_terms(out, labels, mapped, classes, ignore_index, num_masks)
        if out.recovery_losses is not None:
            terms["recovery_q"], terms["recovery_k"] = out.recovery_losses.unbind()
        return terms
