"""The names that compete for each class in the published rows of training-free methods.

The rows were made from class files with several names a class, of which the best one counts, with names in place of
"background", and with some names written without spaces: the spelling changes what CLIP reads, and so the numbers.
"""

from __future__ import annotations

from zs3fast.text.class_lists import CLASS_NAMES, _split
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.utils.options import one_of

# What stands for "background" in VOC21 and COCO-Object.
BACKGROUND_NAMES = _split(
    """
    sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, lamp, door, window,
    wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence
    """
)

_PERSON = _split(
    """
    person, person in shirt, person in jeans, person in dress, person in sweater, person in skirt, person in jacket
    """
)
_VOC: dict[str, ClassEntry] = {
    "boat": ("ship",),
    "diningtable": ("table",),
    "person": _PERSON,
    "tvmonitor": _split("television monitor, tv monitor, monitor, television, screen"),
}
_OBJECT: dict[str, ClassEntry] = {"person": (*_PERSON, "body")}


def competing_names(dataset: str, synonyms: bool = True) -> list[ClassEntry]:
    """The names of every class of a dataset, in the order of its label values.

    Args:
        dataset: one of `zs3fast.text.datasets()`.
        synonyms: False: the first name of each class alone, "background" among them, as in ClearCLIP's class files.
    Raises:
        ValueError: unknown dataset.
    """
    names = CLASS_NAMES[one_of("dataset", dataset, tuple(CLASS_NAMES))]
    if dataset in ("voc20", "voc21"):
        entries = [_VOC.get(name, (name,)) for name in names]
    elif dataset == "coco_object":
        entries = [_OBJECT.get(name, (name,)) for name in names]
    elif dataset in ("coco171", "ade150"):
        entries = [(_joined(name),) for name in names]
    else:
        entries = [(name,) for name in names]
    if not synonyms:
        return [entry[:1] for entry in entries]
    if dataset in ("voc21", "coco_object"):
        entries[0] = BACKGROUND_NAMES
    return entries


def _joined(name: str) -> str:
    return "televisionreceiver" if name == "television" else name.replace(" ", "")
