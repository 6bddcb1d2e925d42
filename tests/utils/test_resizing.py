"""Resizing in whole numbers: against fractions, torch and Pillow, and where it is done."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zs3fast.utils.images import read_image
from zs3fast.utils.resizing import bilinear, resizes_there

DATA = os.environ.get("ZS3FAST_DATA")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = [  # (H, W) -> (H', W')
    ((1, 1), (3, 5)),
    ((5, 7), (1, 1)),
    ((1, 9), (4, 3)),
    ((8, 6), (4, 3)),
    ((4, 4), (8, 8)),
    ((6, 5), (6, 9)),
    ((9, 5), (4, 5)),
    ((7, 11), (13, 4)),
    ((3, 3), (7, 2)),
]
LARGE = [
    ((75, 100), (64, 85)),
    ((375, 500), (512, 683)),
    ((500, 333), (224, 149)),
    ((480, 640), (64, 64)),
    ((31, 97), (64, 200)),
    ((64, 300), (64, 77)),
    ((300, 64), (77, 64)),
    ((1, 400), (3, 50)),
    ((400, 1), (37, 1)),
    ((255, 257), (257, 255)),
    ((1000, 1), (1, 1)),
    ((2, 999), (1, 1000)),
    ((90, 120), (90, 120)),
]


def noise(size, seed=0):
    """Grey levels of all kinds, a third of them black or white."""
    levels = np.random.default_rng(seed).integers(-64, 320, (*size, 3)).clip(0, 255)
    return torch.from_numpy(levels.astype(np.uint8))


def fractions(old, new, antialias):
    """[new, old] weights of the definition, as fractions."""
    reach = max(Fraction(old, new), Fraction(1)) if antialias else Fraction(1)
    rows = []
    for y in range(new):
        centre = (y + Fraction(1, 2)) * Fraction(old, new)
        row = [max(Fraction(0), reach - abs(i + Fraction(1, 2) - centre)) for i in range(old)]
        rows.append([weight / sum(row) for weight in row])
    return np.array(rows, dtype=object)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), SMALL)
def test_it_is_the_definition_rounded_once(old, new, antialias):
    pixels = noise(old)
    down, across = fractions(old[0], new[0], antialias), fractions(old[1], new[1], antialias)
    got = bilinear(pixels, new, antialias)
    assert got.dtype == torch.uint8 and got.shape == (*new, 3)
    for channel in range(3):
        exact = down @ pixels[:, :, channel].numpy().astype(object) @ across.T
        expected = [[round(value) for value in row] for row in exact]  # halves to even, as Python rounds fractions
        assert got[:, :, channel].tolist() == expected


@pytest.mark.parametrize(
    ("old", "new", "antialias"),
    # torch 2.15 antialiases a column of pixels wrongly; Pillow, below, does not
    [(old, new, antialias) for old, new in LARGE for antialias in (False, True) if not (antialias and old[1] == 1)],
)
def test_torch_s_resize_is_what_was_rounded(old, new, antialias):
    pixels = noise(old)
    values = pixels.permute(2, 0, 1)[None].double()
    expected = F.interpolate(values, new, mode="bilinear", align_corners=False, antialias=antialias)[0]
    off = (bilinear(pixels, new, antialias).permute(2, 0, 1) - expected).abs()
    assert off.max() <= 0.5 + 1e-9, "torch is off by a hair itself, so that ties may go the other way"


@pytest.mark.parametrize(("old", "new"), LARGE)
def test_pillow_antialiases_alike(old, new):
    """Within a level: it rounds after either pass."""
    pixels = noise(old)
    pillow = np.array(Image.fromarray(pixels.numpy()).resize(new[::-1], Image.Resampling.BILINEAR))
    assert np.abs(bilinear(pixels, new, antialias=True).numpy().astype(int) - pillow).max() <= 1


def test_flat_pictures_stay_flat():
    for level in (0, 1, 254, 255):
        pixels = torch.full((37, 53, 3), level, dtype=torch.uint8)
        for size in ((64, 91), (11, 7)):
            for antialias in (False, True):
                assert (bilinear(pixels, size, antialias) == level).all()


@pytest.mark.skipif(not DATA, reason="ZS3FAST_DATA is not set: no real photos here")
def test_photos():
    for path in sorted((Path(DATA) / "VOCdevkit" / "VOC2012" / "JPEGImages").glob("*.jpg"))[:4]:
        pixels = torch.from_numpy(read_image(path)[0])
        values = pixels.permute(2, 0, 1)[None].float()
        for side, antialias in ((512, False), (150, False), (150, True)):
            size = tuple(int(n * side / min(pixels.shape[:2]) + 0.5) for n in pixels.shape[:2])
            expected = F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=antialias)[0].round()
            off = (bilinear(pixels, size, antialias).permute(2, 0, 1) - expected).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.005, "float32 misses some, by one level"


def test_sums_beyond_32_bits():
    """A side that shrinks so much that the sums of the first pass are longer: black and white by turns, averaged."""
    pixels = torch.zeros(4000, 1, 3, dtype=torch.uint8)
    pixels[::2] = 255
    assert bilinear(pixels, (1, 1), antialias=True).unique().tolist() in ([127], [128])
    assert (bilinear(torch.full_like(pixels, 255), (1, 1), antialias=True) == 255).all()


def test_a_picture_of_that_size_is_not_copied():
    pixels = noise((6, 5))
    assert bilinear(pixels, (6, 5)) is pixels


def test_where_a_picture_is_resized():
    assert resizes_there(CUDA, (375, 500), (512, 683)) and resizes_there(CUDA, (2048, 2732), (512, 683))
    assert not resizes_there(CUDA, (2049, 2733), (512, 683)), "more than 4 times its sides: the way is too long"
    assert not resizes_there(CUDA, (10, 50_000), (480, 480)), "on one side, too"
    assert not resizes_there(CPU, (375, 500), (512, 683))


def test_bad_input():
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[H, W, 3\], got torch.float32 \[4, 4, 3\]"):
        bilinear(torch.zeros(4, 4, 3), (2, 2))
    with pytest.raises(ValueError, match=r"pixels: expected .*got torch.uint8 \[0, 4, 3\]"):
        bilinear(torch.zeros(0, 4, 3, dtype=torch.uint8), (2, 2))
    with pytest.raises(ValueError, match=r"size: expected a height and a width of at least 1, got \(0, 2\)"):
        bilinear(noise((4, 4)), (0, 2))
