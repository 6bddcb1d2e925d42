"""The folds of PASCAL-5i and COCO-20i: which classes a fold holds out of training (ClsCLIP section 9)."""

from __future__ import annotations

from zs3fast.text import class_names

FOLDS = 4

# VOC names as prompts spell them.
_SPACED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
PASCAL_5I_NAMES = tuple(_SPACED.get(name, name) for name in class_names("voc20"))

# The 80 things of COCO in category order; they are the first 80 of COCO-Stuff's 171 classes.
COCO_80_NAMES = tuple(class_names("coco171")[:80])
_UNUSED_CATEGORIES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_80_CATEGORIES = tuple(i for i in range(1, 91) if i not in _UNUSED_CATEGORIES)


def fold_classes(name: str, fold: int | None) -> list[int]:
    """Classes that a fold tests and never trains on, ascending.

    voc5i: 5 fold .. 5 fold + 4 of 20.  coco20i: fold + 4 v for v = 0..19 of 80.
    """
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < FOLDS:
        raise ValueError(f"fold: expected one of {name}'s, 0..{FOLDS - 1}, got {fold!r}")
    if name == "voc5i":
        return list(range(5 * fold, 5 * fold + 5))
    if name == "coco20i":
        return list(range(fold, 80, FOLDS))
    raise ValueError(f"fold: expected voc5i or coco20i, which have folds, got {name}")
