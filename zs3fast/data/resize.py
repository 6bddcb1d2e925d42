"""Resizing of 8-bit images and label maps by OpenCV, without antialiasing.

ZegCLIP, TagCLIP and CLIP-RC were trained on images resized so. Pillow antialiases when it shrinks, and its results
differ by far more than rounding.
"""

from __future__ import annotations

import cv2
import numpy as np

Window = tuple[int, int, int, int]  # top, left, height, width


def resize_bilinear(image: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Bilinear resize with half-pixel centres: OpenCV's INTER_LINEAR on 8 bits.

    Args:
        image:  uint8 [H, W, 3].
        size:   (height, width) of the resized image.
        window: (top, left, height, width) of it that is wanted; the whole by default. The whole is computed, in a tenth
            of the time that a window alone takes in NumPy.
    Returns:
        uint8 [height, width, 3] of the window.
    """
    return _resized(image, size, window, cv2.INTER_LINEAR)


def resize_nearest(labels: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Nearest resize, source index floor(target * source size / target size): OpenCV's INTER_NEAREST.

    labels [H, W] -> [height, width] of the window (as in `resize_bilinear`), same dtype.
    """
    return _resized(labels, size, window, cv2.INTER_NEAREST)


def _resized(pixels: np.ndarray, size: tuple[int, int], window: Window | None, how: int) -> np.ndarray:
    if pixels.shape[:2] != tuple(size):
        pixels = cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=how)
    top, left, height, width = window or (0, 0, *size)
    return pixels[top : top + height, left : left + width]
