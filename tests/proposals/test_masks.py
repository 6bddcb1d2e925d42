"""Masks from anywhere as Proposals: frames, counts, ranges, and everything that is no proposal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zs3fast.proposals import MaskProposer, check_proposals, from_labels, from_masks, resize_batch, soft_masks
from zs3fast.types import Proposals

FRAME = {"short_side": 64}


def rectangles(height: int, width: int, count: int) -> torch.Tensor:
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for index in range(count):
        masks[index, index : index + 8, 2 * index : 2 * index + 12] = True
    return masks


def test_counts_are_padded_with_empty_invalid_rows():
    got = from_masks([rectangles(64, 64, 3), rectangles(64, 100, 1)], **FRAME)
    assert got.masks.shape == (2, 3, 64, 128) and got.mask_logits is None
    assert got.valid.tolist() == [[True] * 3, [True, False, False]]
    assert got.masks[1, 1:].abs().sum() == 0
    assert got.image_sizes == ((64, 64), (64, 100)) and got.original_sizes == got.image_sizes
    assert torch.equal(got.masks[0, :, :64, :64], rectangles(64, 64, 3).float())
    assert got.masks[0, :, :, 64:].sum() == 0


def test_masks_share_the_frame_of_the_picture():
    """A mask lies where the image's pixels lie after resizing and padding."""
    picture = np.zeros((48, 80, 3), dtype=np.uint8)
    picture[10:30, 20:50] = 255
    mask = torch.from_numpy(picture[:, :, 0] > 0)
    (frame,) = resize_batch([picture], **FRAME)
    got = from_masks([mask[None]], **FRAME)
    assert (got.padded_size, got.image_sizes[0]) == (frame.padded_size, frame.image_size)
    height, width = frame.image_size
    inside = got.masks[0, 0, :height, :width]
    assert (inside - frame.pixels[0] / 255).abs().max() < 0.01


def test_shrinking_keeps_thin_masks():
    line = torch.zeros(1, 640, 640)
    line[:, :, 301] = 1
    got = from_masks(line[None], **FRAME)
    assert got.masks.sum() == pytest.approx(64 * 0.1, rel=0.01)  # a tenth of a pixel wide on 64 rows


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_types_of_masks(dtype):
    masks = rectangles(64, 64, 2).to(dtype)
    for given in (masks[None], masks[None].numpy(), [masks], [masks.numpy()]):
        got = from_masks(given, **FRAME)
        assert got.masks.dtype == torch.float32 and torch.equal(got.masks[0], masks.float())


def test_scores_and_quality_travel():
    scores = [torch.rand(2, 4).softmax(-1), torch.rand(1, 4).softmax(-1)]
    got = from_masks(
        [rectangles(64, 64, 2), rectangles(64, 64, 1)],
        class_scores=scores,
        class_names=["a", "b", "c"],
        quality=[np.array([0.9, 0.2]), np.array([0.5])],
        **FRAME,
    )
    torch.testing.assert_close(got.class_scores[0], scores[0])
    torch.testing.assert_close(got.quality, torch.tensor([[0.9, 0.2], [0.5, 0.0]]))
    assert got.class_names == ("a", "b", "c")


def test_one_picture_of_a_batch_may_have_none():
    got = from_masks([rectangles(64, 64, 2), torch.zeros(0, 64, 64)], **FRAME)
    assert got.valid.tolist() == [[True, True], [False, False]]


def test_label_maps():
    labels = np.full((2, 64, 64), 255)
    labels[0, :10] = 4
    labels[0, 20:30] = 4
    assert from_labels(labels, **FRAME).valid.tolist() == [[True], [False]]
    assert from_labels(labels, connected=True, **FRAME).valid.tolist() == [[True, True], [False, False]]
    assert from_labels(labels[1:], **FRAME).masks.shape == (1, 0, 64, 64)
    with pytest.raises(ValueError, match="labels: expected at least one label map"):
        from_labels([])


@pytest.mark.parametrize("align_corners", [False, True])
def test_soft_masks_are_upsampled_logits(align_corners):
    proposals = Proposals(
        mask_logits=torch.randn(1, 3, 16, 24),
        masks=None,
        valid=torch.ones(1, 3, dtype=torch.bool),
        padded_size=(64, 96),
        image_sizes=((60, 96),),
        original_sizes=((60, 96),),
        align_corners=align_corners,
    )
    check_proposals(proposals, [(60, 96)])
    expected = F.interpolate(proposals.mask_logits, (64, 96), mode="bilinear", align_corners=align_corners).sigmoid()
    torch.testing.assert_close(soft_masks(proposals), expected)
    given = from_masks([rectangles(64, 64, 2)], **FRAME)
    assert soft_masks(given) is given.masks


