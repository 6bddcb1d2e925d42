"""Relationship descriptor: one query a class, made from its text embedding and the image's global token."""

from __future__ import annotations

from torch import Tensor, nn

from zs3fast import ops
from zs3fast.ops.relationship_descriptor import text_term
from zs3fast.utils.weight_cache import WeightCache


class RelationshipDescriptor(nn.Module):
    """Linear(concat(text * global, text)) (ZegCLIP section 3.3), its image-independent half cached per class list.

    Shapes: text [C, D], visual [B, D] -> [B, C, D] (or [B, M, D] -> [B, M, C, D]).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.q_proj = nn.Linear(2 * dim, dim)
        self._text_cache = WeightCache()

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        weight, bias = self.q_proj.weight, self.q_proj.bias
        term = self._text_cache.get((text, weight, bias), lambda: text_term(text, weight, bias))
        return ops.relationship_descriptor(text, visual, weight, bias, text_term=term)
