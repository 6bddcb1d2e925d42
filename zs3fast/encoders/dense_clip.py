"""A frozen CLIP ViT whose patch tokens lie in the joint space: its last block is asked another question.

CLIP trains the class token alone; the last attention gathers for it and blurs the patches. What a patch shows is in its
value: projected by the last block's value and output projections, then as CLIP projects its class token, it can be
compared with text (MaskCLIP, Zhou et al., ECCV 2022, section 3.2). Later methods let patches attend to what is like
them instead, and differ in how alike is meant.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.encoders.clip_vit import Block, ClipViT
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.encoders.self_calibrated import NEIGHBOURS, self_calibrated, stands_for
from zs3fast.ops import self_similarity_attention
from zs3fast.ops.self_similarity_attention import distance_prior
from zs3fast.types import ImageFeatures
from zs3fast.utils.options import one_of

# Each attention, and whether its method keeps the last block's residual connections and MLP.
ATTENTIONS = {
    "value": False,
    "sclip": True,
    "sclip_reduced": False,
    "clearclip": False,
    "naclip": False,
    "kk": False,
    "nonly": False,
    "rcs": False,
    "scclip": False,
    "vanilla": True,
    "self-self": False,  # the first name of sclip_reduced
}
_ASK_QUERIES = ("sclip", "sclip_reduced", "self-self", "clearclip", "nonly", "vanilla")  # of all tokens
RCS_BLOCKS = range(5, 9)  # of twelve


class DenseClipViT(ClipViT):
    """CLIP ViT that embeds every patch as CLIP embeds an image; nothing in it trains.

    In the last block, with queries, keys and values q, k, v of all tokens, s = head_width^-1/2, and omega the
    neighbourhood of patches at distance d, exp(-d^2 / (2 std^2)), and 0 from and to the class token:

        value          a = v                                                          MaskCLIP
        sclip          a = (softmax(s q q^T) + softmax(s k k^T)) v                    SCLIP, with residual and MLP
        sclip_reduced  the same without them; "self-self" is an older name for it
        clearclip      a = softmax(s q q^T) v                                         ClearCLIP
        naclip         a = softmax(s k k^T + omega) v                                 NACLIP
        kk             a = softmax(s k k^T) v
        nonly          a = softmax(omega * s * mean_heads(mean |q| mean |k|)) v       NACLIP's prior alone
        rcs            a = tau [(1 - lam) softmax(s k k^T + omega) + lam mean_l softmax(s q_l k_l^T)] v     ResCLIP's
                       cross-correlation; l: blocks 5, 6, 7 and 8 of twelve, counted from 0
        scclip         see `self_calibrated`                                          SC-CLIP
        vanilla        a = softmax(s q k^T) v                                         CLIP itself, residual and MLP kept

        y = a W_out + b_out;   with residual: y = x + y, y = y + mlp(ln_2(y));   patch = unit(ln_post(y) W_proj)

    Pixels right of and below the last whole patch are left out. The position table keeps CLIP's own grid; other grids
    sample it bicubically at (i + 0.5) g / (h + 0.1) - 0.5, as the methods' own code does.

    Block numbers hold for twelve blocks, the only depth the methods were published for; at L blocks, block i stands for
    round(i L / 12), which is ours.

    Args:
        config: sizes of the tower.
        attention: one of the above.
        residual: keep the last block's residual connections and MLP. None: as the method does.
        std: of omega, in patches.
        tau, lam: of rcs.
        c: the share of the class token that scclip adds.
    """

    position_resize = ("bicubic", False, 0.1)

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        attention: str = "value",
        residual: bool | None = None,
        std: float = 5.0,
        tau: float = 2.0,
        lam: float = 0.3,
        c: float = 0.3,
    ):
        super().__init__(config, config.grid * config.patch_size, double_class_embedding=False)
        one_of("attention", attention, tuple(ATTENTIONS))
        for name, value, fits, expected in (
            ("std", std, std > 0, "a positive number of patches"),
            ("tau", tau, tau > 0, "a positive number"),
            ("lam", lam, 0 <= lam <= 1, "a share in 0..1"),
            ("c", c, True, "a finite number"),
        ):
            if not fits or not math.isfinite(value):
                raise ValueError(f"{name}: expected {expected}, got {value}")
        if residual and attention == "scclip":
            raise ValueError(f"residual: expected None or False, as SC-CLIP has none in the last block, got {residual}")
        if attention in ("rcs", "scclip") and config.layers < 2:
            raise ValueError(f"attention: expected a tower of at least 2 blocks for {attention}, got {config.layers}")
        self.attention = attention
        self.residual = ATTENTIONS[attention] if residual is None else residual
        self.std, self.tau, self.lam, self.c = std, tau, lam, c
        self.requires_grad_(False)

    @property
    def least_patches(self) -> int:
        """How many patches an image must have."""
        return NEIGHBOURS + 1 if self.attention == "scclip" else 1

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The grid (h, w) of whole patches of a batch [B, 3, H, W], or an error that names `images`."""
        patch = self.config.patch_size
        whole = images
        if images.dim() == 4 and min(images.shape[-2:]) >= patch:
            whole = images[..., : images.shape[-2] // patch * patch, : images.shape[-1] // patch * patch]
        h, w = super().check_images(whole)
        if h * w < self.least_patches:
            raise ValueError(
                f"images: SC-CLIP compares a patch with {NEIGHBOURS} others, expected {NEIGHBOURS + 1} patches or "
                f"more, got {h} x {w} of {patch} pixels"
            )
        return h, w

    def forward(self, images: Tensor) -> ImageFeatures:
        """Images [B, 3, H, W] -> CLIP's own image embedding and the patches', all unit vectors [.., D]."""
        tokens, grid = self.embed(images)
        *blocks, last = self.transformer.resblocks
        wanted = RCS_BLOCKS if self.attention == "rcs" else range(0)
        places = [stands_for(i, len(blocks) + 1) for i in wanted]
        entering: dict[int, Tensor] = {}  # tokens before the blocks that RCS asks
        states: list[Tensor] = []  # tokens after every block, for SC-CLIP
        for number, block in enumerate(blocks):
            if number in places:
                entering[number] = tokens
            tokens = block(tokens)
            if self.attention == "scclip":
                states.append(tokens)
        normed = last.ln_1(tokens)
        k, v = (part.transpose(1, 2) for part in last.attn.context_keys_values(normed))  # [B, heads, 1 + N, dh]
        q = last.attn.queries(normed if self.attention in _ASK_QUERIES else normed[:, :1])
        token = tokens[:, :1] + _attended(last, F.scaled_dot_product_attention(q[:, :, :1], k, v))
        token = token + last.mlp(last.ln_2(token))
        if self.attention == "scclip":
            patches = self_calibrated(states, last, grid, self.c)
        else:
            patches = _attended(last, self._mixed(q, k, v, grid, [_asking(blocks[i], entering[i]) for i in places]))
            if self.residual:
                patches = tokens[:, 1:] + patches
                patches = patches + last.mlp(last.ln_2(patches))
        return ImageFeatures(self.project(token)[:, 0], self.project(patches), grid)

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """a [B, heads, N, dh] of the patches, from q, k, v [B, heads, 1 + N, dh] and q_l, k_l of earlier blocks."""
        attention = self.attention
        if attention == "value":
            return v[:, :, 1:]
        if attention == "nonly":
            return self._neighbourhood_alone(q, k, v, grid)
        attend = partial(self_similarity_attention, scale=v.shape[-1] ** -0.5, grid=grid)
        if attention == "vanilla":
            return attend(q, k, v, similarity="qk")
        if attention == "clearclip":
            return attend(q, k, v, similarity="qq")
        if attention in ("sclip", "sclip_reduced", "self-self"):
            return attend(q, k, v, similarity="qq+kk")
        if attention == "kk":
            return attend(k, k, v, similarity="kk")
        alike = attend(k, k, v, similarity="kk", std=self.std)
        if attention == "naclip":
            return alike
        cross = sum(attend(q_l, k_l, v, similarity="qk") for q_l, k_l in earlier) / len(earlier)
        return self.tau * ((1 - self.lam) * alike + self.lam * cross)

    def _neighbourhood_alone(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        size = (q.norm(dim=-1).mean(2) * k.norm(dim=-1).mean(2)).mean(1) * q.shape[-1] ** -0.5  # [B]
        near = omega(grid, self.std, q)  # [N, 1 + N]
        return torch.stack([(near * one).softmax(-1) @ values for one, values in zip(size, v, strict=True)])


def omega(grid: tuple[int, int], std: float, like: Tensor) -> Tensor:
    """NACLIP's neighbourhood [N, 1 + N] of patches and all tokens: exp(-d^2 / (2 std^2)), 0 for the class token."""
    return distance_prior(grid, std, device=like.device)[1:].to(like.dtype)


def _asking(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, heads, T, dh] of a block for the tokens that enter it."""
    normed = block.ln_1(tokens)
    k, _ = block.attn.context_keys_values(normed)
    return block.attn.queries(normed), k.transpose(1, 2)


def _attended(block: Block, heads: Tensor) -> Tensor:
    """The output projection of what was attended to, [B, heads, T, dh] -> [B, T, width]."""
    out: Tensor = block.attn.out_proj(heads.transpose(1, 2).flatten(2))
    return out
