"""A proposer's own classes -> the classes that are asked for, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from zs3fast.proposals.boxes import ALIASES, meanings
from zs3fast.types import Proposals


def scores_for_classes(
    proposals: Proposals,
    class_names: Sequence[Sequence[str]],
    aliases: Sequence[Sequence[str]] = ALIASES,
) -> Proposals:
    """Proposals whose `class_scores` [B, Nq, C + 1] have one column for each class asked for, and no object last.

    Columns that mean the same class are added up; a class that the proposer does not know gets a column of NaN.
    Scores without names are taken as they are, and so are proposals without scores.

    Args:
        class_names: the names of each of C classes, synonyms included.
    """
    scores, own = proposals.class_scores, proposals.class_names
    if scores is None or own is None:
        return proposals
    meant = [meanings(name.split(","), aliases) for name in own]
    columns = []
    for names in class_names:
        wanted = meanings([part for name in names for part in name.split(",")], aliases)
        index = [i for i, words in enumerate(meant) if words & wanted]
        columns.append(scores[..., index].sum(-1) if index else torch.full_like(scores[..., 0], float("nan")))
    columns.append(scores[..., -1])
    return replace(proposals, class_scores=torch.stack(columns, dim=-1), class_names=None)
