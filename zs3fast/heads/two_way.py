"""Two-way decoder: class queries look at patches while patches look at queries (CLIP-RC section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zs3fast.heads.one_way import DecoderLayer


class DecoderHalf(nn.Module):
    """The layers of one direction; exists for the official parameter names."""

    def __init__(self, dim: int, heads: int, layers: int, ffn_width: int, dropout: float = 0.1):
        super().__init__()
        stack = nn.ModuleList(DecoderLayer(dim, heads, ffn_width, dropout) for _ in range(layers))
        self.layers = cast(Sequence[DecoderLayer], stack)  # as a list it knows the type of its items


def in_chunks(layer: DecoderLayer, queries: Tensor, memory: Tensor, chunk: int | None) -> Tensor:
    """`layer(queries, memory)`; without gradients `chunk` rows of queries at a time, which do not see each other."""
    if chunk is None or torch.is_grad_enabled() or torch.compiler.is_exporting() or queries.shape[1] <= chunk:
        out: Tensor = layer(queries, memory)
        return out
    return torch.cat([layer(part, memory) for part in queries.split(chunk, dim=1)], dim=1)


class TwoWayDecoder(nn.Module):
    """(queries, features) <- (Lq(queries, features), Lv(features, queries)), both from the values before the layer.

    Shapes: queries [B, Q, D] with Q = M * C, features [B, N, D] -> the same. No probability matrix [Q, N] is stored.

    Args:
        query_chunk: rows of queries processed at a time in inference, which bounds the FFN's hidden [Q, 4 D].
        dropout: see `DecoderLayer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        ffn_width: int,
        query_chunk: int | None = 8192,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder_heads: expected a divisor of the joint width {dim}, got {heads}")
        if layers < 1:
            raise ValueError(f"decoder_layers: expected at least 1, got {layers}")
        self.query_chunk = query_chunk
        self.decoder_q = DecoderHalf(dim, heads, layers, ffn_width, dropout)
        self.decoder_v = DecoderHalf(dim, heads, layers, ffn_width, dropout)

    def forward(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        for layer_q, layer_v in zip(self.decoder_q.layers, self.decoder_v.layers):
            queries, features = in_chunks(layer_q, queries, features, self.query_chunk), layer_v(features, queries)
        return queries, features


def region_mean_masks(queries: Tensor, features: Tensor, num_regions: int) -> Tensor:
    """Mask logits [B, C, N]: mean over regions of query times feature, the mean taken first.

    mean_m(q_mc . x) = (mean_m q_mc) . x: M times less work and no [B, M * C, N]. queries [B, M * C, D], region-major.
    """
    per_class = queries.unflatten(1, (num_regions, -1)).mean(1)  # [B, C, D]
    out: Tensor = per_class @ features.transpose(1, 2)
    return out
