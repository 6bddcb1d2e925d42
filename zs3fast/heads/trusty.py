"""Trusty Learner: self-attention over the class queries, the trusty token's among them (TagCLIP journal eq. 8)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TrustyLearner(nn.Module):
    """LN(x + Dropout(MHA(x, x, x))) over the class axis: every class sees every other, in no order.

    Shapes: [B, C + 1, D] -> the same. Adding or dropping a class changes the queries of all others.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)  # its parameters; dropout is ours
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        mha = self.self_attn
        qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, mha.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out = mha.out_proj(out.transpose(1, 2).flatten(2))
        result: Tensor = self.norm(x + F.dropout(out, self.dropout, self.training))
        return result
