"""CLIP's vision transformer, in the parts that zero-shot segmentation methods recombine.

A block tells apart the tokens that live on (`x`: they attend, are attended to and are updated) from the tokens that
are only looked at (`context`: keys and values, no output). Deep prompts are the second kind: their outputs are thrown
away, so their queries, output projection and MLP are never computed. Parameter names are CLIP's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.ops.add_layer_norm import runs_kernel as adds_and_norms
from zs3fast.ops.fused_linear import QUICK_GELU_SLOPE, linear, runs_kernel
from zs3fast.ops.fused_linear import quick_gelu as quick_gelu
from zs3fast.utils.weight_cache import WeightCache

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.encoder_attention` of q [B, heads, T, dh] and k, v [B, heads, S, dh] -> [B, heads, T, dh]."""
    return ops.encoder_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with packed query, key and value projections (CLIP's layout)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def context_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B or 1, K, heads, dh] of tokens that are only looked at."""
        kv = self.in_proj(context, slice(context.shape[-1], None))
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return k, v

    def queries(self, x: Tensor) -> Tensor:
        """Queries [B, heads, T, dh] of tokens [B, T, width], where nobody asks for their keys and values."""
        q = self.in_proj(x, slice(0, x.shape[-1]))
        out: Tensor = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out

    def in_proj(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """The packed projection, or the part in these rows of its weight: queries, or keys and values."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        return ops.fused_linear(x, weight, bias) if rows is None else ops.fused_linear(x, weight[rows], bias[rows])

    def forward(
        self,
        x: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
        attend: Attend | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], plus `residual`; `context` puts keys and values before those of `x`.

        `attend` takes q, k, v [B, heads, tokens, dh] in the place of plain softmax attention.
        """
        if context is not None and self._joins_in_place(x, context):
            (q, k, v), context = self._joined(x, context), None
        else:
            q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if attend is None:
            return linear(self.out_proj, ops.encoder_attention(q, k, v, context).flatten(2), residual=residual)
        if context is not None:
            k, v = (torch.cat([new.expand(x.shape[0], -1, -1, -1), own], 1) for new, own in zip(context, (k, v)))
            if torch.is_grad_enabled():
                q = q.contiguous()  # a view would keep all of qkv for the backward pass
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return linear(self.out_proj, out.transpose(1, 2).flatten(2), residual=residual)

    def _joins_in_place(self, x: Tensor, context: tuple[Tensor, Tensor]) -> bool:
        """Whether `_joined` may do it: for one image on a GPU; rows of more, contexts in between, are no matrix."""
        if x.device.type != "cuda" or len(x) != 1 or len(context[0]) != 1 or torch.compiler.is_compiling():
            return False
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return False
        return type(weight) is nn.Parameter and x.dtype == weight.dtype == bias.dtype == context[0].dtype

    def _joined(self, x: Tensor, context: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Queries [1, T, heads, dh] of x, keys and values [1, K + T, heads, dh] of the context and of x; no gradients.

        The projection is written behind the context's rows: joined afterwards, all keys and values are moved again.
        """
        K, width = context[0].shape[1], x.shape[-1]
        packed = x.new_empty(1, K + x.shape[1], 3 * width)
        torch.addmm(self.in_proj_bias, x[0], self.in_proj_weight.t(), out=packed[0, K:])
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).unbind(2)
        for rows, first in zip((k, v), context, strict=True):
            rows[:, :K] = first
        return q[:, K:], k, v


class Mlp(nn.Module):
    """Linear, (Quick)GELU, Linear."""

    def __init__(self, width: int, hidden: int, quick: bool):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.quick = quick
        self._scaled_bias = WeightCache()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., width] -> [..., width], plus `residual`."""
        steps = torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_kernel(x, self.c_fc.weight)
        if steps or not self.quick:
            hidden = linear(self.c_fc, x, "quick_gelu" if self.quick else "gelu")
            return linear(self.c_proj, hidden, residual=residual)
        # x * sigmoid(a x) = silu(a x) / a: the factors ride on the matrix products, the activation is one pass. The
        # bias comes scaled: cuBLASLt adds it within the product where its factor is 1.
        a, fc, proj = QUICK_GELU_SLOPE, self.c_fc, self.c_proj
        bias = self._scaled_bias.get([fc.bias], lambda: a * fc.bias)
        hidden = torch.addmm(bias, x.reshape(-1, x.shape[-1]), fc.weight.t(), alpha=a)
        hidden = F.silu(hidden, inplace=True)
        out = torch.addmm(proj.bias, hidden, proj.weight.t(), alpha=1 / a).view(x.shape)
        return out if residual is None else residual + out


class Block(nn.Module):
    """Pre-norm residual attention block: x + MHA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width, config.quick_gelu)

    def context(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """This block's keys and values of tokens [B or 1, K, width] that are only looked at."""
        return self.attn.context_keys_values(self.ln_1(tokens))

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor] | None = None, attend: Attend | None = None) -> Tensor:
        if adds_and_norms(x, self.ln_2):
            after, norm = self.attn(self.ln_1(x), context, attend), self.ln_2
            x, normed = ops.add_layer_norm(after, x, norm.weight, norm.bias, norm.eps)
        else:
            x = self.attn(self.ln_1(x), context, attend, residual=x)
            normed = self.ln_2(x)
        out: Tensor = self.mlp(normed, residual=x)
        return out


class Transformer(nn.Module):
    """The stack of blocks; exists for CLIP's parameter names."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.resblocks = cast(Sequence[Block], blocks)  # as a list it knows the type of its items


class ClipViT(nn.Module):
    """Stem, blocks and output projection of a CLIP ViT on a position table made for `image_size`.

    Args:
        config: sizes of the tower.
        image_size: side in pixels of the square image the position table is stored for; other sizes resize it.
        double_class_embedding: start the class token as 2 * class_embedding + position[0], as ZegCLIP and its
            descendants do: the embedding is used as the token and added again with its position. Plain CLIP: False.
    """

    # Mode, align_corners and scale offset for grids other than the stored one, see `resize_positions`.
    position_resize: tuple[str, bool, float] = ("bilinear", False, 0.0)

    def __init__(self, config: ClipVisionConfig, image_size: int, *, double_class_embedding: bool = True):
        super().__init__()
        if image_size < config.patch_size or image_size % config.patch_size:
            raise ValueError(f"image_size: expected a multiple of the patch size {config.patch_size}, got {image_size}")
        self.config = config
        self.double_class_embedding = double_class_embedding
        grid, scale = image_size // config.patch_size, config.width**-0.5
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid * grid + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Parameter(scale * torch.randn(config.width, config.embed_dim))

    @property
    def embed_dim(self) -> int:
        """D, the joint width of text and image."""
        return self.config.embed_dim

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (h, w) of a batch [B, 3, H, W], or an error that names `images`."""
        patch = self.config.patch_size
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected normalised floating-point pixels, got {images.dtype}")
        if images.device != self.proj.device:
            raise ValueError(f"images: expected the model's device {self.proj.device}, got {images.device}")
        height, width = images.shape[-2:]
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"images: expected H and W to be multiples of the patch size {patch}, got {height} x {width}"
            )
        return height // patch, width // patch

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, 3, H, W] -> tokens [B, 1 + N, width] after `ln_pre`, and the grid (h, w)."""
        grid = self.check_images(images)
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N, width]
        position = resize_positions(self.positional_embedding, grid, *self.position_resize)
        token = self.class_embedding * (2 if self.double_class_embedding else 1) + position[0]
        tokens = torch.cat([token.expand(images.shape[0], 1, -1), patches + position[1:]], dim=1)
        return self.ln_pre(tokens), grid

    def reset_added_tokens(self) -> None:
        """Set tokens that CLIP does not have from its weights; called after those are loaded."""

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens of the last block -> unit vectors [B, T, D]."""
        joint = self.ln_post(tokens) @ self.proj
        out: Tensor = joint / joint.norm(dim=-1, keepdim=True)  # no epsilon, as CLIP
        return out


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    mode: str = "bilinear",
    align_corners: bool = False,
    scale_offset: float = 0.0,
) -> Tensor:
    """Position table [1 + g*g, width] -> [1 + h*w, width]: row 0 kept, the rest resized to another grid.

    Args:
        scale_offset: resize by the scales (h + scale_offset) / g and (w + scale_offset) / g and not by sizes: samples
            lie at (i + 0.5) g / (h + scale_offset) - 0.5. DINO's code has 0.1, which training-free methods took over.
    """
    side = math.isqrt(table.shape[0] - 1)
    free = not all(isinstance(length, int) for length in grid)  # a graph for any size is exported: no case apart
    if not free and grid == (side, side):
        return table
    if mode == "bicubic" and torch.compiler.is_exporting():  # other runtimes' own bicubic steps are off by a percent
        lengths = [torch.full((), length, dtype=torch.float64) for length in grid]
        own = (lengths[0] == side) & (lengths[1] == side)  # not known before the graph runs, where it is for any size
        offset = torch.where(own, 0.0, scale_offset)  # without it the samples are the table's own rows
        down, along = (
            _bicubic_rows(length, side, wide, offset, align_corners).to(table)
            for length, wide in zip(grid, lengths, strict=True)
        )
        rows = down @ table[1:].reshape(side, -1)  # [h, g * width]
        return torch.cat([table[:1], (along @ rows.unflatten(1, (side, -1))).flatten(0, 1)])
    square = table[1:].unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)  # [1, width, g, g]
    if scale_offset:
        scales = tuple((length + scale_offset) / side for length in grid)
        resized = F.interpolate(
            square, scale_factor=scales, mode=mode, align_corners=align_corners, recompute_scale_factor=False
        )
    else:
        resized = F.interpolate(square, size=grid, mode=mode, align_corners=align_corners)
    return torch.cat([table[:1], resized.squeeze(0).flatten(1).t()])


def _bicubic_rows(length: int, side: int, wide: Tensor, offset: Tensor, align_corners: bool) -> Tensor:
    """Weights [length, side] of `F.interpolate`'s bicubic samples (a = -0.75), in steps that any runtime has.

    `length` may be symbolic, `wide` is the same as a tensor.
    """
    a, i = -0.75, torch.arange(length, dtype=torch.float64)
    x = i * (side - 1) / (wide - 1).clamp(min=1) if align_corners else (i + 0.5) * side / (wide + offset) - 0.5
    taps = x.floor()[:, None] + torch.arange(-1, 3)
    d = (x[:, None] - taps).abs()
    weights = torch.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a)
    return (weights[:, :, None] * (taps.clamp(0, side - 1)[:, :, None] == torch.arange(side))).sum(1)
