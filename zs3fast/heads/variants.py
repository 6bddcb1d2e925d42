"""The descriptor ablations of TagCLIP (journal table 2): class queries from other mixtures of text and image.

Inputs by name, for every class c: `q` = text, `s` = global token, `qms` = text * global, `qmscq` = [qms, q],
`qcs` = [q, s]. A(x, y, v) is 8-head cross-attention with projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "q": lambda text, image: text,
    "s": lambda text, image: image,
    "qms": lambda text, image: text * image,
    "qmscq": lambda text, image: torch.cat([text * image, text], -1),
    "qcs": lambda text, image: torch.cat([text, image], -1),
}
_WIDE = ("qmscq", "qcs")


def descriptor_inputs(names: tuple[str, ...], text: Tensor, visual: Tensor) -> list[Tensor]:
    """The named inputs, each [B, C, D] or [B, C, 2D], from text [C, D] and visual [B, D]."""
    text = text.expand(visual.shape[0], -1, -1)
    image = visual.unsqueeze(1).expand_as(text)
    return [_INPUTS[name](text, image) for name in names]


class Attention(nn.Module):
    """Cross-attention with separate q, k, v and output projections: softmax(q k^T / sqrt(dh)) v."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result


class LinearDescriptor(nn.Module):
    """Linear(concat of the named inputs); `q` alone may be passed on unprojected (rows with `project=False`)."""

    def __init__(self, dim: int, inputs: tuple[str, ...], project: bool = True):
        super().__init__()
        if not project and inputs != ("q",):
            raise ValueError(f"descriptor: expected 'q' where there is no projection, got {'_'.join(inputs)!r}")
        self.inputs = inputs
        self.q_proj = nn.Linear(dim * _total_width(inputs), dim) if project else nn.Identity()

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        out: Tensor = self.q_proj(torch.cat(descriptor_inputs(self.inputs, text, visual), -1))
        return out


class LearnableDescriptor(nn.Module):
    """A table of one learned query a class: closed set only, ignores text and image."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.q = nn.Embedding(num_classes, dim)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        if text.shape[0] != self.q.num_embeddings:
            raise ValueError(
                f"text_embeddings: expected the learnable descriptor's {self.q.num_embeddings} classes, got "
                f"{text.shape[0]}"
            )
        return self.q.weight.expand(visual.shape[0], -1, -1)


class CrossAttentionDescriptor(nn.Module):
    """u_j = Linear_j(input_j); LN(u_1 + Dropout(A(u_1, u_2, u_3))).

    The official code keeps the three Linear_j in a plain list: never trained, never saved, redrawn each run. Here they
    are registered; published numbers of these rows had frozen random ones.
    """

    def __init__(self, dim: int, inputs: tuple[str, ...], heads: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.inputs = inputs
        self.input_proj = nn.ModuleList(nn.Linear(dim * _total_width((name,)), dim) for name in inputs)
        self.attention = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        inputs = descriptor_inputs(self.inputs, text, visual)
        query, key, value = (layer(x) for layer, x in zip(self.input_proj, inputs))
        attended = F.dropout(self.attention(query, key, value), self.dropout, self.training)
        out: Tensor = self.norm(query + attended)
        return out


class SelfAttentionDescriptor(nn.Module):
    """x = input, or Linear(input) where it is 2D wide; LN(x + Dropout(A(x, x, x)))."""

    def __init__(self, dim: int, inputs: tuple[str, ...], heads: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.inputs = inputs
        self.input_proj = nn.Linear(2 * dim, dim) if inputs[0] in _WIDE else nn.Identity()
        self.attention = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        x = self.input_proj(descriptor_inputs(self.inputs, text, visual)[0])
        out: Tensor = self.norm(x + F.dropout(self.attention(x, x, x), self.dropout, self.training))
        return out


class AttentionConcatDescriptor(nn.Module):
    """Linear([LN(in_1 + Dropout(A(in_1, in_2, in_3))), text]) (right half of TagCLIP journal figure 5)."""

    def __init__(self, dim: int, inputs: tuple[str, ...], heads: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        if any(name in _WIDE for name in inputs):
            raise ValueError(f"descriptor: expected inputs of width D for attn_cat, got {'_'.join(inputs)!r}")
        self.inputs = inputs
        self.attention = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(2 * dim, dim)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        query, key, value = descriptor_inputs(self.inputs, text, visual)
        mixed = self.norm(query + F.dropout(self.attention(query, key, value), self.dropout, self.training))
        out: Tensor = self.q_proj(torch.cat([mixed, text.expand_as(mixed)], -1))
        return out


def _total_width(names: tuple[str, ...]) -> int:
    return sum(2 if name in _WIDE else 1 for name in names)


def build_variant(spec: str, dim: int, heads: int, num_classes: int | None, dropout: float = 0.1) -> nn.Module:
    """A descriptor from its name: "s_q", "q", "identity", "learnable", "attn:x_y_v", "self_attn:x", "attn_cat:x_y_v".

    Raises:
        ValueError: unknown kind, unknown input, or a wrong number of inputs.
    """
    kind, _, names = spec.rpartition(":")
    inputs = tuple(names.split("_"))
    if spec == "learnable":
        if num_classes is None:
            raise ValueError("num_classes: expected a number for the learnable descriptor, got None")
        return LearnableDescriptor(dim, num_classes)
    if spec == "identity":
        return LinearDescriptor(dim, ("q",), project=False)
    counts = {"": None, "attn": 3, "self_attn": 1, "attn_cat": 3}
    unknown = [name for name in inputs if name not in _INPUTS]
    if kind not in counts or unknown or (counts[kind] not in (None, len(inputs))):
        raise ValueError(
            f"descriptor: unknown {spec!r}; expected 'qms_q', inputs joined by '_' out of {', '.join(_INPUTS)}, "
            "'learnable', 'identity', or 'attn:x_y_v', 'self_attn:x', 'attn_cat:x_y_v'"
        )
    if kind == "":
        return LinearDescriptor(dim, inputs)
    variant: nn.Module = {
        "attn": CrossAttentionDescriptor,
        "self_attn": SelfAttentionDescriptor,
        "attn_cat": AttentionConcatDescriptor,
    }[kind](dim, inputs, heads, dropout)
    return variant
