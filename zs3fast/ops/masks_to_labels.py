"""masks_to_labels: class maps on the patch grid to a label map (ZegCLIP; TagCLIP eq. 14; sliding-window tests).

    p[c]     = sigmoid(upsample(mask_logits)[c]) - seen_offset * [c seen]        upsample: bilinear, align_corners=False
    u        = sigmoid(upsample(trusty_logits))
    s[c]     = p[c] * (1 - u) if c is seen else p[c] * u                         trusty_weighting "both"
    labels   = argmax_c resize(mean of s over the windows that cover a pixel, size)

Composed of torch ops, each line stores B * C * H * W floats several times over. What has to move is the input,
4 * B * C * h * w bytes, and the labels; the kernels read the first once or twice and write only the second. A class
whose largest value in the neighbourhood is below another's smallest cannot win there, so the CPU kernel evaluates a few
candidates a pixel instead of C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._checks import check_bool, check_float_tensor, check_label_dtype, check_number, check_size, is_int
from zs3fast.ops._register import register_op

OP = "masks_to_labels"
TRUSTY_WEIGHTINGS = ("both", "seen", "unseen", "off")
Size = Sequence[int]


class LabelMap(NamedTuple):
    """Labels with what is known of them.

    labels:    [B, H, W] or [B, top_k, H, W], best class first.
    scores:    the calibrated score of each, float32 (float64 for float64 logits).
    nan_count: [B] int64, pixels whose best score is NaN.
    """

    labels: Tensor
    scores: Tensor
    nan_count: Tensor


def reference_scores(
    mask_logits: Tensor,
    size: Size,
    seen: Sequence[int] | None = None,
    seen_offset: float = 0.0,
    trusty_logits: Tensor | None = None,
    *,
    trusty_weighting: str = "both",
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
) -> Tensor:
    """Calibrated score of every class at every pixel: exact, differentiable, and as large as it sounds.

    Args: as of `masks_to_labels`.
    Returns:
        [B, C, H, W] float32; float64 if mask_logits are. Half types are computed in float32, since sigmoids that
        were rounded to 8 bits would tie everywhere.
    """
    crop, canvas, offsets = _plan(size, crop_size, canvas_size, windows)
    logits = _widened(mask_logits)
    logits = logits.reshape(-1, len(offsets), *logits.shape[1:])  # [B, n, C, h, w]
    is_seen = torch.zeros(logits.shape[2], dtype=torch.bool)
    if seen:
        is_seen[list(seen)] = True
    is_seen = is_seen.to(logits.device)[:, None, None]  # [C, 1, 1]
    trusty = None
    if trusty_logits is not None and trusty_weighting != "off":
        trusty = _widened(trusty_logits).to(logits.dtype)
        trusty = trusty.reshape(-1, len(offsets), *trusty.shape[1:])  # [B, n, 1, h, w]

    total = logits.new_zeros(logits.shape[0], logits.shape[2], *canvas)
    cover = logits.new_zeros(canvas)
    for i, (y, x) in enumerate(offsets):
        scores = _upsample(logits[:, i], crop).sigmoid() - seen_offset * is_seen.to(logits.dtype)
        if trusty is not None:
            unseen = _upsample(trusty[:, i], crop).sigmoid()  # [B, 1, *crop], P(pixel is unseen)
            one = torch.ones_like(unseen)
            scores = scores * torch.where(
                is_seen,
                1 - unseen if trusty_weighting in ("both", "seen") else one,
                unseen if trusty_weighting in ("both", "unseen") else one,
            )
        total[:, :, y : y + crop[0], x : x + crop[1]] += scores
        cover[y : y + crop[0], x : x + crop[1]] += 1
    return _upsample(total / cover, tuple(size))


def reference(
    mask_logits: Tensor,
    size: Size,
    seen: Sequence[int] | None = None,
    seen_offset: float = 0.0,
    trusty_logits: Tensor | None = None,
    *,
    trusty_weighting: str = "both",
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.int64,
    return_details: bool = False,
) -> Tensor | LabelMap:
    """The definition of `masks_to_labels`: the best of `reference_scores`, the lowest class index among equals.

    NaN counts as the largest score, as in torch.argmax.
    """
    scores = reference_scores(
        mask_logits,
        size,
        seen,
        seen_offset,
        trusty_logits,
        trusty_weighting=trusty_weighting,
        crop_size=crop_size,
        canvas_size=canvas_size,
        windows=windows,
    )
    best = scores.argmax(1, keepdim=True)
    if top_k > 1:  # a stable sort, unlike topk, keeps equal scores in class order
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, best)
    result = LabelMap(best.to(dtype), chosen, chosen[:, 0].isnan().sum((1, 2)))
    if top_k == 1:
        result = LabelMap(result.labels[:, 0], result.scores[:, 0], result.nan_count)
    return result if return_details else result.labels


@overload
def masks_to_labels(
    mask_logits: Tensor,
    size: Size,
    seen: Sequence[int] | None = None,
    seen_offset: float = 0.0,
    trusty_logits: Tensor | None = None,
    *,
    trusty_weighting: str = "both",
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.int64,
    return_details: Literal[False] = False,
) -> Tensor: ...
@overload
def masks_to_labels(
    mask_logits: Tensor,
    size: Size,
    seen: Sequence[int] | None = None,
    seen_offset: float = 0.0,
    trusty_logits: Tensor | None = None,
    *,
    trusty_weighting: str = "both",
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.int64,
    return_details: Literal[True],
) -> LabelMap: ...
def masks_to_labels(
    mask_logits: Tensor,
    size: Size,
    seen: Sequence[int] | None = None,
    seen_offset: float = 0.0,
    trusty_logits: Tensor | None = None,
    *,
    trusty_weighting: str = "both",
    crop_size: Size | None = None,
    canvas_size: Size | None = None,
    windows: Sequence[Size] | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.int64,
    return_details: bool = False,
) -> Tensor | LabelMap:
    """Label map of the best calibrated class scores, without storing a score per class and pixel.

    labels = argmax_c resize(mean over windows of weight_c * (sigmoid(upsample(mask_logits)[c]) - seen_offset [c seen]))

    Args:
        mask_logits: [B * n, C, h, w] pre-sigmoid class maps, n windows an image, image-major. B = 0 gives no labels.
        size: (H, W) of the label map.
        seen: class indices that count as seen; None means none.
        seen_offset: subtracted from the sigmoid of every seen class.
        trusty_logits: [B * n, 1, h', w'] pre-sigmoid, sigmoid = P(pixel is unseen); None: no weighting.
        trusty_weighting: "both": seen scores * (1 - u), unseen * u; "seen" or "unseen": only that half; "off": neither.
        crop_size: size of one window in pixels; None: `size`.
        canvas_size: size of the image the windows lie on; None: `crop_size`.
        windows: n offsets (y, x) of the windows' top left corners, the same for each image. Together they cover the
            canvas. None: one window that is the canvas.
        top_k: how many classes a pixel, best first.
        dtype: of the labels: int64, int32, int16 or uint8; large enough for C - 1.
        return_details: also return the scores of the chosen classes and how many are NaN.
    Returns:
        [B, H, W] labels, [B, top_k, H, W] if top_k > 1; a `LabelMap` if return_details. Equal scores go to the lowest
        class index; NaN counts as the largest score, whether or not one that is
        read with weight 0 makes a NaN. Not differentiable: `reference_scores` is.
    """
    _check_tensors(mask_logits, trusty_logits, trusty_weighting)
    check_bool(OP, "return_details", return_details)
    classes = mask_logits.shape[1]
    _check_classes(classes, seen, seen_offset, top_k, dtype)
    _check_geometry(mask_logits, size, crop_size, canvas_size, windows)
    crop, canvas, offsets = _plan(size, crop_size, canvas_size, windows)
    labels, scores, nan_count = torch.ops.zs3fast.masks_to_labels(
        mask_logits.detach(),
        None if trusty_logits is None or trusty_weighting == "off" else trusty_logits.detach(),
        sorted(seen or []),
        float(seen_offset),
        trusty_weighting,
        list(size),
        list(crop),
        list(canvas),
        [value for offset in offsets for value in offset],
        top_k,
        dtype,
        return_details,
    )
    return LabelMap(labels, scores, nan_count) if return_details else labels


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _upsample(x: Tensor, size: Size) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.shape[0] == 0:  # interpolate refuses empty batches
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _plan(
    size: Size, crop_size: Size | None, canvas_size: Size | None, windows: Sequence[Size] | None
) -> tuple[tuple[int, int], tuple[int, int], list[tuple[int, int]]]:
    crop = (size[0], size[1]) if crop_size is None else (crop_size[0], crop_size[1])
    canvas = crop if canvas_size is None else (canvas_size[0], canvas_size[1])
    return crop, canvas, [(0, 0)] if windows is None else [(y, x) for y, x in windows]


def _check_tensors(mask_logits: Tensor, trusty_logits: Tensor | None, trusty_weighting: str) -> None:
    for name, x in (("mask_logits", mask_logits), ("trusty_logits", trusty_logits)):
        if x is None and name == "trusty_logits":
            continue
        x = check_float_tensor(OP, name, x)
        if x.ndim != 4:
            raise ValueError(f"{OP}: {name}: expected 4 dimensions, got shape {list(x.shape)}")
        if any(n == 0 for n in x.shape[1:]):
            raise ValueError(f"{OP}: {name}: expected at least one class and one patch, got shape {list(x.shape)}")
    if trusty_weighting not in TRUSTY_WEIGHTINGS:
        expected = ", ".join(TRUSTY_WEIGHTINGS)
        raise ValueError(f"{OP}: trusty_weighting: expected one of {expected}, got {trusty_weighting!r}")
    if trusty_logits is None:
        return
    if trusty_logits.shape[0] != mask_logits.shape[0] or trusty_logits.shape[1] != 1:
        raise ValueError(
            f"{OP}: trusty_logits: expected [{mask_logits.shape[0]}, 1, h, w] to go with mask_logits "
            f"{list(mask_logits.shape)}, got {list(trusty_logits.shape)}"
        )
    for what in ("dtype", "device"):
        ours, theirs = getattr(mask_logits, what), getattr(trusty_logits, what)
        if ours != theirs:
            raise ValueError(f"{OP}: trusty_logits: expected the {what} of mask_logits, {ours}, got {theirs}")


def _check_classes(
    classes: int, seen: Sequence[int] | None, seen_offset: float, top_k: int, dtype: torch.dtype
) -> None:
    check_number(OP, "seen_offset", seen_offset)
    if not abs(seen_offset) < math.inf:  # which, unlike math.isfinite, a traced number may be asked
        raise ValueError(f"{OP}: seen_offset: expected a finite number, got {seen_offset}")
    if seen is not None:
        if isinstance(seen, Tensor):
            raise TypeError(f"{OP}: seen: expected a sequence of ints, got a tensor (use .tolist())")
        wrong = [c for c in seen if not is_int(c) or c < 0 or c >= classes]
        if wrong:
            raise ValueError(f"{OP}: seen: expected class indices 0..{classes - 1}, got {wrong[:5]}")
        if len(set(seen)) != len(seen):
            raise ValueError(f"{OP}: seen: expected different class indices, got {list(seen)}")
    if not is_int(top_k) or not 1 <= top_k <= classes:
        raise ValueError(f"{OP}: top_k: expected a number in 1..C = {classes}, got {top_k!r}")
    check_label_dtype(OP, classes, dtype)


def _check_geometry(
    mask_logits: Tensor,
    size: Size,
    crop_size: Size | None,
    canvas_size: Size | None,
    windows: Sequence[Size] | None,
) -> None:
    for name, pair in (("size", size), ("crop_size", crop_size), ("canvas_size", canvas_size)):
        if pair is not None or name == "size":
            check_size(OP, name, pair)
    if windows is not None:
        if crop_size is None:
            raise ValueError(f"{OP}: crop_size: expected the size of one window, as windows are given, got None")
        for window in windows:
            if not isinstance(window, Sequence) or len(window) != 2 or not all(is_int(n) for n in window):
                raise TypeError(f"{OP}: windows: expected pairs of ints (y, x), got {window!r}")
    crop, canvas, offsets = _plan(size, crop_size, canvas_size, windows)
    if not offsets:
        raise ValueError(f"{OP}: windows: expected at least one, got none (None: one window that is the canvas)")
    if mask_logits.shape[0] % len(offsets):
        rows = mask_logits.shape[0]
        raise ValueError(f"{OP}: mask_logits: expected a multiple of {len(offsets)} windows as rows, got {rows}")
    for y, x in offsets:
        if y < 0 or x < 0 or y + crop[0] > canvas[0] or x + crop[1] > canvas[1]:
            raise ValueError(f"{OP}: windows: expected all within the canvas {canvas}, got ({y}, {x}) of size {crop}")
    hole = _uncovered(crop, canvas, offsets)
    if hole is not None:
        raise ValueError(
            f"{OP}: windows: expected to cover the canvas {canvas}, got none over pixel {hole} (crop {crop}, {offsets})"
        )


def _uncovered(crop: Size, canvas: Size, offsets: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The first canvas pixel under no window; which windows lie over a row changes only where one starts or ends."""
    rows = sorted({0} | {y for y, _ in offsets} | {y + crop[0] for y, _ in offsets if y + crop[0] < canvas[0]})
    for row in rows:
        reach = 0
        for x in sorted(x for y, x in offsets if y <= row < y + crop[0]):
            if x > reach:
                break
            reach = x + crop[1]
        if reach < canvas[1]:
            return row, reach
    return None


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    mask_logits: Tensor,
    trusty_logits: Tensor | None,
    seen: list[int],
    offset: float,
    weighting: str,
    size: list[int],
    crop: list[int],
    canvas: list[int],
    windows: list[int],
    top_k: int,
    dtype: torch.dtype,
    return_details: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = mask_logits.shape[0] // (len(windows) // 2)
    shape = (batch, *size) if top_k == 1 else (batch, top_k, *size)
    return (
        mask_logits.new_empty(shape, dtype=dtype),
        mask_logits.new_empty(shape if return_details else (0,), dtype=_score_dtype(mask_logits)),
        mask_logits.new_empty((batch,) if return_details else (0,), dtype=torch.int64),
    )


