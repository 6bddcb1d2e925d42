"""MAFT (NeurIPS 2023) in its official structure, plain eager PyTorch, and what it replaced: one CLIP pass a crop.

Waste kept on purpose: in every masked layer the soft masks are resampled again, thresholded, repeated for every head,
joined into a bool mask [B * heads, T, T] over all T = Nq + N tokens, which becomes an additive one; proposal tokens are
scored against each other and patches against proposals; the last layer computes every patch; labels come from class
scores [C, H, W] that are resized before the argmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official


class OfficialIPCLIP(nn.Module):
    """The mask-aware image tower; keys are those under `IPCLIP.` in official checkpoints."""

    def __init__(
        self, *, grid: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int, start_layer: int
    ):
        super().__init__()
        self.start_layer, self.heads = start_layer, heads
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = official.Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        x = self.conv1(images)
        batch, width, h, w = x.shape
        x = x.reshape(batch, width, h * w).permute(0, 2, 1)
        side = int((len(self.positional_embedding) - 1) ** 0.5)
        table = self.positional_embedding[1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=True)
        table = table.flatten(2).permute(0, 2, 1)[0]
        cls = self.class_embedding + torch.zeros(batch, 1, width, dtype=x.dtype, device=x.device)
        x = torch.cat([cls, x], dim=1) + torch.cat([self.positional_embedding[:1], table])
        return self.ln_pre(x).permute(1, 0, 2), h, w  # sequence first

    def joint_mask(self, masks: Tensor, h: int, w: int) -> Tensor:
        """Soft masks [B, Nq, H, W] -> additive mask [B * heads, T, T] over [proposals | patches]."""
        batch, count = masks.shape[:2]
        keep = F.interpolate(masks, size=(h, w), mode="bilinear", align_corners=False).flatten(2) >= 0.5
        keep = keep.repeat_interleave(self.heads, dim=0)
        rows = batch * self.heads
        own = torch.eye(count, dtype=torch.bool, device=masks.device).expand(rows, -1, -1)
        top = torch.cat([own, keep], dim=2)
        none = torch.zeros(rows, h * w, count, dtype=torch.bool, device=masks.device)
        every = torch.ones(rows, h * w, h * w, dtype=torch.bool, device=masks.device)
        seen = torch.cat([top, torch.cat([none, every], dim=2)], dim=1)
        return torch.zeros(seen.shape, device=masks.device).masked_fill(~seen, float("-inf"))

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embeddings [B, Nq, D] of the masks, or [B, D] of the images, not normalised."""
        x, h, w = self.embed(images)
        count = 1
        for layer, block in enumerate(self.transformer.resblocks):
            if masks is None or layer < self.start_layer:
                x = block(x)
                continue
            if layer == self.start_layer:
                count = masks.shape[1]
                x = torch.cat([x[:1].expand(count, -1, -1), x[1:]])
            x = block(x, self.joint_mask(masks, h, w))
        x = self.ln_post(x.permute(1, 0, 2)) @ self.proj  # patches included
        return x[:, 0] if masks is None else x[:, :count]


def label_map(class_weights: Tensor, mask_logits: Tensor, padded: tuple[int, int], image: tuple[int, int],
              size: tuple[int, int]) -> Tensor:  # fmt: skip
    """Labels [H, W] of one picture as the official evaluation makes them: [C, Hi, Wi] scores, resized, argmax."""
    masks = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=True)[0].sigmoid()
    masks = masks[:, : image[0], : image[1]]
    scores = torch.einsum("qc,qhw->chw", class_weights, masks)
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
