"""Resizing of 8-bit pictures as OpenCV does it, computed only where a crop looks.

ZegCLIP, TagCLIP and CLIP-RC were trained on pictures resized bilinearly without antialiasing in OpenCV's fixed-point
arithmetic. Pillow antialiases when it shrinks, so its results differ by far more than rounding; these do not differ.
"""

from __future__ import annotations

import numpy as np

_ONE = 2048  # a weight of 1 in OpenCV's fixed point, 11 bits


def _taps(size: int, target: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left and right source index and their fixed-point weights for targets start .. start + count - 1 of an axis."""
    centre = ((np.arange(start, start + count) + 0.5) * (size / target) - 0.5).astype(np.float32)
    left = np.floor(centre)
    right_weight = (centre - left).astype(np.float32)
    left = left.astype(np.int64)
    weights = [np.rint(weight * np.float32(_ONE)).astype(np.int32) for weight in (1 - right_weight, right_weight)]
    return left.clip(0, size - 1), (left + 1).clip(0, size - 1), weights[0], weights[1]


def resize_bilinear(
    image: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Bilinear resize with half-pixel centres and no antialiasing, rounded like OpenCV's INTER_LINEAR on 8 bits.

    Args:
        image:  uint8 [H, W, 3].
        size:   (height, width) of the resized picture.
        window: (top, left, height, width) of it that is wanted; the whole by default. Work and memory are the window's.
    Returns:
        uint8 [height, width, 3] of the window.
    """
    top, left, height, width = window or (0, 0, *size)
    if image.shape[:2] == tuple(size):
        return image[top : top + height, left : left + width]
    y0, y1, wy0, wy1 = _taps(image.shape[0], size[0], top, height)
    x0, x1, wx0, wx1 = _taps(image.shape[1], size[1], left, width)
    first = y0[0]
    rows = image[first : y1[-1] + 1]
    # Horizontal pass: 8 + 11 bits. OpenCV drops 4 of them before the vertical pass, and 16 + 2 bits in it.
    across = rows[:, x0] * wx0[:, None]
    across += rows[:, x1] * wx1[:, None]
    across >>= 4
    upper = across[y0 - first]
    upper *= wy0[:, None, None]
    upper >>= 16
    lower = across[y1 - first]
    lower *= wy1[:, None, None]
    lower >>= 16
    upper += lower
    upper += 2
    upper >>= 2
    return upper.astype(np.uint8)


def resize_nearest(
    labels: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Nearest resize, source index floor(target * source size / target size), as OpenCV's INTER_NEAREST.

    labels [H, W] -> [height, width] of the window (as in `resize_bilinear`), same dtype.
    """
    top, left, height, width = window or (0, 0, *size)
    rows = _nearest(labels.shape[0], size[0], top, height)
    columns = _nearest(labels.shape[1], size[1], left, width)
    return labels[rows[:, None], columns]


def _nearest(size: int, target: int, start: int, count: int) -> np.ndarray:
    index = np.floor(np.arange(start, start + count) * (1 / (target / size))).astype(np.int64)
    return np.minimum(index, size - 1)
