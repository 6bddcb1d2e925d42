"""refine_maps: score maps spread over neighbours that look alike, and labels from them (PAMR).

    x(k), z(k)   image and maps at the k-th of 8 neighbours of each dilation, edges replicated; K = 8 * dilations
    a_k          = mean over channels r of -|x_r - x_r(k)| / (1e-8 + 0.1 std_r)    std over the 9 * dilations samples
    w            = softmax_k(a)                                                                          [K, H, W]
    z            = sum_k w_k z(k),  `steps` times                              the centre is not among the neighbours
    labels       = argmax_q z_q,    scores = softmax_q(logit_scale * z)[labels]

Names share w and know nothing of each other, so they go by some at a time: w stays, two planes a name of the group
change places from step to step, and a finished group leaves what labels need: of each pixel the best name so far and a
sum. Composed of torch ops a step stores [Q, K, H, W], 1.9 GiB for 171 names on 375 x 500. Floor: 2 K Q H W FLOPs a
step, 0.63 GFMA for 21 names, 10 steps and two dilations there: 17 to 46 ms on two cores of a Zen 5, busy or not, where
the plain form takes 3.5 to 3.8 s. Large images are done in tiles, with a halo of steps * the largest dilation. Maps may
be windows on a patch grid, averaged and resized a group at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._checks import MAX_SIDE, check_float_tensor, check_number, check_size, is_int
from zs3fast.ops._register import register_op
from zs3fast.utils.constants import REFINE_STEPS

OP = "refine_maps"
STEPS, DILATIONS = REFINE_STEPS, (8, 16)
Size = Sequence[int]


def neighbour_weights(image: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """How much each pixel of image [B, R, H, W] takes from its neighbours: w [B, K, H, W], 1 over k in sum."""
    near = _around(image, dilations)  # [B, R, K, H, W]
    centre = image.unsqueeze(2)
    samples = torch.cat([near, centre.expand(-1, -1, len(dilations), -1, -1)], 2)  # the centre once a dilation
    unlike = (near - centre).abs() / (1e-8 + 0.1 * samples.std(2, keepdim=True))
    return (-unlike.mean(1)).softmax(1)


def _around(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """x [B, C, H, W] at the 8 neighbours of each dilation, row by row, edges replicated: [B, C, K, H, W]."""
    height, width = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    found = []
    for d in dilations:
        for dy, dx in ((dy, dx) for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)):
            rows, columns = (height + dy).clamp(0, len(height) - 1), (width + dx).clamp(0, len(width) - 1)
            found.append(x[..., rows[:, None], columns])
    return torch.stack(found, 2)


def reference(
    image: Tensor,
    maps: Tensor,
    size: Size | None = None,
    *,
    steps: int = STEPS,
    dilations: Sequence[int] = DILATIONS,
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
) -> Tensor:
    """The definition of `refine_maps`, differentiable. Half types are computed in float32."""
    size, crop, canvas, offsets = _plan(maps, size, crop_size, canvas_size, windows)
    wide = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
    parts = wide.reshape(len(image), len(offsets), *wide.shape[1:])  # [B, n, Q, h, w]
    total, cover = wide.new_zeros(parts.shape[0], parts.shape[2], *canvas), wide.new_zeros(canvas)
    for i, (y, x) in enumerate(offsets):
        total[..., y : y + crop[0], x : x + crop[1]] += _resize(parts[:, i], crop)
        cover[..., y : y + crop[0], x : x + crop[1]] += 1
    refined = _resize(total / cover, size)
    if steps and refined.numel():
        weights = neighbour_weights(_resize(image.to(wide.dtype), size), dilations).unsqueeze(1)
        for _ in range(steps):
            refined = (weights * _around(refined, dilations)).sum(2)
    return refined.to(maps.dtype)


def reference_labels(
    image: Tensor,
    maps: Tensor,
    *args: Any,
    logit_scale: float | None = None,
    excluded: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The definition of `refine_maps_to_labels`."""
    wide = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
    refined = reference(image, wide, *args, **options)
    race = refined.clone()
    race[:, list(excluded)] = -torch.inf
    labels = race.argmax(1, keepdim=True)
    scores = refined if logit_scale is None else (logit_scale * refined).softmax(1)
    return labels[:, 0].int(), scores.gather(1, labels)[:, 0].float()


