"""Triton kernel of proposals_to_labels: programs that stay, each taking one block of output pixels after the other.

For its block a program first evaluates the masks of all proposals, 4 sigmoids and 16 loads each, and puts them into a
scratch of its own that the caches hold, [Nq, BLOCK_P] floats. Then it walks over blocks of classes: a product with
those masks, and a comparison with the best so far. Kept in registers instead, the masks of 100 proposals spill on every
architecture, since the product holds both halves of them; evaluated again for every block of classes, they cost more
than the product.

Floor: 2 * Nq * C * H * W FLOPs; reads the masks once and the weights once a block of pixels, from L2. Products are
tf32 three times over (x = high + low; high high + high low + low high): float32 to 1e-6, on tensor cores. A single tf32
would decide near ties by its rounding.

Block sizes come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from zs3fast.kernels._math import reciprocal
from zs3fast.kernels._tuning import cdiv

BLOCK_P, BLOCK_C, BLOCK_Q = 64, 64, 16
NUM_WARPS = 4
PROGRAMS_PER_SM = 2  # as many as 255 registers a thread let in, whatever the compiler makes of it
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _axis(position, size_in, size_out, ALIGN: tl.constexpr):
    """Bilinear, in integers. At the same size: the mean of a value with itself, exact for inf."""
    if ALIGN:
        source = position * (size_in - 1)
        scale = tl.maximum(size_out - 1, 1)
    else:
        source = tl.maximum((2 * position + 1) * size_in - size_out, 0)
        scale = 2 * size_out
    low = source // scale
    weight = (source - low * scale).to(tl.float32) / scale
    same = size_in == size_out
    low = tl.where(same, position, low)
    high = tl.where(same, low, tl.minimum(low + 1, size_in - 1))
    return low, high, tl.where(same, 0.5, weight)


@triton.jit
def _load(pointer, y, x, stride_y, stride_x, inside):
    at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return tl.load(pointer + at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _masks_at(
    masks, q, pixel, proposals, h, w, padded_h, padded_w, image_h, image_w, height, width,
    stride_q, stride_y, stride_x, LOGITS: tl.constexpr, UPSAMPLE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_P] masks at the output pixels; 0 past the last proposal or pixel."""
    inside = (q < proposals)[:, None] & (pixel < height * width)[None, :]
    pointer = masks + q.to(tl.int64)[:, None] * stride_q
    y0, y1, down = _axis(pixel // width, image_h, height, False)
    x0, x1, right = _axis(pixel % width, image_w, width, False)
    total = tl.zeros(inside.shape, tl.float32)
    for corner in range(4):  # not unrolled: a quarter of the registers
        lower, farther = corner >= 2, corner % 2 == 1
        y, x = tl.where(lower, y1, y0), tl.where(farther, x1, x0)
        share = tl.where(lower, down, 1 - down) * tl.where(farther, right, 1 - right)
        if UPSAMPLE:
            top, bottom, v = _axis(y, h, padded_h, ALIGN)
            left, far, u = _axis(x, w, padded_w, ALIGN)
            value = _load(pointer, top, left, stride_y, stride_x, inside) * ((1 - v) * (1 - u))[None, :]
            value += _load(pointer, top, far, stride_y, stride_x, inside) * ((1 - v) * u)[None, :]
            value += _load(pointer, bottom, left, stride_y, stride_x, inside) * (v * (1 - u))[None, :]
            value += _load(pointer, bottom, far, stride_y, stride_x, inside) * (v * u)[None, :]
        else:
            value = _load(pointer, y, x, stride_y, stride_x, inside)
        if LOGITS:
            value = reciprocal(1.0 + tl.exp(-value))
        total += value * share[None, :]
    return tl.where(inside, total, 0.0)


@triton.jit
def proposals_to_labels_kernel(
    weights, masks, labels, scores, scratch,
    batch, proposals, classes, h, w, padded_h, padded_w, image_h, image_w, height, width,
    weights_b, weights_q, weights_c, masks_b, masks_q, masks_y, masks_x,
    LOGITS: tl.constexpr, UPSAMPLE: tl.constexpr, ALIGN: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, BLOCK_P)
    blocks = tl.cdiv(height * width, BLOCK_P)
    scratch += tl.program_id(0).to(tl.int64) * tl.cdiv(proposals, BLOCK_Q) * BLOCK_Q * BLOCK_P
    for block in range(tl.program_id(0), batch * blocks, tl.num_programs(0)):
        image = (block // blocks).to(tl.int64)
        pixel = block % blocks * BLOCK_P + p
        for q0 in range(0, proposals, BLOCK_Q):
            q = q0 + tl.arange(0, BLOCK_Q)
            mask = _masks_at(
                masks + image * masks_b, q, pixel, proposals, h, w, padded_h, padded_w, image_h, image_w, height, width,
                masks_q, masks_y, masks_x, LOGITS, UPSAMPLE, ALIGN,
            )  # fmt: skip
            tl.store(scratch + q[:, None] * BLOCK_P + p[None, :], mask)
        tl.debug_barrier()  # what one thread stored, others load
        best = tl.full([BLOCK_P], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK_P], tl.int32)
        for c0 in range(0, classes, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for q0 in range(0, proposals, BLOCK_Q):
                q = q0 + tl.arange(0, BLOCK_Q)
                mask = tl.load(scratch + p[:, None] + q[None, :] * BLOCK_P)  # [BLOCK_P, BLOCK_Q]
                at = q.to(tl.int64)[:, None] * weights_q + c.to(tl.int64)[None, :] * weights_c
                inside = (q < proposals)[:, None] & (c < classes)[None, :]
                weight = tl.load(weights + image * weights_b + at, mask=inside, other=0.0).to(tl.float32)
                sums = tl.dot(mask, weight, sums, input_precision="tf32x3")
            # the first class whose sum is NaN, else the first whose sum is the largest
            real = (c < classes)[None, :]
            is_nan = (sums != sums) & real
            nan_class = tl.min(tl.where(is_nan, c[None, :], _LAST), 1)
            sums = tl.where(is_nan | ~real, float("-inf"), sums)
            top = tl.max(sums, 1)
            top_class = tl.min(tl.where((sums == top[:, None]) & real, c[None, :], _LAST), 1)
            nan_here = nan_class != _LAST
            better = (best == best) & (nan_here | (top > best) | (c0 == 0))  # whatever was NaN before stays
            label = tl.where(better, tl.where(nan_here, nan_class, top_class), label)
            best = tl.where(better, tl.where(nan_here, float("nan"), top), best)
        tl.debug_barrier()  # the next block's masks go where these were
        at = image * height * width + pixel
        tl.store(labels + at, label.to(labels.dtype.element_ty), mask=pixel < height * width)
        if SCORES:
            tl.store(scores + at, best, mask=pixel < height * width)


def num_programs(device: torch.device, blocks: int) -> int:
    """As many as run at the same time; the interpreter runs one after the other."""
    if device.type != "cuda":
        return min(blocks, 2)
    return min(blocks, PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count)


def proposals_to_labels(
    class_weights, masks, size, logits, padded_size, image_size, align_corners, dtype, return_scores
):
    """Arguments and results of torch.ops.zs3fast.proposals_to_labels."""
    batch, proposals, h, w = masks.shape
    height, width = size
    labels = masks.new_empty((batch, height, width), dtype=dtype)
    scores = masks.new_empty(labels.shape if return_scores else (0,), dtype=torch.float32)
    if labels.numel() == 0:
        return labels, scores
    programs = num_programs(masks.device, batch * cdiv(height * width, BLOCK_P))
    rows = cdiv(proposals, BLOCK_Q) * BLOCK_Q
    proposals_to_labels_kernel[(programs,)](
        weights=class_weights,
        masks=masks,
        labels=labels,
        scores=scores,
        scratch=masks.new_empty((programs, rows, BLOCK_P), dtype=torch.float32),
        batch=batch,
        proposals=proposals,
        classes=class_weights.shape[2],
        h=h,
        w=w,
        padded_h=padded_size[0],
        padded_w=padded_size[1],
        image_h=image_size[0],
        image_w=image_size[1],
        height=height,
        width=width,
        weights_b=class_weights.stride(0),
        weights_q=class_weights.stride(1),
        weights_c=class_weights.stride(2),
        masks_b=masks.stride(0),
        masks_q=masks.stride(1),
        masks_y=masks.stride(2),
        masks_x=masks.stride(3),
        LOGITS=logits,
        UPSAMPLE=[h, w] != list(padded_size),
        ALIGN=align_corners,
        SCORES=return_scores,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        BLOCK_Q=BLOCK_Q,
        num_warps=NUM_WARPS,
    )
    return labels, scores
