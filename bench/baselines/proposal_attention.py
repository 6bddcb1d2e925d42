"""Attention under proposal masks as it is run without `proposal_attention`: joint over all tokens, or with a bias.

Written from the method's description. `keep` [B, Nq, N] says which patches a proposal keeps; tokens are [proposals |
patches]. Masks and biases are made once and handed over: what is timed uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joint_mask(keep: Tensor) -> Tensor:
    """What each token sees, bool [B, T, T]: identity | keep over nothing | everything."""
    B, Nq, N = keep.shape
    itself = torch.eye(Nq, dtype=torch.bool, device=keep.device).expand(B, -1, -1)
    patches = keep.new_ones(N, Nq + N)
    patches[:, :Nq] = False
    return torch.cat([torch.cat([itself, keep], dim=2), patches.expand(B, -1, -1)], dim=1)


def broadcast_bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, Nq, T] for the proposal rows, 0 or -inf, the same for all heads."""
    seen = joint_mask(keep)[:, : keep.shape[1]].unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=keep.device).masked_fill_(~seen, float("-inf"))


def joint_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The official layer, q, k, v [B, heads, T, dh]: mask [B * heads, T, T] made additive, all T x T scores stored."""
    heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * heads, T, dh]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    scores = torch.bmm(q / q.shape[-1] ** 0.5, k.transpose(1, 2))
    scores += bias
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, heads)
