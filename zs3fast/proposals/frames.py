"""Images on the frame that proposers, their masks and CLIP share: resized, then padded at the bottom and right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.utils import constants
from zs3fast.utils.images import resize

SHORT_SIDE, LONG_SIDE, DIVISOR = 640, 2560, 32
# of pixels in 0..255
IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD = (
    tuple(255 * value for value in values)
    for values in (constants.IMAGENET_MEAN, constants.IMAGENET_STD, constants.CLIP_MEAN, constants.CLIP_STD)
)


@dataclass(frozen=True, eq=False)
class Frame:
    """One image, resized; the padding is a size only, so that a batch can agree on it.

    pixels:        [3, Hi, Wi] float32 in 0..255.
    image_size:    (Hi, Wi).
    padded_size:   (Hp, Wp), at least (Hi, Wi): what generator and CLIP inputs are padded to.
    original_size: (Ho, Wo) of the image.
    """

    pixels: Tensor
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    original_size: tuple[int, int]


def frame_size(
    original_size: tuple[int, int], short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE
) -> tuple[int, int]:
    """(Hi, Wi) of an image resized to `short_side`, or to less where its long side would pass `long_side`.

    Sides are rounded half up, at least one pixel. Source: MAFT, test resize of all open-vocabulary sets.
    """
    height, width = original_size
    if height < 1 or width < 1:
        raise ValueError(f"original_size: expected a height and a width of at least 1, got {(height, width)}")
    scale = short_side / min(height, width)
    sides = (height * scale, width * scale)
    if max(sides) > long_side:
        shrink = long_side / max(sides)
        sides = (sides[0] * shrink, sides[1] * shrink)
    return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))


def padded_size(sizes: Sequence[tuple[int, int]], divisor: int = DIVISOR) -> tuple[int, int]:
    """(Hp, Wp): the largest height and width of `sizes`, each rounded up to a multiple of `divisor`."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def resize_for_proposer(
    picture: np.ndarray, *, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE, divisor: int = DIVISOR
) -> Frame:
    """One image on MAFT's frame: short side 640, long side at most 2560, padded to a multiple of 32.

    Resized as 8-bit pixels by Pillow's bilinear filter (which averages where it shrinks), as the published loaders do.

    Args:
        picture: uint8 [H, W, 3], RGB.
    """
    check_image(picture)
    original = picture.shape[:2]
    size = frame_size(original, short_side, long_side)
    pixels = torch.from_numpy(resize(picture, size, antialias=True).astype(np.float32)).permute(2, 0, 1).contiguous()
    return Frame(pixels, size, padded_size([size], divisor), original)


def resize_batch(
    pictures: Sequence[np.ndarray], *, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE, divisor: int = DIVISOR
) -> list[Frame]:
    """`resize_for_proposer` of each image, all padded to the largest member of the batch."""
    check_images(pictures)
    frames = [
        resize_for_proposer(image, short_side=short_side, long_side=long_side, divisor=divisor) for image in pictures
    ]
    shared = padded_size([frame.image_size for frame in frames], divisor)
    return [replace(frame, padded_size=shared) for frame in frames]


def generator_input(
    frames: Frame | Sequence[Frame], mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """(pixels - mean) / std, then zeros at the bottom and right: [B, 3, Hp, Wp], what a mask generator reads.

    Args:
        frames: one frame (B = 1), or a batch of equal `padded_size`.
        mean, std: three values each, for pixels in 0..255.
    """
    frames = [frames] if isinstance(frames, Frame) else list(frames)
    sizes = {frame.padded_size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"frames: expected frames of one padded size (see resize_batch), got {sorted(sizes)}")
    height, width = sizes.pop()
    batch = frames[0].pixels.new_zeros(len(frames), 3, height, width)
    for row, frame in zip(batch, frames):
        shift, scale = (frame.pixels.new_tensor(list(values)).view(3, 1, 1) for values in (mean, std))
        row[:, : frame.image_size[0], : frame.image_size[1]] = (frame.pixels - shift) / scale
    return batch


def clip_input(frames: Frame | Sequence[Frame], side: int = 480) -> Tensor:
    """What MAFT's CLIP reads: CLIP-normalised pixels, zero padded, squashed to [B, 3, side, side].

    The padding strip is part of the image and the aspect ratio is lost, both as published: masks on the padded frame
    lie where CLIP sees their pixels. Bilinear, `align_corners=False`, no antialias.
    """
    padded = generator_input(frames, CLIP_MEAN, CLIP_STD)
    return F.interpolate(padded, size=(side, side), mode="bilinear", align_corners=False)


def check_images(pictures: Sequence[np.ndarray]) -> None:
    """Raise unless `pictures` is a sequence of at least one uint8 [H, W, 3] array."""
    if isinstance(pictures, np.ndarray):
        raise TypeError(f"pictures: expected a sequence of arrays [H, W, 3], got one array {list(pictures.shape)}")
    if len(pictures) == 0:
        raise ValueError("pictures: expected at least one image, got none")
    for image in pictures:
        check_image(image)


def check_image(image: np.ndarray) -> None:
    """Raise unless the image is a uint8 [H, W, 3] array."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"picture: expected a NumPy array [H, W, 3], got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"picture: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
