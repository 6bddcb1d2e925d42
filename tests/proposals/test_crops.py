"""Sub-images of the frozen-CLIP baseline against their definitions, one proposal at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zs3fast.proposals import from_masks, generator_input, resize_batch, soft_masks, sub_images
from zs3fast.proposals.frames import CLIP_MEAN, CLIP_STD
from zs3fast.types import Proposals

FRAME = {"short_side": 64}


def scene():
    """Two images of different sizes, three proposals on the first (one empty), one on the second."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 80, 3), np.uint8), rng.integers(0, 256, (64, 64, 3), np.uint8)]
    first, second = torch.zeros(3, 64, 80), torch.zeros(1, 64, 64)
    first[0, 10:30, 20:60] = 1
    first[0, 15:20, 30:40] = 0
    first[1, 40:, 70:] = 1
    second[0, :, 5:9] = 1
    frames = resize_batch(pictures, **FRAME)
    return frames, from_masks([first, second], **FRAME), generator_input(frames, CLIP_MEAN, CLIP_STD)


def roi_align(picture, box, side):
    """Mean of the bilinear samples of each cell, as many as it has pixels; pixel centres lie at half integers."""
    axes, ratios = [], []
    for low, high, size in ((box[1], box[3], picture.shape[1]), (box[0], box[2], picture.shape[2])):
        ratio = int(np.ceil((high - low) / side))
        steps = (torch.arange(side * ratio, dtype=torch.float64) + 0.5) / (side * ratio)
        axes.append((low + steps * (high - low)) / size * 2 - 1)
        ratios.append(ratio)
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]
    fine = F.grid_sample(picture.double()[None], grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(fine, ratios)[0].float()


@pytest.mark.parametrize("merge", ["crop", "mask_crop"])
def test_zegformer_crops(merge):
    frames, proposals, padded = scene()
    got = sub_images(frames, proposals, merge, "zegformer", side=32)
    assert got.rows.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert got.skipped.tolist() == [[False] * 3, [False, True, True]]
    boxes = [(20, 10, 60, 30), (70, 40, 80, 64), (0, 0, 96, 64), (5, 0, 9, 64)]  # the empty one: the whole frame
    for image, (picture, row), box in zip(got.images, got.rows.tolist(), boxes):
        source = padded[picture]
        if merge == "mask_crop":
            source = source * proposals.masks[picture, row]
        torch.testing.assert_close(image, roi_align(source, box, 32), rtol=1e-4, atol=1e-4)
    if merge == "mask_crop":
        assert got.images[2].abs().max() == 0


def test_zegformer_mask():
    frames, proposals, padded = scene()
    got = sub_images(frames, proposals, "mask", "zegformer", side=32)
    for image, (picture, row) in zip(got.images, got.rows.tolist()):
        small = F.interpolate(padded[picture][None], (32, 32), mode="bilinear")[0]
        mask = F.interpolate(proposals.masks[picture, row][None, None], (32, 32), mode="bilinear")[0] > 0.5
        torch.testing.assert_close(image, small * mask)


@pytest.mark.parametrize("form", ["zsseg", "freeseg"])
@pytest.mark.parametrize("merge", ["mask", "crop", "mask_crop"])
def test_zsseg_and_freeseg(form, merge):
    """Filled with the mean colour in 0..255, cut, normalised, resized: the published order, at the unpadded size."""
    frames, proposals, _ = scene()
    got = sub_images(frames, proposals, merge, form, side=32)
    assert got.rows.tolist() == [[0, 0], [0, 1], [1, 0]]  # the empty one is skipped
    assert got.skipped.tolist() == [[False, False, True], [False, True, True]]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    boxes = [(20, 10, 60, 30), (70, 40, 80, 64), (5, 0, 9, 64)]
    for image, (picture, row), (x0, y0, x1, y1) in zip(got.images, got.rows.tolist(), boxes):
        pixels = frames[picture].pixels
        height, width = frames[picture].image_size
        if merge != "crop":
            inside = proposals.masks[picture, row, :height, :width] > 0.5
            pixels = torch.where(inside, pixels, mean.expand_as(pixels))
        if merge != "mask":
            pixels = pixels[:, y0:y1, x0:x1]
        expected = F.interpolate(
            ((pixels - mean) / std)[None], (32, 32), mode="bicubic", align_corners=form == "freeseg"
        )[0]
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)


def test_masks_from_logits_are_the_same():
    frames, proposals, _ = scene()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 16, 24, generator=generator) * 4
    raw = Proposals(
        mask_logits=logits,
        masks=None,
        valid=proposals.valid,
        padded_size=proposals.padded_size,
        image_sizes=proposals.image_sizes,
        original_sizes=proposals.original_sizes,
    )
    ready = replace(raw, mask_logits=None, masks=soft_masks(raw))
    for form in ("zegformer", "zsseg"):
        one, other = (sub_images(frames, given, "mask_crop", form, side=16) for given in (raw, ready))
        assert torch.equal(one.images, other.images) and torch.equal(one.rows, other.rows)
    got = sub_images(frames, raw, "mask", "zegformer", side=16).images
    padded = generator_input(frames, CLIP_MEAN, CLIP_STD)
    inside = F.interpolate(logits[:1, :1], (16, 16), mode="bilinear").sigmoid() > 0.5
    torch.testing.assert_close(got[0], (F.interpolate(padded[:1], (16, 16), mode="bilinear") * inside)[0])


def test_published_size_and_single_frames():
    frames, proposals, _ = scene()
    assert sub_images(frames, proposals).images.shape == (4, 3, 224, 224)
    one = from_masks([torch.ones(1, 64, 64)], **FRAME)
    frame = resize_batch([np.zeros((64, 64, 3), np.uint8)], **FRAME)[0]
    got = sub_images(frame, one, side=8)
    expected = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(got.images[0], expected.view(3, 1, 1).expand(3, 8, 8))


@pytest.mark.parametrize("form", ["zegformer", "zsseg"])
@pytest.mark.parametrize("merge", ["mask", "mask_crop"])
def test_no_proposal_at_all(form, merge):
    frames, proposals, _ = scene()
    got = sub_images(frames, replace(proposals, valid=torch.zeros_like(proposals.valid)), merge, form, side=8)
    assert got.images.shape == (0, 3, 8, 8) and got.rows.shape == (0, 2) and got.skipped.all()


def test_bad_requests():
    frames, proposals, _ = scene()
    with pytest.raises(ValueError, match="merge: expected one of mask, crop, mask_crop, got 'both'"):
        sub_images(frames, proposals, "both")
    with pytest.raises(ValueError, match="form: expected one of zegformer, zsseg, freeseg, got 'maft'"):
        sub_images(frames, proposals, form="maft")
    with pytest.raises(ValueError, match="frames: expected .* sizes .* as the proposals have them"):
        sub_images(frames[:1], proposals)
    with pytest.raises(ValueError, match="masks: expected finite values"):
        sub_images(frames, replace(proposals, masks=proposals.masks * float("nan")))
