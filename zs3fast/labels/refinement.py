"""Pixel-adaptive refinement of maps (PAMR, Araslanov and Roth, CVPR 2020): near pixels of like colour share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS_TO_A_NEIGHBOUR = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
_CHUNK_BYTES = 32 << 20


class Pamr:
    """Maps [Q, H, W] -> the same after some steps of a weighted mean over neighbours, each map on its own.

        a_k  = mean over channels of -|x - x(k)| / (1e-8 + 0.1 std)     std over the 9 samples of every dilation
        w    = softmax_k(a)                                             k: 8 neighbours at every dilation
        z   <- sum_k w_k z(k)                                           `steps` times; the pixel itself is left out

    Pixels beyond the edges repeat those at the edge.

    Args:
        image: [channels, H, W], normalised, at the size of the maps.
        steps: how often.
        dilations: distances of the neighbours, in pixels.
    """

    def __init__(self, image: Tensor, steps: int = 10, dilations: Sequence[int] = (8, 16)):
        self.steps, self.dilations = steps, tuple(dilations)
        near = torch.stack(list(_neighbours(image, self.dilations)))  # [K, channels, H, W]
        samples = torch.cat([near, image.expand(len(self.dilations), *image.shape)])
        unlike = (image - near).abs() / (1e-8 + 0.1 * samples.std(0))
        self.weights = (-unlike.mean(1)).softmax(0)  # [K, H, W]

    def __call__(self, maps: Tensor) -> Tensor:
        chunk = max(_CHUNK_BYTES // (maps[0].numel() * maps.element_size()), 1) if len(maps) else 1
        return torch.cat([self._refined(part) for part in maps.split(chunk)])

    def _refined(self, maps: Tensor) -> Tensor:
        for _ in range(self.steps):
            new = torch.zeros_like(maps)
            for weight, near in zip(self.weights, _neighbours(maps, self.dilations), strict=True):
                new.addcmul_(near, weight.to(maps.dtype))
            maps = new
        return maps


def _neighbours(x: Tensor, dilations: Sequence[int]):
    """x [C, H, W] moved to each neighbour, dilation by dilation."""
    height, width = x.shape[-2:]
    for d in dilations:
        padded = F.pad(x[None], (d, d, d, d), mode="replicate")[0]
        for y, x_step in _STEPS_TO_A_NEIGHBOUR:
            yield padded[:, d + d * y : d + d * y + height, d + d * x_step : d + d * x_step + width]
