"""Trusty Learner: self-attention over the class queries, the trusty token's among them (TagCLIP journal eq. 8)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.heads.self_attention import attend


class TrustyLearner(nn.Module):
    """LN(x + Dropout(MHA(x, x, x))) over the class axis: every class sees every other, in no order.

    Shapes: [B, C + 1, D] -> the same. Adding or dropping a class changes the queries of all others.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out = attend(self.self_attn, x)
        result: Tensor = self.norm(x + F.dropout(out, self.dropout, self.training))
        return result
