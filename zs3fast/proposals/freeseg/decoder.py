"""Queries -> masks and class embeddings: each layer looks only where the mask so far says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.proposals.freeseg.positions import sine_positions


class MaskedDecoder(nn.Module):
    """Learned queries, refined by layers that visit the maps in turn, coarse to fine.

    A query of layer l attends to the cells of map l mod 3 where its mask so far (the mask features' logits, resized
    bilinearly to that map) has a sigmoid of at least 0.5, or to all cells if there is none. Published are 10 layers,
    one more than Mask2Former's.

    The mask of a layer is linear in the mask features, so these are resized once a map instead of every layer's logits.

    Args:
        dim: of queries and maps.  mask_dim: of the mask features.
        layers, heads, queries, ffn_width: 10, 8, 100, 2048.
        class_widths: outputs of the class head's layers (1024, then the text's width).
        levels: maps (3).
    Source: Cheng et al., Mask2Former, 3.2.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        mask_dim: int = 256,
        layers: int = 10,
        heads: int = 8,
        queries: int = 100,
        ffn_width: int = 2048,
        class_widths: Sequence[int] = (1024, 512),
        levels: int = 3,
    ):
        super().__init__()
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(levels, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_width) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = MLP(dim, dim, dim, mask_dim)
        self.class_embed = MLP(dim, *class_widths)

    def forward(self, maps: Sequence[Tensor], mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, dim, h_i, w_i] and mask features [B, mask_dim, h4, w4] -> mask logits [B, Nq, h4, w4]
        and class embeddings [B, Nq, E], not normalised."""
        memories, positions, resized = [], [], []
        for level, embedding in zip(maps, self.level_embed.weight):
            height, width = level.shape[2:]
            size = height, width
            memories.append(level.flatten(2).transpose(1, 2) + embedding)
            positions.append(sine_positions(size, level.shape[1], level))
            resized.append(F.interpolate(mask_features, size=size, mode="bilinear", align_corners=False))
        x = self.query_feat.weight.expand(len(mask_features), -1, -1)
        query_positions = self.query_embed.weight
        for index, layer in enumerate(self.layers):
            visited = index % len(memories)
            keep = attention_mask(self._masks(x, resized[visited]))
            x = layer(x, query_positions, memories[visited], positions[visited], keep)
        return self._masks(x, mask_features), self.class_embed(self.norm(x))

    def _masks(self, x: Tensor, mask_features: Tensor) -> Tensor:
        return torch.einsum("bqd,bdhw->bqhw", self.mask_embed(self.norm(x)), mask_features)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each is x = norm(x + part(x))."""

    def __init__(self, dim: int, heads: int, ffn_width: int):
        super().__init__()
        self.cross_attention = Attention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_width)
        self.linear2 = nn.Linear(ffn_width, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_positions: Tensor, memory: Tensor, positions: Tensor, keep: Tensor | None
    ) -> Tensor:
        x = self.cross_norm(x + self.cross_attention(x + query_positions, memory + positions, memory, keep))
        placed = x + query_positions
        x = self.self_norm(x + self.self_attention(placed, placed, x))
        out: Tensor = self.ffn_norm(x + self.linear2(F.relu(self.linear1(x))))
        return out


class Attention(nn.Module):
    """Multi-head attention with one stacked projection, as in `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of the width {dim}, got {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """queries [B, Nq, dim], keys and values [B, N, dim], keep bool [B, Nq, N]: where attention is allowed."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, keys, values), weights, biases)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keep is None else keep.unsqueeze(1))
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


def attention_mask(logits: Tensor) -> Tensor:
    """Mask logits [B, Nq, h, w] -> bool [B, Nq, h * w], where attention is allowed; empty rows become full ones."""
    keep = logits.flatten(2).sigmoid() >= 0.5
    return keep | ~keep.any(-1, keepdim=True)


class MLP(nn.Module):
    """Linear layers of the given widths, ReLU between them."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
