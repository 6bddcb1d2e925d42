"""Text meets pixels before the decoder: why FreeSeg's proposals depend on the class list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 24  # attention scores in flight: bounds the memory at large maps and long class lists


@dataclass(frozen=True)
class TextKeys:
    """What pixels attend to, with the pixel-side projections already multiplied in: a function of the text alone.

    keys:   [heads * T, dim].  bias: [heads, T], added to the scores.  values: [heads * T, dim].
    """

    keys: Tensor
    bias: Tensor
    values: Tensor


class TextInteraction(nn.Module):
    """One cross-attention from pixels to text, applied to several maps in turn.

    q = LN_q(map);  map' = q + gamma * attention(q, t_i, t_i),  t_i = LN_k(t_{i-1}): the residual is the normalised map,
    and the i-th map (from 1) sees text that went through the text norm i times. Both look like slips and are what the
    released weights were trained with.

    With W_h the part of a weight that belongs to head h, scores are q . (W_q,h^T k_h) + b_q,h . k_h, and the output is
    the sum over heads of a_h (v_h W_o,h^T). So the wide projections (dim -> inner, inner -> dim) are made for the text
    once, never for the pixels.

    Args:
        dim: of the maps.  text_dim: of the text.  inner: width of the attention.  heads: of the attention.
        dropout: on the attention weights, in training mode.
    Source: the released MAFT checkpoints, whose generator is FreeSeg's.
    """

    def __init__(self, dim: int = 256, text_dim: int = 512, *, inner: int = 2048, heads: int = 8, dropout: float = 0.1):
        super().__init__()
        if inner % heads:
            raise ValueError(f"heads: expected a divisor of the interaction's width {inner}, got {heads}")
        self.heads, self.dropout = heads, dropout
        self.layer_norm_q = nn.LayerNorm(dim)
        self.layer_norm_k = nn.LayerNorm(text_dim)
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(text_dim, inner)
        self.v_proj = nn.Linear(text_dim, inner)
        self.out_proj = nn.Linear(inner, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def text_keys(self, text: Tensor, maps: int) -> list[TextKeys]:
        """Text [T, text_dim] -> what each of `maps` maps attends to, in the order they are visited."""
        parts = []
        split = (self.heads, -1)  # rows of a projection by head
        q_weight, q_bias = self.q_proj.weight.unflatten(0, split), self.q_proj.bias.unflatten(0, split)
        out_weight = self.out_proj.weight.unflatten(1, split)  # [dim, heads, width]
        scale = q_weight.shape[1] ** -0.5
        for _ in range(maps):
            text = self.layer_norm_k(text)
            k, v = (project(text).unflatten(1, split) for project in (self.k_proj, self.v_proj))  # [T, heads, width]
            parts.append(
                TextKeys(
                    keys=torch.einsum("thw,hwd->htd", k * scale, q_weight).flatten(0, 1),
                    bias=torch.einsum("thw,hw->ht", k * scale, q_bias),
                    values=torch.einsum("thw,dhw->htd", v, out_weight).flatten(0, 1),
                )
            )
        return parts

    def forward(self, maps: Sequence[Tensor], keys: Sequence[TextKeys]) -> list[Tensor]:
        """Maps [B, dim, h, w] of any sizes, and the `text_keys` made for as many."""
        return [self._one(level, key) for level, key in zip(maps, keys, strict=True)]

    def _one(self, level: Tensor, text: TextKeys) -> Tensor:
        queries = self.layer_norm_q(level.permute(0, 2, 3, 1))
        rows = queries.reshape(-1, queries.shape[-1])
        parts = []
        for chunk in rows.split(max(CHUNK // len(text.keys), 1)):
            scores = (chunk @ text.keys.t()).unflatten(1, text.bias.shape) + text.bias
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            parts.append(torch.addmm(self.out_proj.bias, weights.flatten(1), text.values))
        attended = torch.cat(parts).view_as(queries)
        out: Tensor = (queries + self.gamma * attended).permute(0, 3, 1, 2)
        return out
