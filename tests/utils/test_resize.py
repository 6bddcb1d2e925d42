"""The one resizer: OpenCV's bytes without antialiasing, Pillow's with it, and how far a GPU's exact one is from it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.test_resizing import LARGE
from zs3fast.utils.images import resize
from zs3fast.utils.resizing import bilinear


def noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize(("old", "new"), LARGE)
def test_bytes_are_the_libraries_own(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = noise(old)
    np.testing.assert_array_equal(resize(image, new, antialias=False), cv2.resize(image, new[::-1]))
    pillow = Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(image, new, antialias=True), np.asarray(pillow))
    turned = resize(image.transpose(1, 0, 2), new, antialias=False)  # no copy of the caller's
    np.testing.assert_array_equal(turned, cv2.resize(np.ascontiguousarray(image.transpose(1, 0, 2)), new[::-1]))


@pytest.mark.parametrize("antialias", [False, True])
def test_the_exact_resize_differs_by_one_grey_level(antialias: bool) -> None:
    differing = []
    for old, new in LARGE:
        exact = bilinear(torch.from_numpy(noise(old)), new, antialias).numpy().astype(int)
        off = np.abs(exact - resize(noise(old), new, antialias))
        assert off.max() <= 1
        differing.append((off > 0).mean())
    assert 0 < np.mean(differing) < (0.16, 0.12)[antialias], "of noise; an eighth of the bytes, and a tenth"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 \[H, W, 3\], got float64"):
        resize(np.zeros((3, 3, 3)), (2, 2), antialias=False)
    with pytest.raises(ValueError, match="size: expected a height and a width of at least 1"):
        resize(noise((3, 3)), (0, 2), antialias=True)
