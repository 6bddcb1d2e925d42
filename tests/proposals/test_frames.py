"""MAFT's frame: sizes, padding, and the inputs made from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zs3fast.proposals import clip_input, generator_input, resize_batch, resize_for_proposer
from zs3fast.proposals.frames import frame_size


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("original", "size", "padded"),
    [
        ((480, 640), (640, 853), (640, 864)),
        ((375, 500), (640, 853), (640, 864)),
        ((640, 480), (853, 640), (864, 640)),
        ((640, 640), (640, 640), (640, 640)),
        ((1280, 1920), (640, 960), (640, 960)),
        ((100, 1000), (256, 2560), (256, 2560)),  # the long side's cap
        ((1, 5000), (1, 2560), (32, 2560)),  # would round to no rows
        ((333, 512), (640, 984), (640, 992)),  # 984.02
    ],
)
def test_sizes(original, size, padded):
    frame = resize_for_proposer(np.zeros((*original, 3), dtype=np.uint8))
    assert (frame.image_size, frame.padded_size, frame.original_size) == (size, padded, original)
    assert frame.pixels.shape == (3, *size) and frame.pixels.dtype == torch.float32


def test_sides_are_rounded_half_up():
    assert frame_size((2, 5), short_side=3) == (3, 8)  # 7.5
    assert frame_size((2, 3), short_side=3) == (3, 5)  # 4.5: Python's round gives 4


def test_shrinking_averages():
    """A checkerboard of single pixels, shrunk four times, is grey; sampling would keep it black and white."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    frame = resize_for_proposer(np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8), short_side=32)
    assert (frame.pixels[:, 2:-2, 2:-2] - 127.5).abs().max() < 8


def test_no_resize_keeps_the_pixels():
    given = picture(64, 96)
    frame = resize_for_proposer(given, short_side=64)
    assert torch.equal(frame.pixels, torch.from_numpy(given).permute(2, 0, 1).float())


def test_batch_is_padded_to_its_largest_member():
    frames = resize_batch([picture(64, 100), picture(150, 64)], short_side=64)
    assert [frame.image_size for frame in frames] == [(64, 100), (150, 64)]
    assert [frame.padded_size for frame in frames] == [(160, 128)] * 2
    batch = generator_input(frames)
    assert batch.shape == (2, 3, 160, 128)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    for row, frame in zip(batch, frames):
        height, width = frame.image_size
        expected = (frame.pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(row[:, :height, :width], expected)
        assert row[:, height:].abs().sum() == 0 and row[:, :, width:].abs().sum() == 0


def test_given_mean_and_std():
    frame = resize_for_proposer(picture(64, 64), short_side=64)
    got = generator_input(frame, mean=(0, 0, 0), std=(255, 255, 255))
    torch.testing.assert_close(got[0], frame.pixels / 255)


def test_clip_sees_the_padded_frame_squashed():
    frame = resize_for_proposer(picture(70, 100), short_side=70)
    mean = torch.tensor([122.7709383, 116.7460125, 104.09373615]).view(3, 1, 1)
    std = torch.tensor([68.5005327, 66.6321579, 70.3231630]).view(3, 1, 1)
    padded = F.pad((frame.pixels - mean) / std, (0, 28, 0, 26))  # to 96 x 128
    expected = F.interpolate(padded[None], size=(48, 48), mode="bilinear", align_corners=False)
    got = clip_input(frame, side=48)
    assert torch.equal(got, expected)
    assert got[0, :, -6:].abs().max() == 0  # the strip of padding is part of what CLIP sees
    assert clip_input(frame).shape == (1, 3, 480, 480)


def test_frames_of_different_padding_are_refused():
    frames = [resize_for_proposer(picture(64, width), short_side=64) for width in (64, 100)]
    with pytest.raises(ValueError, match="frames: expected frames of one padded size"):
        clip_input(frames)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros((4, 4), np.uint8), ValueError, r"expected uint8 \[H, W, 3\], got uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), ValueError, "got float32"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got uint8 \[0, 4, 3\]"),
        (torch.zeros(3, 4, 4), TypeError, "expected a NumPy array .*, got Tensor"),
    ],
)
def test_bad_pictures(given, error, message):
    with pytest.raises(error, match=f"picture: .*{message}"):
        resize_for_proposer(given)


def test_bad_batches():
    with pytest.raises(ValueError, match="pictures: expected at least one image, got none"):
        resize_batch([])
    with pytest.raises(TypeError, match="pictures: expected a sequence of arrays"):
        resize_batch(picture(4, 4))
