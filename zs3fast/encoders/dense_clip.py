"""A frozen CLIP ViT whose patch tokens lie in the joint space: its last attention is not asked where to look.

CLIP trains the class token alone; the last attention gathers for it and blurs the patches. What a patch shows is in its
value: projected by the last block's value and output projections, then as CLIP projects its class token, it can be
compared with text (MaskCLIP, Zhou et al., ECCV 2022, section 3.2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zs3fast.encoders.clip_vit import Block, ClipViT
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.types import ImageFeatures

ATTENTIONS = ("value", "self-self")


class DenseClipViT(ClipViT):
    """CLIP ViT that embeds every patch as CLIP embeds a picture; nothing in it trains.

    In the last block, with queries, keys and values q, k, v of all tokens and s = head_width^-1/2:

        value:      a = v                                                        a patch sees itself alone
        self-self:  a = softmax(s q q^T) v + softmax(s k k^T) v                  patches see what is like them
        patch = unit(ln_post(a W_out + b_out) W_proj)

    Args:
        config: sizes of the tower; the position table keeps CLIP's own grid and is resized bicubically on every call.
        attention: "value" (MaskCLIP) or "self-self" (the correlative attention of SCLIP, Wang et al., ECCV 2024).
        residual: keep the last block's residual connections and MLP, as SCLIP does; they belong to the class token's
            task, and are left out by default.
    """

    position_resize = ("bicubic", False)

    def __init__(self, config: ClipVisionConfig, *, attention: str = "value", residual: bool = False):
        super().__init__(config, config.grid * config.patch_size, double_class_embedding=False)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.attention = attention
        self.residual = residual
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> ImageFeatures:
        """Images [B, 3, H, W] -> CLIP's own image embedding and the patches', all unit vectors [.., D]."""
        tokens, grid = self.embed(images)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            tokens = block(tokens)
        k, v = (part.transpose(1, 2) for part in last.context(tokens))  # [B, heads, 1 + N, dh]
        asking = tokens if self.attention == "self-self" else tokens[:, :1]
        q = last.attn.queries(last.ln_1(asking))
        token = tokens[:, :1] + _attended(last, F.scaled_dot_product_attention(q[:, :, :1], k, v))
        token = token + last.mlp(last.ln_2(token))
        if self.attention == "value":
            patches = v[:, :, 1:]
        else:
            patches = F.scaled_dot_product_attention(q[:, :, 1:], q, v)
            patches = patches + F.scaled_dot_product_attention(k[:, :, 1:], k, v)
        patches = _attended(last, patches)
        if self.residual:
            patches = tokens[:, 1:] + patches
            patches = patches + last.mlp(last.ln_2(patches))
        return ImageFeatures(self.project(token)[:, 0], self.project(patches), grid)


def _attended(block: Block, heads: Tensor) -> Tensor:
    """The output projection of what was attended to, [B, heads, T, dh] -> [B, T, width]."""
    return block.attn.out_proj(heads.transpose(1, 2).flatten(2))
