"""Refined labels without the maps are those of the definition, which stores them."""

from __future__ import annotations

import pytest
import torch

from zs3fast.labels.refinement import Pamr
from zs3fast.labels.softmax import Frame, Rule, softmax_labels, softmax_scores

FRAMES = {
    "windows": Frame((20, 24), (30, 32), [(0, 0), (0, 8), (10, 0), (10, 8)]),
    "whole": Frame((30, 32), (30, 32), [(0, 0)]),
    "padded": Frame((30, 30), (30, 30), [(0, 0)], (1, 1), (32, 32)),
}
RULES = {
    "names": Rule(scale=30.0),
    "classes": Rule([0, 0, 1, 2, 2, 2, 3], 30.0, prob_thd=0.3),
    "areas": Rule([0, 1, 1, 2, 3, 4, 4], 30.0, area_thd=0.25),
    "over-classes": Rule([0, 0, 1, 2, 2, 2, 3], 30.0, over_classes=True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frame", FRAMES)
def test_labels_are_those_of_the_definition(frame: str, rule: str) -> None:
    torch.manual_seed(0)
    where, how, size = FRAMES[frame], RULES[rule], (41, 37)
    logits = 0.1 * torch.randn(len(where.windows), 7, 4, 4)
    refine = Pamr(torch.randn(3, *where.canvas_size), steps=3, dilations=(1, 4))
    labels, scores = softmax_labels(
        logits,
        size,
        crop_size=where.crop_size,
        canvas_size=where.canvas_size,
        windows=where.windows,
        margin=where.margin,
        padded_size=where.padded_size,
        rule=how,
        refine=refine,
    )
    p = softmax_scores(logits.double(), size, where, how, lambda maps: refine(maps.float()).double())
    best = p.amax(0)
    sure = (best - how.prob_thd).abs() > 1e-4
    want = p.argmax(0).masked_fill(best < how.prob_thd, 0)
    assert (labels != want)[sure].float().mean() <= 1e-3
    torch.testing.assert_close(scores.double(), best, rtol=1e-4, atol=1e-5)
    assert len(labels.unique()) > 1
