"""CLIP ViT with deep prompts and region tokens: class tokens whose world is a window (CLIP-RC section 3.2).

A region token sees its own window and itself; each patch sees, besides class token, prompts and patches, the one token
of its region. Only the live rows (class token, patches, regions) are queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.encoders.prompted import PromptContext, PromptedClipViT
from zs3fast.types import ImageFeatures


class RegionBridgeClipViT(PromptedClipViT):
    """Prompted CLIP ViT that also returns one token a region of the image.

    Args:
        config, image_size, num_prompts, double_class_embedding, dropout: as for `PromptedClipViT`; every layer has its
            own prompts.
        regions: M, a square number, or (rh, rw). Windows are floor(h / rh) x floor(w / rw) patches; patches in the
            margin left over belong to no region.
        update_regions: train the region tokens (the "updated" rows of the paper's table 6); published: frozen.
    """

    def __init__(
        self,
        config: ClipVisionConfig,
        image_size: int,
        *,
        num_prompts: int,
        regions: int | Sequence[int],
        update_regions: bool = False,
        double_class_embedding: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__(
            config,
            image_size,
            num_prompts=num_prompts,
            double_class_embedding=double_class_embedding,
            dropout=dropout,
        )
        self.regions = region_grid(regions)
        grid = image_size // config.patch_size
        self._check_grid((grid, grid))
        self.region_level_bridge = nn.Parameter(torch.empty(math.prod(self.regions), config.width))
        self.region_level_bridge.requires_grad_(update_regions)
        self.reset_added_tokens()

    @torch.no_grad()
    def reset_added_tokens(self) -> None:
        """Every region token starts as class_embedding + position[0]: one class embedding short of the class token."""
        self.region_level_bridge.copy_(self.class_embedding + self.positional_embedding[0])

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.regions[0] > grid[0] or self.regions[1] > grid[1]:
            raise ValueError(
                f"regions: {self.regions[0]} x {self.regions[1]} regions do not fit a patch grid of "
                f"{grid[0]} x {grid[1]}; expected at most one a patch"
            )

    def forward(self, images: Tensor, contexts: PromptContext | None = None) -> ImageFeatures:
        """Images [B, 3, H, W] -> unit global token [B, D], patch tokens [B, N, D] and region tokens [B, M, D].

        Args:
            contexts: `kept_context()` of these weights, outside training; None: computed here.
        """
        x, grid = self.embed(images)
        self._check_grid(grid)
        batch, live = x.shape[:2]
        tokens = torch.cat([x, self.ln_pre(self.region_level_bridge).expand(batch, -1, -1)], dim=1)
        contexts = self.prompt_context(batch) if contexts is None else contexts
        attend = partial(
            ops.region_bridge_attention,
            num_prefix=1 + self.prompt_embeddings.shape[1],
            grid=grid,
            regions=self.regions,
            skip_prompts=True,
        )
        for block, context in zip(self.transformer.resblocks, contexts):
            tokens = block(tokens, context, attend)
        # The region tokens skip prompt_norm, as in the official code.
        tokens = torch.cat([self.prompt_norm(tokens[:, :live]), tokens[:, live:]], dim=1)
        joint = self.project(tokens)
        return ImageFeatures(joint[:, 0], joint[:, 1:live], grid, region_tokens=joint[:, live:])


def region_grid(regions: int | Sequence[int]) -> tuple[int, int]:
    """(rh, rw) of a number of regions; a single number must be a square."""
    if isinstance(regions, int):
        side = math.isqrt(max(regions, 0))
        if side < 1 or side * side != regions:
            raise ValueError(f"regions: expected a square number of region tokens, or (rh, rw), got {regions}")
        return side, side
    rows, columns = regions
    if rows < 1 or columns < 1:
        raise ValueError(f"regions: expected (rh, rw) of at least 1, got {tuple(regions)}")
    return rows, columns
