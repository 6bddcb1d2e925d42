"""Backbone features -> three maps of equal width that have seen each other, and the map masks are made of.

Multi-scale deformable attention in plain torch: every cell looks at a few points of each map, bilinearly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.proposals.freeseg.positions import sine_positions


class PixelDecoder(nn.Module):
    """Features of res2..res5 -> ([1/32, 1/16, 1/8 maps], mask features at 1/4), all of `dim` channels.

    Args:
        channels: of res2, res3, res4, res5.
        dim, mask_dim: width of the maps and of the mask features (published: 256 both).
        layers, heads, points, ffn_width: of the encoder (6, 8, 4, 1024).
        groups: of GroupNorm (32).
        dropout: in training mode, after attention and in the feed-forward part (0.1).
    Source: Cheng et al., Masked-attention Mask Transformer (Mask2Former), 3.1 and 4.1.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        dim: int = 256,
        mask_dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        ffn_width: int = 1024,
        groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__()
        sources = list(channels)[:0:-1]  # res5, res4, res3: low to high resolution
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(source, dim, 1), nn.GroupNorm(groups, dim)) for source in sources
        )
        self.level_embed = nn.Parameter(torch.empty(len(sources), dim).normal_())
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, len(sources), points, ffn_width, dropout) for _ in range(layers)
        )
        self.adapter = NormedConv(channels[0], dim, 1, groups)
        self.smooth = NormedConv(dim, dim, 3, groups)
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        finest, *coarser = features
        maps = [project(feature) for project, feature in zip(self.input_proj, reversed(coarser))]
        sizes = [tuple(level.shape[2:]) for level in maps]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        places = [sine_positions(size, tokens.shape[2], tokens) for size in sizes]
        positions = torch.cat([place + level for place, level in zip(places, self.level_embed)])
        centres = cell_centres(sizes, tokens)
        for layer in self.layers:
            tokens = layer(tokens, positions, centres, sizes)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes)]
        lateral = self.adapter(finest)
        finest = lateral + F.interpolate(maps[-1], size=lateral.shape[2:], mode="bilinear", align_corners=False)
        return maps, self.mask_features(F.relu(self.smooth(finest)))


class EncoderLayer(nn.Module):
    """x = norm1(x + attention(x + positions, x)); x = norm2(x + linear2(relu(linear1(x))))."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, ffn_width: int, dropout: float):
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_width)
        self.linear2 = nn.Linear(ffn_width, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x + positions, x, centres, sizes)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


class DeformableAttention(nn.Module):
    """Every query reads `points` places of every level, with weights and places it chooses itself.

    out = output_proj(sum over levels l, points p of  w_lp * value_l(centre + offset_lp)),  w softmax over all (l, p);
    offsets in cells of their level, values bilinear and 0 outside, a head at a time.
    Source: Zhu et al., Deformable DETR, eq. 3.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of the width {dim}, got {heads}")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, values: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """queries [B, T, dim], values [B, E, dim] of the levels in a row, centres [T, 2] as (x, y) in [0, 1]."""
        batch, count, dim = queries.shape
        split = (batch, count, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).view(*split, 2).permute(3, 0, 2, 1, 4, 5)  # [l, B, heads, T, p, 2]
        weights = self.attention_weights(queries).view(batch, count, self.heads, -1).softmax(-1)
        weights = weights.view(split).permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # [l, B * heads, 1, T, p]
        levels = self.value_proj(values).transpose(1, 2).reshape(batch * self.heads, dim // self.heads, -1)
        levels = levels.split([height * width for height, width in sizes], dim=2)
        out = queries.new_zeros(batch * self.heads, dim // self.heads, count)
        for level, size, offset, weight in zip(levels, sizes, offsets, weights):
            cells = offset.new_tensor([size[1], size[0]])
            places = 2 * (centres[:, None] + offset / cells) - 1
            sampled = F.grid_sample(level.unflatten(2, size), places.flatten(0, 1), align_corners=False)
            out = out + (sampled * weight).sum(-1)
        result: Tensor = self.output_proj(out.view(batch, dim, count).transpose(1, 2))
        return result


class NormedConv(nn.Conv2d):
    """A convolution without bias, size kept, then GroupNorm."""

    def __init__(self, before: int, after: int, kernel: int, groups: int):
        super().__init__(before, after, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, after)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x))
        return out


def cell_centres(sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Centres (x, y) in [0, 1] of the cells of all grids in a row, [sum h * w, 2]."""
    grids = []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (height, width))
        grids.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1))
    return torch.cat(grids)
