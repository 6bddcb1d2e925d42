"""Recovery decoder: decoded queries and features back to what CLIP said, in training only (CLIP-RC section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.heads.one_way import DecoderLayer


class RecoveryDecoder(nn.Module):
    """Linears, `layers` >= 1 two-way layers, Linears; compared with the detached descriptor and patch tokens.

    Shapes: queries [B, M * C, D], features [B, N, D] -> descriptors [B, M * C, 2 D], patch tokens [B, N, D].
    """

    def __init__(self, dim: int, heads: int, layers: int, ffn_width: int, dropout: float = 0.1):
        super().__init__()
        self.linear_q_in, self.linear_k_in = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.decouple_q = nn.ModuleList(DecoderLayer(dim, heads, ffn_width, dropout) for _ in range(layers))
        self.decouple_v = nn.ModuleList(DecoderLayer(dim, heads, ffn_width, dropout) for _ in range(layers))
        self.linear_q_out, self.linear_k_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        queries, features = self.linear_q_in(queries), self.linear_k_in(features)
        for layer_q, layer_v in zip(self.decouple_q, self.decouple_v):
            queries, features = layer_q(queries, features), layer_v(features, queries)
        return self.linear_q_out(queries), self.linear_k_out(features)


def _divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) | softmax(got)) over the last axis, the mean over tokens."""
    rows = got.numel() // max(got.shape[-1], 1)
    return F.kl_div(got.log_softmax(-1), wanted.softmax(-1), reduction="sum") / max(rows, 1)


RECOVERY_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda got, wanted: (got - wanted).abs().mean(),
    "l2": lambda got, wanted: (got - wanted).square().mean(),
    "kd": _divergence,
}


def recovery_loss(kind: str, got: Tensor, wanted: Tensor) -> Tensor:
    """Distance of tokens [B, T, D] (CLIP-RC table 8).

    "l1" and "l2" are means over all elements; "kd" is knowledge distillation, which the paper does not spell out: here
    the divergence of the tokens' softmax over their D channels.
    """
    return RECOVERY_LOSSES[kind](got, wanted)


def descriptors(text: Tensor, visual: Tensor) -> Tensor:
    """concat(text * visual, text) of every region and class, [B, M * C, 2 D], region-major; stored."""
    names = text.expand(*visual.shape[:2], *text.shape)
    return torch.cat([names * visual.unsqueeze(2), names], -1).flatten(1, 2)


def descriptor_l1(recovered: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """mean |recovered - concat(text * visual, text)| over all elements, the target rebuilt and never stored.

    Args:
        recovered: [B, M * C, 2 D], region-major.  text: [C, D].  visual: [B, M, D]. No gradient reaches the last two.
    """
    out: Tensor = _DescriptorL1.apply(recovered, text.detach(), visual.detach())
    return out


class _DescriptorL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recovered: Tensor, text: Tensor, visual: Tensor) -> Tensor:
        ctx.save_for_backward(recovered, text, visual)
        total = recovered.new_zeros((), dtype=torch.float64)
        for _, difference in _differences(recovered, text, visual):
            total += difference.abs().sum(dtype=torch.float64)
        return (total / max(recovered.numel(), 1)).to(recovered.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        recovered, text, visual = ctx.saved_tensors
        result = torch.empty_like(recovered)
        scale = grad / max(recovered.numel(), 1)
        for place, difference in _differences(recovered, text, visual):
            place(result).copy_(difference.sign() * scale)
        return result, None, None


def _differences(
    recovered: Tensor, text: Tensor, visual: Tensor
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """(a view of the same place in a tensor like `recovered`, its difference to the target), one region at a time."""
    classes, dim = text.shape
    for m in range(visual.shape[1]):

        def product(x: Tensor, m: int = m) -> Tensor:
            return x[:, m * classes : (m + 1) * classes, :dim]

        def names(x: Tensor, m: int = m) -> Tensor:
            return x[:, m * classes : (m + 1) * classes, dim:]

        yield product, product(recovered) - text * visual[:, m : m + 1]
        yield names, names(recovered) - text
