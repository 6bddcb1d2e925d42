"""What a call's class list comes to: who competes, who is seen, who stays unlabelled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from zs3fast.models.base import ZeroShotModel
from zs3fast.text import parse_classes
from zs3fast.text.background import background_for
from zs3fast.text.vocabulary import ClassEntry, same_name

logger = logging.getLogger("zs3fast")

AUTO_BACKGROUND = "auto"
Classes = str | Iterable[str | Sequence[str]]


@dataclass(frozen=True)
class Plan:
    """The names to show, names and embeddings [C, D] of all that compete, and who is what.

    seen: indices, or None where nothing is known.  rejected: indices of the background.
    min_score: below it pixels stay unlabelled, or None.  details: whether results keep what they came from.
    """

    class_names: tuple[str, ...]
    competing: tuple[ClassEntry, ...]
    text: Tensor
    seen: list[int] | None
    rejected: list[int]
    min_score: float | None
    details: bool = False


def competitors(entries: list[ClassEntry], background: str | Sequence[str]) -> tuple[tuple[ClassEntry, ...], list[int]]:
    """All that compete, the classes first, and the indices of those that stay unlabelled."""
    if isinstance(background, str) and background.strip().casefold() == AUTO_BACKGROUND:
        rejected = background_for(entries)
    else:
        rejected = parse_classes(background, "background") if background else []
    shown = {same_name(entry[0]) for entry in entries}
    competing = entries + [entry for entry in rejected if same_name(entry[0]) not in shown]
    names = {same_name(entry[0]) for entry in rejected}
    return tuple(competing), [i for i, entry in enumerate(competing) if same_name(entry[0]) in names]


def check_min_score(min_score: float | None) -> None:
    if min_score is not None and not np.isfinite(min_score):
        raise ValueError(f"min_score: expected a finite number, got {min_score}")


def seen_of(
    model: ZeroShotModel, given: list[ClassEntry], competing: Sequence[ClassEntry], seen: Iterable[str | int] | None
) -> list[int] | None:
    """Indices of the seen among the competing classes; None where nothing is known. See `Segmenter`."""
    vocabulary = model.config.get("class_names")
    if seen is not None:
        return _seen_argument(given, seen)
    if vocabulary is not None:
        names = {same_name(vocabulary[index]) for index in model.seen}
        return [i for i, entry in enumerate(competing) if any(same_name(name) in names for name in entry)]
    if len(given) == model.config.get("num_classes"):
        return list(model.seen)
    logger.info("the model's vocabulary is not known: none of the %d classes counts as seen", len(given))
    return None


def _seen_argument(given: list[ClassEntry], seen: Iterable[str | int]) -> list[int]:
    if isinstance(seen, str):
        raise TypeError(f"seen: expected a list of names or indices, got the string {seen!r}")
    position = {same_name(name): index for index, entry in enumerate(given) for name in entry}
    indices = []
    for item in seen:
        index = position.get(same_name(item)) if isinstance(item, str) else item
        if not isinstance(index, int) or not 0 <= index < len(given):
            raise ValueError(f"seen: expected names or indices of the {len(given)} classes, got {item!r}")
        indices.append(index)
    return sorted(set(indices))
