"""The ensemble of two opinions, class by class, as its formula has it."""

from __future__ import annotations

import pytest
import torch

from zs3fast.labels.ensemble import ensemble_class_weights

SEEN = [0, 2]


def opinions(batch: int = 2, count: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(batch, count, classes, generator=generator).double().softmax(-1)
    own = torch.randn(batch, count, classes + 1, generator=generator).double().softmax(-1)
    return clip, own


@pytest.mark.parametrize("form", ["freeseg", "zegformer"])
def test_by_hand(form: str) -> None:
    clip, own = opinions()
    own[..., 3] = float("nan")  # an unseen class that the proposer does not know
    usable = torch.ones(2, 5, dtype=torch.bool)
    usable[1, 2] = False
    got = ensemble_class_weights(clip, own, seen=SEEN, weight=0.7, usable=usable, form=form)
    for b in range(2):
        for n in range(5):
            for c in range(4):
                said = clip[b, n, SEEN].mean() if form == "zegformer" and c in SEEN else clip[b, n, c]
                said = 1.0 if (b, n) == (1, 2) else said
                if c == 3:
                    expected = torch.as_tensor(said).double() ** 0.7
                else:
                    share = 0.7 if c in SEEN else 0.3
                    expected = own[b, n, c] ** share * said ** (1 - share)
                torch.testing.assert_close(got[b, n, c], expected)


def test_open_vocabulary_is_clip_alone() -> None:
    clip, own = opinions()
    assert ensemble_class_weights(clip, own, seen=SEEN, weight=0.0) is clip
    assert ensemble_class_weights(clip, None, seen=SEEN, weight=0.8) is clip


def test_columns_must_be_the_classes_and_no_object() -> None:
    clip, own = opinions()
    with pytest.raises(ValueError, match=r"class_scores: expected \[B, Nq, C \+ 1\] = \[2, 5, 5\].*got \[2, 5, 4\]"):
        ensemble_class_weights(clip, own[..., :-1], seen=SEEN, weight=0.5)


def test_equation_9_as_printed() -> None:
    """Unseen classes: CLIP's opinion alone to the power of lambda, though the proposer has one."""
    clip, own = torch.rand(1, 3, 4), torch.rand(1, 3, 5)
    got = ensemble_class_weights(clip, own, seen=[0, 2], weight=0.7, form="paper")
    torch.testing.assert_close(got[..., [1, 3]], clip[..., [1, 3]] ** 0.7)
    torch.testing.assert_close(got[..., [0, 2]], own[..., [0, 2]] ** 0.7 * clip[..., [0, 2]] ** 0.3)