def _score_dtype(mask_logits: Tensor) -> torch.dtype:
    return torch.promote_types(mask_logits.dtype, torch.float32)


def _reference_run(
    mask_logits: Tensor,
    trusty_logits: Tensor | None,
    seen: list[int],
    offset: float,
    weighting: str,
    size: list[int],
    crop: list[int],
    canvas: list[int],
    windows: list[int],
    top_k: int,
    dtype: torch.dtype,
    return_details: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result = reference(
        mask_logits,
        size,
        seen,
        offset,
        trusty_logits,
        trusty_weighting=weighting,
        crop_size=crop,
        canvas_size=canvas,
        windows=list(zip(windows[::2], windows[1::2], strict=True)),
        top_k=top_k,
        dtype=dtype,
        return_details=True,
    )
    assert isinstance(result, LabelMap)
    labels, scores, nan_count = (x.contiguous() for x in result)  # gathered along the classes, they lie otherwise
    if not return_details:
        scores, nan_count = scores.new_empty(0), nan_count.new_empty(0)
    return labels, scores, nan_count


_CUDA_MAX_CLASSES = 8192  # which of them are seen travels as an argument of the kernel
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _cpp_objections(mask_logits: Tensor, *_args: Any) -> list[str]:
    return _dispatch.cpp_objections(mask_logits, _KERNEL_DTYPES)


def _triton_objections(mask_logits: Tensor, *_args: Any) -> list[str]:
    return _dispatch.triton_objections(mask_logits, _KERNEL_DTYPES)


def _cuda_objections(
    logits: Tensor,
    _trusty: Tensor | None = None,
    _seen: Sequence[int] = (),
    _offset: float = 0.0,
    _weighting: str = "off",
    size: Size = (),
    crop: Size = (),
    canvas: Size = (),
    windows: Sequence[int] = (0, 0),
    top_k: int = 1,
    *_args: Any,
) -> list[str]:
    reasons = _dispatch.cuda_objections(OP, logits, _KERNEL_DTYPES)
    if len(windows) > 2 or not tuple(size) == tuple(crop) == tuple(canvas):
        reasons.append("takes one window of the size of the labels alone")
    if top_k > 1:
        reasons.append("takes top_k = 1 alone")
    if logits.shape[1] > _CUDA_MAX_CLASSES:
        reasons.append(f"takes {_CUDA_MAX_CLASSES} classes at most")
    return reasons


def _count(
    logits: _flops.Shape,
    trusty: _flops.Shape | None,
    _seen: list[int],
    _offset: float,
    _weighting: str,
    size: Size,
    crop: Size,
    canvas: Size,
    offsets: list[int],
    *_args: Any,
) -> int:
    """Every class and the trusty map at every pixel of every window, and the last resize where there is one."""
    windows, classes = logits[0], logits[1] + (trusty is not None)
    pixels = windows * crop[0] * crop[1]
    resized = 0 if tuple(size) == tuple(canvas) else size[0] * size[1] * logits[1]
    images = windows // (len(offsets) // 2)
    return _flops.PER_INTERPOLATED * (pixels * classes + images * resized)


register_op(
    OP,
    schema=(
        "(Tensor mask_logits, Tensor? trusty_logits, int[] seen, float seen_offset, str trusty_weighting,"
        " SymInt[2] size, SymInt[2] crop_size, SymInt[2] canvas_size, SymInt[] windows, int top_k, ScalarType dtype,"
        " bool return_details) -> (Tensor labels, Tensor scores, Tensor nan_count)"
    ),
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _cpp_objections, "triton": _triton_objections, "cuda": _cuda_objections},
)
