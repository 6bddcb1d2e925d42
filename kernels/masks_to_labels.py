"""Triton kernels of masks_to_labels: a program owns a block of output pixels and walks over the classes.

Floor: read 4 * B * C * h * w bytes, write the labels. A pixel reads four patches of every class; neighbours share them,
so they come from L1, and what bounds the kernels is the instructions a pixel and class. Hence whatever does not depend
on the class is outside the loop over them: the places and weights of the patches, which windows cover a pixel, their
trusty weights. Half types are widened at the load.

`one_window` samples the patches of a pixel directly. Scores grow with logits inside the seen and inside the unseen
group, so it keeps the largest logit of each, and two sigmoids a pixel decide.
`windows` makes the canvas pixels behind a tile of output pixels, each the mean of the scores of the one or two windows
that cover it, once a class, and mixes four of them a pixel. `overlaps` takes any number of windows and ranks: nothing
is held, so it computes places again and again.
Classes ranked below the first are found by walking again over those after the last one found: no list a pixel.

Ladder (instructions a pixel and class, sm_90): bench/results/sass.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from zs3fast.kernels._math import reciprocal

BLOCK_PIXELS = 256
NUM_WARPS = 4
WINDOWS_WARPS = 8  # a tile's places and weights lie in registers
_LARGEST = tl.constexpr(16.635532)  # the sigmoid of anything larger is 1 in float32


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
    return reciprocal(1.0 + tl.exp(-x))


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
def _taps(y, x, h, w, crop_h, crop_w, stride_y, stride_x):
    """Places [4] and weights [4] of the patches that a crop pixel mixes, for a map that is upsampled to the crop.

    Places count from the map's start and fit in 32 bits: a 64-bit base and they make one instruction a load.
    """
    y0, y1, down = _axis(y, h, crop_h)
    x0, x1, right = _axis(x, w, crop_w)
    top, bottom = (y0 * stride_y).to(tl.int32), (y1 * stride_y).to(tl.int32)
    left, far = (x0 * stride_x).to(tl.int32), (x1 * stride_x).to(tl.int32)
    up, near = 1 - down, 1 - right
    places = (top + left, top + far, bottom + left, bottom + far)
    return places, (up * near, up * right, down * near, down * right)


@triton.jit
def _mix(pointer, places, weights):
    """The value of the map at `pointer` that `_taps` speak of; they lie inside it whatever the pixel."""
    a = tl.load(pointer + places[0]).to(tl.float32)
    b = tl.load(pointer + places[1]).to(tl.float32)
    c = tl.load(pointer + places[2]).to(tl.float32)
    d = tl.load(pointer + places[3]).to(tl.float32)
    return a * weights[0] + b * weights[1] + c * weights[2] + d * weights[3]


@triton.jit
def _best_logit(pointer, order, first, last, stride, places, weights, BLOCK: tl.constexpr):
    """Largest logit among the classes order[first:last] and the first class that has it; -inf and -1 of none.

    Logits whose sigmoid is 1 in float32 are equal.
    """
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK], tl.int32) + tl.load(order + first, mask=first < last, other=-1)
    for i in range(first, last):
        c = tl.load(order + i)
        logit = _mix(pointer + c.to(tl.int64) * stride, places, weights)
        logit = tl.minimum(logit, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        better = ~(logit <= best) & (best == best)
        best = tl.where(better, logit, best)
        label = tl.where(better, c, label)
    return best, label


@triton.jit
def _calibrated(best, label, first, offset, unseen, weight, WEIGHED: tl.constexpr):
    """Score of a group whose largest logit is `best`, and its class: the `first` where all scores are equal or NaN."""
    score = _sigmoid(best) - offset
    level = score == -offset
    if WEIGHED:
        score *= weight
        level = level | (unseen != unseen) | ((weight == 0) & (best == best))
    return score, tl.where(level & (label >= 0), first, label)


@triton.jit
def _better_group(seen_score, seen_label, unseen_score, unseen_label):
    """Score and label of the better of two groups: NaN is the largest, the lower class wins a tie, -1 is no class."""
    ahead = _beats(unseen_score, seen_score)
    level = (ahead == _beats(seen_score, unseen_score)) & (unseen_label < seen_label)
    take = (seen_label < 0) | ((unseen_label >= 0) & (ahead | level))
    return tl.where(take, unseen_score, seen_score), tl.where(take, unseen_label, seen_label)


@triton.jit
def masks_to_labels_one_window_kernel(
    masks,
    trusty,
    seen,
    order,
    labels,
    scores,
    nan_count,
    seen_offset,
    classes,
    num_seen,
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
    RANKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < height * width
    pixel = tl.minimum(pixel, height * width - 1)  # so loads need no mask
    y, x = pixel // width, pixel % width
    unseen = tl.zeros([BLOCK], tl.float32)
    if WEIGH_SEEN or WEIGH_UNSEEN:
        places, weights = _taps(y, x, trusty_h, trusty_w, height, width, trusty_stride_y, trusty_stride_x)
        unseen = _sigmoid(_mix(trusty + image * trusty_stride_row, places, weights))
    places, weights = _taps(y, x, h, w, height, width, masks_stride_y, masks_stride_x)
    pointer = masks + image * masks_stride_row
    if RANKED:
        last = tl.zeros([BLOCK], tl.float32)
        last_class = tl.full([BLOCK], -1, tl.int32)
        for k in range(top_k):
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            label = tl.zeros([BLOCK], tl.int32)
            for c in range(classes):
                is_seen = tl.load(seen + c) != 0
                logit = _mix(pointer + tl.cast(c, tl.int64) * masks_stride_channel, places, weights)
                score = _sigmoid(logit) - tl.where(is_seen, seen_offset, 0.0)
                if WEIGH_SEEN or WEIGH_UNSEEN:
                    score *= _weight(unseen, is_seen, WEIGH_SEEN, WEIGH_UNSEEN)
                better = _comes_next(score, c, best, last, last_class)
                best = tl.where(better, score, best)
                label = tl.where(better, c, label)
            last, last_class = best, label
            _store(labels, scores, nan_count, image, k, top_k, height * width, pixel, label, best, mask, DETAILS)
    else:
        stride = masks_stride_channel
        best_seen, label_seen = _best_logit(pointer, order, 0, num_seen, stride, places, weights, BLOCK)
        best_unseen, label_unseen = _best_logit(pointer, order, num_seen, classes, stride, places, weights, BLOCK)
        first = tl.load(order, mask=num_seen > 0, other=-1)
        score_seen, label_seen = _calibrated(
            best_seen, label_seen, first, seen_offset, unseen, 1.0 - unseen, WEIGH_SEEN
        )
        first = tl.load(order + num_seen, mask=num_seen < classes, other=-1)
        score_unseen, label_unseen = _calibrated(best_unseen, label_unseen, first, 0.0, unseen, unseen, WEIGH_UNSEEN)
        best, label = _better_group(score_seen, label_seen, score_unseen, label_unseen)
        _store(labels, scores, nan_count, image, 0, 1, height * width, pixel, label, best, mask, DETAILS)


@triton.jit
def _covering(y, x, windows, num_windows, crop_h, crop_w):
    """How many windows cover a canvas pixel, and the first and the last that do."""
    count = tl.zeros(y.shape, tl.int32)
    earliest, latest = count, count
    for n in range(num_windows):
        top_n, left_n = tl.load(windows + 2 * n), tl.load(windows + 2 * n + 1)
        inside = (y >= top_n) & (y < top_n + crop_h) & (x >= left_n) & (x < left_n + crop_w)
        earliest = tl.where(inside & (count == 0), n, earliest)
        latest = tl.where(inside, n, latest)
        count += inside.to(tl.int32)
    return count, earliest, latest


@triton.jit
def _covered(
    y, x, n, share, windows, image, num_windows, trusty, h, w, trusty_h, trusty_w, crop_h, crop_w,
    masks_stride_row, masks_stride_y, masks_stride_x, trusty_stride_row, trusty_stride_y, trusty_stride_x,
    WEIGH_SEEN: tl.constexpr, WEIGH_UNSEEN: tl.constexpr,
):  # fmt: skip
    row = image * num_windows + n
    y = tl.minimum(tl.maximum(y - tl.load(windows + 2 * n), 0), crop_h - 1)
    x = tl.minimum(tl.maximum(x - tl.load(windows + 2 * n + 1), 0), crop_w - 1)
    of_seen, of_unseen = share, share
    if WEIGH_SEEN or WEIGH_UNSEEN:
        places, weights = _taps(y, x, trusty_h, trusty_w, crop_h, crop_w, trusty_stride_y, trusty_stride_x)
        unseen = _sigmoid(_mix(trusty + row * trusty_stride_row, places, weights))
        if WEIGH_SEEN:
            of_seen = share * (1.0 - unseen)
        if WEIGH_UNSEEN:
            of_unseen = share * unseen
    places, weights = _taps(y, x, h, w, crop_h, crop_w, masks_stride_y, masks_stride_x)
    start = ((row - image * num_windows) * masks_stride_row).to(tl.int32)
    places = (places[0] + start, places[1] + start, places[2] + start, places[3] + start)
    return places, weights, of_seen, of_unseen


@triton.jit
def _mixed(values, at, shares, MIX: tl.constexpr):
    """[pixels]: four canvas pixels of the tile each, through shared memory."""
    if MIX:
        total = tl.gather(values, at[0], 0) * shares[0]
        total += tl.gather(values, at[1], 0) * shares[1]
        total += tl.gather(values, at[2], 0) * shares[2]
        total += tl.gather(values, at[3], 0) * shares[3]
        return total
    else:
        return values


@triton.jit
def _best_mean(
    pointer, order, first, last, stride, earliest, latest, at, shares,
    SEEN: tl.constexpr, PAIR: tl.constexpr, MIX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Largest score (without the offset of seen classes) among the classes order[first:last], and its class."""
    best = tl.full([PIXELS], float("-inf"), tl.float32)
    label = tl.full([PIXELS], -1, tl.int32)
    for i in range(first, last):
        c = tl.load(order + i)
        here = pointer + c.to(tl.int64) * stride
        canvas = _sigmoid(_mix(here, earliest[0], earliest[1])) * (earliest[2] if SEEN else earliest[3])
        if PAIR:
            canvas += _sigmoid(_mix(here, latest[0], latest[1])) * (latest[2] if SEEN else latest[3])
        mean = _mixed(canvas, at, shares, MIX)
        better = ~(mean <= best) & (best == best)
        best = tl.where(better, mean, best)
        label = tl.where(better, c, label)
    return best, label


