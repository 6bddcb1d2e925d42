"""Bilinear resizing of 8-bit images to the same bytes on every device: what a GPU does in place of `images.resize`.

It is exact where OpenCV and Pillow round on the way: without antialiasing an eighth of the bytes differ from OpenCV's,
with it a tenth from Pillow's, by one grey level and never more (tests/utils/test_resize.py, on noise; a seventh on
photographs at 224 pixels).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST_SHRUNK = 4


def resizes_there(device: torch.device, old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether an image of size `old` goes to the model's device as it is and is resized there.

    On a GPU, unless a side shrinks to less than a quarter: a photograph of 100 megapixels is 300 MB, for each of the
    images that wait in pinned memory, where its resized bytes are one or two.
    """
    return device.type == "cuda" and all(a <= MOST_SHRUNK * b for a, b in zip(old, new, strict=True))


def bilinear(pixels: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear resize with half-pixel centres, exact but for one rounding to 8 bits, halves to even.

        out[y, x] = round( sum_ij u[y, i] v[x, j] pixels[i, j] / (sum_i u[y, i] * sum_j v[x, j]) )
        u[y, i]   = max(0, reach - |i + 1/2 - (y + 1/2) H / H'|),     v likewise

    Multiplied by 2 H' and 2 W', u and v are whole numbers, and so are all sums: no order or fusion of operations can
    change a byte, whereas sums of floats round to another grey level here and there from one CPU or GPU to the next.
    It has not run on a GPU so far; `tests/gpu/test_pipeline.py` is what to run there.

    Args:
        pixels: uint8 [H, W, 3], on any device.
        size: (H', W').
        antialias: reach is max(1, H / H') source pixels, so that where it shrinks all of them count; else 1, as in
            OpenCV's resize.
    Returns:
        uint8 [H', W', 3] in any memory order; `pixels` itself where that is its size. Memory is some times that of
        [H', W, 3] and [H', W', 3].
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected a height and a width of at least 1, got {tuple(size)}")
    if tuple(pixels.shape[:2]) == tuple(size):
        return pixels
    tables = [_taps(old, new, antialias) for old, new in zip(pixels.shape[:2], size, strict=True)]
    fits = 255 * int(tables[0][1].sum(0).max()) < 2**31
    # A few kilobytes, and not waited for: that would be to wait for all that a GPU has been given to do.
    (y, u), (x, v) = ([table.to(pixels.device, non_blocking=True) for table in pair] for pair in tables)
    rows = _weighted(pixels, y, u.int() if fits else u.double())
    # Turned, so that a tap of the other axis copies rows as well. Below 2^53 float64 holds whole numbers.
    sums = _weighted(rows.transpose(0, 1).contiguous(), x, v.double())
    whole = (v.sum(0)[:, None] * u.sum(0)).double()[:, :, None]
    return sums.div_(whole).round_().to(torch.uint8).transpose(0, 1)


def _weighted(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """sum_t weights[t, n] * values[places[t, n]] over the first axis, in the type of the weights."""
    total = None
    for place, weight in zip(places, weights, strict=True):
        part = values.index_select(0, place).to(weight.dtype).mul_(weight[:, None, None])
        total = part if total is None else total.add_(part)
    assert total is not None  # every pixel has a tap
    return total


@functools.lru_cache(maxsize=64)
def _taps(old: int, new: int, antialias: bool) -> tuple[Tensor, Tensor]:
    """Source places and whole weights, both int64 [taps, new] on the host; weights beyond the edges are 0."""
    reach = 2 * (max(old, new) if antialias else new)
    centre = (2 * torch.arange(new) + 1) * old
    first = (centre - reach - new).div(2 * new, rounding_mode="floor") + 1
    places = first + torch.arange(-(-reach // new))[:, None]
    weights = (reach - ((2 * places + 1) * new - centre).abs()).clamp(min=0)
    return places.clamp(0, old - 1), weights * ((places >= 0) & (places < old))
