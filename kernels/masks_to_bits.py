"""masks_to_bits in Triton: a program makes some words of one mask, a lane a patch.

A patch reads four pixels of the padded size; each is a load of a soft mask, or four loads of logits and a sigmoid.
Floor: a bit's 16 logits, of which neighbouring patches share some, and 4 bytes out for 32 patches; one launch.

Coordinates are torch's fp32 ones, rounding included (one fused multiply-add, here an exact product and difference in
fp64, rounded once): a mask with hard edges changes a patch's mean by as much as its coordinate is off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._math import reciprocal
from zs3fast.kernels._tuning import cdiv

WORDS = 4  # of a program
NUM_WARPS = 4


@triton.jit
def _axis(i, size_in, size_out, scale, ALIGN: tl.constexpr):
    """Bilinear source of output place i: two neighbours and the weight of the second."""
    place = i.to(tl.float64)
    if ALIGN:
        source = (place * scale).to(tl.float32)
    else:
        source = tl.maximum(((place + 0.5) * scale - 0.5).to(tl.float32), 0.0)
    source = tl.where(size_in == size_out, i.to(tl.float32), source)
    low = tl.minimum(source.to(tl.int32), size_in - 1)
    # at the same size a pixel is read alone: a NaN beside it is not its business
    high = tl.where(size_in == size_out, low, tl.minimum(low + 1, size_in - 1))
    return low, high, tl.minimum(tl.maximum(source - low.to(tl.float32), 0.0), 1.0)


@triton.jit
def _read(map, y, x, stride_y, stride_x, inside):
    at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return tl.load(map + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _blend(a, b, c, d, down, right):
    return (a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down


@triton.jit
def _pixel(
    map, y, x, stride_y, stride_x, height, width, padded_h, padded_w, scale_y, scale_x, inside,
    ALIGN: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Pixels (y, x) of the soft mask at the padded size."""
    if LOGITS:
        y0, y1, down = _axis(y, height, padded_h, scale_y, ALIGN)
        x0, x1, right = _axis(x, width, padded_w, scale_x, ALIGN)
        a = _read(map, y0, x0, stride_y, stride_x, inside)
        b = _read(map, y0, x1, stride_y, stride_x, inside)
        c = _read(map, y1, x0, stride_y, stride_x, inside)
        d = _read(map, y1, x1, stride_y, stride_x, inside)
        return reciprocal(1.0 + tl.exp(-_blend(a, b, c, d, down, right)))
    else:
        return _read(map, y, x, stride_y, stride_x, inside)


@triton.jit
def masks_to_bits_kernel(
    masks, bits,
    stride_b, stride_q, stride_y, stride_x,
    proposals, height, width, padded_h, padded_w, grid_h, grid_w, words,
    scale_y, scale_x, grid_scale_y, grid_scale_x,
    ALIGN: tl.constexpr, LOGITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    mask = tl.program_id(0).to(tl.int64)
    map = masks + mask // proposals * stride_b + mask % proposals * stride_q
    n = tl.program_id(1) * 32 * WORDS + tl.arange(0, 32 * WORDS)  # patches
    inside = n < grid_h * grid_w
    y0, y1, down = _axis(n // grid_w, padded_h, grid_h, grid_scale_y, False)
    x0, x1, right = _axis(n % grid_w, padded_w, grid_w, grid_scale_x, False)
    a = _pixel(
        map, y0, x0, stride_y, stride_x, height, width, padded_h, padded_w, scale_y, scale_x, inside, ALIGN, LOGITS
    )
    b = _pixel(
        map, y0, x1, stride_y, stride_x, height, width, padded_h, padded_w, scale_y, scale_x, inside, ALIGN, LOGITS
    )
    c = _pixel(
        map, y1, x0, stride_y, stride_x, height, width, padded_h, padded_w, scale_y, scale_x, inside, ALIGN, LOGITS
    )
    d = _pixel(
        map, y1, x1, stride_y, stride_x, height, width, padded_h, padded_w, scale_y, scale_x, inside, ALIGN, LOGITS
    )
    keep = (_blend(a, b, c, d, down, right) >= 0.5) & inside
    place = (keep.to(tl.int32) << (n % 32)).reshape(WORDS, 32)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    tl.store(bits + mask * words + word, tl.sum(place, 1), mask=word < words)


def _scale(size_in: int, size_out: int, align_corners: bool) -> float:
    """torch's fp32 ratio of sizes, as a double."""
    if align_corners:
        size_in, size_out = size_in - 1, size_out - 1
    return 0.0 if size_out == 0 else torch.tensor(size_in / size_out, dtype=torch.float32).item()


def masks_to_bits(
    masks: Tensor, grid: tuple[int, int], padded_size: tuple[int, int], align_corners: bool, logits: bool
) -> Tensor:
    B, Nq, height, width = masks.shape
    words = cdiv(grid[0] * grid[1], 32)
    bits = masks.new_empty(B, Nq, words, dtype=torch.int32)
    if B * Nq == 0:
        return bits
    masks_to_bits_kernel[(B * Nq, cdiv(words, WORDS))](
        masks, bits,
        *masks.stride(),
        proposals=Nq,
        height=height,
        width=width,
        padded_h=padded_size[0],
        padded_w=padded_size[1],
        grid_h=grid[0],
        grid_w=grid[1],
        words=words,
        scale_y=_scale(height, padded_size[0], align_corners),
        scale_x=_scale(width, padded_size[1], align_corners),
        grid_scale_y=_scale(padded_size[0], grid[0], False),
        grid_scale_x=_scale(padded_size[1], grid[1], False),
        ALIGN=align_corners,
        LOGITS=logits,
        WORDS=WORDS,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return bits
