"""ResNet as DeepLab builds it: three small convolutions in front, a multi-grid of dilations at the end.

Every convolution carries its frozen batch normalisation folded into weight and bias (see `fold_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
STAGES = ("res2", "res3", "res4", "res5")


class DeepLabResNet(nn.Module):
    """Images [B, 3, H, W] -> features of res2, res3, res4, res5 at strides 4, 8, 16 and 32.

    res5 keeps res4's stride where `res5_dilation` > 1. Block j of res5 is dilated by res5_dilation * multi_grid[j].

    Args:
        stem: channels of the stem's three convolutions (published: 64, 64, 128).
        depths: blocks of each stage (ResNet-101: 3, 4, 23, 3).
        widths: inner channels of each stage (64, 128, 256, 512).  channels: outer ones (256, 512, 1024, 2048).
        multi_grid: one factor a block of res5.
        res5_dilation: 1 (the published backbone of mask generators), 2 or 4.
    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 3.2.1.
    """

    def __init__(
        self,
        *,
        stem: Sequence[int] = (64, 64, 128),
        depths: Sequence[int] = (3, 4, 23, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        multi_grid: Sequence[int] = (1, 2, 4),
        res5_dilation: int = 1,
    ):
        super().__init__()
        if len(multi_grid) != depths[3]:
            raise ValueError(f"multi_grid: expected one factor for each of {depths[3]} blocks, got {list(multi_grid)}")
        self.channels = tuple(channels)
        self.stem = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(3, stem[0], 3, stride=2, padding=1),
                "conv2": nn.Conv2d(stem[0], stem[1], 3, padding=1),
                "conv3": nn.Conv2d(stem[1], stem[2], 3, padding=1),
            }
        )
        before = stem[2]
        for name, depth, width, after in zip(STAGES, depths, widths, channels):
            last = name == "res5"
            stride = 1 if name == "res2" or (last and res5_dilation > 1) else 2
            dilations = [res5_dilation * factor for factor in multi_grid] if last else [1] * depth
            blocks = nn.ModuleList()
            for index, dilation in enumerate(dilations):
                blocks.append(Bottleneck(before, width, after, stride if index == 0 else 1, dilation))
                before = after
            setattr(self, name, blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images
        for conv in self.stem.values():
            x = F.relu_(conv(x))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for name in STAGES:
            for block in getattr(self, name):
                x = block(x)
            features.append(x)
        return features


class Bottleneck(nn.Module):
    """x -> relu(shortcut(x) + conv3(relu(conv2(relu(conv1(x)))))), 1x1, 3x3 (stride and dilation here), 1x1."""

    def __init__(self, before: int, width: int, after: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation)
        self.conv3 = nn.Conv2d(width, after, 1)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        return F.relu_(out + residual)


def fold_norm(
    weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float = NORM_EPS
) -> tuple[Tensor, Tensor]:
    """A convolution without bias and its frozen batch normalisation as one convolution: (weight, bias).

    norm(W * x) = (g W) * x + (shift - g mean),  g = scale / sqrt(variance + eps); computed in float64.

    Args:
        weight: [out, in, k, k].  scale, shift, mean, variance: [out].
    """
    gain = scale.double() / (variance.double() + eps).sqrt()
    folded = weight.double() * gain.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), (shift.double() - gain * mean.double()).to(weight.dtype)