NAN = torch.full((1, 1, 64, 64), float("nan"))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "masks: expected the masks of at least one image, got none"),
        ([torch.zeros(0, 64, 64)], {}, "masks: expected at least one proposal, got none"),
        ([torch.zeros(2, 64, 64)], {}, "masks: expected at least one with a pixel in it"),
        (NAN, {}, r"masks\[0\]: expected finite values, got nan"),
        ([torch.full((1, 64, 64), 255)], {}, r"masks\[0\]: expected values in \[0, 1\], got 255 to 255"),
        ([-torch.ones(1, 64, 64)], {}, r"masks\[0\]: expected values in \[0, 1\]"),
        ([torch.ones(64, 64)], {}, r"masks\[0\]: expected \[Nq, H, W\] .*got \[64, 64\]"),
        (torch.ones(2, 64, 64), {}, r"masks: expected \[B, Nq, H, W\] of a batch of equal sizes, got \[2, 64, 64\]"),
        (
            [torch.ones(1, 64, 64)],
            {"original_sizes": [(64, 65)]},
            r"masks\[0\]: expected masks of an image of .*, got \(64, 64\)",
        ),
        ([torch.ones(1, 64, 64)], {"original_sizes": [(64, 64)] * 2}, "masks: expected those of 2 images, got 1"),
        ([torch.ones(1, 64, 64)], {"quality": [torch.ones(2)]}, r"quality\[0\]: expected one row for each of 1 masks"),
        ([torch.ones(1, 64, 64)], {"quality": []}, "quality: expected those of 1 images, got 0"),
        (
            [torch.ones(1, 64, 64)],
            {"class_scores": [torch.ones(1, 3)], "class_names": ["a", "b", "c"]},
            "expected class_scores of 4 columns, got 3",
        ),
        (
            [torch.ones(1, 64, 64)] * 2,
            {"class_scores": [torch.ones(1, 3), torch.ones(1, 4)]},
            r"class_scores\[1\]: expected 3 columns, as the first image's, got 4",
        ),
    ],
)
def test_bad_masks(given, options, message):
    with pytest.raises(ValueError, match=message):
        from_masks(given, **options)


def test_no_array():
    with pytest.raises(TypeError, match=r"masks\[0\]: expected a tensor or an array .* got str"):
        from_masks(["masks.png"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, "expected mask_logits or masks, got neither"),
        ({"mask_logits": torch.zeros(1, 2, 16, 16)}, "expected mask_logits or masks, got both"),
        ({"masks": torch.zeros(1, 2, 64, 32)}, r"expected masks of padded_size \[64, 64\], got \[64, 32\]"),
        ({"masks": torch.zeros(2, 64, 64)}, r"expected masks \[B, Nq, H, W\], got \[2, 64, 64\]"),
        ({"masks": torch.full((1, 2, 64, 64), float("nan"))}, "masks: expected finite values"),
        ({"masks": torch.full((1, 2, 64, 64), 7.0)}, r"masks: expected values in \[0, 1\], got 7 to 7"),
        ({"valid": torch.ones(1, 3, dtype=torch.bool)}, r"expected valid \[1, 2\], got \[1, 3\]"),
        ({"image_sizes": ((64, 64), (64, 64))}, "expected image_sizes of 1 images, as masks, got 2"),
        ({"image_sizes": ((65, 64),)}, r"expected image sizes within padded_size .*, got \(65, 64\)"),
        ({"class_scores": torch.zeros(1, 3, 4)}, r"expected class_scores \[1, 2, K \+ 1\], got \[1, 3, 4\]"),
        ({"class_scores": torch.full((1, 2, 4), float("nan"))}, "class_scores hold values that are not finite"),
    ],
)
def test_malformed_proposals(change, message):
    good = from_masks([rectangles(64, 64, 2)], **FRAME)
    check_proposals(good, [(64, 64)])
    with pytest.raises(ValueError, match=message):
        check_proposals(replace(good, **change))


def test_proposals_of_another_batch_or_picture():
    good = from_masks([rectangles(64, 64, 2)], **FRAME)
    with pytest.raises(ValueError, match="masks: expected those of 2 images, got 1"):
        check_proposals(good, [(64, 64)] * 2)
    with pytest.raises(ValueError, match=r"expected masks of an image of \(64, 80\), got \(64, 64\)"):
        check_proposals(good, [(64, 80)])


def test_a_function_is_a_proposer():
    def whole(pictures, names=None):
        return from_masks([torch.ones(1, *picture.shape[:2]) for picture in pictures])

    assert isinstance(whole, MaskProposer)
    assert whole([np.zeros((8, 8, 3), np.uint8)]).valid.tolist() == [[True]]
