"""The colour jitter of the published recipes (SSD's, in OpenCV's 8-bit arithmetic), on RGB pixels.

Brightness and contrast are tables of 256 entries; saturation and hue go through 8-bit HSV with hue in 0..179.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# Reciprocals in 12-bit fixed point: 255 / v for the saturation, 30 / (max - min) for the hue.
_ROUND = 1 << 11
_DIVISORS = np.arange(1, 256)
_SATURATION = np.concatenate([[0], np.rint((255 << 12) / _DIVISORS)]).astype(np.int32)
_HUE = np.concatenate([[0], np.rint((180 << 12) / (6.0 * _DIVISORS))]).astype(np.int32)
_LEVELS = np.arange(256, dtype=np.float32)
# For the six sectors of the hue circle: which of (1, 1 - s, 1 - s f, 1 - s (1 - f)) scales red, green and blue.
_SECTORS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [H, W, 3]: hue in 0..179 (two degrees a step), saturation and value in 0..255."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    hue = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue *= _HUE[chroma]
    hue += _ROUND
    hue >>= 12
    hue[hue < 0] += 180
    chroma *= _SATURATION[value]
    chroma += _ROUND
    chroma >>= 12
    out = np.empty_like(image)
    out[..., 0], out[..., 1], out[..., 2] = hue, chroma, value
    return out


@cache
def _hsv_factors() -> np.ndarray:
    """[180 * 256, 3]: what red, green and blue are of the value, for every hue and saturation.

    Products are formed in float64 and rounded once, as the fused multiply-adds of OpenCV's vector code do.
    """
    hue = np.arange(180, dtype=np.float32) * np.float32(6 / 180)
    sector = np.floor(hue)
    fraction = (hue - sector)[:, None]
    saturation = (_LEVELS * np.float32(1 / 255))[None].astype(np.float64)
    levels = [np.ones((180, 256)), 1 - saturation + 0 * fraction]
    levels += [1 - saturation * fraction, 1 - saturation * (np.float32(1) - fraction)]
    order = np.broadcast_to(_SECTORS[sector.astype(np.int64), None], (180, 256, 3))
    return np.take_along_axis(np.stack(levels, -1), order, -1).astype(np.float32).reshape(-1, 3)


def hsv_to_rgb(image: np.ndarray) -> np.ndarray:
    """The way back from `rgb_to_hsv`: uint8 [H, W, 3] HSV, hue below 180 -> uint8 [H, W, 3] RGB, truncated."""
    rgb = np.take(_hsv_factors(), image[..., 0] * np.int32(256) + image[..., 1], 0)
    rgb *= (image[..., 2] * np.float32(1 / 255))[..., None]
    rgb *= np.float32(255)
    return rgb.astype(np.uint8)


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
    levels = scaled_levels(offset=offset) if brightness_on else np.arange(256, dtype=np.uint8)
    if contrast_on and contrast_first:
        levels = scaled_levels(contrast)[levels]
    image = levels[image]
    if saturation_on:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = scaled_levels(saturation)[hsv[..., 1]]
        image = hsv_to_rgb(hsv)
    if hue_on:  # from RGB again: the recipes round to 8 bits in between
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = ((np.arange(180) + shift) % 180).astype(np.uint8)[hsv[..., 0]]
        image = hsv_to_rgb(hsv)
    if contrast_on and not contrast_first:
        image = scaled_levels(contrast)[image]
    return image
