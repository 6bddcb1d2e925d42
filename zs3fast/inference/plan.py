"""What a call's class list comes to: who competes by which text rows, who is seen, who stays unlabelled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from zs3fast.inference.text_rows import TextRows
from zs3fast.models.base import ZeroShotModel
from zs3fast.text import parse_classes, whole_names
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


class CallOptions(TypedDict, total=False):
    """What a call may say of its classes, see `Segmenter.__call__`."""

    seen: Iterable[str | int] | None
    min_score: float | None
    background: str | Sequence[str]
    details: bool


def class_list(model: ZeroShotModel, names: Classes | None) -> list[ClassEntry] | None:
    """The classes of calls that give none: these, or the model's training vocabulary; None where it has none."""
    vocabulary = model.config.get("class_names")
    if names is None and vocabulary is not None:
        names = whole_names(vocabulary)
    return None if names is None else parse_classes(names, "class_names")


class Planner:
    """Makes a Plan of a call's arguments, for the model and the class list that text rows are kept of."""

    def __init__(self, texts: TextRows):
        self.texts = texts

    @torch.no_grad()
    def __call__(
        self,
        classes: Classes | None,
        seen: Iterable[str | int] | None,
        min_score: float | None,
        background: str | Sequence[str],
        details: bool = False,
    ) -> Plan:
        """Arguments as of `Segmenter.__call__`; what is wrong with any of them is raised here."""
        if min_score is not None and not np.isfinite(min_score):
            raise ValueError(f"min_score: expected a finite number, got {min_score}")
        model, entries = self.texts.model, self.entries(classes)
        competing, rejected = competitors(entries, background)
        text, is_seen = self.texts.embeddings(competing), seen_of(model, entries, competing, seen)
        lowest = model.min_score if min_score is None else min_score
        return Plan(tuple(entry[0] for entry in entries), competing, text, is_seen, rejected, lowest, details)

    def entries(self, classes: Classes | None) -> list[ClassEntry]:
        """The classes given, each with its names; those of the segmenter where none are."""
        if classes is not None:
            return parse_classes(classes)
        if self.texts.classes is None:
            raise ValueError("classes: expected class names, since neither model nor segmenter has a list of its own")
        return list(self.texts.classes)


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