@triton.jit
def _best_of_tile(
    y, x, at, shares, image, masks, trusty, order, windows, seen_offset, classes, num_seen, num_windows,
    h, w, trusty_h, trusty_w, crop_h, crop_w, masks_stride_row, masks_stride_channel, masks_stride_y, masks_stride_x,
    trusty_stride_row, trusty_stride_y, trusty_stride_x,
    WEIGH_SEEN: tl.constexpr, WEIGH_UNSEEN: tl.constexpr, PAIR: tl.constexpr, MIX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Best score and label of a tile of output pixels whose canvas pixels (y, x) are each in one window, or two."""
    _count, n, latest_n = _covering(y, x, windows, num_windows, crop_h, crop_w)
    share = tl.full(y.shape, 0.5 if PAIR else 1.0, tl.float32)
    earliest = _covered(
        y, x, n, share, windows, image, num_windows, trusty, h, w, trusty_h, trusty_w, crop_h, crop_w,
        masks_stride_row, masks_stride_y, masks_stride_x, trusty_stride_row, trusty_stride_y, trusty_stride_x,
        WEIGH_SEEN, WEIGH_UNSEEN,
    )  # fmt: skip
    latest = earliest
    of_seen = earliest[2]
    if PAIR:  # a pixel in one window alone has it twice, by halves
        latest = _covered(
            y, x, latest_n, share, windows, image, num_windows, trusty, h, w, trusty_h, trusty_w, crop_h, crop_w,
            masks_stride_row, masks_stride_y, masks_stride_x, trusty_stride_row, trusty_stride_y, trusty_stride_x,
            WEIGH_SEEN, WEIGH_UNSEEN,
        )  # fmt: skip
        of_seen += latest[2]
    pointer = masks + image * num_windows * masks_stride_row
    stride = masks_stride_channel
    seen, label_seen = _best_mean(
        pointer, order, 0, num_seen, stride, earliest, latest, at, shares, True, PAIR, MIX, PIXELS
    )
    unseen, label_unseen = _best_mean(
        pointer, order, num_seen, classes, stride, earliest, latest, at, shares, False, PAIR, MIX, PIXELS
    )
    offset = seen_offset * _mixed(of_seen, at, shares, MIX)
    seen -= offset
    # sigmoids that are nothing beside the offset are equal
    label_seen = tl.where((seen == -offset) & (label_seen >= 0), tl.load(order), label_seen)
    return _better_group(seen, label_seen, unseen, label_unseen)


@triton.jit
def masks_to_labels_windows_kernel(
    masks,
    trusty,
    order,
    windows,
    labels,
    scores,
    nan_count,
    seen_offset,
    classes,
    num_seen,
    num_windows,
    h,
    w,
    trusty_h,
    trusty_w,
    crop_h,
    crop_w,
    canvas_h,
    canvas_w,
    canvas_columns,
    height,
    width,
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
    MIX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CANVAS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    tiles_x = tl.cdiv(width, COLUMNS)
    i = tl.arange(0, ROWS * COLUMNS)
    row = tl.program_id(0) // tiles_x * ROWS + i // COLUMNS  # [ROWS * COLUMNS]
    column = tl.program_id(0) % tiles_x * COLUMNS + i % COLUMNS
    mask = (row < height) & (column < width)
    row, column = tl.minimum(row, height - 1), tl.minimum(column, width - 1)
    y0, y1, down = _axis(row, canvas_h, height)
    x0, x1, right = _axis(column, canvas_w, width)
    # the canvas pixels of the tile, [CANVAS], canvas_columns a row; the last ones again where the tile is smaller
    first_y, first_x = tl.min(y0, 0), tl.min(x0, 0)
    n = tl.arange(0, CANVAS)
    if MIX:
        y = tl.minimum(first_y + n // canvas_columns, canvas_h - 1)
        x = tl.minimum(first_x + n % canvas_columns, canvas_w - 1)
        inside = y <= tl.max(y1, 0)
    else:
        y, x, inside = row, column, mask
    upper, lower = (y0 - first_y) * canvas_columns, (y1 - first_y) * canvas_columns
    at = (upper + x0 - first_x, upper + x1 - first_x, lower + x0 - first_x, lower + x1 - first_x)
    shares = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
    # one branch for all of a tile: most lie in one window
    count, _first, _last = _covering(y, x, windows, num_windows, crop_h, crop_w)
    if tl.max(tl.where(inside, count, 0), 0) > 1:
        best, label = _best_of_tile(
            y, x, at, shares, image, masks, trusty, order, windows, seen_offset, classes, num_seen,
            num_windows, h, w, trusty_h, trusty_w, crop_h, crop_w, masks_stride_row, masks_stride_channel,
            masks_stride_y, masks_stride_x, trusty_stride_row, trusty_stride_y, trusty_stride_x,
            WEIGH_SEEN, WEIGH_UNSEEN, True, MIX, ROWS * COLUMNS,
        )  # fmt: skip
    else:
        best, label = _best_of_tile(
            y, x, at, shares, image, masks, trusty, order, windows, seen_offset, classes, num_seen,
            num_windows, h, w, trusty_h, trusty_w, crop_h, crop_w, masks_stride_row, masks_stride_channel,
            masks_stride_y, masks_stride_x, trusty_stride_row, trusty_stride_y, trusty_stride_x,
            WEIGH_SEEN, WEIGH_UNSEEN, False, MIX, ROWS * COLUMNS,
        )  # fmt: skip
    pixel = row * width + column
    _store(labels, scores, nan_count, image, 0, 1, height * width, pixel, label, best, mask, DETAILS)


@triton.jit
def masks_to_labels_overlaps_kernel(
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
def _class_order(seen: tuple[int, ...], classes: int, device: torch.device) -> torch.Tensor:
    """[C] int32 on the device: the seen classes, then the others, each in order."""
    chosen = set(seen)
    return torch.tensor(sorted(range(classes), key=lambda c: c not in chosen), dtype=torch.int32).to(device)


@lru_cache(maxsize=64)
def _most_covering(windows: tuple[int, ...], crop: tuple[int, int]) -> int:
    """How many windows one pixel lies in at most: looked at where windows begin, since only there the number grows."""
    corners = list(zip(windows[::2], windows[1::2], strict=True))
    tops, lefts = set(windows[::2]), set(windows[1::2])
    return max(
        sum(top <= y < top + crop[0] and left <= x < left + crop[1] for top, left in corners)
        for y in tops
        for x in lefts
    )


def _near(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """`x`, copied where places along `dims` would not fit in 32 bits."""
    return x if sum((x.shape[d] - 1) * x.stride(d) for d in dims) < 2**31 else x.contiguous()


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
    mask_logits = _near(mask_logits, (2, 3) if num_windows == 1 else (0, 2, 3))
    trusty = mask_logits if trusty_logits is None else _near(trusty_logits, (2, 3))
    device = mask_logits.device
    one_window = num_windows == 1 and tuple(crop) == tuple(canvas) == tuple(size)
    flags = _class_flags(tuple(seen), classes, device)
    common = dict(
        masks=mask_logits,
        trusty=trusty,
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
    groups = dict(order=_class_order(tuple(seen), classes, device), num_seen=len(set(seen)))

    def grid(block: int) -> tuple[int, int]:
        return triton.cdiv(height * width, block), batch

    if one_window:
        masks_to_labels_one_window_kernel[grid(BLOCK_PIXELS)](
            **common, **groups, seen=flags, top_k=top_k, RANKED=top_k > 1, BLOCK=BLOCK_PIXELS
        )
        return labels, scores, nan_count
    common |= dict(
        windows=_window_table(tuple(windows), device),
        num_windows=num_windows,
        crop_h=crop[0],
        crop_w=crop[1],
        canvas_h=canvas[0],
        canvas_w=canvas[1],
    )
    mix = tuple(canvas) != tuple(size)
    rows, columns, canvas_columns, tile = _tile(size, canvas) if mix else (1, BLOCK_PIXELS // 2, 0, BLOCK_PIXELS // 2)
    if top_k == 1 and tile <= 4 * rows * columns and _most_covering(tuple(windows), tuple(crop)) <= 2:
        tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
        masks_to_labels_windows_kernel[tiles, batch](
            **(common | {"num_warps": WINDOWS_WARPS}),
            **groups,
            canvas_columns=canvas_columns,
            MIX=mix,
            ROWS=rows,
            COLUMNS=columns,
            CANVAS=tile,
        )
    else:
        block = BLOCK_PIXELS // 4  # four canvas pixels each
        masks_to_labels_overlaps_kernel[grid(block)](**common, seen=flags, top_k=top_k, BLOCK=block)
    return labels, scores, nan_count


def _tile(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of a tile of output pixels, and the columns and the room of the canvas pixels behind it."""
    rows = 1 << (BLOCK_PIXELS.bit_length() - 1) // 2
    columns = BLOCK_PIXELS // rows

    def span(pixels: int, out: int, of: int) -> int:  # neighbours are less than of / out apart, and each reads two
        return min((pixels - 1) * of // out + 3, of)

    canvas_columns = span(columns, size[1], canvas[1])
    return rows, columns, canvas_columns, triton.next_power_of_2(span(rows, size[0], canvas[0]) * canvas_columns)
