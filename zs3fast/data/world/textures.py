"""Textures of the materials: periodic grey tiles, painted once a process, coloured by a table when a scene is drawn."""

from __future__ import annotations

import functools

import numpy as np

from zs3fast.data.world.vocabulary import COLOURS, MATERIALS

PERIOD = 256  # side of a tile in pixels
ACCENT = 240  # tile values from here on are the material's second paint: mortar, foam, cloud
VARIANTS = 3  # grain sizes of each material
_SEED = 20_000  # of the tiles; scenes draw from seeds of their own

Axes = tuple[np.ndarray, np.ndarray]

# What the accent is painted with, or None where there is none.
_SECOND = {
    "water": (232, 244, 250),
    "bricks": (176, 168, 158),
    "sky": (250, 250, 252),
}


def noise(rng: np.random.Generator, sigma_y: float, sigma_x: float) -> np.ndarray:
    """Periodic smooth noise [PERIOD, PERIOD] float32 of mean 0 and deviation 1, blurred by these many pixels."""
    frequency = np.fft.fftfreq(PERIOD)
    blur = [np.exp(-2 * (np.pi * sigma * frequency) ** 2) for sigma in (sigma_y, sigma_x)]
    spectrum = np.fft.fft2(rng.standard_normal((PERIOD, PERIOD))) * blur[0][:, None] * blur[1]
    spectrum[0, 0] = 0
    field = np.fft.ifft2(spectrum).real
    out: np.ndarray = (field / field.std()).astype(np.float32)
    return out


@functools.cache
def tiles(material: str) -> tuple[np.ndarray, ...]:
    """The material's uint8 [PERIOD, PERIOD] tiles, fine to coarse: 0 (dark) to 239 (light), and the accent."""
    paint = _PAINTERS[material]
    seeds = [(_SEED, MATERIALS.index(material), variant) for variant in range(VARIANTS)]
    return tuple(
        _grey(*paint(np.random.default_rng(seed), grain)) for seed, grain in zip(seeds, (0.85, 1.0, 1.2), strict=True)
    )


@functools.cache
def light() -> np.ndarray:
    """Slow light and shade, int16 [PERIOD, PERIOD], to be added to tiles."""
    return (9 * noise(np.random.default_rng((_SEED, 100)), 22, 22)).astype(np.int16)


def ramp(material: str, colour: str) -> np.ndarray:
    """Float32 [256, 3]: the colour of every tile value."""
    pure = np.array(COLOURS[colour], np.float32)
    grey = np.full(3, pure.mean(), np.float32)
    base = 0.66 * pure + 0.14 * grey + 0.20 * 255  # paler than the things that lie on it
    if colour == "white":
        base = np.array((216, 216, 213), np.float32)
    dark, pale = (0.85 if material == "sky" else 0.52) * base, 0.5 * base + 0.5 * 255
    steps = np.linspace(0, 1, ACCENT, dtype=np.float32)[:, None]
    lower = dark + (base - dark) * np.minimum(2 * steps, 1)
    table = lower + (pale - base) * np.maximum(2 * steps - 1, 0)
    second = np.array(_SECOND.get(material, 0.3 * base), np.float32)
    return np.concatenate([table, np.repeat(second[None], 256 - ACCENT, axis=0)])


def _grey(tone: np.ndarray, accent: np.ndarray | None = None) -> np.ndarray:
    """Tones around 0.5 (0 dark, 1 light) and a mask of the accent, as a tile."""
    grey = np.clip(tone * (ACCENT - 1), 0, ACCENT - 1).astype(np.uint8)
    if accent is not None:
        grey[accent] = ACCENT + 8
    out: np.ndarray = grey
    return out


def _axes() -> Axes:
    steps = np.arange(PERIOD, dtype=np.float32)
    return steps[:, None], steps[None, :]


def _wave(place: np.ndarray, count: int) -> np.ndarray:
    """A sine with `count` periods in a tile."""
    return np.sin(place * np.float32(2 * np.pi * count / PERIOD))


