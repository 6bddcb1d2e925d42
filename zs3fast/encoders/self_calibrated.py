"""SC-CLIP (arXiv 2411.15869): patches of the last block repaired, made alike and asked for what is like them.

With S_i the output of block i, X the patches before the last block, t the class token there, and f^ = f / |f|:

    X    = repaired(X)                               anomalous patches become the mean of their sound neighbours
    sim  = f^ f^^T,  f = repaired(patches of S_8)    after = g^ g^^T,  g = patches of S_3
    X    = spread(X, sim)
    y    = spread(attend(X) + c t, after) + spread(attend(R) + c r, after),  [r, R] = S_3 + S_4 + ... + S_9

    spread(Z, M) = M' Z / (rows of M' summed + 1e-6),  M' = M where M >= beta, else 0
    attend(Z)    = (softmax(e) + softmax(s k k^T)) v W_out / 2 + b_out,  k, v of ln_1(Z) and the last block,
                   e = 3 (sim - mean(sim)), left out where negative

Everything is linear in the values, so both terms of y share one spread, both attend share one product with softmax(e),
and mean(sim) = |sum of f^|^2 / N^2 is known beforehand: no N x N matrix is stored, rows go by in groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.encoders.clip_vit import Block
from zs3fast.ops import self_similarity_attention
from zs3fast.utils.precision import without_autocast

NEIGHBOURS = 30
SHARE = 0.05  # of the patches are anomalous
BETA = 0.4
SHARPNESS = 3.0
SIMILAR_BLOCK, AFTER_BLOCK, FUSED_BLOCKS = 8, 3, range(3, 10)  # of twelve
_GROUP_BYTES = 32 << 20


def stands_for(block: int, layers: int) -> int:
    """The block of `layers` that stands for `block` of twelve: round(block * layers / 12), never the last."""
    return min(round(block * layers / 12), layers - 2)


def self_calibrated(states: list[Tensor], last: Block, grid: tuple[int, int], c: float) -> Tensor:
    """SC-CLIP's patches [B, N, width] as the last block leaves them, before `ln_post`.

    Args:
        states: tokens [B, 1 + N, width] after each block but the last, the class token first.
        last: the last block.
        grid: (h, w), h * w = N of `NEIGHBOURS` + 1 at least.
        c: share of the class token that is added.
    """
    layers = len(states) + 1
    similar, after = (states[stands_for(i, layers)][:, 1:] for i in (SIMILAR_BLOCK, AFTER_BLOCK))
    fused = torch.stack([states[stands_for(i, layers)] for i in FUSED_BLOCKS]).sum(0)
    token, patches = states[-1][:, :1], states[-1][:, 1:]
    odd = anomalies(patches)
    patches = repaired(patches, odd, grid)
    unit = F.normalize(repaired(similar, odd, grid), dim=-1)
    patches = spread(patches, unit)
    parts = [last.attn.context_keys_values(last.ln_1(part)) for part in (patches, fused[:, 1:])]  # [B, N, heads, dh]
    values = parts[0][1] + parts[1][1]
    mixed = correlated(values.flatten(2), unit).view_as(values)
    for k, v in parts:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        near = self_similarity_attention(k, k, v, similarity="kk", scale=k.shape[-1] ** -0.5, grid=grid, num_prefix=0)
        mixed = mixed + near.transpose(1, 2)
    y = last.attn.out_proj(mixed.flatten(2) / 4) * 2  # two halves of each of two, and the bias of each
    return spread(y + c * (token + fused[:, :1]), F.normalize(after, dim=-1))


@torch.no_grad()
def anomalies(x: Tensor) -> Tensor:
    """Which patches [B, N] of x [B, N, width] lie apart: those whose score is above the 0.95 quantile of the image."""
    scores = outlier_scores(x)
    return scores > quantile(scores, 1 - SHARE)


def quantile(x: Tensor, q: float) -> Tensor:
    """`torch.quantile(x, q, dim=1, keepdim=True)` of x [B, N], which torch 2.11 cannot trace for any B."""
    rank = torch.full_like(x[:, :1], q) * (x.shape[1] - 1)
    below = rank.long()
    ordered = x.sort(1).values
    found = torch.lerp(ordered.gather(1, below), ordered.gather(1, rank.ceil().long()), rank - below)
    return found.masked_fill(x.isnan().any(1, keepdim=True), torch.nan)


def outlier_scores(x: Tensor) -> Tensor:
    """SC-CLIP's scores [B, N] of x [B, N, width], float32 at least: r_i * mean over the nearest k patches j of 1 / r_j.

    r is the squared distance to the farthest of the k = 30 nearest. A local outlier factor, but for taking the patch's
    own distance where that takes its neighbour's.
    """
    x = x if x.dtype == torch.float64 else x.float()
    with without_autocast(x.device):
        centred = x - x.mean(1, keepdim=True)  # distances stay, and are not lost in what all have in common
        squares = centred.square().sum(-1)
        nearest = []
        for rows in _groups(x):
            d = squares[:, rows, None] + squares[:, None] - 2 * centred[:, rows] @ centred.mT  # [B, rows, N]
            own = torch.arange(rows.start, rows.stop, device=x.device)
            d[:, own - rows.start, own] = -1.0  # rounding may not put another patch before oneself
            nearest.append(d.topk(NEIGHBOURS + 1, largest=False).indices[..., 1:])
        index = torch.cat(nearest, 1)  # [B, N, k]
        farthest = centred.gather(1, index[..., -1:].expand_as(centred))
        reach = (centred - farthest).square().sum(-1)  # by differences: exact where d rounds
        return reach * (1 / reach).gather(1, index.flatten(1)).view_as(index).mean(-1)


def repaired(x: Tensor, odd: Tensor, grid: tuple[int, int]) -> Tensor:
    """x [B, N, width], each patch in `odd` [B, N] the mean of its 8 neighbours that are not; as it was if all are."""
    sound = (~odd).to(x.dtype).view(-1, 1, *grid)
    maps = x.mT.unflatten(-1, grid)
    # An odd patch is not sound, so that a sum over all nine is one over the eight.
    total, count = (F.avg_pool2d(each, 3, 1, 1, divisor_override=1).flatten(2).mT for each in (maps * sound, sound))
    use = odd[..., None] & (count > 0)
    return torch.where(use, total / count.clamp_min(1), x)


def spread(z: Tensor, unit: Tensor) -> Tensor:
    """z [B, N, width] averaged over patches whose cosine is `BETA` at least; unit: [B, N, width], unit rows."""
    out = []
    for rows in _groups(unit):
        weights = unit[:, rows] @ unit.mT
        weights = weights.masked_fill(weights < BETA, 0.0)
        out.append(weights @ z / (weights.sum(-1, keepdim=True) + 1e-6))
    return torch.cat(out, 1)


def correlated(v: Tensor, unit: Tensor) -> Tensor:
    """softmax(e) v, [B, N, width], e = 3 (sim - mean(sim)) of the cosines sim of `unit`, negative ones left out."""
    count = unit.shape[1]
    mean = (unit.sum(1).square().sum(-1) / count**2)[:, None, None]
    out = []
    for rows in _groups(unit):
        e = SHARPNESS * (unit[:, rows] @ unit.mT - mean)
        e = e.masked_fill(e < 0, -torch.inf)
        own = torch.arange(rows.start, rows.stop, device=v.device)
        alone = torch.zeros_like(e[0], dtype=torch.bool)
        alone[own - rows.start, own] = True
        e = torch.where(alone & (e < 0), 0.0, e)  # of all the same patches rounding could leave none, not oneself
        out.append(e.softmax(-1) @ v)
    return torch.cat(out, 1)


def _groups(x: Tensor) -> list[slice]:
    """Rows [B, rows, N] of an N x N matrix for x [B, N, width] that take `_GROUP_BYTES` at most, one at least."""
    batch, count = x.shape[:2]
    if torch.compiler.is_compiling():
        batch = 8  # any: a graph whose groups depended on it would be of one number of images
    rows = max(_GROUP_BYTES // max(batch * count * x.element_size(), 1), 1)
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
