"""proposals_to_labels: classified mask proposals to a label map (MAFT, section "semantic output" of every MaskFormer).

    M[q]   = sigmoid(upsample(mask_logits[q], padded_size))[:Hi, :Wi]          or soft masks as they are
    O[c]   = sum_q A[q, c] * resize(M[q], size)                                resize: bilinear, align_corners=False
    labels = argmax_c O[c]

The resize commutes with the sum, so it is done on Nq masks instead of C classes, at the size that is asked for: a
product [H W, Nq] x [Nq, C] of 2 * Nq * C * H * W FLOPs with an argmax behind it. Composed of torch ops it stores
4 * C * Hp * Wp bytes, 1.9 GB for C = 847 on 640 x 864. Over a tile every proposal lies in an interval; a class that
loses to another for all values in the intervals is not computed there, which leaves a few classes a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._checks import check_bool, check_float_tensor, check_label_dtype, check_size
from zs3fast.ops._register import register_op
from zs3fast.utils.precision import without_autocast

OP = "proposals_to_labels"
Size = Sequence[int]


def reference_scores(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    *,
    logits: bool,
    padded_size: Size | None = None,
    image_size: Size | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Score of every class at every pixel: exact, differentiable, and as large as it sounds.

    Args: as of `proposals_to_labels`.
    Returns:
        [B, C, H, W] float32; float64 if an argument is. Half types are computed in float32, under autocast too.
    """
    dtype = _score_dtype(class_weights, masks)
    masks = masks.to(dtype)
    if logits:
        masks = _resize(masks, tuple(padded_size or masks.shape[-2:]), align_corners).sigmoid()
    height, width = image_size or masks.shape[-2:]
    masks = _resize(masks[..., :height, :width], tuple(size), False)
    with without_autocast(masks.device):
        return torch.einsum("bqc,bqhw->bchw", class_weights.to(dtype), masks)


