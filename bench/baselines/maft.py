"""MAFT (NeurIPS 2023) in its official structure, plain eager PyTorch, and what it replaced: one CLIP pass a crop.

Waste kept on purpose: in every masked layer the soft masks are resampled again, thresholded, repeated for every head,
joined into a bool mask [B * heads, T, T] over all T = Nq + N tokens, which becomes an additive one; proposal tokens are
scored against each other and patches against proposals; the last layer computes every patch; labels come from class
scores [C, H, W] that are resized before the argmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official

if TYPE_CHECKING:  # a process that measures the baseline alone does without zs3fast
    from zs3fast.types import Proposals


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


class OfficialMAFT(nn.Module):
    """Image, text and mask proposals in, labels out; parameter names are those of the official checkpoints.

    Without an ensemble: class weights are the softmax of 100 * cosine alone. `sizes`: see OfficialIPCLIP.
    """

    def __init__(self, **sizes: int):
        super().__init__()
        self.IPCLIP = OfficialIPCLIP(**sizes)

    def forward(self, images: Tensor, text_embeddings: Tensor, proposals: Proposals) -> Tensor:
        """Logits [B, Nq, C] of every proposal; its soft mask is made at the size of the padded frame."""
        padded = proposals.padded_size
        masks = F.interpolate(proposals.mask_logits, padded, mode="bilinear", align_corners=True).sigmoid()
        embeddings = self.IPCLIP(images, masks)
        embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return 100 * embeddings @ (text_embeddings / text_embeddings.norm(dim=-1, keepdim=True)).t()

    def class_scores(self, logits: Tensor, proposals: Proposals) -> Tensor:
        """[B, C, H, W] on the images' own sizes, all of one size."""
        return torch.stack(
            [
                score_map(weights, masks, proposals.padded_size, image, size)
                for weights, masks, image, size in zip(
                    logits.float().softmax(-1), proposals.mask_logits, proposals.image_sizes, proposals.original_sizes
                )
            ]
        )

    def predict_labels(self, images: Tensor, text_embeddings: Tensor, proposals: Proposals) -> Tensor:
        """Labels [B, H, W]."""
        return self.class_scores(self(images, text_embeddings, proposals), proposals).argmax(1)


def score_map(class_weights: Tensor, mask_logits: Tensor, padded: tuple[int, int], image: tuple[int, int],
              size: tuple[int, int]) -> Tensor:  # fmt: skip
    """Scores [C, H, W] of one image as the official evaluation makes them: [C, Hi, Wi], then resized."""
    masks = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=True)[0].sigmoid()
    masks = masks[:, : image[0], : image[1]]
    scores = torch.einsum("qc,qhw->chw", class_weights, masks)
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def label_map(class_weights: Tensor, mask_logits: Tensor, padded: tuple[int, int], image: tuple[int, int],
              size: tuple[int, int]) -> Tensor:  # fmt: skip
    """Labels [H, W]: the class of the largest score."""
    return score_map(class_weights, mask_logits, padded, image, size).argmax(0)
