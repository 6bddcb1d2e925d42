"""Any image a user has -> RGB, 8 bits a channel; any mask -> the numbers it stores."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zs3fast.utils.errors import FileFormatError, FileLimitError, ImageError
from zs3fast.utils.files import hidden

# What a folder's files are taken for images by; other files that Pillow knows (.pdf, .mpg, .h5) are none.
_SUFFIXES = (
    ".apng .avif .avifs .blp .bmp .dds .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo .pbm .pcx .pgm .png "
    ".pnm .ppm .psd .qoi .sgi .tga .tif .tiff .webp"
).split()
_UNREADABLE = (".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".rw2")
_STRIP = 1 << 17  # pixels that are worked on at a time
_ORIENTATION = 0x0112  # of EXIF
_SIXTEEN = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(image: Any) -> tuple[np.ndarray, str | None]:
    """An image as uint8 [H, W, 3] RGB, and its path if it came from one.

    Args:
        image: one of
            - a path. The EXIF rotation is applied; of an animation or a multi-page file the first frame is used, with a
              warning.
            - the bytes of such a file, or a binary file object.
            - a PIL image of any mode: transparency is laid over white, CMYK and palettes are converted, 16-bit greys
              are scaled to 8 bits, the EXIF rotation is applied if still recorded.
            - a NumPy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha), uint8, uint16 (scaled) or float in 0..1.
            - a tensor, channels first: [H, W], [1, H, W], [3, H, W] or [4, H, W], of the same types.
    Raises:
        FileNotFoundError: no such file.
        ImageError (a ValueError): a file that cannot be read, naming it; too many pixels.
        ValueError: a shape or range that is no image.
        TypeError: something else than the above, or an array of another dtype.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image_file(Path(image))[0], os.fspath(image)
    if isinstance(image, Image.Image):
        with _one_line(f"image: {image.format or 'PIL'} image"):
            return _from_pil(image, "image"), getattr(image, "filename", None) or None
    if isinstance(image, np.ndarray):
        return _from_array(image), None
    if isinstance(image, Tensor):
        if image.dim() == 3 and image.shape[0] not in (1, 3, 4):
            raise ValueError(f"image: expected a tensor with channels first, [3, H, W], got {list(image.shape)}")
        array = image.detach().cpu()
        array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
        return _from_array((array.permute(1, 2, 0) if array.dim() == 3 else array).numpy()), None
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = io.BytesIO(image)
    if callable(getattr(image, "read", None)) and callable(getattr(image, "seek", None)):
        with _opened(image, f"image: {getattr(image, 'name', None) or 'the data'}") as opened:
            return _from_pil(opened, "image"), None
    raise TypeError(
        f"image: expected a path, a PIL image, an array or a tensor, bytes or a file, got {type(image).__name__}"
    )


