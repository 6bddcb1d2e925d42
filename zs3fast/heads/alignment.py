"""Region alignment: what region and global tokens add to queries and patches (CLIP-RC section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.types import ImageFeatures

PARTS = ("region", "global", "patch")  # the official order of the concatenation


class FeatureAlignment(nn.Module):
    """Linear(concat(region tokens upsampled to the patches, global token, patch tokens)), never concatenated.

    A linear map commutes with bilinear upsampling and with copying, so the region part is projected at M tokens and
    the global part at one: of the three N x D x D products only the patches' own is left.

    Args:
        dim: D.
        parts: what joins the patches, in any of the combinations of the paper's table 7: "region", "global".
    Shapes: region_tokens [B, M, D], global_token [B, D], patch_tokens [B, N, D] -> [B, N, D].
    """

    def __init__(self, dim: int, parts: tuple[str, ...] = ("region", "global")):
        super().__init__()
        self.parts = tuple(part for part in PARTS if part in (*parts, "patch"))
        self.lateral_proj = nn.Linear(dim * len(self.parts), dim)

    def forward(self, features: ImageFeatures, regions: tuple[int, int]) -> Tensor:
        dim = features.global_token.shape[-1]
        weights = dict(zip(self.parts, self.lateral_proj.weight.split(dim, dim=1)))
        aligned = ops.fused_linear(features.patch_tokens, weights["patch"])
        if "global" in weights:
            aligned = aligned + ops.fused_linear(
                features.global_token, weights["global"], self.lateral_proj.bias
            ).unsqueeze(1)
        else:
            aligned = aligned + self.lateral_proj.bias
        if "region" in weights:
            assert features.region_tokens is not None
            projected = ops.fused_linear(features.region_tokens, weights["region"])  # [B, M, D]
            aligned = aligned + upsample_tokens(projected, regions, features.grid_size)
        return aligned


def upsample_tokens(tokens: Tensor, regions: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Tokens [B, M, D] on a grid of regions -> [B, N, D] on the patch grid, bilinearly."""
    square = tokens.transpose(1, 2).unflatten(-1, regions)  # [B, D, rh, rw]
    return F.interpolate(square, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def region_visuals(features: ImageFeatures) -> Tensor:
    """What meets the text in the descriptor: region plus global token [B, M, D], not renormalised."""
    assert features.region_tokens is not None
    return features.region_tokens + features.global_token.unsqueeze(1)
