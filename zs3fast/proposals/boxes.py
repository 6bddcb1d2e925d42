"""Box proposals: what a box proposer is, ground-truth boxes, and the choice of a class's boxes by its word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zs3fast.proposals.components import label_masks
from zs3fast.types import BoxProposals

# Words of one meaning in the class lists of VOC and COCO; spaces, hyphens and case are no difference to begin with,
# which covers diningtable / dining table and pottedplant / potted plant.
ALIASES: tuple[tuple[str, ...], ...] = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("sofa", "couch"),
    ("tvmonitor", "tv"),
)


@runtime_checkable
class BoxProposer(Protocol):
    """Finds boxes in one image: uint8 [H, W, 3], RGB. `name`: its file name, of use to proposers that read files."""

    def __call__(self, picture: np.ndarray, name: str | None = None) -> BoxProposals: ...


def make_boxes(
    boxes: Tensor | np.ndarray | Sequence[Sequence[float]],
    names: Sequence[str],
    image_size: tuple[int, int],
    *,
    scores: Tensor | np.ndarray | Sequence[float] | None = None,
    vocabulary: Sequence[str] | None = None,
    slack: float = 1.0,
) -> BoxProposals:
    """Boxes from anywhere as `BoxProposals`, checked.

    Args:
        boxes: [K, 4] x0 y0 x1 y1 in pixels; x1 and y1 lie just past the last pixel. K = 0 is fine.
        names: K class words.
        image_size: (H, W) of the image.
        scores: [K] in [0, 1]; None: all 1.
        slack: pixels by which a box may reach over the image's edge (rounding); it is clipped.
    Raises:
        ValueError: a box that is not finite, empty, in another format or outside the image, naming it.
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size: expected a height and a width of at least 1, got {(height, width)}")
    table = _numbers(boxes, "boxes", "[K, 4], x0 y0 x1 y1")
    table = table.reshape(0, 4) if table.numel() == 0 else table
    if table.dim() != 2 or table.shape[1] != 4:
        raise ValueError(f"boxes: expected [K, 4], x0 y0 x1 y1, got {list(table.shape)}")
    if len(names) != len(table):
        raise ValueError(f"names: expected {len(table)}, one a box, got {len(names)}")
    confidence = torch.ones(len(table)) if scores is None else _numbers(scores, "scores", "[K]")
    if confidence.shape != table.shape[:1] or not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError(f"scores: expected {len(table)} values in [0, 1], got {confidence.tolist()}")
    for index, box in enumerate(table.tolist()):
        problem = _problem(box, height, width, slack)
        if problem:
            raise ValueError(f"boxes: box {index} ({names[index]!r}) {box} {problem}")
    limits = table.new_tensor([width, height, width, height])
    return BoxProposals(
        boxes=table.clamp_min(0).minimum(limits),
        scores=confidence.to(table.device),
        names=tuple(str(name) for name in names),
        image_size=(int(height), int(width)),
        vocabulary=None if vocabulary is None else tuple(vocabulary),
    )


def _numbers(values: object, name: str, shape: str) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        given = repr(values)
        raise ValueError(f"{name}: expected numbers {shape}, got {given[:80]}{'...' * (len(given) > 80)}") from None


def _problem(box: Sequence[float], height: int, width: int, slack: float) -> str:
    x0, y0, x1, y1 = box
    if not np.isfinite(box).all():
        return "is not finite"
    if max(x0, 0) >= min(x1, width) or max(y0, 0) >= min(y1, height):
        if x0 < x1 and y0 < y1:
            return f"lies outside the image of {width} x {height} pixels"
        return "has no area; expected x0 y0 x1 y1 with x0 < x1 and y0 < y1, perhaps it is x y width height"
    if min(x0, y0) < -slack or x1 > width + slack or y1 > height + slack:
        return f"reaches over the edge of the image of {width} x {height} pixels"
    if max(x1, y1) <= 1 and not all(float(side).is_integer() for side in box):
        return "lies within one pixel; expected pixels, perhaps it is relative to the image's size"
    return ""


