"""Shapes as distance fields and patterns as weights of a second paint, both in a thing's own coordinates.

Coordinates are pixels from the thing's centre, turned with it; r is its radius. A field is negative inside and, near
the outline, about the distance to it in pixels, which is all that drawing needs.
"""

from __future__ import annotations

import numpy as np

_TRIANGLE = [np.radians(90 + 120 * k) for k in range(3)]  # outward normals of the sides, y downwards: tip on top


def shape_field(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Distance field float32 of one of `vocabulary.SHAPES` at x and y, which broadcast to [h, w].

    All shapes lie within 1.11 r of the centre.
    """
    return _SHAPES[shape](x, y, r)


def pattern_weight(pattern: str, x: np.ndarray, y: np.ndarray, period: float, phase: tuple[float, float]) -> np.ndarray:
    """How much of the second paint there is, 0..1, for one of `vocabulary.PATTERNS`; edges are a pixel soft.

    Args:
        x, y: as for `shape_field`; stripes run along x.
        period: pixels from one stripe or dot, or two squares of the board, to the next.
        phase: where the pattern begins, in periods.
    """
    if pattern == "plain":
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    turn = np.float32(2 * np.pi / period)
    wave_y = np.sin(turn * y + np.float32(2 * np.pi * phase[1]))
    sharp = np.float32(period / (2 * np.pi))  # a sine rises by 2 pi / period a pixel where it crosses 0
    if pattern == "striped":
        out: np.ndarray = np.clip(0.5 + sharp * wave_y, 0, 1)
        return out
    wave_x = np.sin(turn * x + np.float32(2 * np.pi * phase[0]))
    if pattern == "checkered":
        out = np.clip(0.5 + 1.6 * sharp * wave_x * wave_y, 0, 1)
        return out
    out = np.clip(0.5 + sharp * (wave_x + wave_y - 0.75), 0, 1)  # dotted
    return out


def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    out: np.ndarray = np.hypot(x, y) - r * 0.92
    return out


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    out: np.ndarray = np.maximum(np.abs(x), np.abs(y)) - r * 0.78
    return out


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    sides = [np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y for a in _TRIANGLE]
    return np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - r * 0.55


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Five points: the plane is folded onto half of one, whose edge runs from the tip to the notch."""
    tip, notch, half = r * 1.1, r * 0.52, np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(np.mod(angle + half, 2 * half) - half)
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    edge = np.array((notch * np.cos(half) - tip, notch * np.sin(half)))
    normal = np.array((edge[1], -edge[0])) / np.hypot(*edge)
    out: np.ndarray = ((u - tip) * np.float32(normal[0]) + v * np.float32(normal[1])).astype(np.float32)
    return out


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(
        np.maximum(x - r * 0.36, y - r * 0.98),
        np.maximum(x - r * 0.98, y - r * 0.36),
    )


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    out: np.ndarray = np.abs(np.hypot(x, y) - r * 0.72) - r * 0.27
    return out


_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
