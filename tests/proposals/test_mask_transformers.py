"""Mask2Former, MaskFormer and SAM: real model classes, random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.proposals.tiny_models import picture, tiny_mask2former, tiny_maskformer, tiny_sam, transformers
from zs3fast.proposals import (
    MaskProposer,
    SamProposer,
    TransformersMaskProposer,
    check_proposals,
    generator_input,
    resize_batch,
    soft_masks,
)
from zs3fast.proposals.sam import point_grid, stability_scores

FRAME = {"short_side": 64}
BUILDERS = {"mask2former": tiny_mask2former, "maskformer": tiny_maskformer}


@pytest.mark.parametrize("kind", BUILDERS)
def test_queries_become_proposals(kind):
    model = BUILDERS[kind]()
    proposer = TransformersMaskProposer(model, **FRAME)
    assert isinstance(proposer, MaskProposer)
    pictures = [picture(48, 60), picture(90, 48, seed=1)]
    got = proposer(pictures)
    check_proposals(got, [(48, 60), (90, 48)])
    assert got.padded_size == (128, 96) and got.image_sizes == ((64, 80), (120, 64))
    assert got.mask_logits.shape[2:] == (32, 24) and got.masks is None and got.valid.all()
    assert got.class_names == tuple(f"LABEL_{index}" for index in range(model.config.num_labels))

    with torch.no_grad():
        out = model(pixel_values=generator_input(resize_batch(pictures, **FRAME)))
    assert torch.equal(got.mask_logits, out.masks_queries_logits)
    exponentials = out.class_queries_logits.double().exp()
    expected = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(got.class_scores.double(), expected, rtol=1e-5, atol=1e-7)
    assert got.class_scores.shape[-1] == len(got.class_names) + 1
    assert soft_masks(got).shape == (2, got.valid.shape[1], 128, 96)


def test_batch_of_one_size_equals_single_pictures():
    proposer = TransformersMaskProposer(tiny_maskformer(), **FRAME)
    pictures = [picture(64, 96, seed=seed) for seed in range(2)]
    together = proposer(pictures)
    for index, one in enumerate(pictures):
        alone = proposer([one])
        torch.testing.assert_close(together.mask_logits[index], alone.mask_logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.class_scores[index], alone.class_scores[0], rtol=1e-4, atol=1e-5)


def test_mean_and_std_reach_the_model():
    model = tiny_maskformer()
    pictures = [picture(64, 64)]
    got = TransformersMaskProposer(model, mean=(0, 0, 0), std=(255, 255, 255), **FRAME)(pictures)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures[0]).permute(2, 0, 1).float()[None] / 255
        torch.testing.assert_close(got.mask_logits, model(pixel_values=pixels).masks_queries_logits)


def test_broken_weights_are_reported():
    model = tiny_maskformer()
    with torch.no_grad():
        model.class_predictor.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the mask proposer's output is not finite"):
        TransformersMaskProposer(model, **FRAME)([picture(64, 64)])
    model = tiny_sam()
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.proj_out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="SAM's output is not finite"):
        SamProposer(model, points_per_side=2, **FRAME)([picture(64, 64)])


SAM = {"points_per_side": 8, "min_iou": 0.1, "min_stability": 0.3, "short_side": 48}


@pytest.mark.parametrize(("min_iou", "min_stability", "nms_iou"), [(0.1, 0.3, 0.95), (0.5, 0.6, 0.9), (0.3, 0.3, 0.7)])
def test_sam_equals_the_library_pipeline(min_iou, min_stability, nms_iou):
    """transformers' mask-generation pipeline takes the same steps with its own code.

    The third setting keeps 3 masks with boxes that end on the last pixel, as SAM's do, and 2 with boxes ending past it.
    """
    model, size = tiny_sam(scale=14), (48, 60)
    limits = {"min_iou": min_iou, "min_stability": min_stability, "nms_iou": nms_iou}
    proposer = SamProposer(model, **{**SAM, **limits})
    got = proposer([picture(*size, seed=2)])
    check_proposals(got, [size])
    pipeline = transformers.pipeline(
        "mask-generation", model=model, image_processor=proposer.processor, device="cpu", points_per_batch=64
    )
    expected = pipeline(
        Image.fromarray(picture(*size, seed=2)),
        points_per_crop=8,
        pred_iou_thresh=min_iou,
        stability_score_thresh=min_stability,
        crops_nms_thresh=nms_iou,
    )
    count = len(expected["masks"])
    assert count > 1 and got.valid.sum() == count
    torch.testing.assert_close(got.quality[0], torch.as_tensor(expected["scores"]).clamp(0, 1))
    masks = torch.from_numpy(np.stack([np.asarray(mask) for mask in expected["masks"]])).float()
    assert torch.equal(got.masks[0, :, :48, :60], masks)
    assert got.masks[:, :, 48:].sum() == 0 and got.masks[..., 60:].sum() == 0


def test_sam_caps_and_pads_a_batch():
    proposer = SamProposer(tiny_sam(scale=14), nms_iou=0.95, **SAM)
    pictures = [picture(48, 60, seed=2), picture(70, 48, seed=1)]
    got = proposer(pictures)
    assert got.padded_size == (96, 64) and got.image_sizes == ((48, 60), (70, 48))
    for index, (height, width) in enumerate(got.image_sizes):
        masks, quality = got.masks[index, got.valid[index]], got.quality[index, got.valid[index]]
        assert len(masks) and set(masks.unique().tolist()) == {0.0, 1.0} and masks.any(-1).any(-1).all()
        assert torch.equal(quality, quality.sort(descending=True).values)
        assert masks[:, height:].sum() == 0 and masks[:, :, width:].sum() == 0
        alone = proposer(pictures[index : index + 1])
        assert torch.equal(alone.masks[0, :, :height, :width], masks[:, :height, :width])
    capped = SamProposer(tiny_sam(scale=14), nms_iou=0.95, max_masks=3, **SAM)(pictures)
    assert torch.equal(capped.masks, got.masks[:, :3])


def test_sam_undoes_padding_and_resize():
    """A square of the model's 64 x 64 input, of which the image fills 51 x 64, lands in its place on the frame."""
    proposer = SamProposer(tiny_sam(), min_stability=0.5)
    logits = torch.full((1, 32, 32), -9.0)
    logits[:, 4:12, 8:16] = 9.0  # rows 8..24, columns 16..32 of the input
    masks, boxes, _ = proposer._filter(logits, torch.tensor([0.9]), [51, 64], (102, 128))
    assert masks.shape == (1, 102, 128)
    expected = torch.tensor([[32.0, 16.0, 63.0, 47.0]])  # twice as large; ends on the last pixel
    assert (boxes - expected).abs().max() <= 2


