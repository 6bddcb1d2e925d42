"""Scenes: what lies where, drawn from a random generator alone, and its image with an exact map of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from zs3fast.data.world.shapes import pattern_weight, shape_field
from zs3fast.data.world.textures import ACCENT, PERIOD, VARIANTS, light, noise, ramp, tiles
from zs3fast.data.world.vocabulary import ALL_STUFF, ALL_THINGS, COLOURS, STUFF, THINGS, Concept

SMALLEST = 32  # side of a scene in pixels
RADII = (13.0, 25.0)  # of things, in pixels
_SHADOW = (3, 2, 4.0, 0.42)  # pixels down, pixels right, softness, strength
_TRIES = 12  # places tried for a thing; the one that covers least of the others is taken
_SKIES = ("sky",)  # materials that are above all others


@dataclass(frozen=True)
class Thing:
    """An object: its words, centre (y, x) and radius in pixels, angles in radians, and how it is painted."""

    concept: Concept
    centre: tuple[float, float]
    radius: float
    angle: float
    pattern_angle: float
    period: float
    phase: tuple[float, float]
    darker: bool
    tone: tuple[float, float, float]


@dataclass(frozen=True)
class Ground:
    """A stretch of stuff: its words, the grain of its tile, where on the tile it begins, and its tone."""

    concept: Concept
    variant: int
    offset: tuple[int, int]
    mirrored: bool
    tone: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """What lies where; `draw` and `part_map` are functions of it alone.

    size:    (H, W) in pixels.
    grounds: one to three, in the order in which they follow along `slope`.
    slope:   direction (y, x) across the borders between grounds.  cuts: where the borders are along it, 0..1.
    bends:   offset (y, x) of the noise that bends the borders, and by how many pixels.
    things:  the last is on top.
    """

    size: tuple[int, int]
    grounds: tuple[Ground, ...]
    slope: tuple[float, float]
    cuts: tuple[float, ...]
    bends: tuple[int, int, float]
    things: tuple[Thing, ...]

    @cached_property
    def concepts(self) -> tuple[Concept, ...]:
        """The words of every part, by its number in the part map: grounds, then things."""
        parts: tuple[Ground | Thing, ...] = (*self.grounds, *self.things)
        return tuple(part.concept for part in parts)


def random_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    things: tuple[int, int],
    grounds: tuple[int, int],
    all_combinations: bool = False,
) -> Scene:
    """A scene of so many (from, to) things and grounds, all of different words.

    Args:
        all_combinations: of all 192 combinations, as captions are; else of the 64 classes.
    """
    all_things, all_stuff = (ALL_THINGS, ALL_STUFF) if all_combinations else (THINGS, STUFF)
    return arrange(rng, size, _drawn(rng, all_things, things), _drawn(rng, all_stuff, grounds))


def arrange(
    rng: np.random.Generator, size: tuple[int, int], things: Sequence[Concept], grounds: Sequence[Concept]
) -> Scene:
    """A scene with exactly these parts, one to three of them grounds."""
    if not 1 <= len(grounds) <= 3:
        raise ValueError(f"grounds: expected one to three, got {len(grounds)}")
    if min(size) < SMALLEST:
        raise ValueError(f"size: expected at least {SMALLEST} pixels a side, got {size}")
    grounds = sorted(grounds, key=lambda concept: concept[1] not in _SKIES)
    turn = rng.uniform(-0.9, 0.9)
    first = rng.uniform(0.3, 0.7) if len(grounds) < 3 else rng.uniform(0.25, 0.4)
    cuts = (first, first + rng.uniform(0.25, 0.4))
    return Scene(
        size=size,
        grounds=tuple(_random_ground(rng, concept) for concept in grounds),
        slope=(float(np.cos(turn)), float(np.sin(turn))),
        cuts=cuts[: len(grounds) - 1],
        bends=_random_bends(rng),
        things=_random_things(rng, size, things),
    )


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The image uint8 [H, W, 3] and the part map uint8 [H, W] of a scene."""
    parts, depth = _grounds(scene)
    image = _paint_grounds(scene, parts, depth)
    for number, thing in enumerate(scene.things, len(scene.grounds)):
        _draw_thing(thing, number, parts, image)
    return image, parts


def part_map(scene: Scene) -> np.ndarray:
    """Uint8 [H, W]: at every pixel the number of the part that is seen there, an index into `scene.concepts`."""
    parts, _ = _grounds(scene)
    for number, thing in enumerate(scene.things, len(scene.grounds)):
        _draw_thing(thing, number, parts, None)
    return parts


# --- what lies where -------------------------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, concepts: Sequence[Concept], count: tuple[int, int]) -> list[Concept]:
    number = rng.integers(*count, endpoint=True)
    return [concepts[i] for i in rng.choice(len(concepts), number, replace=False)]


def _random_bends(rng: np.random.Generator) -> tuple[int, int, float]:
    y, x = map(int, rng.integers(0, PERIOD, 2))
    return y, x, rng.uniform(2, 9)


def _random_ground(rng: np.random.Generator, concept: Concept) -> Ground:
    y, x = rng.integers(0, PERIOD, 2)
    return Ground(concept, int(rng.integers(VARIANTS)), (int(y), int(x)), bool(rng.integers(2)), _tone(rng))