def refine_maps(
    image: Tensor,
    maps: Tensor,
    size: Size | None = None,
    *,
    steps: int = STEPS,
    dilations: Sequence[int] = DILATIONS,
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
) -> Tensor:
    """Score maps spread `steps` times over neighbours that look alike.

    z = sum over k of w_k z(k),  w = softmax_k(mean over channels of -|x - x(k)| / (1e-8 + 0.1 std))

    Args:
        image:     [B, R, h', w'], any size and number of channels, normalised or not; resized to `size`.
        maps:      [B * n, Q, h, w] scores of Q names, n windows an image, image-major; B = 0 and Q = 0 give empty
                   results.
        size:      (H, W) of the result; None: the canvas, or of maps that are no windows their own.
        steps:     0 gives the resized maps.
        dilations: distances of neighbours in pixels of the result, 1 at least; eight neighbours each.
        crop_size, canvas_size, windows: as of `masks_to_labels`: where windows lie on the canvas that is resized to
                   `size`; each is resized to crop_size, and where they overlap their mean is taken. All resizing is
                   bilinear with align_corners=False and no antialias. None: one window that is the canvas.
    Returns:
        [B, Q, H, W] of maps' dtype. NaN reaches the pixels that a resize takes it into with a weight above 0, and all
        their neighbours in each step, however small their weights; one in the image, the pixels whose neighbours or
        centre it is. Not differentiable; `reference` is.
    Source: Araslanov and Roth, CVPR 2020 (PAMR); steps and dilations are those of SCLIP and NACLIP (WACV 2025).
    """
    _check(image, maps, size, steps, dilations, crop_size, canvas_size, windows)
    if torch.is_grad_enabled() and (image.requires_grad or maps.requires_grad):
        raise ValueError(f"{OP}: not differentiable: expected tensors without requires_grad (detach() them), got one")
    return _call(image, maps, size, steps, dilations, crop_size, canvas_size, windows, None, (), False)[0]


def refine_maps_to_labels(
    image: Tensor,
    maps: Tensor,
    size: Size | None = None,
    *,
    steps: int = STEPS,
    dilations: Sequence[int] = DILATIONS,
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
    logit_scale: float | None = None,
    excluded: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The best name of every pixel of `refine_maps`, without storing a map a name.

    labels = argmax_q z_q,    scores = softmax_q(logit_scale * z)[labels], or z[labels]

    Args:
        image, maps, ...: as of `refine_maps`; Q is 1 at least.
        logit_scale: above 0, of the softmax over names; None: scores are the refined values themselves.
        excluded:    names that cannot win. They stay in the softmax's sum.
    Returns:
        labels [B, H, W] int32 and scores [B, H, W] float32 (float64 scores are rounded). Equal scores go to the lowest
        name; NaN counts as the largest. Not differentiable.
    """
    _check(image, maps, size, steps, dilations, crop_size, canvas_size, windows)
    names = maps.shape[1]
    if names < 1:
        raise ValueError(f"{OP}: maps: expected one name at least to choose from, got shape {list(maps.shape)}")
    check_number(OP, "logit_scale", logit_scale, optional=True)
    if logit_scale is not None and not 0 < logit_scale < math.inf:
        raise ValueError(f"{OP}: logit_scale: expected a positive number, got {logit_scale}")
    wrong = [name for name in excluded if not is_int(name) or not 0 <= name < names]
    if wrong:
        raise ValueError(f"{OP}: excluded: expected names 0..{names - 1}, got {wrong[:5]}")
    if len(set(excluded)) == names:
        raise ValueError(f"{OP}: excluded: expected some of the {names} names to be left, got all of them")
    image, maps = image.detach(), maps.detach()
    arguments = (size, steps, dilations, crop_size, canvas_size, windows, logit_scale, excluded)
    return _call(image, maps, *arguments, True)[1:]


def _call(
    image: Tensor,
    maps: Tensor,
    size: Size | None,
    steps: int,
    dilations: Sequence[int],
    crop_size: Size | None,
    canvas_size: Size | None,
    windows: Sequence[Size] | None,
    logit_scale: float | None,
    excluded: Sequence[int],
    labels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size, crop, canvas, offsets = _plan(maps, size, crop_size, canvas_size, windows)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.zs3fast.refine_maps(
        image,
        maps,
        size,
        crop,
        canvas,
        [value for offset in offsets for value in offset],
        steps,
        list(dilations),
        None if logit_scale is None else float(logit_scale),
        sorted(set(excluded)),
        labels,
    )
    return out


def _resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, align_corners=False, along one axis after the other. What has weight 0 is not looked at."""
    for dim, new in zip((-2, -1), size, strict=True):
        old = x.shape[dim]
        if old == new:
            continue
        at = ((2 * torch.arange(new, device=x.device) + 1) * old - new).clamp(min=0)  # in whole halves of 1 / new
        low = (at // (2 * new)).clamp(max=old - 1)
        part = (at - low * 2 * new).to(x.dtype) / (2 * new)
        high = torch.where(part > 0, low + 1, low).clamp(max=old - 1)
        part = part.unsqueeze(-1) if dim == -2 else part
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), part)
    return x


