"""Where a cell of a feature map lies, as sines and cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE, EPS = 10000.0, 1e-6


def sine_positions(size: tuple[int, int], dim: int, like: Tensor) -> Tensor:
    """Sinusoidal embeddings [h * w, dim] of a grid, rows first; the first half of the channels tells y, the other x.

    Channels 2i and 2i + 1 of a half are sin and cos of  2 pi (p + 1) / (n + 1e-6) / 10000^(4i / dim)  for cell p of n.

    Args:
        size: (h, w).  dim: a multiple of 4.  like: gives device and dtype.
    Source: Carion et al., End-to-End Object Detection with Transformers, appendix A.4; normalised as in Mask2Former.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}")
    frequencies = TEMPERATURE ** (torch.arange(dim // 4, device=like.device, dtype=like.dtype) * (-4 / dim))
    halves = []
    for length in size:
        places = torch.arange(1, length + 1, device=like.device, dtype=like.dtype) * (2 * math.pi / (length + EPS))
        angles = places[:, None] * frequencies
        halves.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))  # [n, dim / 2]
    y, x = halves
    height, width = size
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)
