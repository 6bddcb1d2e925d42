"""What the page and the service take from strangers: an image's bytes and class names, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zs3fast.text import parse_classes
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.utils.images import image_header, read_image

# Decoders that see bytes from outside; Pillow has others, which start programs or are rarely looked after.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Limits:
    """max_bytes: of an encoded image.  max_pixels: of the decoded one.  max_classes: names.  max_name: characters each.

    Errors of the methods are ValueErrors of one line that begin with the argument's name.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 25_000_000
    max_classes: int = 1_000
    max_name: int = 200

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def classes(self, given: Any, argument: str = "classes") -> list[ClassEntry]:
        """Class names as `zs3fast.text.parse_classes` reads them: "cat, grass", or an item a class."""
        if isinstance(given, str):
            items: Sequence[Any] = given.split(",")
        elif isinstance(given, Sequence) and all(isinstance(item, str) for item in given):
            items = given
        else:
            raise ValueError(f"{argument}: expected text, or a list of texts, got {type(given).__name__}")
        if len(items) > self.max_classes:
            raise ValueError(f"{argument}: expected at most {self.max_classes:,} names, got {len(items):,}")
        names = [name for item in items for name in item.split(",")]
        if len(names) > self.max_classes:  # synonyms are encoded one by one as well
            raise ValueError(
                f"{argument}: expected at most {self.max_classes:,} names, got {len(names):,} with synonyms"
            )
        longest = max(names, key=len, default="")
        if len(longest) > self.max_name:
            raise ValueError(
                f"{argument}: expected names of at most {self.max_name} characters, got one of {len(longest):,}: "
                f"{longest[:40]!r}..."
            )
        return parse_classes(given, argument)

    def image(self, data: bytes) -> np.ndarray:
        """The image uint8 [H, W, 3] of a file's bytes; its size is looked at before it is decoded."""
        self.check_bytes(len(data))
        if not data:
            raise ValueError("image: expected the bytes of an image file, got none")
        kind, (height, width) = image_header(data)
        if kind not in FORMATS:
            raise ValueError(f"image: expected {', '.join(FORMATS)}, got {kind}")
        if height * width > self.max_pixels:
            raise ValueError(
                f"image: expected at most {self.max_pixels:,} pixels, got {width} x {height} = {height * width:,}"
            )
        return read_image(data)[0]

    def check_bytes(self, count: int) -> None:
        """Raise for a file of so many bytes."""
        if count > self.max_bytes:
            raise ImageTooLarge(
                f"image: expected at most {self.max_bytes / 2**20:.3g} MiB, got {count / 2**20:.3g} MiB"
            )


class ImageTooLarge(ValueError):
    """More bytes than are taken."""
