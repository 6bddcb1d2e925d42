"""Triton kernels of masks_to_labels: a program owns a block of output pixels and walks over the classes.

Floor: read 4 * B * C * h * w bytes, write the labels. A pixel reads four patches of every class; neighbours share them,
so they come from L1 and L2, and the 2 C exponentials and divisions a pixel are what bounds the kernel. Half types are
widened at the load.

Two kernels. `one_window` samples the patches of a pixel directly. `windows` computes, for each of the four canvas
pixels behind an output pixel, the mean over the windows that cover it. Classes ranked below the first are found by
walking again over those that come after the last one found: no list per pixel, and top_k = 1 is one walk.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

BLOCK_PIXELS = 256
NUM_WARPS = 4


@triton.jit
def _axis(position, size_in, size_out):
    """Bilinear, align_corners=False, in integers. At the same size: the mean of a value with itself, exact for inf."""
    source = tl.maximum((2 * position + 1) * size_in - size_out, 0)
    low = source // (2 * size_out)
    weight = (source - low * 2 * size_out).to(tl.float32) / (2 * size_out)
    same = size_in == size_out
    high = tl.where(same, low, tl.minimum(low + 1, size_in - 1))
    return low, high, tl.where(same, 0.5, weight)


@triton.jit
def _bilinear(a, b, c, d, down, right):
    return (a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down


@triton.jit
def _sample(pointer, y, x, h, w, crop_h, crop_w, stride_y, stride_x, mask):
    """The map at `pointer`, upsampled to the crop, at crop pixels (y, x)."""
    y0, y1, down = _axis(y, h, crop_h)
    x0, x1, right = _axis(x, w, crop_w)
    top, bottom = y0.to(tl.int64) * stride_y, y1.to(tl.int64) * stride_y
    left, far = x0.to(tl.int64) * stride_x, x1.to(tl.int64) * stride_x
    a = tl.load(pointer + top + left, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(pointer + top + far, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(pointer + bottom + left, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(pointer + bottom + far, mask=mask, other=0.0).to(tl.float32)
    return _bilinear(a, b, c, d, down, right)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _beats(a, b):
    """Larger, NaN being the largest."""
    return (a > b) | ((a != a) & (b == b))


@triton.jit
def _comes_next(score, c, best, last, last_class):
    """Whether (score, c) is the best yet among those that come after (last, last_class); classes come in order."""
    after = (last_class < 0) | _beats(last, score) | ((c > last_class) & ~_beats(score, last))
    return after & _beats(score, best)


@triton.jit
def _weight(unseen, is_seen, WEIGH_SEEN: tl.constexpr, WEIGH_UNSEEN: tl.constexpr):
    weight_seen = 1.0 - unseen if WEIGH_SEEN else tl.full(unseen.shape, 1.0, tl.float32)
    weight_unseen = unseen if WEIGH_UNSEEN else tl.full(unseen.shape, 1.0, tl.float32)
    return tl.where(is_seen, weight_seen, weight_unseen)


@triton.jit
def _store(labels, scores, nan_count, image, k, top_k, pixels, pixel, label, best, mask, DETAILS: tl.constexpr):
    at = (image * top_k + k) * pixels + pixel
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=mask)
    if DETAILS:
        tl.store(scores + at, best, mask=mask)
        if k == 0:
            tl.atomic_add(nan_count + image, tl.sum(((best != best) & mask).to(tl.int64), 0))


@triton.jit
def masks_to_labels_one_window_kernel(
    masks,
    trusty,
    seen,
    labels,
    scores,
    nan_count,
    seen_offset,
    classes,
    h,
    w,
    trusty_h,
    trusty_w,
    height,
    width,
    top_k,
    masks_stride_row,
    masks_stride_channel,
    masks_stride_y,
    masks_stride_x,
    trusty_stride_row,
    trusty_stride_y,
    trusty_stride_x,
    WEIGH_SEEN: tl.constexpr,
    WEIGH_UNSEEN: tl.constexpr,
    DETAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < height * width
    y, x = pixel // width, pixel % width
    unseen = tl.zeros([BLOCK], tl.float32)
    if WEIGH_SEEN or WEIGH_UNSEEN:
        pointer = trusty + image * trusty_stride_row
        unseen = _sigmoid(
            _sample(pointer, y, x, trusty_h, trusty_w, height, width, trusty_stride_y, trusty_stride_x, mask)
        )
    last = tl.zeros([BLOCK], tl.float32)
    last_class = tl.full([BLOCK], -1, tl.int32)
    for k in range(top_k):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK], tl.int32)
        pointer = masks + image * masks_stride_row
        for c in range(classes):
            is_seen = tl.load(seen + c) != 0
            logit = _sample(pointer, y, x, h, w, height, width, masks_stride_y, masks_stride_x, mask)
            score = _sigmoid(logit) - tl.where(is_seen, seen_offset, 0.0)
            if WEIGH_SEEN or WEIGH_UNSEEN:
                score *= _weight(unseen, is_seen, WEIGH_SEEN, WEIGH_UNSEEN)
            better = _comes_next(score, c, best, last, last_class)
            best = tl.where(better, score, best)
            label = tl.where(better, c, label)
            pointer += masks_stride_channel
        last, last_class = best, label
        _store(labels, scores, nan_count, image, k, top_k, height * width, pixel, label, best, mask, DETAILS)


@triton.jit
def masks_to_labels_windows_kernel(
    masks,
    trusty,
    seen,
    windows,
    labels,
    scores,
    nan_count,
    seen_offset,
    classes,
    num_windows,
    h,
    w,
    trusty_h,
    trusty_w,
    crop_h,
    crop_w,
    canvas_h,
    canvas_w,
    height,
    width,
    top_k,
    masks_stride_row,
    masks_stride_channel,
    masks_stride_y,
    masks_stride_x,
    trusty_stride_row,
    trusty_stride_y,
    trusty_stride_x,
    WEIGH_SEEN: tl.constexpr,
    WEIGH_UNSEEN: tl.constexpr,
    DETAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    corner = tl.arange(0, 4)[None, :]
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < height * width
    y0, y1, down = _axis(pixel // width, canvas_h, height)
    x0, x1, right = _axis(pixel % width, canvas_w, width)
    # the four canvas pixels an output pixel mixes, and how much of each: [BLOCK, 4]
    y = tl.where(corner < 2, y0[:, None], y1[:, None])
    x = tl.where(corner % 2 == 0, x0[:, None], x1[:, None])
    share = tl.where(corner < 2, 1 - down[:, None], down[:, None])
    share *= tl.where(corner % 2 == 0, 1 - right[:, None], right[:, None])
    cover = tl.zeros([BLOCK, 4], tl.float32)
    for n in range(num_windows):
        top, left = tl.load(windows + 2 * n), tl.load(windows + 2 * n + 1)
        inside = (y >= top) & (y < top + crop_h) & (x >= left) & (x < left + crop_w)
        cover += inside.to(tl.float32)
    cover = tl.maximum(cover, 1.0)  # pixels past the end have none

    last = tl.zeros([BLOCK], tl.float32)
    last_class = tl.full([BLOCK], -1, tl.int32)
    for k in range(top_k):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK], tl.int32)
        channel = masks
        for c in range(classes):
            is_seen = tl.load(seen + c) != 0
            total = tl.zeros([BLOCK, 4], tl.float32)
            for n in range(num_windows):
                top, left = tl.load(windows + 2 * n), tl.load(windows + 2 * n + 1)
                inside = (y >= top) & (y < top + crop_h) & (x >= left) & (x < left + crop_w) & mask[:, None]
                if tl.max(tl.max(inside.to(tl.int32), 1), 0) > 0:
                    row = image * num_windows + n
                    pointer = channel + row * masks_stride_row
                    logit = _sample(
                        pointer, y - top, x - left, h, w, crop_h, crop_w, masks_stride_y, masks_stride_x, inside
                    )
                    score = _sigmoid(logit) - tl.where(is_seen, seen_offset, 0.0)
                    if WEIGH_SEEN or WEIGH_UNSEEN:
                        pointer = trusty + row * trusty_stride_row
                        unseen = _sigmoid(
                            _sample(
                                pointer,
                                y - top,
                                x - left,
                                trusty_h,
                                trusty_w,
                                crop_h,
                                crop_w,
                                trusty_stride_y,
                                trusty_stride_x,
                                inside,
                            )
                        )
                        score *= _weight(unseen, is_seen, WEIGH_SEEN, WEIGH_UNSEEN)
                    total += tl.where(inside, score, 0.0)
            mean = tl.sum(total / cover * share, 1)  # [BLOCK]
            better = _comes_next(mean, c, best, last, last_class)
            best = tl.where(better, mean, best)
            label = tl.where(better, c, label)
            channel += masks_stride_channel
        last, last_class = best, label
        _store(labels, scores, nan_count, image, k, top_k, height * width, pixel, label, best, mask, DETAILS)


@lru_cache(maxsize=64)
def _class_flags(seen: tuple[int, ...], classes: int, device: torch.device) -> torch.Tensor:
    """[C] int32 on the device: copied there once per class list, since a copy would stall every call."""
    flags = torch.zeros(classes, dtype=torch.int32)
    flags[list(seen)] = 1
    return flags.to(device)


@lru_cache(maxsize=64)
def _window_table(windows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(windows, dtype=torch.int32).to(device)


def masks_to_labels(
    mask_logits, trusty_logits, seen, seen_offset, weighting, size, crop, canvas, windows, top_k, dtype, return_details
):
    """Arguments and results of torch.ops.zs3fast.masks_to_labels."""
    rows, classes, h, w = mask_logits.shape
    num_windows = len(windows) // 2
    batch, (height, width) = rows // num_windows, size
    shape = (batch, height, width) if top_k == 1 else (batch, top_k, height, width)
    labels = mask_logits.new_empty(shape, dtype=dtype)
    scores = mask_logits.new_empty(shape if return_details else (0,), dtype=torch.float32)
    nan_count = mask_logits.new_zeros((batch if return_details else 0,), dtype=torch.int64)
    if labels.numel() == 0:
        return labels, scores, nan_count
    trusty = mask_logits if trusty_logits is None else trusty_logits
    device = mask_logits.device
    one_window = num_windows == 1 and tuple(crop) == tuple(canvas) == tuple(size)
    common = dict(
        masks=mask_logits,
        trusty=trusty,
        seen=_class_flags(tuple(seen), classes, device),
        labels=labels,
        scores=scores,
        nan_count=nan_count,
        seen_offset=float(seen_offset),
        classes=classes,
        h=h,
        w=w,
        trusty_h=trusty.shape[2],
        trusty_w=trusty.shape[3],
        height=height,
        width=width,
        top_k=top_k,
        masks_stride_row=mask_logits.stride(0),
        masks_stride_channel=mask_logits.stride(1),
        masks_stride_y=mask_logits.stride(2),
        masks_stride_x=mask_logits.stride(3),
        trusty_stride_row=trusty.stride(0),
        trusty_stride_y=trusty.stride(2),
        trusty_stride_x=trusty.stride(3),
        WEIGH_SEEN=trusty_logits is not None and weighting in ("both", "seen"),
        WEIGH_UNSEEN=trusty_logits is not None and weighting in ("both", "unseen"),
        DETAILS=return_details,
        num_warps=NUM_WARPS,
    )
    if one_window:
        grid = (triton.cdiv(height * width, BLOCK_PIXELS), batch)
        masks_to_labels_one_window_kernel[grid](**common, BLOCK=BLOCK_PIXELS)
    else:
        block = BLOCK_PIXELS // 4  # four canvas pixels each
        grid = (triton.cdiv(height * width, block), batch)
        masks_to_labels_windows_kernel[grid](
            **common,
            windows=_window_table(tuple(windows), device),
            num_windows=num_windows,
            crop_h=crop[0],
            crop_w=crop[1],
            canvas_h=canvas[0],
            canvas_w=canvas[1],
            BLOCK=block,
        )
    return labels, scores, nan_count