def _plan(
    maps: Tensor, size: Size | None, crop_size: Size | None, canvas_size: Size | None, windows: Sequence[Size] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], list[tuple[int, int]]]:
    """Size, crop, canvas and offsets with their defaults filled in."""
    crop = canvas_size or size or maps.shape[-2:] if crop_size is None else crop_size
    canvas = crop if canvas_size is None else canvas_size
    final = canvas if size is None else size
    offsets = [(0, 0)] if windows is None else [(y, x) for y, x in windows]
    return (final[0], final[1]), (crop[0], crop[1]), (canvas[0], canvas[1]), offsets


def _check(
    image: Tensor,
    maps: Tensor,
    size: Size | None,
    steps: int,
    dilations: Sequence[int],
    crop_size: Size | None,
    canvas_size: Size | None,
    windows: Sequence[Size] | None,
) -> None:
    for name, x in (("image", image), ("maps", maps)):
        check_float_tensor(OP, name, x)
        if x.ndim != 4 or 0 in x.shape[-2:]:
            raise ValueError(f"{OP}: {name}: expected [B, channels, height, width], got shape {list(x.shape)}")
    if image.shape[1] < 1:
        raise ValueError(f"{OP}: image: expected one channel at least, got shape {list(image.shape)}")
    if image.device != maps.device:
        raise ValueError(f"{OP}: image: expected maps' device {maps.device}, got {image.device}")
    if not is_int(steps):
        raise TypeError(f"{OP}: steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"{OP}: steps: expected 0 or more, got {steps}")
    if not isinstance(dilations, Sequence) or not all(is_int(d) for d in dilations):
        raise TypeError(f"{OP}: dilations: expected ints, got {dilations!r}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"{OP}: dilations: expected at least one, each 1 or more, got {tuple(dilations)}")
    if steps > MAX_SIDE or max(dilations) > MAX_SIDE or steps * max(dilations) > MAX_SIDE:
        raise ValueError(
            f"{OP}: steps: expected to reach 2^24 pixels at most, got {steps} of dilations {tuple(dilations)}"
        )
    for name, pair in (("size", size), ("crop_size", crop_size), ("canvas_size", canvas_size)):
        if pair is not None:
            check_size(OP, name, pair)
    if windows is not None:
        if crop_size is None or canvas_size is None:
            raise ValueError(f"{OP}: windows: expected with crop_size and canvas_size, got {crop_size}, {canvas_size}")
        for window in windows:
            if not isinstance(window, Sequence) or len(window) != 2 or not all(map(is_int, window)):
                raise TypeError(f"{OP}: windows: expected pairs of ints (y, x), got {window!r}")
    _, crop, canvas, offsets = _plan(maps, size, crop_size, canvas_size, windows)
    if not offsets:
        raise ValueError(f"{OP}: windows: expected one at least, got none")
    if maps.shape[0] != image.shape[0] * len(offsets):
        raise ValueError(
            f"{OP}: maps: expected {image.shape[0]} images * {len(offsets)} windows, got shape {list(maps.shape)}"
        )
    for top, left in offsets:
        if top < 0 or left < 0 or top + crop[0] > canvas[0] or left + crop[1] > canvas[1]:
            raise ValueError(
                f"{OP}: windows: expected ({top}, {left}) of size {crop} to lie on the canvas, got {canvas}"
            )
    hole = _uncovered(crop, canvas, offsets)
    if hole is not None:
        raise ValueError(f"{OP}: windows: expected to cover the canvas {canvas}, got none over pixel {hole}")


def _uncovered(crop: Size, canvas: Size, offsets: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The first canvas pixel under no window; which windows lie over a row changes only where one starts or ends."""
    rows = sorted({0} | {y for y, _ in offsets} | {y + crop[0] for y, _ in offsets if y + crop[0] < canvas[0]})
    for row in rows:
        reach = 0
        for x in sorted(x for y, x in offsets if y <= row < y + crop[0]):
            if x > reach:
                break
            reach = max(reach, x + crop[1])
        if reach < canvas[1]:
            return row, reach
    return None


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
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
    batch, names = image.shape[0], maps.shape[1]
    pixels = (batch, *size) if labels else (0,)
    return (
        maps.new_empty((0,) if labels else (batch, names, *size)),
        maps.new_empty(pixels, dtype=torch.int32),
        maps.new_empty(pixels, dtype=torch.float32),
    )


def _reference_run(
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
    offsets = list(zip(windows[::2], windows[1::2], strict=True))
    options: dict[str, Any] = {"steps": steps, "dilations": dilations}
    options |= {"crop_size": crop, "canvas_size": canvas, "windows": offsets}
    if labels:
        found = reference_labels(image, maps, size, logit_scale=logit_scale, excluded=excluded, **options)
        return maps.new_empty(0), *found
    refined = reference(image, maps, size, **options)
    return refined, maps.new_empty(0, dtype=torch.int32), maps.new_empty(0, dtype=torch.float32)


def _count(
    image: _flops.Shape,
    maps: _flops.Shape,
    size: Size,
    crop: Size,
    canvas: Size,
    windows: Sequence[int],
    steps: int,
    dilations: Sequence[int],
    *_: Any,
) -> int:
    """Multiply-adds of the steps, and the interpolations."""
    pixels, names = size[0] * size[1], maps[1]
    resized = maps[0] * names * crop[0] * crop[1] if tuple(crop) != tuple(maps[2:]) else 0
    resized += image[0] * names * pixels if tuple(size) != tuple(canvas) else 0
    resized += image[0] * image[1] * pixels if tuple(size) != tuple(image[2:]) else 0
    return 2 * steps * 8 * len(dilations) * image[0] * names * pixels + _flops.PER_INTERPOLATED * resized


_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def _wide_image(image: Tensor) -> list[str]:
    return ["a float64 image not built (float32, float16, bfloat16)"] if image.dtype == torch.float64 else []


def _cpp_objections(image: Tensor, maps: Tensor | None = None, *_: Any) -> list[str]:
    return _dispatch.cpp_objections(image if maps is None else maps, _KERNEL_DTYPES) + _wide_image(image)


def _triton_objections(image: Tensor, maps: Tensor | None = None, *_: Any) -> list[str]:
    return _dispatch.triton_objections(image if maps is None else maps, _KERNEL_DTYPES) + _wide_image(image)


register_op(
    OP,
    schema=(
        "(Tensor image, Tensor maps, SymInt[2] size, SymInt[2] crop_size, SymInt[2] canvas_size, SymInt[] windows,"
        " int steps, int[] dilations, float? logit_scale, int[] excluded, bool labels)"
        " -> (Tensor refined, Tensor labels, Tensor scores)"
    ),
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _cpp_objections, "triton": _triton_objections},
)
