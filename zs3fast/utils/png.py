"""PNG files written strip by strip: of a photo of 36 megapixels Pillow and OpenCV want 150 MB at once, this a few."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

_GREY, _COLOUR, _INDEXED = 0, 2, 3


def write_png(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    strips: Iterable[np.ndarray],
    palette: np.ndarray | None = None,
) -> None:
    """Write an image of `size` (width, height) from its rows.

    Args:
        strips: from the top, [some, width, 3] uint8, or [some, width] uint8 or uint16: greys, or indices of a palette.
        palette: [n, 3] uint8.
    Raises:
        ValueError: strips that do not make up the image.
    """
    width, height = size
    above: np.ndarray | None = None
    rows, kind = 0, b""
    packed = zlib.compressobj(1)  # a third of the time of level 6 for a tenth more bytes
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for strip in strips:
            if not kind:
                colour = _INDEXED if palette is not None else _COLOUR if strip.ndim == 3 else _GREY
                kind = struct.pack(">IIBBBBB", width, height, 8 * strip.itemsize, colour, 0, 0, 0)
                _chunk(file, b"IHDR", kind)
                if palette is not None:
                    _chunk(file, b"PLTE", palette.astype(np.uint8).tobytes())
            # Rows as bytes, the high one first, each less the row above it (filter 2, "up").
            data = strip.astype(strip.dtype.newbyteorder(">"), copy=False)
            data = np.ascontiguousarray(data).view(np.uint8).reshape(len(strip), -1)
            before = np.zeros_like(data[0]) if above is None else above
            lines = np.full((len(data), 1 + data.shape[1]), 2, np.uint8)
            np.subtract(data[0], before, out=lines[0, 1:])
            np.subtract(data[1:], data[:-1], out=lines[1:, 1:])
            above, rows = data[-1].copy(), rows + len(data)
            _chunk(file, b"IDAT", packed.compress(lines.data))
        if rows != height or above is None:
            raise ValueError(f"strips: expected {height} rows, got {rows}")
        _chunk(file, b"IDAT", packed.flush())
        _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, name: bytes, data: bytes) -> None:
    if data or name == b"IEND":
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
