"""Proposal classification: two opinions of every proposal's class -> one weight a class (MAFT section 3.1, eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORMS = ("freeseg", "zegformer", "paper")


def ensemble_class_weights(
    clip_scores: Tensor,
    class_scores: Tensor | None,
    *,
    seen: Sequence[int],
    weight: float,
    usable: Tensor | None = None,
    form: str = "freeseg",
) -> Tensor:
    """Class weights A [B, Nq, C] of proposals.

        seen:   A = Ap^weight * Ac^(1 - weight)
        unseen: A = Ap^(1 - weight) * Ac^weight, or Ac^weight where the proposer has no such class

    Args:
        clip_scores: Ac [B, Nq, C], CLIP's softmax over the classes.
        class_scores: Ap [B, Nq, C + 1], the proposer's softmax with "no object" last; a column of NaN is a class it
            does not know. None: Ac alone counts.
        seen: indices of seen classes; all others count as unseen.
        weight: lambda; 0 (open vocabulary): A = Ac, whatever the proposer says.
        usable: [B, Nq] bool; where False, Ac is replaced by 1 (the mask is too faint for CLIP to say anything).
        form: "freeseg" (ZSSeg's too); "zegformer", which gives all seen classes the mean of their Ac; "paper": eq. 9 as
            printed, Ac^weight for every unseen class, whether the proposer knows it or not.
    """
    if class_scores is None or weight <= 0:
        return clip_scores
    batch, count, classes = clip_scores.shape
    if class_scores.shape != (batch, count, classes + 1):
        raise ValueError(
            f"class_scores: expected [B, Nq, C + 1] = {[batch, count, classes + 1]}, the classes in use and no object, "
            f"got {list(class_scores.shape)}"
        )
    is_seen = torch.zeros(classes, dtype=torch.bool, device=clip_scores.device)
    is_seen[list(seen)] = True
    if form == "zegformer" and len(seen):
        mean = clip_scores[..., is_seen].mean(-1, keepdim=True)
        clip_scores = torch.where(is_seen, mean, clip_scores)
    if usable is not None:
        clip_scores = clip_scores.masked_fill(~usable.unsqueeze(-1), 1.0)
    own = class_scores[..., :-1]
    known = ~own.isnan()
    own = own.nan_to_num(1.0)
    if form == "paper":
        known = known & is_seen
    both = torch.where(is_seen, own**weight * clip_scores ** (1 - weight), own ** (1 - weight) * clip_scores**weight)
    return torch.where(known, both, clip_scores**weight)
