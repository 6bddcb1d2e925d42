"""CLIP-RC (CVPR 2024) in its official structure, plain eager PyTorch.

Waste kept on purpose: one dense [E, E] mask added to the scores of every layer, prompts as queries, a prompt_norm after
the last layer but one that nobody reads, the descriptor [B, M * C, 2D] and the concatenated features [B, N, 3D] stored,
both directions of every decoder layer with stored probabilities and with scores cloned, averaged over the heads and
dropped, and masks of all M * C queries before their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official
from bench.baselines.zegclip import OfficialZegCLIP


def region_mask(num_prefix: int, side: int, regions_side: int) -> Tensor:
    """Additive mask [E, E] of 0 and -inf over [class token and prompts | patches | region tokens].

    A patch sees everything but the other regions' tokens; a region token sees its own window and itself.
    """
    window = side // regions_side
    patches, regions = side**2, regions_side**2
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    inside = (row < window * regions_side) & (column < window * regions_side)  # the margin belongs to no region
    owner = torch.where(inside, row // window * regions_side + column // window, -1)
    owned = owner.unsqueeze(1) == torch.arange(regions)  # [N, M]
    first = num_prefix + patches
    seen = torch.zeros(first + regions, first + regions, dtype=torch.bool)
    seen[:first, :first] = True
    seen[num_prefix:first, first:] = owned
    seen[first:, num_prefix:first] = owned.t()
    seen[first:, first:] = torch.eye(regions, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


class RegionVisionTransformer(official.PromptedVisionTransformer):
    """The prompted tower with region tokens behind the patches; -> ([B, D], [B, D, h, w], [B, D, r, r])."""

    def __init__(self, *, regions: int, **sizes: Any):
        super().__init__(**sizes)
        self.regions_side = math.isqrt(regions)
        if self.regions_side**2 != regions or self.regions_side > self.grid:
            raise ValueError(f"regions: expected a square number up to {self.grid**2}, got {regions}")
        start = self.class_embedding.detach() + self.positional_embedding.detach()[0]
        self.region_level_bridge = nn.Parameter(start.repeat(regions, 1), requires_grad=False)
        mask = region_mask(1 + self.num_prompts, self.grid, self.regions_side)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, (h, w) = self.embed(images)
        regions = self.region_level_bridge.expand(x.shape[0], -1, -1)
        x = self.insert_prompts(self.ln_pre(torch.cat([x, regions], dim=1)))
        live = x.shape[0] - regions.shape[1]
        last = len(self.transformer.resblocks) - 1
        for i, block in enumerate(self.transformer.resblocks):
            if i > 0:
                x = self.replace_prompts(x, i)
            x = block(x, self.mask)
            if i == last - 1:
                self.prompt_norm(x[:live])  # read by nobody
        x = x.permute(1, 0, 2)
        x = torch.cat([self.prompt_norm(x[:, :live]), x[:, live:]], dim=1)
        x = self.ln_post(x) @ self.proj  # prompt tokens included
        patches, side = x[:, live - h * w : live], self.regions_side
        return official.unit(x[:, 0]), official.token_map(patches, h, w), official.token_map(x[:, live:], side, side)


class DecoderHalf(nn.Module):
    """The layers of one direction, which start as copies of the first."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(make_layer(width, heads, dropout) for _ in range(layers))
        for layer in self.layers[1:]:
            layer.load_state_dict(self.layers[0].state_dict())


def make_layer(width: int, heads: int, dropout: float) -> official.DecoderLayer:
    return official.DecoderLayer(width, heads, 4 * width, dropout, self_attention="weights only")


