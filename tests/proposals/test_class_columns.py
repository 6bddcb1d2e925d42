"""Columns of a proposer's scores find the classes that are asked for."""

from __future__ import annotations

from dataclasses import replace

import torch

from zs3fast.proposals import from_masks
from zs3fast.proposals.class_columns import scores_for_classes


def proposals():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0.5, 0.1, 0.1, 0.1, 0.2]])
    names = ("airplane", "door, double door", "sofa", "double door")
    return from_masks([torch.ones(2, 8, 8)], class_scores=[scores], class_names=names)


def test_columns_by_name_alias_and_synonym() -> None:
    given = proposals()
    got = scores_for_classes(given, [("couch",), ("Aeroplane",), ("zebra",), ("door",)])
    own = given.class_scores
    assert got.class_scores.shape == (1, 2, 5) and got.class_names is None
    torch.testing.assert_close(got.class_scores[..., 0], own[..., 2])
    torch.testing.assert_close(got.class_scores[..., 1], own[..., 0])
    assert got.class_scores[..., 2].isnan().all()
    torch.testing.assert_close(got.class_scores[..., 3], own[..., 1])
    torch.testing.assert_close(got.class_scores[..., 4], own[..., 4])
    both = scores_for_classes(given, [("double door",)]).class_scores[..., 0]
    torch.testing.assert_close(both, own[..., 1] + own[..., 3])
    line = scores_for_classes(given, [("jet, aeroplane",)]).class_scores[..., 0]  # a dataset's line, as one name
    torch.testing.assert_close(line, own[..., 0])


def test_scores_without_names_stay() -> None:
    bare = replace(proposals(), class_names=None)
    assert scores_for_classes(bare, [("cat",)]) is bare
    none = replace(bare, class_scores=None)
    assert scores_for_classes(none, [("cat",)]) is none