def test_sam_batch_of_points_changes_nothing():
    model = tiny_sam(scale=14)
    whole = SamProposer(model, points_per_batch=1000, **SAM)([picture(48, 60)])
    parts = SamProposer(model, points_per_batch=7, **SAM)([picture(48, 60)])
    assert torch.equal(whole.masks, parts.masks)
    torch.testing.assert_close(whole.quality, parts.quality)


def test_sam_without_a_mask_warns():
    with pytest.warns(UserWarning, match="SAM found no mask .* in 1 of 1 images"):
        got = SamProposer(tiny_sam(), points_per_side=3, **FRAME)([picture(64, 64)])
    assert got.masks.shape == (1, 0, 64, 64) and got.quality.shape == (1, 0) and got.class_scores is None


def test_sam_published_defaults():
    proposer = SamProposer(tiny_sam())
    assert (proposer.points_per_side, proposer.max_masks) == (32, 100)
    assert (proposer.min_iou, proposer.min_stability, proposer.nms_iou) == (0.88, 0.95, 0.7)
    with pytest.raises(ValueError, match="points_per_side: expected at least 1, got 0"):
        SamProposer(tiny_sam(), points_per_side=0)


def test_points_are_the_centres_of_cells():
    grid = point_grid(4)
    assert grid.shape == (16, 2)
    assert grid[:5].tolist() == [[0.125, 0.125], [0.375, 0.125], [0.625, 0.125], [0.875, 0.125], [0.125, 0.375]]


def test_stability_by_hand():
    logits = torch.tensor([[[3.0, 0.5, -0.5, -3.0]], [[-3.0, -3.0, -3.0, -3.0]], [[2.0, 2.0, 2.0, 2.0]]])
    torch.testing.assert_close(stability_scores(logits), torch.tensor([1 / 3, 0.0, 1.0]))
    assert stability_scores(torch.tensor([[1.0, -1.0]])) == 0.0  # both bounds are strict


@pytest.mark.parametrize("builder", [tiny_maskformer, tiny_sam], ids=["maskformer", "sam"])
def test_half_precision(builder):
    model = builder().to(torch.bfloat16)
    if builder is tiny_sam:
        proposer = SamProposer(model, points_per_side=3, min_iou=-1e9, min_stability=0.0, **FRAME)
    else:
        proposer = TransformersMaskProposer(model, **FRAME)
    got = proposer([picture(64, 80)])
    check_proposals(got, [(64, 80)])
    assert soft_masks(got).dtype == torch.float32 and got.valid.any()