def reference(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    *,
    logits: bool,
    padded_size: Size | None = None,
    image_size: Size | None = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `proposals_to_labels`: the best of `reference_scores`, the lowest class index among equals.

    NaN counts as the largest score, as in torch.argmax.
    """
    scores = reference_scores(
        class_weights,
        masks,
        size,
        logits=logits,
        padded_size=padded_size,
        image_size=image_size,
        align_corners=align_corners,
    )
    best = scores.argmax(1, keepdim=True)
    labels = best[:, 0].to(dtype)
    return (labels, scores.gather(1, best)[:, 0]) if return_scores else labels


@overload
def proposals_to_labels(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    *,
    logits: bool,
    padded_size: Size | None = None,
    image_size: Size | None = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
    return_scores: Literal[False] = False,
) -> Tensor: ...
@overload
def proposals_to_labels(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    *,
    logits: bool,
    padded_size: Size | None = None,
    image_size: Size | None = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def proposals_to_labels(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    *,
    logits: bool,
    padded_size: Size | None = None,
    image_size: Size | None = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map of classified mask proposals, without storing a score per class and pixel.

    labels = argmax_c sum_q class_weights[q, c] * resize(crop(M[q])),   M = masks, or sigmoid(upsample(masks)) if logits

    Args:
        class_weights: [B, Nq, C], what each proposal adds to each class. Any sign. Nq = 0: all scores are 0.
        masks: [B, Nq, Hp, Wp] soft masks on the padded frame, or [B, Nq, h, w] their logits at any resolution.
        size: (H, W) of the label map.
        logits: what `masks` are.
        padded_size: (Hp, Wp), the frame that logits are upsampled to; None: h, w. Soft masks have it already.
        image_size: (Hi, Wi), the top left part of the padded frame that is image; None: all of it.
        align_corners: of the bilinear upsampling to the padded frame. The resize to `size` is never aligned.
        dtype: of the labels: int64, int32, int16 or uint8; large enough for C - 1.
        return_scores: also return the winning scores.
    Returns:
        [B, H, W] labels; with return_scores (labels, scores), both [B, H, W], scores float32 (float64 for float64).
        Equal scores go to the lowest class index; NaN counts as the largest score. Not differentiable:
        `reference_scores` is.
    Source: MAFT (NeurIPS 2023) section 3, after MaskFormer's semantic inference.
    """
    _check_tensors(class_weights, masks)
    check_bool(OP, "return_scores", return_scores)
    check_label_dtype(OP, class_weights.shape[2], dtype)
    padded, image = _frame(masks, size, logits, padded_size, image_size, align_corners)
    labels, scores = torch.ops.zs3fast.proposals_to_labels(
        class_weights.detach(),
        masks.detach(),
        list(size),
        logits,
        padded,
        image,
        align_corners,
        dtype,
        return_scores,
    )
    return (labels, scores) if return_scores else labels


def _score_dtype(class_weights: Tensor, masks: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(class_weights.dtype, masks.dtype), torch.float32)


def _resize(x: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    if x.shape[0] == 0 or x.shape[1] == 0:  # interpolate refuses empty maps
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def _check_tensors(class_weights: Tensor, masks: Tensor) -> None:
    for name, x, ndim in (("class_weights", class_weights, 3), ("masks", masks, 4)):
        check_float_tensor(OP, name, x)
        if x.ndim != ndim:
            raise ValueError(f"{OP}: {name}: expected {ndim} dimensions, got shape {list(x.shape)}")
    if class_weights.shape[2] == 0:
        raise ValueError(f"{OP}: class_weights: expected at least one class, got shape {list(class_weights.shape)}")
    if any(n == 0 for n in masks.shape[2:]):
        raise ValueError(f"{OP}: masks: expected at least one pixel, got shape {list(masks.shape)}")
    for what, dim in (("images", 0), ("proposals", 1)):
        if class_weights.shape[dim] != masks.shape[dim]:
            raise ValueError(
                f"{OP}: class_weights: expected {masks.shape[dim]} {what}, as masks {list(masks.shape)}, "
                f"got {list(class_weights.shape)}"
            )
    if class_weights.device != masks.device:
        raise ValueError(f"{OP}: class_weights: expected the masks' device {masks.device}, got {class_weights.device}")


def _frame(
    masks: Tensor,
    size: Size,
    logits: bool,
    padded_size: Size | None,
    image_size: Size | None,
    align_corners: bool,
) -> tuple[list[int], list[int]]:
    """The padded frame and the image on it, checked."""
    check_bool(OP, "logits", logits)
    check_bool(OP, "align_corners", align_corners)
    for name, pair in (("size", size), ("padded_size", padded_size), ("image_size", image_size)):
        if pair is not None or name == "size":
            check_size(OP, name, pair)
    own = list(masks.shape[2:])
    padded = own if padded_size is None else list(padded_size)
    if not logits and padded != own:
        raise ValueError(f"{OP}: masks: expected soft ones on the padded frame {padded}, got {own}")
    image = padded if image_size is None else list(image_size)
    if image[0] > padded[0] or image[1] > padded[1]:
        raise ValueError(f"{OP}: image_size: expected at most the padded frame {padded}, got {image}")
    return padded, image


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    logits: bool,
    padded_size: Size,
    image_size: Size,
    align_corners: bool,
    dtype: torch.dtype,
    return_scores: bool,
) -> tuple[Tensor, Tensor]:
    shape = (masks.shape[0], *size)
    return (
        masks.new_empty(shape, dtype=dtype),
        masks.new_empty(shape if return_scores else (0,), dtype=_score_dtype(class_weights, masks)),
    )


def _reference_run(
    class_weights: Tensor,
    masks: Tensor,
    size: Size,
    logits: bool,
    padded_size: Size,
    image_size: Size,
    align_corners: bool,
    dtype: torch.dtype,
    return_scores: bool,
) -> tuple[Tensor, Tensor]:
    labels, scores = reference(
        class_weights,
        masks,
        size,
        logits=logits,
        padded_size=padded_size,
        image_size=image_size,
        align_corners=align_corners,
        dtype=dtype,
        return_scores=True,
    )
    return labels.contiguous(), scores.contiguous() if return_scores else scores.new_empty(0)


def _count(
    class_weights: _flops.Shape,
    masks: _flops.Shape,
    size: Size,
    logits: bool,
    padded: Size,
    image: Size,
    *_args: Any,
) -> int:
    """The product of class weights and masks, the resize of every mask, and of logits the upsampling before it."""
    B, Nq, C = class_weights
    pixels = size[0] * size[1]
    upsampled = padded[0] * padded[1] if logits and tuple(padded) != tuple(masks[2:]) else 0
    resized = pixels if tuple(size) != tuple(image) else 0
    return 2 * B * Nq * C * pixels + _flops.PER_INTERPOLATED * B * Nq * (upsampled + resized)


_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _each(objections: Callable[[Tensor, tuple[torch.dtype, ...]], list[str]]) -> _dispatch.Objections:
    """Objections to either tensor, each named once."""

    def both(*args: Any) -> list[str]:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        return list(dict.fromkeys(reason for tensor in tensors for reason in objections(tensor, _KERNEL_DTYPES)))

    return both


register_op(
    OP,
    schema=(
        "(Tensor class_weights, Tensor masks, SymInt[2] size, bool logits, SymInt[2] padded_size,"
        " SymInt[2] image_size, bool align_corners, ScalarType dtype, bool return_scores)"
        " -> (Tensor labels, Tensor scores)"
    ),
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _each(_dispatch.cpp_objections), "triton": _each(_dispatch.triton_objections)},
)
