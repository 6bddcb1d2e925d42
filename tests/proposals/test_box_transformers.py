"""Object detectors of the transformers library: real classes, random weights."""

from __future__ import annotations

import pytest
import torch

from tests.proposals.tiny_models import WORDS, picture, tiny_detector
from zs3fast.proposals import BoxProposer, TransformersBoxProposer, boxes_for_class, unknown_words

KINDS = ("detr", "rtdetr", "yolos")
SIZE = (40, 60)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def expected_boxes(kind, model, processor, nms_iou):
    """Straight from the model's outputs, one box after the other."""
    inputs = processor(images=[picture(*SIZE)], return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=inputs["pixel_values"])
    candidates = []
    if kind == "rtdetr":  # a sigmoid a class; as many pairs as there are queries
        scores, order = out.logits[0].sigmoid().flatten().sort(descending=True)
        pairs = [(score, place // len(WORDS), place % len(WORDS)) for score, place in zip(scores, order)]
        pairs = pairs[: out.logits.shape[1]]
    else:  # a softmax whose last column is no object
        scores, labels = out.logits[0].softmax(-1)[:, :-1].max(-1)
        pairs = [(scores[row], row, labels[row]) for row in range(len(scores))]
    for score, row, label in pairs:
        x, y, width, height = out.pred_boxes[0, row].tolist()
        box = [(x - width / 2) * 60, (y - height / 2) * 40, (x + width / 2) * 60, (y + height / 2) * 40]
        box = [min(max(box[0], 0), 60), min(max(box[1], 0), 40), min(max(box[2], 0), 60), min(max(box[3], 0), 40)]
        if WORDS[int(label)] != "N/A" and box[0] < box[2] and box[1] < box[3]:
            candidates.append((float(score), WORDS[int(label)], box))
    kept = []
    for score, word, box in sorted(candidates, reverse=True):
        if all(other != word or iou(box, better) <= nms_iou for _, other, better in kept):
            kept.append((score, word, box))
    return kept


@pytest.mark.parametrize("nms_iou", [1.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_detections(kind, nms_iou):
    model, processor = tiny_detector(kind)
    proposer = TransformersBoxProposer(model, processor, threshold=0.0, nms_iou=nms_iou)
    assert isinstance(proposer, BoxProposer)
    got = proposer(picture(*SIZE))
    expected = expected_boxes(kind, model, processor, nms_iou)
    assert len(expected) > 0 and got.names == tuple(word for _, word, _ in expected)
    torch.testing.assert_close(got.scores, torch.tensor([score for score, _, _ in expected]))
    torch.testing.assert_close(got.boxes, torch.tensor([box for _, _, box in expected]), rtol=1e-4, atol=1e-3)
    assert got.image_size == SIZE and got.vocabulary == ("person", "dining table")


@pytest.mark.parametrize("kind", KINDS)
def test_threshold(kind):
    model, processor = tiny_detector(kind)
    everything = TransformersBoxProposer(model, processor, threshold=0.0, nms_iou=1.0)(picture(*SIZE))
    middle = float(everything.scores.median())
    some = TransformersBoxProposer(model, processor, threshold=middle, nms_iou=1.0)(picture(*SIZE))
    assert torch.equal(some.scores, everything.scores[everything.scores > middle])
    none = TransformersBoxProposer(model, processor, threshold=1.0)(picture(*SIZE))
    assert none.boxes.shape == (0, 4) and none.scores.shape == (0,) and none.names == ()
    assert none.vocabulary == everything.vocabulary


def test_overlapping_boxes_of_one_class_are_suppressed():
    model, processor = tiny_detector("yolos")
    loose = TransformersBoxProposer(model, processor, threshold=0.0, nms_iou=1.0)(picture(*SIZE))
    tight = TransformersBoxProposer(model, processor, threshold=0.0, nms_iou=0.0)(picture(*SIZE))
    assert len(tight.names) < len(loose.names)


def test_words_of_the_detector():
    model, processor = tiny_detector("detr")
    got = TransformersBoxProposer(model, processor, threshold=0.0)(picture(*SIZE))
    tables = boxes_for_class(got, "diningtable")
    assert tables.names == ("dining table",) * got.names.count("dining table")
    assert unknown_words(["diningtable", "zebra"], got.vocabulary) == ["zebra"]


def test_bad_arguments():
    model, processor = tiny_detector("yolos")
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\], got 25"):
        TransformersBoxProposer(model, processor, threshold=25)
    with pytest.raises(TypeError, match="processor: object has no post_process_object_detection"):
        TransformersBoxProposer(model, object())
    with pytest.raises(ValueError, match="picture: expected uint8"):
        TransformersBoxProposer(model, processor)(picture(4, 4)[..., 0])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the detector's output is not finite"):
        TransformersBoxProposer(model, processor)(picture(*SIZE))