def _sand(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    y, _ = _axes()
    ripples = _wave(y + 7 * noise(rng, 16, 22), round(22 / grain))
    return (0.52 + 0.10 * ripples + 0.11 * noise(rng, 0.5 * grain, 0.5 * grain),)


def _grass(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    blades = noise(rng, 4.0 * grain, 0.8 * grain) + 0.6 * noise(rng, 2.5 * grain, 0.6 * grain)
    return (0.45 + 0.16 * blades + 0.05 * noise(rng, 14, 14),)


def _water(rng: np.random.Generator, grain: float) -> tuple[np.ndarray, np.ndarray]:
    y, _ = _axes()
    waves = _wave(y + 4.5 * grain * noise(rng, 5 * grain, 12 * grain), round(24 / grain))
    tone = 0.42 + 0.20 * waves + 0.05 * noise(rng, 1, 5)
    return tone, (waves > 0.93) & (noise(rng, 3, 9) > 0.4)


def _bricks(rng: np.random.Generator, grain: float) -> tuple[np.ndarray, np.ndarray]:
    y, x = _axes()
    rows = 2 * round(15 / grain)
    height = PERIOD / rows
    row = np.floor(y / height).astype(int)
    place = x / (2 * height) + 0.5 * (row % 2)
    columns = rows // 2
    column = np.floor(place).astype(int) % columns
    tone = 0.45 + 0.11 * rng.standard_normal((rows, columns))[row, column] + 0.05 * noise(rng, 0.7, 0.7)
    edge_y, edge_x = y / height % 1 * height, place % 1 * 2 * height
    tone += 0.10 * (edge_y < 2.6) - 0.08 * (edge_y > height - 1)
    return tone.astype(np.float32), (edge_y < 1.4) | (edge_x < 1.4)


def _wood(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    y, _ = _axes()
    planks = round(13 / grain)
    height = PERIOD / planks
    plank = np.floor(y / height).astype(int)
    rings = _wave(y + 5 * noise(rng, 5, 40), round(50 / grain))
    tone = 0.50 + 0.09 * rng.standard_normal(planks)[plank] + 0.08 * rings + 0.06 * noise(rng, 0.6, 9)
    tone[np.broadcast_to(y / height % 1 * height < 1.5, tone.shape)] = 0.05
    return (tone.astype(np.float32),)


def _sky(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    clouds = noise(rng, 8 * grain, 15 * grain) + 0.45 * noise(rng, 3.5 * grain, 6 * grain) + 0.15 * noise(rng, 1.5, 2)
    return (0.42 + 0.58 * np.clip(0.6 * (clouds + 0.1), 0, 1),)


def _pebbles(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    """Round stones: the distance to the nearest of jittered points, against that to the second nearest."""
    y, x = _axes()
    count = round(28 / grain)
    cell = PERIOD / count
    jitter = 0.5 + rng.uniform(-0.38, 0.38, (2, count, count))
    tones = rng.uniform(0.34, 0.86, (count, count))
    first = np.full((PERIOD, PERIOD), np.inf)
    second, tone = first.copy(), first.copy()
    row, column = (y // cell).astype(int), (x // cell).astype(int)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            key = (row + down) % count, (column + right) % count
            distance = np.hypot((row + down + jitter[0][key]) * cell - y, (column + right + jitter[1][key]) * cell - x)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            tone = np.where(nearer, tones[key], tone)
            first = np.minimum(first, distance)
    rim = np.clip((second - first) / 2.6, 0, 1)
    return ((rim * (tone + 0.10 - 0.05 * first / grain)).astype(np.float32),)


def _leaves(rng: np.random.Generator, grain: float) -> tuple[np.ndarray]:
    """Leaf upon leaf, each an ellipse with a midrib."""
    tone = np.full((PERIOD, PERIOD), 0.15, np.float32)
    length, reach = 6.5 * grain, int(np.ceil(7.5 * grain))
    span = np.arange(-reach, reach + 1, dtype=np.float32)
    for _ in range(round(2600 / grain**2)):
        cy, cx = rng.uniform(0, PERIOD, 2)
        turn, shade = rng.uniform(0, 2 * np.pi), rng.uniform(0.30, 0.80)
        rows, columns = (int(cy) + span.astype(int)) % PERIOD, (int(cx) + span.astype(int)) % PERIOD
        along = np.cos(turn) * span[:, None] + np.sin(turn) * span
        across = np.cos(turn) * span - np.sin(turn) * span[:, None]
        inside = np.abs(along / length) ** 2 + np.abs(across / (0.45 * length)) ** 2
        leaf = shade + 0.10 * across / length - 0.22 * (np.abs(across) < 0.6) - 0.25 * (inside > 0.72)
        window = np.ix_(rows, columns)
        tone[window] = np.where(inside < 1, leaf, tone[window])
    return (tone,)


_PAINTERS = {
    "sand": _sand,
    "grass": _grass,
    "water": _water,
    "bricks": _bricks,
    "wood": _wood,
    "sky": _sky,
    "pebbles": _pebbles,
    "leaves": _leaves,
}
