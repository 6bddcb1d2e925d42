"""Label maps of the training settings, from dataset indices."""

from __future__ import annotations

import pytest
import torch

from zs3fast.labels import targets

SEEN = [0, 2, 4]


def test_inductive_maps_seen_in_list_order_and_ignores_the_rest() -> None:
    labels = torch.tensor([[[4, 0, 1, 3, 255, 2]]])
    assert targets.inductive_labels(labels, [4, 0, 2], 5).tolist() == [[[0, 1, 255, 255, 255, 2]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_type(dtype: torch.dtype) -> None:
    labels = torch.tensor([[[0, 1, 255]]], dtype=dtype)
    targets.check_labels(labels, 5, 255)
    assert targets.inductive_labels(labels, SEEN, 5).tolist() == [[[0, 255, 255]]]
    assert targets.unseen_pixels(labels, SEEN, 5).tolist() == [[[False, True, False]]]


def test_narrow_labels_meet_more_classes_than_their_type_holds() -> None:
    targets.check_labels(torch.full((1, 1, 1), 200, dtype=torch.uint8), 300, 65535)


def test_another_ignore_index() -> None:
    labels = torch.tensor([[[0, 1, 65535]]])
    assert targets.inductive_labels(labels, SEEN, 300, 65535).tolist() == [[[0, 65535, 65535]]]


@pytest.mark.parametrize("ignore", [-1, -100])
def test_a_negative_ignore_index_is_no_class(ignore: int) -> None:
    """As an index it stood for the last class, or for none at all."""
    labels = torch.tensor([[[0, 1, 4, ignore]]])
    assert targets.inductive_labels(labels, SEEN, 5, ignore).tolist() == [[[0, ignore, 2, ignore]]]
    assert targets.unseen_pixels(labels, SEEN, 5, ignore).tolist() == [[[False, True, False, False]]]
    logits = torch.zeros(1, 5, 1, 4)
    assert targets.pseudo_labels(labels, logits, SEEN, 5, ignore).tolist() == [[[0, 1, 4, ignore]]]


def test_classes_an_image_has() -> None:
    labels = torch.tensor([[[0, 0, 2]], [[255, -1, 3]]])
    assert targets.present_classes(labels, 3).tolist() == [[True, False, True], [False, False, False]]
    assert targets.present_classes(labels.to(torch.int16), 4)[1].tolist() == [False, False, False, True]


def test_pseudo_labels_are_unseen_and_ties_take_the_lowest() -> None:
    """Saturated sigmoids tie: the lowest unseen index wins, as in the official argmax over scores."""
    logits = torch.full((1, 5, 2, 2), 50.0)
    labels = torch.tensor([[[1, 3], [255, 0]]])
    filled = targets.pseudo_labels(labels, logits, SEEN, 5)
    assert filled.tolist() == [[[1, 1], [255, 0]]]
    logits[:, 3] = 60.0
    logits[:, 1] = 3.0
    assert targets.pseudo_labels(labels, logits, SEEN, 5).tolist() == [[[3, 3], [255, 0]]]


def test_nothing_unseen_leaves_labels_alone() -> None:
    labels = torch.tensor([[[1, 3], [255, 0]]])
    assert targets.pseudo_labels(labels, torch.zeros(1, 5, 2, 2), range(5), 5) is labels


def test_bad_labels_name_value_and_place() -> None:
    with pytest.raises(ValueError, match=r"labels: value -1 at \[b, y, x\] = \[0, 1, 0\], expected 0..4 or 255"):
        targets.check_labels(torch.tensor([[[0, 0], [-1, 0]]]), 5, 255)
    with pytest.raises(TypeError, match="labels: expected an integer type, got torch.bool"):
        targets.check_labels(torch.zeros(1, 2, 2, dtype=torch.bool), 5, 255)
