"""Resizing and colour against values worked out by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zs3fast.data.colour import colour_jitter, hsv_to_rgb, rgb_to_hsv, scaled_levels
from zs3fast.data.resize import resize_bilinear, resize_nearest


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def channels(values):
    return np.repeat(np.array(values, np.uint8)[:, :, None], 3, 2)


def test_bilinear_by_hand():
    """Two pixels to four: centres at -0.25, 0.25, 0.75, 1.25, so 0, 3/4 + 1/4, 1/4 + 3/4, 1; edges repeat."""
    got = resize_bilinear(channels([[0, 100]]), (1, 4))[..., 0]
    assert got.tolist() == [[0, 25, 75, 100]]
    assert resize_bilinear(channels([[0], [200]]), (4, 1))[:, 0, 0].tolist() == [0, 50, 150, 200]


def test_bilinear_does_not_antialias():
    """Four pixels to one: only the two around the centre count, however many there are."""
    assert resize_bilinear(channels([[255, 10, 20, 255]]), (1, 1))[0, 0, 0] == 15
    assert resize_bilinear(channels([[9, 8, 7, 6, 5, 4]]), (1, 2))[0, :, 0].tolist() == [8, 5]


def test_bilinear_rounds_to_nearest():
    """1/4 of 255 is 63.75, 3/4 are 191.25."""
    assert resize_bilinear(channels([[0, 255]]), (1, 4))[0, :, 0].tolist() == [0, 64, 191, 255]


def exact_bilinear(image, size):
    """The definition in float64."""

    def axis(length, target):
        centre = ((np.arange(target) + 0.5) * length / target - 0.5).clip(0, length - 1)
        low = np.floor(centre).astype(int)
        return low, np.minimum(low + 1, length - 1), centre - low

    y0, y1, fy = axis(image.shape[0], size[0])
    x0, x1, fx = axis(image.shape[1], size[1])
    image = image.astype(np.float64)
    across = image[:, x0] * (1 - fx)[:, None] + image[:, x1] * fx[:, None]
    return across[y0] * (1 - fy)[:, None, None] + across[y1] * fy[:, None, None]


SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 99), st.data())
def test_bilinear_windows(source, target, seed, data):
    """A window is that part of the whole; the whole is the definition within its 11-bit weights."""
    image = noise(*source, seed=seed)
    whole = resize_bilinear(image, target)
    assert whole.shape == (*target, 3)
    assert np.abs(whole - exact_bilinear(image, target)).max() < 1
    top, left = data.draw(st.integers(0, target[0] - 1)), data.draw(st.integers(0, target[1] - 1))
    height, width = data.draw(st.integers(1, target[0] - top)), data.draw(st.integers(1, target[1] - left))
    part = resize_bilinear(image, target, (top, left, height, width))
    assert np.array_equal(part, whole[top : top + height, left : left + width])
    labels = image[..., 0].astype(np.int32)
    nearest = resize_nearest(labels, target)
    part = resize_nearest(labels, target, (top, left, height, width))
    assert np.array_equal(part, nearest[top : top + height, left : left + width]) and part.dtype == np.int32


def test_nearest_by_hand():
    """Source index floor(i * 5 / 3) = 0, 1, 3 and floor(i * 2 / 5) = 0, 0, 0, 1, 1."""
    assert resize_nearest(np.arange(5)[None], (1, 3)).tolist() == [[0, 1, 3]]
    assert resize_nearest(np.arange(2)[None], (1, 5)).tolist() == [[0, 0, 0, 1, 1]]


HSV = {
    (255, 0, 0): (0, 255, 255),
    (0, 255, 0): (60, 255, 255),
    (0, 0, 255): (120, 255, 255),
    (255, 255, 0): (30, 255, 255),
    (0, 255, 255): (90, 255, 255),
    (255, 0, 255): (150, 255, 255),
    (0, 0, 0): (0, 0, 0),
    (77, 77, 77): (0, 0, 77),
    (200, 100, 50): (10, 191, 200),  # 60 * 50 / 150 = 20 degrees; 255 * 150 / 200 = 191.25
    (50, 100, 200): (110, 191, 200),  # 240 - 20 degrees
    (100, 0, 1): (0, 255, 100),  # -0.6 degrees is -0.3 steps, which rounds to 0
    (100, 0, 10): (177, 255, 100),  # -6 degrees, -3 steps, and 180 more
}


def test_hsv_by_hand():
    rgb = np.array([list(HSV)], np.uint8)
    assert [tuple(map(int, hsv)) for hsv in rgb_to_hsv(rgb)[0]] == list(HSV.values())


def test_rgb_by_hand():
    """Hue 10 is 20 degrees, a third of the first sector: p = v (1 - s), t = v (1 - s (1 - 1/3)), truncated."""
    v, s = 200, 191 / 255
    expected = [200, int(v * (1 - s * 2 / 3)), int(v * (1 - s))]
    assert hsv_to_rgb(np.array([[[10, 191, 200]]], np.uint8)).tolist() == [[expected]]
    pure = {hsv: rgb for rgb, hsv in HSV.items() if hsv[1] in (0, 255) and hsv[0] % 30 == 0 and hsv != (0, 255, 100)}
    got = hsv_to_rgb(np.array([list(pure)], np.uint8))[0].astype(int)
    assert np.abs(got - list(pure.values())).max() <= 1  # cut off in float32: cyan comes back as (0, 254, 255)


def test_there_and_back():
    image = noise(64, 64)
    back = hsv_to_rgb(rgb_to_hsv(image)).astype(int)
    assert np.abs(back - image).max() <= 8  # 8-bit HSV is coarse; two degrees at full chroma are 8.5 levels


def test_levels():
    assert scaled_levels(1.5)[[0, 1, 100, 171, 255]].tolist() == [0, 1, 150, 255, 255]  # 1.5 is truncated
    assert scaled_levels(offset=-31.5)[[0, 31, 32, 255]].tolist() == [0, 0, 0, 223]


class Draws:
    """A generator whose draws are given: coins (brightness, contrast first, contrast, saturation, hue) and values."""

    def __init__(self, coins, brightness=0.0, contrast=1.0, saturation=1.0, hue=0):
        self.coins, self.brightness, self.factors, self.hue = coins, brightness, (contrast, saturation), hue

    def random(self, count):
        return np.where(self.coins, 0.25, 0.75)

    def uniform(self, low, high, count=None):
        assert (low, high) == ((-32, 32) if count is None else (0.5, 1.5))
        return self.brightness if count is None else self.factors

    def integers(self, low, high, endpoint):
        assert low == -18 and endpoint
        self.largest = high
        return self.hue


ON = np.ones(5, bool)


def jittered(pixel, coins, **values):
    return colour_jitter(np.array([[pixel]], np.uint8), Draws(coins, **values)).tolist()[0][0]


def test_jitter_by_hand():
    pixel = (200, 100, 50)
    off = [False] * 5
    assert jittered(pixel, off, brightness=30, contrast=1.4, saturation=0.5, hue=9) == list(pixel)
    assert jittered(pixel, [1, 0, 0, 0, 0], brightness=20.5) == [220, 120, 70]
    assert jittered(pixel, [0, 0, 1, 0, 0], contrast=1.5) == [255, 150, 75]
    # Brightness is clipped before the contrast: (200 + 32) * 1.5 = 348, (100 + 32) * 1.5 = 198, (50 + 32) * 1.5 = 123.
    assert jittered(pixel, [1, 1, 1, 0, 0], brightness=32, contrast=1.5) == [255, 198, 123]
    # Hue: red by +60 steps is green, by -18 steps 36 degrees back: 324 degrees, blue = 255 * (1 - 0.4) = 153.
    assert jittered((255, 0, 0), [0, 0, 0, 0, 1], hue=-18) in ([255, 0, 153], [255, 0, 152])
    # Saturation: 191 * 0.5 = 95, so green = 200 (1 - 95/255 * 2/3) = 150.3 and blue = 200 (1 - 95/255) = 125.5.
    assert jittered(pixel, [0, 0, 0, 1, 0], saturation=0.5) == [200, 150, 125]


def test_contrast_comes_before_or_after():
    """Before, red saturates at 255 and the colour changes; after, it does not.

    Before: (255, 150, 75) has hue 30 * 75 / 180 = 12.5, stored as 13, and saturation 180, halved to 90; green is
    255 (1 - 90/255 (1 - 13/30)) = 204, blue 255 - 90. After: (200, 150, 125) times 1.5.
    """
    before = jittered((200, 100, 50), [0, 1, 1, 1, 0], contrast=1.5, saturation=0.5)
    after = jittered((200, 100, 50), [0, 0, 1, 1, 0], contrast=1.5, saturation=0.5)
    assert after == [255, 225, 187] and before == [255, 204, 165]


def test_hue_ranges_of_the_recipes():
    image = noise(4, 4)
    for largest in (17, 18):
        draws = Draws(ON)
        colour_jitter(image, draws, largest)
        assert draws.largest == largest


def test_jitter_leaves_its_input_alone():
    image = noise(16, 16)
    image.flags.writeable = False
    seen = {colour_jitter(image, np.random.default_rng(seed)).tobytes() for seed in range(64)}
    assert len(seen) > 55  # 1 in 16 does nothing
