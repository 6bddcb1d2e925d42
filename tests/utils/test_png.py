"""PNG files written strip by strip read as Pillow's own do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zs3fast.utils.png import write_png

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 6), (5,)])
@pytest.mark.parametrize(
    ("shape", "dtype", "mode"),
    [((7, 5, 3), np.uint8, "RGB"), ((7, 1), np.uint8, "L"), ((7, 300), np.uint16, "I;16"), ((7, 9), np.uint8, "P")],
)
def test_what_is_written_is_read(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, mode: str, cuts: tuple[int, ...]
) -> None:
    image = RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    palette = RNG.integers(0, 256, (256, 3), np.uint8) if mode == "P" else None
    write_png(tmp_path / "x.png", (shape[1], shape[0]), np.split(image, cuts), palette)
    with Image.open(tmp_path / "x.png") as read:
        assert read.mode == mode and np.array_equal(np.asarray(read), image)
        if palette is not None:
            assert np.array_equal(np.array(read.getpalette("RGB")).reshape(-1, 3), palette)


def test_rows_in_any_memory_order(tmp_path: Path) -> None:
    image = np.asfortranarray(RNG.integers(0, 256, (6, 8, 3), np.uint8))[::-1]
    write_png(tmp_path / "x.png", (8, 6), [image[:4], image[4:]])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), image)


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_too_few_or_too_many_rows(tmp_path: Path, rows: int) -> None:
    with pytest.raises(ValueError, match=f"expected 4 rows, got {rows}"):
        write_png(tmp_path / "x.png", (2, 4), [np.zeros((rows, 2), np.uint8)] if rows else [])


def test_memory_is_a_strips(tmp_path: Path) -> None:
    strip = RNG.integers(0, 256, (16, 4000, 3), np.uint8)
    tracemalloc.start()
    write_png(tmp_path / "x.png", (4000, 1600), (strip for _ in range(100)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * strip.nbytes
