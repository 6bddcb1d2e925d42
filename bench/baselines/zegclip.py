"""ZegCLIP (arXiv 2212.03588) in its official structure, plain eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official


class ZegCLIPHead(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.q_proj = nn.Linear(2 * width, width)
        self.decoder_1 = official.Decoder(
            [
                official.DecoderLayer(width, heads, 4 * width, dropout, self_attention="weights only")
                for _ in range(layers)
            ]
        )

    def forward(self, text: Tensor, global_token: Tensor, patch_map: Tensor) -> Tensor:
        """Mask logits [B, C, h, w]."""
        queries = self.q_proj(official.descriptor_input(text, global_token))
        return self.decoder_1(queries, patch_map)


class OfficialZegCLIP(nn.Module):
    """The official network; parameter names are those of the official checkpoints, text tower left out.

    Args:
        image_size, patch_size, width, layers, heads, embed_dim: of CLIP's image tower; defaults are ViT-B/16 at 512.
        num_prompts: prompt tokens a layer (10 for VOC, 100 for COCO).
        seen: indices of the seen classes; their scores are lowered by `seen_offset`.
        dropout: of prompts and decoder, in training mode only.
    """

    loss_weights = {"loss_mask": 100.0, "loss_dice": 1.0}

    def __init__(
        self,
        *,
        seen: Sequence[int],
        num_prompts: int = 10,
        image_size: int = 512,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        embed_dim: int = 512,
        decoder_heads: int = 8,
        decoder_layers: int = 3,
        seen_offset: float = 0.1,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.image_size = image_size
        self.seen = list(seen)
        self.seen_offset = seen_offset
        self.backbone = self.make_backbone(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            embed_dim=embed_dim,
            num_prompts=num_prompts,
            dropout=dropout,
        )
        self.decode_head = self.make_head(embed_dim, decoder_heads, decoder_layers, dropout)

    def make_backbone(self, **sizes: Any) -> nn.Module:
        return official.PromptedVisionTransformer(**sizes)

    def make_head(self, width: int, heads: int, layers: int, dropout: float) -> nn.Module:
        return ZegCLIPHead(width, heads, layers, dropout)

    def forward(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Mask logits on the patch grid, [B, C, h, w]."""
        global_token, patch_map = self.backbone(images)
        return self.decode_head(text_embeddings, global_token, patch_map)

    def upsample(self, mask_logits: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)

    def class_scores(self, mask_logits: Tensor) -> Tensor:
        """Calibrated scores at full size, [B, C, H, W]."""
        return official.offset_seen(self.upsample(mask_logits).sigmoid(), self.seen, self.seen_offset)

    def predict_labels(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Images of one window -> labels [B, H, W]."""
        size = tuple(images.shape[-2:])
        return official.labels_from_crop(self.class_scores(self(images, text_embeddings)), size, size)

    def losses(self, images: Tensor, text_embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted inductive losses; all text embeddings, labels in dataset indices."""
        labels = official.inductive_labels(labels, self.seen)
        logits = self.upsample(self(images, text_embeddings[self.seen]))
        accuracy = official.pixel_accuracy(logits, labels)
        focal, dice, _ = official.mask_losses(logits, labels)
        terms = {name: self.loss_weights[name] * value for name, value in (("loss_mask", focal), ("loss_dice", dice))}
        return terms | {"total": sum(terms.values()), "acc_seg": accuracy}
