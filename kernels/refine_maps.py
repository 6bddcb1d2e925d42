"""refine_maps in Triton: maps spread over neighbours that look alike, tile by tile and a group of names at a time.

weights: a program is a block of pixels with all neighbours of each, [BLOCK, K]: deviation, likeness and softmax stay in
         registers, and w [K, pixels] is written once.
step:    a program is a block of pixels and of names; w is read once for the names of a block, maps 8 times a dilation,
         nearly always from the L1 and L2 caches. 2 K FLOPs for 8 to 12 bytes moved: bound by memory.
fold:    a group of names into the best so far and the softmax's running maximum and sum.

Resizing is a + part * (b - a) of neighbouring rows and columns: what is flat stays flat to the last bit.
Block sizes below come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._tuning import cdiv, next_power_of_2

_TILE_BYTES = 256 << 20  # weights, image and planes of a tile, where its halo leaves room
_GROUP = 8  # names whose planes exist at once
_PIXELS = 128  # of a program
_NAMES = 4
_LOWEST = torch.finfo(torch.float32).min
Size = Sequence[int]


@triton.jit
def _neighbour(y, x, k, dilations, height, width):
    """Flat index of the k-th neighbour, edges replicated: eight a dilation, row by row."""
    d = tl.load(dilations + k // 8)
    cell = k % 8
    cell += (cell >= 4).to(tl.int32)
    at_y = tl.minimum(tl.maximum(y + (cell // 3 - 1) * d, 0), height - 1)
    at_x = tl.minimum(tl.maximum(x + (cell % 3 - 1) * d, 0), width - 1)
    return at_y * width + at_x


@triton.jit
def refine_maps_weights_kernel(
    image, weights, dilations, channels, height, width, count, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    k = tl.arange(0, NEIGHBOURS)
    real = (k < count)[None, :]
    near_index = _neighbour(
        (pixel // width)[:, None], (pixel % width)[:, None], tl.minimum(k, count - 1)[None, :], dilations, height, width
    )  # [BLOCK, NEIGHBOURS]
    centres = count // 8
    samples = 9 * centres
    unlike = tl.zeros([BLOCK, NEIGHBOURS], tl.float32)
    for _ in range(0, channels):
        centre = tl.load(image + pixel, mask=inside, other=0.0)
        near = tl.load(image + near_index, mask=inside[:, None], other=0.0)
        image += pixels
        d = tl.where(real, near - centre[:, None], 0.0)  # from the centre: what is flat deviates by exactly 0
        mean = tl.sum(d, 1) / samples
        off = tl.where(real, d - mean[:, None], 0.0)
        square = tl.sum(off * off, 1) + centres * mean * mean
        unlike += tl.abs(d) / (1e-8 + 0.1 * tl.sqrt(square / (samples - 1)))[:, None]
    e = tl.where(real, -unlike / channels, float("-inf"))
    e = tl.exp(e - tl.max(e, 1)[:, None])
    share = e / tl.sum(e, 1)[:, None]
    at = weights + k.to(tl.int64)[None, :] * pixels + pixel[:, None]
    tl.store(at, share, mask=inside[:, None] & real)


@triton.jit
def refine_maps_step_kernel(
    weights, old, new, dilations, names, height, width, count, BLOCK: tl.constexpr, NAMES: tl.constexpr
):
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    name = tl.program_id(1) * NAMES + tl.arange(0, NAMES)
    mask = (name < names)[:, None] & inside[None, :]
    plane = name.to(tl.int64)[:, None] * pixels
    y, x = pixel // width, pixel % width
    sums = tl.zeros([NAMES, BLOCK], tl.float32)
    for k in range(0, count):
        w = tl.load(weights + pixel, mask=inside, other=0.0)
        weights += pixels
        near = _neighbour(y, x, k, dilations, height, width)
        sums += w[None, :] * tl.load(old + plane + near[None, :], mask=mask, other=0.0)
    tl.store(new + plane + pixel[None, :], sums, mask=mask)


@triton.jit
def refine_maps_fold_kernel(
    maps, excluded, value, label, largest, total, pixels, names, first, scale, BLOCK: tl.constexpr
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    best = tl.load(value + pixel, mask=inside, other=0.0)
    chosen = tl.load(label + pixel, mask=inside, other=0)
    before = tl.load(largest + pixel, mask=inside, other=0.0)
    now = before
    plane = maps
    for i in range(0, names):
        z = tl.load(plane + pixel, mask=inside, other=0.0)
        plane += pixels
        now = tl.where(z > now, z, now)
        better = ((z > best) | ((z != z) & (best == best))) & (tl.load(excluded + first + i) == 0)
        best = tl.where(better, z, best)  # NaN is the largest, the first one stays
        chosen = tl.where(better, first + i, chosen)
    sums = tl.load(total + pixel, mask=inside, other=0.0) * tl.exp(scale * (before - now))
    for _ in range(0, names):
        z = tl.load(maps + pixel, mask=inside, other=0.0)
        maps += pixels
        sums += tl.exp(scale * (z - now))
    tl.store(value + pixel, best, mask=inside)
    tl.store(label + pixel, chosen, mask=inside)
    tl.store(largest + pixel, now, mask=inside)
    tl.store(total + pixel, sums, mask=inside)


def refine_maps(
    image: Tensor,
    maps: Tensor,
    size: Size,
    crop: Size,
    canvas: Size,
    windows: Sequence[int],
    steps: int,
    dilations: Sequence[int],
    logit_scale: float | None,
    excluded: Sequence[int],
    labels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: refined maps, or labels and scores; whichever is not asked for is empty."""
    (batch, channels), names = image.shape[:2], maps.shape[1]
    refined = maps.new_empty((0,) if labels else (batch, names, *size))
    found = maps.new_empty((batch, *size) if labels else (0,), dtype=torch.int32)
    scores = maps.new_empty(found.shape, dtype=torch.float32)
    distances = torch.tensor(list(dilations), dtype=torch.int32, device=maps.device)
    out = torch.zeros(names, dtype=torch.int32, device=maps.device)
    if excluded:
        out[list(excluded)] = 1
    start = next((i for i in range(names) if i not in set(excluded)), 0)  # of a pixel where every score is -inf
    halo, neighbours = steps * max(dilations), 8 * len(dilations)
    most = _TILE_BYTES // (4 * (neighbours + channels + 3 * min(_GROUP, max(names, 1)) + 4))
    for b in range(batch):
        own = maps[b * len(windows) // 2 : (b + 1) * len(windows) // 2] if len(windows) > 2 else maps[b : b + 1]
        for rows, cols in _tiles(size, most, halo):
            (top, bottom), (left, right) = (_grown(r, halo, n) for r, n in zip((rows, cols), size, strict=True))
            height, width = bottom - top, right - left
            core = (slice(rows[0] - top, rows[1] - top), slice(cols[0] - left, cols[1] - left))
            place = (slice(*rows), slice(*cols))
            box = (top, bottom, left, right)
            weights = None
            if steps and names:
                weights = _weights(_resized(image[b].float(), size, box), distances, neighbours)
            state = [
                maps.new_full((height * width,), fill, dtype=kind)
                for fill, kind in ((-torch.inf, torch.float32), (start, torch.int32), (_LOWEST, torch.float32),
                                   (0.0, torch.float32))
            ] if labels else []  # fmt: skip
            for first in range(0, names, _GROUP):
                group = _on_canvas(own[:, first : first + _GROUP].float(), size, crop, canvas, windows)
                old = _resized(group, size, box)
                for _ in range(steps):
                    new = torch.empty_like(old)
                    refine_maps_step_kernel[(cdiv(height * width, _PIXELS), cdiv(len(old), _NAMES))](
                        weights, old, new, distances,
                        names=len(old),
                        height=height,
                        width=width,
                        count=neighbours,
                        BLOCK=_PIXELS,
                        NAMES=_NAMES,
                    )  # fmt: skip
                    old = new
                if not labels:
                    refined[b, first : first + len(old), place[0], place[1]] = old[:, core[0], core[1]]
                    continue
                refine_maps_fold_kernel[(cdiv(height * width, _PIXELS),)](
                    old, out, *state,
                    pixels=height * width,
                    names=len(old),
                    first=first,
                    scale=1.0 if logit_scale is None else logit_scale,
                    BLOCK=_PIXELS,
                )  # fmt: skip
            if labels:
                value, label, largest, total = (x.view(height, width)[core] for x in state)
                found[b][place] = label
                scores[b][place] = value if logit_scale is None else (logit_scale * (value - largest)).exp() / total
    return refined, found, scores


def _weights(image: Tensor, distances: Tensor, neighbours: int) -> Tensor:
    """w [K, height, width] of an image [channels, height, width]."""
    channels, height, width = image.shape
    weights = image.new_empty(neighbours, height, width)
    block = next_power_of_2(neighbours)
    pixels = max(1024 // block, 1)
    refine_maps_weights_kernel[(cdiv(height * width, pixels),)](
        image, weights, distances,
        channels=channels,
        height=height,
        width=width,
        count=neighbours,
        BLOCK=pixels,
        NEIGHBOURS=block,
    )  # fmt: skip
    return weights


def _tiles(size: Size, most: int, halo: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of the tiles that make up an image of `size`, each with its halo about `most` pixels."""
    height, width = size
    side = int(most**0.5)
    tall, wide = (most // width if width <= side else side), (most // height if height <= side else side)
    whole = height * width <= most
    for rows in _cores(height, height if whole else tall, halo):
        for cols in _cores(width, width if whole else wide, halo):
            yield rows, cols


def _cores(length: int, room: int, halo: int) -> list[tuple[int, int]]:
    longest = length if length <= room else max(room - 2 * halo, halo, 64)
    step = cdiv(length, cdiv(length, longest))
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _grown(span: tuple[int, int], by: int, length: int) -> tuple[int, int]:
    return max(span[0] - by, 0), min(span[1] + by, length)


def _on_canvas(group: Tensor, size: Size, crop: Size, canvas: Size, windows: Sequence[int]) -> Tensor:
    """The mean [q, h, w] of windows where they lie on the canvas, as small as resizing can start from."""
    if len(windows) == 2 and tuple(crop) == tuple(canvas):
        return group[0] if tuple(crop) == tuple(size) else _resized(group[0], crop, (0, crop[0], 0, crop[1]))
    total, cover = group.new_zeros(group.shape[1], *canvas), group.new_zeros(tuple(canvas))
    for window, y, x in zip(group, windows[::2], windows[1::2], strict=True):
        place = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
        total[place] += _resized(window, crop, (0, crop[0], 0, crop[1]))
        cover[place] += 1
    return total.div_(cover)


def _resized(x: Tensor, size: Size, box: tuple[int, int, int, int]) -> Tensor:
    """The part `box` (top, bottom, left, right) of x [C, h, w] resized to `size`, contiguous."""
    top, bottom, left, right = box
    x = _between(x, 1, size[0], top, bottom)
    return _between(x, 2, size[1], left, right).contiguous()


def _between(x: Tensor, dim: int, length: int, first: int, end: int) -> Tensor:
    old = x.shape[dim]
    if old == length:
        return x.narrow(dim, first, end - first)
    at = ((torch.arange(first, end, dtype=torch.float64) + 0.5) * old / length - 0.5).clamp_min(0)
    low = at.long().clamp_max(old - 1)
    part = (at - low).float()
    high = torch.where(part > 0, low + 1, low).clamp_max(old - 1)  # what has weight 0 is not looked at: it may be NaN
    low, high = low.to(x.device), high.to(x.device)
    part = (part.view(-1, 1) if dim == 1 else part).to(x.device)
    a, b = x.index_select(dim, low), x.index_select(dim, high)
    return a + part * (b - a)
