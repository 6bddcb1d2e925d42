"""CLIP image towers with proposal tokens: class tokens that look at one mask each (MAFT, section 3.2, IP-CLIP).

From layer `start_layer` on the class token exists once a proposal. A proposal token sees itself and the patches its
mask keeps; patches see patches alone. So the patch stream does not know the proposals, the proposals do not know each
other, and any number of them costs little more than the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.clip_vit import Block, ClipViT, resize_positions, softmax_attention
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.ops.fused_linear import linear

# What table 4d freezes, unit by unit; attention and the norms of the blocks always train.
FREEZABLE = {
    "cls": ("class_embedding",),
    "pos": ("positional_embedding",),
    "mlp": ("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    "conv": ("conv1.weight", "ln_pre.weight", "ln_pre.bias"),
    "proj": ("proj",),
}


class ProposalClipViT(ClipViT):
    """CLIP ViT that embeds every proposal of an image in one pass, or the image as a whole.

    Args:
        config: sizes of the tower; the position table keeps CLIP's own grid and is resized on every call.
        start_layer: L, the first layer with proposal tokens.
        freeze: units of `FREEZABLE` that do not train. All of them, as in the official code, leave the attention
            projections and norms of all layers and the last norm; the paper's best row (table 4d) lets "proj" train.
    """

    position_resize = ("bicubic", True, 0.0)

    def __init__(self, config: ClipVisionConfig, *, start_layer: int = 8, freeze: Sequence[str] = tuple(FREEZABLE)):
        super().__init__(config, config.image_size, double_class_embedding=False)
        if type(start_layer) is not int or not 0 <= start_layer < config.layers:
            expected = f"expected 0..{config.layers - 1} for a tower of {config.layers} layers"
            raise ValueError(f"start_layer: {expected}, got {start_layer!r}")
        self.start_layer = start_layer
        frozen = [end for unit in freeze for end in FREEZABLE[unit]]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(name == end or name.endswith("." + end) for end in frozen))

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (h, w); pixels that fill no patch are left out, as CLIP's ViT-L/14 does at 480."""
        patch = self.config.patch_size
        height, width = (max(side // patch, 1) * patch for side in images.shape[-2:])
        return super().check_images(images[..., :height, :width])

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, 3, H, W] -> tokens [B, 1 + N, width] at the input of layer L, and the patch grid."""
        tokens, grid = self.embed(images)
        for block in self.transformer.resblocks[: self.start_layer]:
            tokens = block(tokens)
        return tokens, grid

    def proposal_head(self, tokens: Tensor, bits: Tensor) -> Tensor:
        """Embeddings [B, Nq, D] of proposals, not normalised, from trunk tokens and mask bits [B, Nq, ceil(N / 32)]."""
        batch, count = bits.shape[:2]
        proposals, patches = tokens[:, :1], tokens[:, 1:]
        *blocks, last = self.transformer.resblocks[self.start_layer :]
        for block in blocks:
            normed = block.ln_1(patches)
            q, k, v = _heads(block, normed)
            proposals = _proposal_block(block, proposals, k, v, bits)
            patches = _finish(block, patches, softmax_attention(q, k, v))
        k, v = (part.transpose(1, 2) for part in last.context(patches))  # the last patch outputs are dead
        proposals = _proposal_block(last, proposals, k, v, bits)
        out: Tensor = (self.ln_post(proposals) @ self.proj).view(batch, count, self.embed_dim)
        return out

    def image_head(self, tokens: Tensor) -> Tensor:
        """Embedding [B, D] of the whole image, not normalised: plain CLIP, its last layer for the class token alone."""
        *blocks, last = self.transformer.resblocks[self.start_layer :]
        for block in blocks:
            tokens = block(tokens)
        k, v = (part.transpose(1, 2) for part in last.context(tokens))
        token = tokens[:, :1]
        q = _heads(last, last.ln_1(token))[0]
        token = _finish(last, token, softmax_attention(q, k, v))
        out: Tensor = self.ln_post(token[:, 0]) @ self.proj
        return out


def _heads(block: Block, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, T, dh] of tokens after `ln_1`."""
    attn = block.attn
    qkv = attn.in_proj(normed).unflatten(-1, (3, attn.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _finish(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block after attention [B, heads, T, dh]: output projection, residuals, MLP."""
    x = linear(
        block.attn.out_proj,
        attended.transpose(1, 2).flatten(2),
        residual=x.expand(attended.shape[0], attended.shape[2], -1),
    )
    out: Tensor = block.mlp(block.ln_2(x), residual=x)
    return out


def _proposal_block(block: Block, proposals: Tensor, k: Tensor, v: Tensor, bits: Tensor) -> Tensor:
    """One block for the proposal tokens [B, Nq, width], or [B, 1, width] while they are all the same."""
    q, k_self, v_self = (part.expand(-1, -1, bits.shape[1], -1) for part in _heads(block, block.ln_1(proposals)))
    return _finish(block, proposals, ops.proposal_attention(q, k_self, v_self, k, v, bits))


class ProposalClipResNet(nn.Module):
    """CLIP's ResNet (RN50, ...) whose attention pooling embeds every proposal (MAFT's RN50; paper only).

    g = mean of the trunk's features F [B, N, width]; both get their positions; Nq copies of g attend to themselves and
    the features their mask keeps; then CLIP's output projection. There is one attention and no residual.

    Args:
        vision: open_clip's `vision_cfg`.  embed_dim: D.

    The query, key and value projections of the pooling train; the trunk stays in evaluation mode.
    """

    def __init__(self, vision: dict[str, Any], embed_dim: int):
        from open_clip.modified_resnet import ModifiedResNet

        super().__init__()
        width = vision.get("width", 64)
        self.embed_dim = embed_dim
        self.visual = ModifiedResNet(
            layers=vision["layers"],
            output_dim=embed_dim,
            heads=width * 32 // vision.get("head_width", 64),
            image_size=vision.get("image_size", 224),
            width=width,
        )
        for name, parameter in self.visual.named_parameters():
            parameter.requires_grad_(name.startswith(("attnpool.q_proj", "attnpool.k_proj", "attnpool.v_proj")))

    def train(self, mode: bool = True) -> ProposalClipResNet:
        super().train(mode)
        self.visual.eval()  # its batch norm is frozen
        return self

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, 3, H, W] -> [mean, features] [B, 1 + N, width] with their positions, and the feature grid."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if min(images.shape[-2:]) < 32:
            raise ValueError(f"images: expected H and W of at least 32, got {images.shape[-2]} x {images.shape[-1]}")
        visual = self.visual
        with torch.no_grad():
            x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
            grid = tuple(x.shape[-2:])
            features = x.flatten(2).transpose(1, 2)
            tokens = torch.cat([features.mean(1, keepdim=True), features], dim=1)
        return tokens + resize_positions(visual.attnpool.positional_embedding, grid, "bicubic", True), grid

    def proposal_head(self, tokens: Tensor, bits: Tensor) -> Tensor:
        """Embeddings [B, Nq, D] of proposals, not normalised, from trunk tokens and mask bits [B, Nq, ceil(N / 32)]."""
        pool = self.visual.attnpool
        q = self._split(pool.q_proj(tokens[:, :1]))
        k, v = self._split(pool.k_proj(tokens)), self._split(pool.v_proj(tokens))
        q, k_self, v_self = (part.expand(-1, -1, bits.shape[1], -1) for part in (q, k[:, :, :1], v[:, :, :1]))
        attended = ops.proposal_attention(q, k_self, v_self, k[:, :, 1:], v[:, :, 1:], bits)
        out: Tensor = pool.c_proj(attended.transpose(1, 2).flatten(2))
        return out

    def image_head(self, tokens: Tensor) -> Tensor:
        """Embedding [B, D] of the whole image, not normalised: the mean attends to itself and all features."""
        pool = self.visual.attnpool
        q, k, v = self._split(pool.q_proj(tokens[:, :1])), *(self._split(p(tokens)) for p in (pool.k_proj, pool.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = pool.c_proj(attended.transpose(1, 2).flatten(2))[:, 0]
        return out

    def _split(self, x: Tensor) -> Tensor:
        out: Tensor = x.unflatten(-1, (self.visual.attnpool.num_heads, -1)).transpose(1, 2)
        return out
