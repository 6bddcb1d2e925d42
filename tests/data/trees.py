"""Small datasets on disk in the layouts people have, made from arrays."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 16)


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def stripes(values, size: tuple[int, int] = SIZE, dtype=np.uint8) -> np.ndarray:
    """A mask of vertical stripes, one a value."""
    return np.array(values, dtype)[np.arange(size[1]) * len(values) // size[1]] * np.ones((size[0], 1), dtype)


def write_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write_list(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def palette_mask(path: Path, mask: np.ndarray) -> None:
    """A mask as VOC stores it: a palette image whose indices are the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask, "P")
    image.putpalette([17 * i % 256 for i in range(768)])
    image.save(path)


def voc(root: Path, train=("a", "b"), aug=("c",), val=("d", "e"), lists=("train", "aug", "val"), values=None) -> Path:
    """VOC 2012 with SegmentationClass for train and val, SegmentationClassAug for aug; returns the VOC2012 folder."""
    place = root / "VOCdevkit" / "VOC2012"
    values = values or {}
    for number, name in enumerate([*train, *aug, *val]):
        write_image(place / "JPEGImages" / f"{name}.jpg", picture(number))
        folder = "SegmentationClassAug" if name in aug else "SegmentationClass"
        palette_mask(place / folder / f"{name}.png", stripes(values.get(name, (0, 1 + number, 20, 255))))
    ids = {"train": train, "aug": aug, "val": val, "train_aug": (*train, *aug)}
    for name in lists:
        write_list(place / "ImageSets/Segmentation" / f"{name}.txt", ids[name])
    return place


def folders(root: Path, images: str, labels: str, masks: dict[str, np.ndarray], suffix: str = ".png") -> Path:
    """An image for every mask, in parallel folders."""
    for number, (name, mask) in enumerate(masks.items()):
        write_image(root / images / f"{name}.jpg", picture(number, mask.shape))
        write_image(root / labels / f"{name}{suffix}", mask)
    return root


def grey_png(path: Path, values: list[list[int]], bits: int) -> None:
    """A grey PNG of 1, 2, 4 or 8 bits, as tools write masks; Pillow itself writes no 2 and 4."""
    rows = []
    for row in values:
        binary = "".join(f"{value:0{bits}b}" for value in row)
        binary += "0" * (-len(binary) % 8)
        rows.append(b"\0" + bytes(int(binary[i : i + 8], 2) for i in range(0, len(binary), 8)))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