def two_way(
    layers_q: nn.ModuleList, layers_v: nn.ModuleList, queries: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries look at features and features at queries, both at what they were before the layer."""
    for layer_q, layer_v in zip(layers_q, layers_v):
        (queries, _), (features, _) = layer_q(queries, features), layer_v(features, queries)
    return queries, features


class RecoveryDecoder(nn.Module):
    """Decoded queries and features back to the descriptor [B, M * C, 2D] and the patches [B, N, D]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.linear_q_in, self.linear_k_in = nn.Linear(width, width), nn.Linear(width, width)
        self.decouple_q = nn.ModuleList([make_layer(width, heads, dropout)])
        self.decouple_v = nn.ModuleList([make_layer(width, heads, dropout)])
        self.linear_q_out, self.linear_k_out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        queries, features = self.linear_q_in(queries), self.linear_k_in(features)
        queries, features = two_way(self.decouple_q, self.decouple_v, queries, features)
        return self.linear_q_out(queries), self.linear_k_out(features)


class CLIPRCHead(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.q_proj = nn.Linear(2 * width, width)
        self.lateral_proj = nn.Linear(3 * width, width)
        self.decoder_q = DecoderHalf(width, heads, layers, dropout)
        self.decoder_v = DecoderHalf(width, heads, layers, dropout)
        self.recovery_decoder = RecoveryDecoder(width, heads, dropout)

    def forward(
        self, text: Tensor, global_token: Tensor, patch_map: Tensor, region_map: Tensor, *, recover: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Mask logits [B, C, h, w] and, if asked, the L1 recovery losses of queries and features."""
        batch, width, h, w = patch_map.shape
        regions = region_map.flatten(2).transpose(1, 2)  # [B, M, D]
        descriptor = official.descriptor_input(text, regions + global_token.unsqueeze(1)).flatten(1, 2)
        queries = self.q_proj(descriptor)  # [B, M * C, D]
        patches = patch_map.flatten(2).transpose(1, 2)
        upsampled = F.interpolate(region_map, size=(h, w), mode="bilinear", align_corners=False)
        upsampled = upsampled.flatten(2).transpose(1, 2)
        repeated = global_token.unsqueeze(1).repeat(1, h * w, 1)
        features = self.lateral_proj(torch.cat([upsampled, repeated, patches], dim=-1))
        queries, features = two_way(self.decoder_q.layers, self.decoder_v.layers, queries, features)
        masks = queries @ features.transpose(1, 2)  # [B, M * C, N]
        masks = masks.reshape(batch, regions.shape[1], len(text), h, w).mean(dim=1)
        if not recover:
            return masks, None
        queries, features = self.recovery_decoder(queries, features)
        return masks, (F.l1_loss(queries, descriptor.detach()), F.l1_loss(features, patches.detach()))


class OfficialCLIPRC(OfficialZegCLIP):
    """The official network; see OfficialZegCLIP. `regions`: M, a square number."""

    loss_weights = {"loss_mask": 100.0, "loss_dice": 1.0, "recovery_loss_q": 2.0, "recovery_loss_k": 2.0}

    def __init__(self, *, seen: Sequence[int], regions: int = 16, **sizes: Any):
        self._regions = regions
        super().__init__(seen=seen, **sizes)

    def make_backbone(self, **sizes: Any) -> nn.Module:
        return RegionVisionTransformer(regions=self._regions, **sizes)

    def make_head(self, width: int, heads: int, layers: int, dropout: float) -> nn.Module:
        return CLIPRCHead(width, heads, layers, dropout)

    def forward(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        return self.decode_head(text_embeddings, *self.backbone(images), recover=False)[0]

    def losses(self, images: Tensor, text_embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted inductive losses; the recovery terms in training mode only."""
        labels = official.inductive_labels(labels, self.seen)
        tokens = self.backbone(images)
        masks, recovery = self.decode_head(text_embeddings[self.seen], *tokens, recover=self.training)
        logits = self.upsample(masks)
        accuracy = official.pixel_accuracy(logits, labels)
        focal, dice, _ = official.mask_losses(logits, labels)
        parts = {"loss_mask": focal, "loss_dice": dice}
        if recovery is not None:
            parts |= {"recovery_loss_q": recovery[0], "recovery_loss_k": recovery[1]}
        terms = {name: self.loss_weights[name] * value for name, value in parts.items()}
        return terms | {"total": sum(terms.values()), "acc_seg": accuracy}