def _random_things(rng: np.random.Generator, size: tuple[int, int], concepts: Sequence[Concept]) -> tuple[Thing, ...]:
    placed: list[tuple[float, float, float]] = []
    things = []
    smallest, largest = RADII
    largest = min(largest, 0.36 * min(size))
    for concept in concepts:
        radius = smallest + (largest - smallest) * rng.random()
        ys = rng.uniform(0.55 * radius, size[0] - 0.55 * radius, _TRIES)
        xs = rng.uniform(0.55 * radius, size[1] - 0.55 * radius, _TRIES)
        overlap = np.zeros(_TRIES)
        for y, x, other in placed:
            overlap += np.maximum(0, radius + other - np.hypot(ys - y, xs - x)) / min(radius, other)
        best = int(np.argmax(overlap < 0.5)) if (overlap < 0.5).any() else int(np.argmin(overlap))
        centre = float(ys[best]), float(xs[best])
        placed.append((*centre, radius))
        quarter = np.radians(rng.uniform(-18, 18))
        things.append(
            Thing(
                concept=concept,
                centre=centre,
                radius=radius,
                angle=float(quarter),
                pattern_angle=float(rng.uniform(0, np.pi)) if concept[0] == "striped" else float(quarter),
                period=float(np.clip(0.42 * radius, 6.0, 9.0) * rng.uniform(0.9, 1.1)),
                phase=(float(rng.random()), float(rng.random())),
                darker=bool(rng.integers(2)) or concept[1] == "white",
                tone=_tone(rng),
            )
        )
    return tuple(things)


def _tone(rng: np.random.Generator) -> tuple[float, float, float]:
    """Factors on red, green and blue: a common one of brightness, and little else."""
    red, green, blue = map(float, rng.uniform(0.9, 1.08) * rng.uniform(0.96, 1.04, 3))
    return red, green, blue


# --- drawing ---------------------------------------------------------------------------------------------------------


def _grounds(scene: Scene) -> tuple[np.ndarray, np.ndarray | None]:
    """Part map of the grounds alone, and pixels to the nearest border (None: there is none)."""
    height, width = scene.size
    parts = np.zeros(scene.size, np.uint8)
    if not scene.cuts:
        return parts, None
    down, right = scene.slope
    y = np.arange(height, dtype=np.float32)[:, None] - height / 2
    x = np.arange(width, dtype=np.float32) - width / 2
    across = np.float32(down) * y + np.float32(right) * x
    across += np.float32(scene.bends[2]) * _window(_bending(), scene.bends[:2], scene.size)
    nearest = None
    for cut in scene.cuts:
        distance = across - np.float32((cut - 0.5) * (abs(down) * height + abs(right) * width))
        parts += distance > 0
        nearest = np.abs(distance) if nearest is None else np.minimum(nearest, np.abs(distance))
    return parts, nearest


def _paint_grounds(scene: Scene, parts: np.ndarray, depth: np.ndarray | None) -> np.ndarray:
    value = None
    for number, ground in enumerate(scene.grounds):
        tile = tiles(ground.concept[1])[ground.variant]
        own = _window(tile[:, ::-1] if ground.mirrored else tile, ground.offset, scene.size)
        value = own if value is None else np.where(parts == number, own, value)
    assert value is not None  # every scene has a ground
    shade = _window(light(), scene.bends[:2], scene.size)
    if depth is not None:
        shade = shade - (38 * np.maximum(0, 1 - depth / 3)).astype(np.int16)
    index = np.where(value < ACCENT, np.clip(value + shade, 0, ACCENT - 1), value)
    tables = [ramp(*reversed(g.concept)) * np.array(g.tone, np.float32) for g in scene.grounds]
    table = np.clip(np.concatenate(tables), 0, 255).astype(np.uint8)
    return np.take(table, index + 256 * parts.astype(np.int16), axis=0)


def _draw_thing(thing: Thing, number: int, parts: np.ndarray, image: np.ndarray | None) -> None:
    """Write the thing's number into `parts` and, if there is an image, paint it and its shadow."""
    height, width = parts.shape
    down, right, softness, strength = _SHADOW
    (cy, cx), reach = thing.centre, 1.12 * thing.radius + 2
    spread = 0 if image is None else softness + max(down, right)
    top, bottom = max(0, int(cy - reach - spread)), min(height, int(cy + reach + spread) + 2)
    left, end = max(0, int(cx - reach - spread)), min(width, int(cx + reach + spread) + 2)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(cy)
    dx = np.arange(left, end, dtype=np.float32) - np.float32(cx)
    pattern, colour, shape = thing.concept
    field = shape_field(shape, *_turned(dx, dy, thing.angle), thing.radius)
    window = np.s_[top:bottom, left:end]
    parts[window][field < 0] = number
    if image is None:
        return
    shadow = shape_field(shape, *_turned(dx - right, dy - down, thing.angle), thing.radius)
    dimmed = 1 - strength * np.clip(0.5 - shadow / (2 * softness), 0, 1)
    weight = pattern_weight(pattern, *_turned(dx, dy, thing.pattern_angle), thing.period, thing.phase)
    pure = np.array(COLOURS[colour], np.float32) * np.array(thing.tone, np.float32)
    second = 0.38 * pure if thing.darker else 0.25 * pure + 0.75 * 250
    # Lit from above left, and a dark rim of a pixel and a half that tells it from ground of its own colour.
    lit = 1.04 - (0.16 / thing.radius) * (0.6 * dx + 0.8 * dy)
    lit = lit * (1 - 0.45 * np.clip(1 + field / 1.6, 0, 1))
    paint = (pure + (second - pure) * weight[..., None]) * lit[..., None]
    cover = np.clip(0.5 - field, 0, 1)[..., None]
    under = image[window] * dimmed[..., None]
    image[window] = np.clip(under + (paint - under) * cover, 0, 255).astype(np.uint8)


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _window(tile: np.ndarray, offset: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """`size` pixels of a periodic tile from `offset` on."""
    rows, columns = ((np.arange(n) + start) % PERIOD for start, n in zip(offset, size))
    return tile[rows[:, None], columns]


@cache
def _bending() -> np.ndarray:
    """What bends the borders between grounds."""
    return noise(np.random.default_rng(19_999), 11, 11)
