"""Self-attention of a head's own tokens: torch's parameters, and dropout as an attribute that is read at each call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.ops.fused_linear import linear


class SelfAttention(nn.Module):
    """A part with `self_attn`: torch's parameters, and ours to run them.

    torch's own forward pass has a path without gradients that its FLOP counter cannot see.

    Args:
        dropout: of attention probabilities and of what the part adds to its tokens, in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)

    @property
    def dropout(self) -> float:
        """One value, which `self_attn` holds: setting either sets both."""
        dropout: float = self.self_attn.dropout
        return dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.self_attn.dropout = dropout

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def attend(self, x: Tensor) -> Tensor:
        """What tokens [B, T, D] get from each other, projected."""
        mha = self.self_attn
        assert mha.in_proj_weight is not None  # keys and values are as wide as queries
        qkv = ops.fused_linear(x, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, mha.num_heads, -1)).unbind(2)
        if self.training and self.dropout:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2)
        else:
            out = ops.encoder_attention(q, k, v)
        return ops.fused_linear(out.flatten(2), mha.out_proj.weight, mha.out_proj.bias)


class TransformerLayer(SelfAttention):
    """Post-norm self-attention and a ReLU feed-forward part, [P, N, D] -> the same; names of torch's encoder layer.

    Args:
        dropout: of attention probabilities, attention output, hidden layer and FFN output, in training.
    """

    def __init__(self, dim: int, heads: int, ffn_width: int, dropout: float = 0.1):
        super().__init__(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_width), nn.Linear(ffn_width, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self._dropout(self.attend(x)))
        hidden = self._dropout(linear(self.linear1, x, "relu"))
        out: Tensor = self.norm2(x + self._dropout(linear(self.linear2, hidden)))
        return out
