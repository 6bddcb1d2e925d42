"""The colour jitter of the published recipes (SSD's, in OpenCV's 8-bit arithmetic), on RGB pixels.

Brightness and contrast are tables of 256 entries; saturation and hue go through 8-bit HSV with hue in 0..179.
"""

from __future__ import annotations

import cv2
import numpy as np

_LEVELS = np.arange(256, dtype=np.float32)
_SAME = np.arange(256, dtype=np.uint8)


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [H, W, 3]: hue in 0..179 (two degrees a step), saturation and value in 0..255."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2HSV)


def hsv_to_rgb(image: np.ndarray) -> np.ndarray:
    """The way back from `rgb_to_hsv`: uint8 [H, W, 3] HSV, hue below 180 -> uint8 [H, W, 3] RGB, truncated."""
    return cv2.cvtColor(image, cv2.COLOR_HSV2RGB)


def scaled_levels(factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """uint8 [256]: level * factor + offset, clipped to 0..255 and truncated."""
    return (_LEVELS * np.float32(factor) + np.float32(offset)).clip(0, 255).astype(np.uint8)


def colour_jitter(image: np.ndarray, rng: np.random.Generator, largest_hue: int = 17) -> np.ndarray:
    """SSD's photometric distortion: every step with probability 0.5, each clipped and truncated to 8 bits.

    Brightness: add U(-32, 32). Contrast: times U(0.5, 1.5), before or after the next two by a coin. Saturation: times
    U(0.5, 1.5). Hue: plus an integer of -18..`largest_hue` modulo 180, which is two degrees a step.

    Args:
        image: uint8 [H, W, 3] RGB; not written to.
        largest_hue: 17 in the recipes of ZegCLIP, TagCLIP and CLIP-RC, 18 in MAFT's.
    Returns:
        uint8 [H, W, 3].
    """
    coins = rng.random(5) < 0.5
    offset, contrast, saturation = rng.uniform(-32, 32), *rng.uniform(0.5, 1.5, 2)
    shift = rng.integers(-18, largest_hue, endpoint=True)
    brightness_on, contrast_first, contrast_on, saturation_on, hue_on = coins
    image = np.ascontiguousarray(image)
    levels = scaled_levels(offset=offset) if brightness_on else _SAME
    if contrast_on and contrast_first:
        levels = scaled_levels(contrast)[levels]
    image = cv2.LUT(image, levels)
    if saturation_on:
        image = _in_hsv(image, _SAME, scaled_levels(saturation))
    if hue_on:  # from RGB again: the recipes round to 8 bits in between
        image = _in_hsv(image, ((np.arange(256) + shift) % 180).astype(np.uint8), _SAME)
    if contrast_on and not contrast_first:
        image = cv2.LUT(image, scaled_levels(contrast))
    return image


def _in_hsv(image: np.ndarray, hue: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """The image with its hues and saturations looked up in tables of 256."""
    return hsv_to_rgb(cv2.LUT(rgb_to_hsv(image), np.dstack([hue, saturation, _SAME])))