def mask_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Tight boxes of binary masks: bool [n, H, W] -> int64 [n, 4] and bool [n], whether there is a pixel at all.

    x0 y0 x1 y1 with x1 and y1 just past the last pixel, so that a one-pixel mask has area 1; empty masks: zeros.
    """
    columns, rows = masks.any(dim=-2), masks.any(dim=-1)
    filled = columns.any(dim=-1)
    edges = []
    for line in (columns, rows):
        first = line.int().argmax(dim=-1)
        last = line.shape[-1] - line.flip(-1).int().argmax(dim=-1)
        edges.append((first, last))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=-1) * filled.unsqueeze(-1), filled


def boxes_from_masks(masks: Tensor | np.ndarray, names: Sequence[str]) -> BoxProposals:
    """The tight box of every instance mask, score 1: ground truth for the upper bound.

    Args:
        masks: [K, H, W], inside where not 0. names: K class words.
    """
    given = torch.as_tensor(masks)
    if given.dim() != 3 or 0 in given.shape[1:]:
        raise ValueError(f"masks: expected [K, H, W] with pixels in it, got {list(given.shape)}")
    if len(names) != len(given):
        raise ValueError(f"names: expected {len(given)}, one a mask, got {len(names)}")
    if given.is_floating_point() and bool(given.isnan().any()):
        raise ValueError("masks: expected numbers, got nan")
    boxes, filled = mask_boxes(given != 0)
    if not bool(filled.all()):
        index = int((~filled).nonzero()[0])
        raise ValueError(f"masks: mask {index} ({names[index]!r}) is empty and has no box")
    return make_boxes(boxes, names, (given.shape[1], given.shape[2]), vocabulary=_distinct(names), slack=0)


def boxes_from_labels(
    labels: np.ndarray | Tensor, class_names: Sequence[str], *, ignore_index: int = 255, min_area: int = 1
) -> BoxProposals:
    """The tight box of every connected region of a label map, score 1: ground truth where there are no instances.

    Args:
        labels: integer [H, W], indices into `class_names` or `ignore_index`.
        min_area: smaller regions are left out, in pixels.
    """
    masks, classes = label_masks(labels, ignore_index=ignore_index, connected=True, min_area=min_area)
    wrong = [value for value in classes.tolist() if not 0 <= value < len(class_names)]
    if wrong:
        raise ValueError(f"labels: expected 0..{len(class_names) - 1} or {ignore_index} (ignored), got {wrong[0]}")
    if not len(masks):
        height, width = masks.shape[1:]
        return make_boxes([], [], (height, width), vocabulary=class_names)
    found = boxes_from_masks(masks, [class_names[value] for value in classes.tolist()])
    return replace(found, vocabulary=tuple(class_names))


def boxes_for_class(
    boxes: BoxProposals, class_word: str | Sequence[str], aliases: Sequence[Sequence[str]] = ALIASES
) -> BoxProposals:
    """The boxes whose class word means the asked class; none is a result, not an error.

    Args:
        class_word: a word, or a class's synonyms; any of them may match.
        aliases: groups of words of one meaning.
    """
    wanted = meanings(class_word, aliases)
    keep = [index for index, name in enumerate(boxes.names) if meanings(name, aliases) & wanted]
    rows = torch.tensor(keep, dtype=torch.long, device=boxes.boxes.device)
    return replace(
        boxes, boxes=boxes.boxes[rows], scores=boxes.scores[rows], names=tuple(boxes.names[index] for index in keep)
    )


def unknown_words(
    class_words: Sequence[str | Sequence[str]],
    vocabulary: Sequence[str] | None,
    aliases: Sequence[Sequence[str]] = ALIASES,
) -> list[str]:
    """Which classes a detector can never find: no word of theirs, nor an alias, is in its vocabulary.

    Args:
        class_words: a word or a sequence of synonyms each. vocabulary: the detector's words; None: unknown, so none
            of the classes is reported.
    """
    if isinstance(class_words, str):
        raise TypeError(f"class_words: expected a sequence of words, got the string {class_words!r}")
    if vocabulary is None:
        return []
    known: set[str] = set().union(*(meanings(word, aliases) for word in vocabulary))
    return [
        entry if isinstance(entry, str) else entry[0] for entry in class_words if not meanings(entry, aliases) & known
    ]


def meanings(words: str | Sequence[str], aliases: Sequence[Sequence[str]]) -> set[str]:
    """Every folded spelling that means the same as one of `words`."""
    spellings = {_fold(word) for word in ([words] if isinstance(words, str) else words)}
    for group in aliases:
        folded = {_fold(word) for word in group}
        if folded & spellings:
            spellings |= folded
    return spellings


def _fold(word: str) -> str:
    return "".join(character for character in word.casefold() if not character.isspace() and character not in "-_")


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
