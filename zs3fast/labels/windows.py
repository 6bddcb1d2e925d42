"""The layout of sliding windows (ZegCLIP's test recipe: crop 512, stride 426)."""

from __future__ import annotations


def sliding_windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, int]]:
    """Top-left corners (y, x) of the windows that cover an image, row by row.

    A side of length L has max(L - crop + stride - 1, 0) // stride + 1 windows; window i starts at stride * i, and the
    last one is moved back to end at L. Every pixel is covered where crop >= stride.

    Args:
        size: (H, W) of the image.  stride: steps (down, right).
        crop: (height, width) of a window, no larger than the image.
    Raises:
        ValueError: a crop larger than the image, or a size, crop or stride below 1.
    """
    rows, columns = (_starts(*sides) for sides in zip(("height", "width"), size, crop, stride, strict=True))
    return [(y, x) for y in rows for x in columns]


def _starts(side: str, length: int, crop: int, stride: int) -> list[int]:
    if min(length, crop, stride) < 1 or crop > length:
        raise ValueError(
            f"windows: expected 1 <= crop <= image and stride >= 1, got {side} {length}, crop {crop}, stride {stride}"
        )
    count = (length - crop + stride - 1) // stride + 1
    return [min(i * stride, length - crop) for i in range(count)]
