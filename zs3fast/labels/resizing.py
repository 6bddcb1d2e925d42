"""Parts of maps that are resized bilinearly, without the whole: torch's align_corners=False, no antialias."""

from __future__ import annotations

import torch
from torch import Tensor


def resized_region(maps: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """Rows and columns [C, r, c] of maps [C, h, w] resized to `size` = (H, W); float32 at least."""
    maps = maps if maps.is_floating_point() else maps.float()
    for axis, wanted in ((1, rows), (2, columns)):
        maps = between(maps, axis, *(tap[wanted] for tap in taps(maps.shape[axis], size[axis - 1])))
    return maps


def taps(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `new` rows resized bilinearly from `old`: the row below, the row above, and how far towards the second."""
    where = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp_min(0)
    low = where.long().clamp_max(old - 1)
    return low, (low + 1).clamp_max(old - 1), (where - low).float()


def between(x: Tensor, axis: int, low: Tensor, high: Tensor, part: Tensor) -> Tensor:
    """x with its rows along `axis` between those of `low` and `high`."""
    if bool((part == 0).all()):
        return x.index_select(axis, low.to(x.device))
    shape = [1] * x.dim()
    shape[axis] = -1
    part = part.to(x).view(shape)
    return x.index_select(axis, low.to(x.device)) * (1 - part) + x.index_select(axis, high.to(x.device)) * part
