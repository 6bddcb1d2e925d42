"""masks_to_bits: which patches a soft mask keeps, 32 of them an int32 (MAFT eq. 2, the mask of the attention).

    m = bilinear(sigmoid(bilinear(mask_logits -> padded_size)) -> grid),  bit n of a mask: m[n] >= 0.5

Without antialiasing a patch reads four pixels of the padded size, and each of those four logits: 16 reads a bit,
whatever the sizes, and nothing is stored at the padded size (221 MB for 100 masks of 640 x 864). The soft probability
is resampled, then compared; the sigmoid stands between the two resizes, so they cannot be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._bits import num_words, pack_bits
from zs3fast.ops._checks import check_bool, check_float_tensor, check_size
from zs3fast.ops._register import register_op

OP = "masks_to_bits"
Size = tuple[int, int]


def reference(
    masks: Tensor,
    grid: Size,
    *,
    padded_size: Size | None = None,
    align_corners: bool = False,
    logits: bool = False,
) -> Tensor:
    """The two steps one after the other, every pixel of the padded size stored: see `masks_to_bits`.

    Half types are widened to float32: a mean that was rounded to 8 bits would be 0.5 too often.
    """
    return pack_bits((_reference_soft(masks, grid, padded_size, align_corners, logits) >= 0.5).flatten(2))


def _reference_soft(masks: Tensor, grid: Size, padded_size: Size | None, align_corners: bool, logits: bool) -> Tensor:
    """m, [B, Nq, h, w]: what the bits are thresholds of."""
    masks = masks.float() if masks.dtype in (torch.float16, torch.bfloat16) else masks
    if logits:
        masks = _resize(masks, padded_size or masks.shape[-2:], align_corners).sigmoid()
    return _resize(masks, grid, False)


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if x.shape[0] * x.shape[1] == 0:  # interpolate refuses empty batches
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def masks_to_bits(
    masks: Tensor,
    grid: Size,
    *,
    padded_size: Size | None = None,
    align_corners: bool = False,
    logits: bool = False,
) -> Tensor:
    """Patches that each mask keeps, as bits: the form in which `proposal_attention` reads masks.

    bit n = (bilinear(masks -> grid)[n] >= 0.5),  with masks = sigmoid(bilinear(logits -> padded_size)) of logits

    Args:
        masks: [B, Nq, Hp, Wp] soft masks in [0, 1] (0 and 1 alone will do), or with `logits` their pre-sigmoid maps
            [B, Nq, h4, w4] of any resolution. B = 0 and Nq = 0 give an empty result. Half types are widened.
        grid: (h, w) patches.
        padded_size: with logits, (Hp, Wp): the size that soft masks would have; None: the logits' own.
        align_corners: with logits, how they are brought to padded_size. The step to the grid has align_corners False
            and no antialiasing, so a small object can vanish between the four pixels that a patch reads.
        logits: whether masks are logits.
    Returns:
        [B, Nq, ceil(h w / 32)] int32: patches row by row, patch n in bit n % 32 of word n // 32, 0 behind the last.
        `zs3fast.ops.unpack_bits` makes them bool again. A patch that reads a NaN keeps nothing. Not
        differentiable.
        Equal to resizing, sigmoid and resizing one after the other but where m is within 1e-6 of 0.5.
    Source: MAFT (NeurIPS 2023) eq. 2 and its code, which drops m < 0.5 and repeats this in every layer and head.
    """
    _check(masks, grid, padded_size, align_corners, logits)
    padded = (padded_size or masks.shape[-2:]) if logits else masks.shape[-2:]
    bits: Tensor = torch.ops.zs3fast.masks_to_bits(masks.detach(), tuple(grid), tuple(padded), align_corners, logits)
    return bits


def _check(masks: Tensor, grid: Size, padded_size: Size | None, align_corners: bool, logits: bool) -> None:
    check_float_tensor(OP, "masks", masks)
    if masks.ndim != 4:
        raise ValueError(f"{OP}: masks: expected [B, Nq, height, width], got shape {list(masks.shape)}")
    if masks.shape[2] < 1 or masks.shape[3] < 1:
        raise ValueError(f"{OP}: masks: expected at least one pixel, got shape {list(masks.shape)}")
    check_bool(OP, "logits", logits)
    check_bool(OP, "align_corners", align_corners)
    if not logits and (padded_size is not None or align_corners):
        what = "align_corners" if padded_size is None else "padded_size"
        raise ValueError(f"{OP}: {what}: expected with logits=True alone, whose upsampling it tells, got logits=False")
    check_size(OP, "grid", grid)
    if padded_size is not None:
        check_size(OP, "padded_size", padded_size)


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(masks: Tensor, grid: Size, padded_size: Size, align_corners: bool, logits: bool) -> Tensor:
    return masks.new_empty(*masks.shape[:2], num_words(grid[0] * grid[1]), dtype=torch.int32)


def _reference_run(masks: Tensor, grid: Size, padded_size: Size, align_corners: bool, logits: bool) -> Tensor:
    return reference(masks, grid, padded_size=padded_size, align_corners=align_corners, logits=logits)


def _count(masks: _flops.Shape, grid: Size, _padded: Size, _align: bool, logits: bool) -> int:
    """A patch interpolates between four values, of logits each interpolated itself."""
    return _flops.PER_INTERPOLATED * masks[0] * masks[1] * grid[0] * grid[1] * (5 if logits else 1)


_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _cpp_objections(masks: Tensor, *_args: Any) -> list[str]:
    return _dispatch.cpp_objections(masks, _KERNEL_DTYPES)


def _triton_objections(masks: Tensor, *_args: Any) -> list[str]:
    return _dispatch.triton_objections(masks, _KERNEL_DTYPES)


register_op(
    OP,
    schema="(Tensor masks, SymInt[2] grid, SymInt[2] padded_size, bool align_corners, bool logits) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _cpp_objections, "triton": _triton_objections},
)
