"""Labels where classes compete by a softmax: similarities of windows averaged, resized, compared.

    a      = mean over the windows that cover a canvas pixel of upsample(logits)       bilinear, align_corners=False
    z      = resize(a, size)
    labels = argmax_c z,   scores = max_c softmax_c(z)

All steps are linear but the last, so the picture is done in bands of rows: nothing is stored at C x H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_BYTES = 64 << 20


def softmax_labels(
    logits: Tensor,
    size: tuple[int, int],
    *,
    crop_size: tuple[int, int],
    canvas_size: tuple[int, int],
    windows: Sequence[tuple[int, int]],
    band_bytes: int = BAND_BYTES,
) -> tuple[Tensor, Tensor]:
    """Labels int32 [H, W] of one picture and the probability [H, W] of each, float32 at least.

    Args:
        logits: [n, C, h, w], a row a window.
        size: (H, W) of the picture.
        crop_size, canvas_size: of a window and of the image the windows lie on, in pixels.
        windows: n offsets (y, x), which together cover the canvas.
        band_bytes: how large the scores of a band may be; a band has one row at least.

    Equal logits go to the lowest class index; a pixel with a NaN has the score NaN.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    (height, width), classes = size, logits.shape[1]
    row_bytes = logits.element_size() * classes * (width + canvas_size[1] * max(canvas_size[0] / height, 1))
    resize, zoom = _taps(canvas_size[0], height), _taps(logits.shape[2], crop_size[0])
    labels, scores = [], []
    for rows in torch.arange(height).split(max(int(band_bytes / row_bytes), 1)):
        low, high, part = (tap[rows] for tap in resize)
        band = _canvas_rows(logits, zoom, (int(low[0]), int(high[-1]) + 1), crop_size, canvas_size[1], windows)
        band = _between(band, low - low[0], high - low[0], part)
        band = F.interpolate(band[None], (len(rows), width), mode="bilinear", align_corners=False)[0]
        best = band.max(0)
        labels.append(best.indices.int())
        scores.append((best.values - band.logsumexp(0)).exp())
    return torch.cat(labels), torch.cat(scores)


def _canvas_rows(
    logits: Tensor,
    zoom: tuple[Tensor, Tensor, Tensor],
    rows: tuple[int, int],
    crop_size: tuple[int, int],
    width: int,
    windows: Sequence[tuple[int, int]],
) -> Tensor:
    """Rows [C, rows, width] of the canvas: the mean over windows of their upsampled logits."""
    first, end = rows
    total = logits.new_zeros(logits.shape[1], end - first, width)
    cover = logits.new_zeros(end - first, width)
    for window, (y, x) in zip(logits, windows):
        top, bottom = max(y, first), min(y + crop_size[0], end)
        if top >= bottom:
            continue
        strip = _between(window, *(tap[top - y : bottom - y] for tap in zoom))
        strip = F.interpolate(strip[None], (bottom - top, crop_size[1]), mode="bilinear", align_corners=False)[0]
        total[:, top - first : bottom - first, x : x + crop_size[1]] += strip
        cover[top - first : bottom - first, x : x + crop_size[1]] += 1
    return total.div_(cover)


def _taps(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `new` rows resized bilinearly from `old`: the row below, the row above, and how far towards the second."""
    where = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp_min(0)
    low = where.long().clamp_max(old - 1)
    return low, (low + 1).clamp_max(old - 1), (where - low).float()


def _between(x: Tensor, low: Tensor, high: Tensor, part: Tensor) -> Tensor:
    """Rows [C, r, w] between rows `low` and `high` of x [C, h, w]."""
    low, high, part = low.to(x.device), high.to(x.device), part.to(x)[:, None]
    return x[:, low] * (1 - part) + x[:, high] * part
