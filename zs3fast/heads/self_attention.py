"""Self-attention of a head's own tokens: torch's parameters, and dropout as an attribute that is read at each call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.ops.fused_linear import linear


def attend(mha: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """What tokens [B, T, D] get from each other, projected; in training with `mha.dropout` on the probabilities.

    `mha` holds the parameters: its own forward pass has a path without gradients that torch's FLOP counter cannot see.
    """
    assert mha.in_proj_weight is not None  # keys and values are as wide as queries
    qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, mha.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=mha.dropout if mha.training else 0.0)
    result: Tensor = mha.out_proj(out.transpose(1, 2).flatten(2))
    return result


class TransformerLayer(nn.Module):
    """Post-norm self-attention and a ReLU feed-forward part, [P, N, D] -> the same; names of torch's encoder layer.

    Args:
        dropout: of attention probabilities, attention output, hidden layer and FFN output, in training.
    """

    def __init__(self, dim: int, heads: int, ffn_width: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_width), nn.Linear(ffn_width, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self._dropout(attend(self.self_attn, x)))
        hidden = self._dropout(linear(self.linear1, x, "relu"))
        out: Tensor = self.norm2(x + self._dropout(linear(self.linear2, hidden)))
        return out
