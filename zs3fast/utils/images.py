"""Any picture a user has -> RGB, 8 bits a channel."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What Pillow's decoders let out of files that are cut off or garbled.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)


def read_image(image: Any) -> tuple[np.ndarray, str | None]:
    """A picture as uint8 [H, W, 3] RGB, and its path if it came from one.

    Args:
        image: one of
            - a path. The EXIF rotation is applied; of an animation or a multi-page file the first frame is used, with a
              warning.
            - a PIL image of any mode: transparency is laid over white, CMYK and palettes are converted, 16-bit greys
              are scaled to 8 bits, the EXIF rotation is applied if still recorded.
            - a NumPy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha), uint8, uint16 (scaled) or float in 0..1.
            - a tensor, channels first: [H, W], [1, H, W], [3, H, W] or [4, H, W], of the same types.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, naming it; too many pixels; a shape or range that is no picture.
        TypeError: something else than the above, or an array of another dtype.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_file(Path(image)), os.fspath(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, "image"), getattr(image, "filename", None) or None
    if isinstance(image, np.ndarray):
        return _from_array(image), None
    if isinstance(image, Tensor):
        if image.dim() == 3 and image.shape[0] not in (1, 3, 4):
            raise ValueError(f"image: a tensor has its channels first, [3, H, W], got {list(image.shape)}")
        array = image.detach().cpu()
        array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
        return _from_array((array.permute(1, 2, 0) if array.dim() == 3 else array).numpy()), None
    raise TypeError(f"image: expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def _read_file(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"image: no file {path}")
    if not path.is_file():
        raise ValueError(f"image: {path} is a folder, expected a picture")
    try:
        with Image.open(path) as image:
            return _from_pil(image, str(path))
    except UnidentifiedImageError:
        raise ValueError(f"image: {path} is not a picture in a format that Pillow {Image.__version__} reads") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(
            f"image: {path} has more than {limit} pixels and may be a decompression bomb; "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except DECODER_ERRORS as error:
        if str(error).startswith("image: "):
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"image: {path} cannot be read, it may be cut off or damaged ({reason})") from None


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # cameras store previews beside the photo in MPO
        warnings.warn(f"{name} holds {frames} frames, only the first is used", stacklevel=4)
        image.seek(0)
    image.load()
    image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ValueError(f"image: {name} has no pixels, its size is {image.size}")
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _from_array(_sixteen_bits(np.asarray(image), name))
    if image.mode == "F":
        raise ValueError(f"image: {name} holds floating-point pixels of unknown range, expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _sixteen_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"image: {name} holds integers from {array.min()} to {array.max()}, expected 8 or 16 bits")
    return array.astype(np.uint16)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"image: an array is [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
    array = _eight_bits(array)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 4:
        alpha = array[:, :, 3:].astype(np.float32) / 255
        array = np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return np.rint(array / np.float32(257)).astype(np.uint8)  # 65535 -> 255
    if array.dtype.kind != "f":
        raise TypeError(f"image: expected uint8, uint16 or floats in 0..1, got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):  # so written, nan fails too
        raise ValueError(f"image: floats must lie in 0..1, got {array.min():g} to {array.max():g}")
    return np.rint(array * 255).astype(np.uint8)
