"""What the official ZegCLIP, TagCLIP and CLIP-RC share, with all the cost of their structure.

Written from the methods' description, not from their code. Every operation they run is run here, and nothing is skipped
because its result goes unused: prompt tokens are queries in every layer, attention probabilities are stored, the
decoder keeps every head's scores and the maps of every layer, the last decoder layer computes values, output projection
and FFN that nothing reads, and the pixel stage holds several [B, C, H, W] tensors. Parameter names are those of the
official checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredAttention(nn.Module):
    """Multi-head self-attention as PyTorch 1.10 ran it: scaled q, bmm, softmax, dropout, bmm; probabilities stored."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        length, batch, width = x.shape  # sequence first, as the official encoder and decoder call it
        head_width = width // self.heads
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (
            t.contiguous().view(length, batch * self.heads, head_width).transpose(0, 1) for t in (q, k, v)
        )  # [B * heads, E, dh]
        scores = torch.bmm(q / head_width**0.5, k.transpose(-2, -1))
        if mask is not None:
            scores += mask  # [E, E], added to every head of every image
        probabilities = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        out = torch.bmm(probabilities, v).transpose(0, 1).contiguous().view(length, batch, width)
        return self.out_proj(out)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """Pre-norm transformer block of CLIP's image tower."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = StoredAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))


class PromptedVisionTransformer(nn.Module):
    """CLIP's image tower with fresh prompt tokens in every layer; images [B, 3, H, W] -> ([B, D], [B, D, h, w])."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        num_prompts: int,
        dropout: float,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.num_prompts = num_prompts
        self.grid = image_size // patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        bound = (6 / (3 * patch_size**2 + width)) ** 0.5
        self.prompt_embeddings = nn.Parameter(torch.empty(1, num_prompts, width).uniform_(-bound, bound))
        self.deep_prompt_embeddings = nn.Parameter(torch.empty(layers - 1, num_prompts, width).uniform_(-bound, bound))
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)
        self.prompt_dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prompt" in name)

    def prompts(self, embeddings: Tensor, batch: int) -> Tensor:
        return self.prompt_dropout(self.prompt_proj(embeddings).expand(batch, -1, -1))

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class token and patches [B, 1 + N, width] before ln_pre, and the patch grid (h, w)."""
        x = self.conv1(images)  # [B, width, h, w]
        batch, width, h, w = x.shape
        x = x.reshape(batch, width, h * w).permute(0, 2, 1)
        cls = self.class_embedding + torch.zeros(batch, 1, width, dtype=x.dtype, device=x.device)
        x = torch.cat([cls, x], dim=1)

        cls_position = self.positional_embedding[0] + self.class_embedding  # the class embedding enters twice
        table = self.positional_embedding[1:].reshape(1, self.grid, self.grid, width).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(h, w), mode="bilinear")  # on every call
        table = table.reshape(1, width, h * w).permute(0, 2, 1)
        return x + torch.cat([cls_position.reshape(1, 1, width), table], dim=1), (h, w)

    def insert_prompts(self, x: Tensor) -> Tensor:
        """Layer 0's prompts behind the class token; [B, E - K, width] -> [E, B, width]."""
        prompts = self.prompts(self.prompt_embeddings, x.shape[0])
        return torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1).permute(1, 0, 2)

    def replace_prompts(self, x: Tensor, layer: int) -> Tensor:
        """What the layer before made of its prompts is thrown away; [E, B, width] in and out."""
        prompts = self.prompts(self.deep_prompt_embeddings[layer - 1], x.shape[1]).permute(1, 0, 2)
        return torch.cat([x[:1], prompts, x[1 + self.num_prompts :]], dim=0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, (h, w) = self.embed(images)
        x = self.insert_prompts(self.ln_pre(x))
        for i, block in enumerate(self.transformer.resblocks):
            if i > 0:
                x = self.replace_prompts(x, i)
            x = block(x)
        x = self.ln_post(self.prompt_norm(x.permute(1, 0, 2))) @ self.proj  # prompt tokens included
        return unit(x[:, 0]), token_map(x[:, -h * w :], h, w)


def unit(x: Tensor) -> Tensor:
    """x / |x| over dimension 1."""
    return x / x.norm(dim=1, keepdim=True)


def token_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens [B, h * w, D] -> unit vectors [B, D, h, w]."""
    return unit(tokens.reshape(tokens.shape[0], h, w, -1).permute(0, 3, 1, 2))


class CrossAttention(nn.Module):
    """Attention of class queries over patches that also returns the head-averaged scores before the softmax."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.attn_drop = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return x.reshape(batch, length, self.heads, width // self.heads).permute(0, 2, 1, 3)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(queries)), self.split(self.k(memory)), self.split(self.v(memory))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, heads, C, N]
        kept = scores.clone()
        attended = (self.attn_drop(scores.softmax(dim=-1)) @ v).transpose(1, 2).reshape(queries.shape)
        return self.proj(attended), kept.sum(dim=1) / self.heads


class DecoderLayer(nn.Module):
    """Post-norm layer: optional self-attention over the classes, cross-attention, FFN. Returns (queries, map)."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float, *, self_attention: str):
        super().__init__()
        assert self_attention in ("run", "weights only", "absent")
        self.runs_self_attention = self_attention == "run"
        if self_attention != "absent":
            self.self_attn = StoredAttention(width, heads, dropout)
        self.multihead_attn = CrossAttention(width, heads, dropout)
        self.linear1 = nn.Linear(width, ffn_width)
        self.linear2 = nn.Linear(ffn_width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if self.runs_self_attention:
            attended = self.self_attn(queries.transpose(0, 1)).transpose(0, 1)
            queries = self.norm1(queries + self.dropout(attended))
        attended, layer_map = self.multihead_attn(queries, memory)
        queries = self.norm2(queries + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout(self.linear2(hidden))), layer_map


class Decoder(nn.Module):
    """Layers in a row. Maps and queries of all layers are kept, resized, and all but the last map dropped."""

    def __init__(self, layers: Sequence[DecoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, queries: Tensor, patch_map: Tensor) -> Tensor:
        batch, width, h, w = patch_map.shape
        memory = patch_map.flatten(2).transpose(1, 2)
        all_queries, all_maps = [], []
        for layer in self.layers:
            queries, layer_map = layer(queries, memory)
            all_queries.append(queries)
            all_maps.append(layer_map.reshape(batch, -1, h, w))
        torch.stack(all_queries, dim=0)  # read by nobody
        maps = [F.interpolate(m, size=(h, w), mode="bilinear", align_corners=False) for m in all_maps]
        return torch.stack(maps, dim=0)[-1]


def descriptor_input(text: Tensor, visual: Tensor) -> Tensor:
    """Text * image beside text, both stored: visual [B, D] -> [B, C, 2D], [B, M, D] -> [B, M, C, 2D]."""
    text = text.expand(*visual.shape[:-1], -1, -1)
    return torch.cat([torch.einsum("...d,...cd->...cd", visual, text), text], dim=-1)


def offset_seen(scores: Tensor, seen: Sequence[int], offset: float) -> Tensor:
    """Subtract the offset from the seen channels by gathering and scattering them."""
    index = torch.as_tensor(seen, device=scores.device)
    scores[:, index] = scores[:, index] - offset
    return scores


def labels_from_crop(scores: Tensor, crop_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Scores of one window -> labels, through the general sliding-window code: accumulate, divide, resize, softmax."""
    batch, classes = scores.shape[:2]
    height, width = crop_size
    scores = F.interpolate(scores, size=crop_size, mode="bilinear", align_corners=False)
    total = scores.new_zeros(batch, classes, height, width)
    count = scores.new_zeros(batch, 1, height, width)
    total += F.pad(scores, (0, 0, 0, 0))  # a copy
    count += 1
    scores = F.interpolate(total / count, size=size, mode="bilinear", align_corners=False)
    return scores.softmax(dim=1).argmax(dim=1)


def focal_loss(logits: Tensor, target: Tensor, num_masks: float, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, pixel mean, summed over channels and images. All tensors [B, C, H, W]."""
    logits = logits.flatten(2).clone()
    target = target.flatten(2)
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    loss = (alpha * target + (1 - alpha) * (1 - target)) * cross_entropy * (1 - p_t) ** gamma
    return loss.mean(dim=2).sum() / num_masks


def dice_loss(logits: Tensor, target: Tensor, num_masks: float) -> Tensor:
    """Dice of [M, H * W] mask logits against their binary targets."""
    p = logits.sigmoid()
    numerator = 2 * (p * target).sum(dim=1)
    denominator = p.sum(dim=1) + target.sum(dim=1)
    return (1 - (numerator + 1) / (denominator + 1)).sum() / num_masks


def mask_losses(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor, float]:
    """Unweighted focal and dice of full-size [B, C, H, W] logits and [B, H, W] labels, and the normaliser."""
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    present = [image.unique() for image in labels]
    present = [classes[classes != ignore_index] for classes in present]
    num_masks = float(max(1, sum(len(classes) for classes in present)))
    one_hot = torch.zeros_like(logits)
    masks = []
    for image, classes in enumerate(present):
        for c in classes.tolist():
            target = (labels[image] == c).to(logits.dtype)
            one_hot[image, c] = target
            masks.append((logits[image, c], target))
    focal = focal_loss(logits, one_hot, num_masks)
    if not masks:
        return focal, logits.sum() * 0, num_masks
    dice = dice_loss(
        torch.stack([m for m, _ in masks]).flatten(1), torch.stack([t for _, t in masks]).flatten(1), num_masks
    )
    return focal, dice, num_masks


def pixel_accuracy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Percent of valid pixels whose largest logit is the label's. Logged at each step, not optimised."""
    logits = logits.detach()
    _, prediction = logits.topk(1, dim=1)
    correct = prediction.squeeze(1).eq(labels)
    valid = labels != ignore_index
    return 100 * correct[valid].sum() / valid.sum().clamp_min(1)


def inductive_labels(labels: Tensor, seen: Sequence[int], ignore_index: int = 255) -> Tensor:
    """Dataset indices -> 0..S-1 for seen classes, ignore for everything else."""
    table = torch.full((256,), ignore_index, dtype=torch.int64, device=labels.device)
    table[torch.as_tensor(seen, device=labels.device)] = torch.arange(len(seen), device=labels.device)
    return table[labels.long()]
