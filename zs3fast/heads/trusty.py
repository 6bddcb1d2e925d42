"""Trusty Learner: self-attention over the class queries, the trusty token's among them (TagCLIP journal eq. 8)."""

from __future__ import annotations

from torch import Tensor, nn

from zs3fast.heads.self_attention import SelfAttention


class TrustyLearner(SelfAttention):
    """LN(x + Dropout(MHA(x, x, x))) over the class axis: every class sees every other, in no order.

    Shapes: [B, C + 1, D] -> the same. Adding or dropping a class changes the queries of all others.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self._dropout(self.attend(x)))
        return out
