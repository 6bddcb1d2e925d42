"""One-way decoder: class queries look at patches, the last layer's scores are the masks (ZegCLIP section 3.2).

A layer's cross-attention is q = W_q Q, k = W_k X, v = W_v X in heads of width dh, scores q.k / sqrt(dh). The masks are
the mean over heads of the last layer's scores before softmax, so in that layer only the query and key projections
exist: its values, output projection and FFN never reach an output, in training or evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.ops.fused_linear import linear
from zs3fast.utils.precision import without_autocast


def _split_heads(x: Tensor, heads: int) -> Tensor:
    out: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, tokens, dh]
    return out


class CrossAttention(nn.Module):
    """Queries [B, C, D] attend to patches [B, N, D]; in training with `dropout` on the probabilities."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        return self.with_masks(queries, patches, need_masks=False)[0]

    def with_masks(self, queries: Tensor, patches: Tensor, need_masks: bool = True) -> tuple[Tensor, Tensor | None]:
        """The output [B, C, D] and, if asked for, mask logits [B, C, N], the mean over heads of the scaled scores."""
        q, k, v = (
            _split_heads(linear(layer, x), self.heads)
            for layer, x in ((self.q, queries), (self.k, patches), (self.v, patches))
        )
        dropout = self.dropout if self.training else 0.0
        out, masks = ops.attention_to_mask(q, k, v, q.shape[-1] ** -0.5, dropout_p=dropout, need_masks=need_masks)
        assert out is not None
        return linear(self.proj, out.transpose(1, 2).flatten(2)), masks


class MaskAttention(nn.Module):
    """The last layer's live half: mask logits [B, C, N] = mean over heads of the scaled scores."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        dim = queries.shape[-1]
        scale = (dim // self.heads) ** -0.5
        # a graph is for any number of classes, so that it does not ask which of both are more
        more = not torch.compiler.is_compiling() and queries.shape[1] >= patches.shape[1]
        if torch.is_grad_enabled() or more:
            q, k = (_split_heads(x, self.heads) for x in (linear(self.q, queries), linear(self.k, patches)))
            mean_scores = ops.attention_to_mask(q, k, None, scale)[1]
            assert mean_scores is not None
            return mean_scores
        # Fewer classes than patches: fold the key projection into the queries, q.(W x + b) = (W^T q).x + q.b. In
        # float32 at least: labels compare these scores, and in 8 bits many of two classes would be equal.
        q = linear(self.q, queries)
        with without_autocast(q.device):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, x, weight, bias = (t.to(wide) for t in (q, patches, self.k.weight, self.k.bias))
            masks = (q @ weight) @ x.transpose(1, 2) + (q @ bias).unsqueeze(-1)
            out: Tensor = masks.mul_(scale / self.heads)
        return out


class DecoderLayer(nn.Module):
    """Post-norm cross-attention and FFN, after an optional self-attention handed in by the method.

    Args:
        dropout: of attention probabilities, attention output, hidden layer and FFN output, in training.
    """

    def __init__(self, dim: int, heads: int, ffn_width: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.multihead_attn = CrossAttention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_width), nn.Linear(ffn_width, dim)
        self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        return self._after_attention(queries, self.multihead_attn(queries, patches))

    def _after_attention(self, queries: Tensor, attended: Tensor) -> Tensor:
        queries = self.norm2(queries + self._dropout(attended))
        hidden = self._dropout(linear(self.linear1, queries, "relu"))
        out: Tensor = self.norm3(queries + self._dropout(linear(self.linear2, hidden)))
        return out


class MaskLayer(nn.Module):
    """The last layer: nothing but the scores between queries and patches."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.multihead_attn = MaskAttention(dim, heads)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        out: Tensor = self.multihead_attn(queries, patches)
        return out


class TokenMaskLayer(DecoderLayer):
    """A last layer whose output tokens are wanted as well: nothing of it is dead work."""

    def tokens_and_masks(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Output tokens [B, C, D] and mask logits [B, C, N]."""
        attended, masks = self.multihead_attn.with_masks(queries, patches)
        assert masks is not None
        return self._after_attention(queries, attended), masks


class OneWayDecoder(nn.Module):
    """Queries [B, C, D] and patch tokens [B, N, D] -> mask logits [B, C, N].

    Args:
        dim: D.  heads: attention heads.  layers: at least 1; the last one makes the masks.
        ffn_width: hidden width of the feed-forward part.
        query_mixers: for every layer a module applied to the queries before it, or None.
        dropout: see `DecoderLayer`.
        tokens: the last layer is a whole one, and `with_tokens` gives what it makes of the queries.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        ffn_width: int,
        query_mixers: Sequence[nn.Module | None] | None = None,
        dropout: float = 0.1,
        tokens: bool = False,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder_heads: expected a divisor of the joint width {dim}, got {heads}")
        if layers < 1:
            raise ValueError(f"decoder_layers: expected at least 1, got {layers}")
        stack: list[nn.Module] = [DecoderLayer(dim, heads, ffn_width, dropout) for _ in range(layers - 1)]
        stack.append(TokenMaskLayer(dim, heads, ffn_width, dropout) if tokens else MaskLayer(dim, heads))
        mixers = query_mixers or [None] * layers  # after the layers, whose tensors a wrong count is noticed by
        self.query_mixers = nn.ModuleList(mixer or nn.Identity() for mixer in mixers)
        self.layers = nn.ModuleList(stack)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        last = self.layers[-1]
        queries = self._mixed(queries, patches)
        if isinstance(last, TokenMaskLayer):
            return last.tokens_and_masks(queries, patches)[1]
        masks: Tensor = last(queries, patches)
        return masks

    def with_tokens(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Output tokens [B, C, D] and mask logits [B, C, N]; needs `tokens`."""
        last = self.layers[-1]
        assert isinstance(last, TokenMaskLayer)
        return last.tokens_and_masks(self._mixed(queries, patches), patches)

    def _mixed(self, queries: Tensor, patches: Tensor) -> Tensor:
        """The queries as the last layer gets them."""
        *layers, _ = self.layers
        for mix, layer in zip(self.query_mixers, layers):
            queries = layer(mix(queries), patches)
        mixed: Tensor = self.query_mixers[-1](queries)
        return mixed