def image_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format (as Pillow calls it) and size (H, W) that the bytes of an image file begin with; no pixel is decoded.

    Raises:
        ImageError (a ValueError): no image, or one whose size alone makes Pillow refuse it.
    """
    with _opened(io.BytesIO(data), "image: the data") as image:
        return image.format or "unknown", (image.height, image.width)


def read_image_file(path: Path, what: str = "image") -> tuple[np.ndarray, int]:
    """An image file as uint8 [H, W, 3] RGB, upright, and its EXIF orientation: 1, or what was undone, 2..8.

    Args:
        what: what errors call it.
    """
    name = f"{what}: {path}"
    with _opened(path, name) as image:
        pixels, orientation = _stored(image, str(path))
    with _one_line(name):  # where the decoder's own copy is gone
        return _upright(pixels, orientation), orientation if orientation in range(2, 9) else 1


def read_mask_file(path: Path, what: str = "labels", grey: bool = False) -> tuple[np.ndarray, str | None]:
    """The numbers that a mask stores, [H, W] of an integer type, and a note on what may be meant otherwise.

    Of a palette image these are the indices. Greys of 1, 2 and 4 bits are the numbers 0, 1, 2, ... that lie in the
    file, not the greys they stand for, which is what Pillow gives; 8, 16 and 32 bits are as they are.

    Args:
        what: what errors call it.
        grey: of an image in colours, take the greys; its transparency is not looked at.
    Raises:
        FileNotFoundError: no such file.  ImageError: unreadable, or in colours; the message names the file.
    """
    name = f"{what}: {path}"
    with _opened(path, name) as image:
        if grey and image.mode in ("LA", "RGB", "RGBA"):
            return np.asarray(image.convert("L")), None
        if image.mode not in ("1", "L", "P", *_SIXTEEN):
            raise ImageError(f"{name}: expected class indices in one channel, got an image of mode {image.mode}")
        top = _largest_grey(image)
        values = np.asarray(image)
        note = _ramp_note(image, values) if image.mode == "P" else None
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if top is not None:
        values = ((values.astype(np.uint16) * top + 127) // 255).astype(np.uint8)
    return values, None if note is None else f"{name} {note}"


def read_colours(path: Path, what: str = "labels") -> np.ndarray:
    """The colours of a mask as they are stored, uint8 [H, W, 3]: no rotation, and transparency is not looked at."""
    name = f"{what}: {path}"
    with _opened(path, name) as image:
        if image.mode not in ("P", "L", "1", "RGB", "RGBA"):
            raise ImageError(f"{name}: expected colours of 8 bits a channel, got an image of mode {image.mode}")
        return np.asarray(image.convert("RGB"))


def strips(height: int, width: int) -> Iterator[slice]:
    """Rows of an image, some at a time: work on a photo of 36 megapixels then needs no memory but the photo's."""
    step = max(1, _STRIP // max(width, 1))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def image_files(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Of the files of a folder: the images, sorted, and images in formats that Pillow does not read (HEIC, raw files).

    Hidden files are neither: `._a.jpg` is what macOS writes beside `a.jpg`, `.a.part.png` what a killed writer left.
    """
    files = sorted(path for path in paths if not hidden(path.name))
    known = set(Image.registered_extensions())
    images = {path for path in files if (suffix := path.suffix.lower()) in _SUFFIXES and suffix in known}
    unread = {path for path in files if (suffix := path.suffix.lower()) in _UNREADABLE and suffix not in known}
    plugins = {path for path in files if path.suffix.lower() in _UNREADABLE} - unread
    return (
        [path for path in files if path in images | plugins and path.is_file()],
        [path for path in files if path in unread and path.is_file()],
    )


def image_suffixes() -> tuple[str, ...]:
    """Suffixes of what a folder's files are taken for images by, in lower case."""
    Image.init()
    known = set(Image.registered_extensions())
    return tuple(suffix for suffix in (*_SUFFIXES, *_UNREADABLE) if suffix in known)


@contextmanager
def _opened(source: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """An opened image file; whatever goes wrong with it is one error that begins with `name`."""
    if isinstance(source, Path) and not source.is_file():
        what, _, path = name.partition(": ")
        if source.exists():
            raise ImageError(f"{name} is {'a folder' if source.is_dir() else 'no plain file'}, expected an image")
        raise FileNotFoundError(f"{what}: no file {path}")
    with _one_line(name), Image.open(source) as image:
        yield image
        if isinstance(source, Path):
            image.close()  # its pixels too, of which the caller has a copy


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Errors of decoding as one that begins with `name`. Decoders let out whatever the bytes provoke, also TypeErrors,
    RuntimeErrors and MemoryErrors, and each version others."""
    try:
        yield
    except FileFormatError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a format that Pillow {PIL.__version__} reads") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise FileLimitError(
            f"{name} has more than {limit} pixels and may be a decompression bomb; "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except MemoryError:
        raise ImageError(f"{name} cannot be read, there is not enough memory for it") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read, it may be cut off or damaged ({reason})") from None


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of an image's first frame, upright; an opened image is left at the frame it was at."""
    return _upright(*_stored(image, name))


def _stored(image: Image.Image, name: str) -> tuple[np.ndarray, Any]:
    """The pixels of an image's first frame as they are stored, and what EXIF says of their orientation, if anything."""
    position = image.tell()
    # A file just opened is at its first frame, which a PSD's composite is not; only images of the caller are elsewhere.
    if position > 0 and image.format != "PSD":
        image.seek(0)
    try:
        image.load()
        pixels, orientation = _pixels(image, name), image.getexif().get(_ORIENTATION, 1)
        _warn_of_frames(image, name)
    finally:
        if image.tell() != position:
            image.seek(position)
    return pixels, orientation


def _warn_of_frames(image: Image.Image, name: str) -> None:
    """Say that there is more than is used; asked last, as counting walks through pages that may be damaged."""
    if image.format in ("MPO", "PSD"):  # cameras store previews beside the photo in MPO; a PSD's frames are its layers
        return
    try:
        frames = str(count) if (count := getattr(image, "n_frames", 1)) > 1 else ""
    except Exception:  # a later page is damaged or cut off: there are some, how many is not known
        frames = "several"
    if frames:
        warnings.warn(f"{name} holds {frames} frames, only the first is used", stacklevel=5)


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [H, W, 3] of a loaded image as it is stored, converted strip by strip."""
    if 0 in image.size:
        raise ImageError(f"image: {name}: expected at least one pixel, got the size {image.size}")
    if image.mode == "F":
        raise ImageError(f"image: {name}: expected 8 or 16 bits a channel, got floating-point pixels of unknown range")
    if image.mode == "I":
        low, high = (int(value) for value in image.getextrema())  # type: ignore[arg-type]  # a pair: of one channel
        if low < 0 or high > 65535:
            raise ImageError(f"image: {name}: expected 8 or 16 bits, got integers from {low} to {high}")
    transparent = image.has_transparency_data
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in strips(image.height, image.width):
        whole = rows == slice(0, image.height)
        strip = image if whole else image.crop((0, rows.start, image.width, rows.stop))
        if image.mode in _SIXTEEN:
            pixels[rows] = _eight_bits(np.asarray(strip).astype(np.uint16))[:, :, None]
            continue
        if transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        pixels[rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as EXIF's orientation 1..8 means them to be seen; anything else is no orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _largest_grey(image: Image.Image) -> int | None:
    """What the file's largest number is where Pillow scales greys to 0..255 while it decodes; None where it does not.

    Asked before the image is loaded. PNG and TIFF of 2 and 4 bits, PGM of any maximum.
    """
    if image.mode != "L":
        return None
    for tile in getattr(image, "tile", []):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if tile[0] in ("ppm", "ppm_plain"):
            return int(arguments[-1]) if len(arguments) > 1 and 0 < int(arguments[-1]) < 255 else None
        bits = {"L;2": 2, "L;4": 4, "L;2I": 2, "L;4I": 4, "L;2R": 2, "L;4R": 4}.get(str(arguments[0]))
        if bits is not None:
            return (1 << bits) - 1
    return None


def _ramp_note(image: Image.Image, values: np.ndarray) -> str | None:
    """A word on a palette of greys that are not their indices: the greys may be the labels that were meant."""
    palette = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    used = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    used = used[used < len(palette)]
    greys = palette[used, 0]
    ramp = (palette == palette[:, :1]).all()
    if not ramp or len(used) < 2 or (greys == used).all():
        return None
    return (
        f"has a palette of greys; its indices ({_few(used)}) are taken as labels, not the greys ({_few(greys)}) that "
        "they are shown in"
    )


def _few(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:4].tolist())) + (", ..." if len(values) > 4 else "")


def resize(image: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
    """The image uint8 [H, W, 3] at `size` = (H', W'), bilinearly, as the library does it that a method was made with.

    antialias: False: OpenCV's INTER_LINEAR, which looks at the nearest four pixels whatever the sizes (mmsegmentation,
    so ZegCLIP and its kin). True: Pillow's BILINEAR, which averages what lies between the samples of an image made
    smaller (CLIP, detectron2). They differ by far more than rounding; each method keeps its own.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if min(size) < 1:
        raise ValueError(f"size: expected a height and a width of at least 1, got {tuple(size)}")
    if image.shape[:2] == tuple(size):
        return image
    if antialias:
        return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    import cv2

    return np.asarray(cv2.resize(np.ascontiguousarray(image), (size[1], size[0]), interpolation=cv2.INTER_LINEAR))


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"image: expected an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
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
        raise ValueError(f"image: expected floats in 0..1, got {_exactly(array.min())} to {_exactly(array.max())}")
    out: np.ndarray = np.rint(array * 255).astype(np.uint8)
    return out


def _exactly(value: np.floating) -> str:
    """A number as short as it can be told from others: 128, but 1.0000001."""
    return short if float(short := f"{value:g}") == float(value) else str(value)
