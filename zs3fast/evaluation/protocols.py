"""What a setting means at test time: which classes lose the seen offset, and which means are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.models.base import ZeroShotModel

# In the order of their chapters; "fold" is the (image, class) pairs of PASCAL-5i and COCO-20i.
SETTINGS = (
    "inductive",
    "transductive",
    "supervised",
    "cross-dataset",
    "background-undifferentiated",
    "training-free",
    "fold",
)
PAIR_DATASETS = ("voc5i", "coco20i")

# Images of the published test sets; pairs where a fold of pairs is the set.
PUBLISHED_ITEMS: dict[str, int | tuple[int, ...]] = {
    "voc20": 1449,
    "coco171": 5000,
    "context59": 5104,
    "context60": 5104,
    "voc21": 1449,
    "coco_object": 5000,
    "cityscapes": 500,
    "pc459": 5104,
    "ade150": 2000,
    "ade847": 2000,
    "voc5i": (346, 451, 725, 346),
    "coco20i": (35783, 17912, 14563, 14315),
}

UNDIFFERENTIATED_NOTE = (
    "background-undifferentiated: the evaluation vocabulary of the published row is not described; here training "
    "merges unseen classes into the background and evaluation is that of the inductive setting"
)

_SIGNS = {
    "supervised": "training saw all classes",
    "transductive": "its seen classes have no offset",
    "inductive": "training saw only some of the classes",
}


class LabelledImages(Protocol):
    """What evaluation needs of a dataset (`zs3fast.data.SegmentationDataset`)."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def seen(self) -> list[int]: ...

    @property
    def unseen(self) -> list[int]: ...

    @property
    def ignore_index(self) -> int: ...

    @property
    def ids(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def image_path(self, index: int) -> Path: ...


@dataclass(frozen=True)
class Setting:
    """How a test set is segmented and scored.

    name:       one of `SETTINGS`.
    calibrated: the classes that count as seen for the model, and lose `seen_offset`.
    seen:       the classes whose mean is mIoU(S), all others are in mIoU(U); None: no split is scored.
    notes:      what a reader of the numbers should know.
    """

    name: str
    calibrated: tuple[int, ...]
    seen: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


def learned_setting(model: ZeroShotModel) -> str | None:
    """The setting that weights look to have been trained in, on their own vocabulary; None where they do not say.

    Methods without training, where they carry no vocabulary: training-free.

    All classes seen: supervised. Else no offset on the seen ones, as self-training of the one-stage methods leaves
    them: transductive. Else inductive.
    """
    if model.training_free and model.class_names is None:
        return "training-free"
    if model.num_classes is None or not model.seen:
        return None
    if len(model.seen) == model.num_classes:
        return "supervised"
    return "transductive" if model.clears_offset and model.seen_offset == 0 else "inductive"


def resolve_setting(
    name: str | None, dataset: LabelledImages, vocabulary: Sequence[str] | None, learned: str | None = None
) -> Setting:
    """The setting of an evaluation.

    | setting | seen for the model | scored |
    |---|---|---|
    | inductive, background-undifferentiated | the dataset's seen classes | seen, unseen |
    | transductive | none: after self-training nothing is offset and no trusty map weighs | seen, unseen |
    | supervised | all: an equal offset | the zero-shot split all the same, as the papers do |
    | cross-dataset | none: no class is favoured, and in an ensemble all lean on CLIP | all classes |
    | training-free | none: nothing was trained | all classes |

    Args:
        name: one of `SETTINGS` but "fold"; None: `learned`, or inductive, where the model was trained on this dataset's
            classes, cross-dataset where not.
        vocabulary: names of the classes the model was trained on; None: unknown.
        learned: what the weights look like, see `learned_setting`; a `name` that disagrees gets a note.
    Raises:
        ValueError: an unknown name, a split the dataset does not have, or a model trained on other classes.
    """
    names = SETTINGS[:-1]
    if name is not None and name not in names:
        raise ValueError(f"setting: expected one of {', '.join(names)}, got {name!r}")
    if learned == "training-free" and name in (None, learned):
        return Setting(learned, (), None)
    if name == "training-free":
        raise ValueError("setting: expected a method without training for training-free, got trained weights")
    own = vocabulary is not None and _same_names(vocabulary, dataset.class_names)
    if name is None:
        if vocabulary is None:
            raise ValueError(
                f"setting: expected one of {', '.join(names)}, got none, and the weights do not say what they learned"
            )
        name = (learned or "inductive") if own and dataset.unseen else "cross-dataset"
    if name == "cross-dataset":
        note = f"cross-dataset: the weights were trained on the classes of {dataset.name} itself"
        return Setting(name, (), None, (note,) if own else ())
    if not dataset.unseen or not dataset.seen:
        raise ValueError(f"setting: expected a dataset with seen and unseen classes for {name}, got {dataset.name}")
    if vocabulary is not None and not own:
        raise ValueError(
            f"setting: {name} needs weights trained on the classes of {dataset.name}; these were trained on others "
            "(cross-dataset scores that)"
        )
    seen = tuple(dataset.seen)
    calibrated = {"transductive": (), "supervised": tuple(range(dataset.num_classes))}.get(name, seen)
    notes: tuple[str, ...] = (UNDIFFERENTIATED_NOTE,) if name == "background-undifferentiated" else ()
    expected = "inductive" if name == "background-undifferentiated" else name
    if own and learned not in (None, expected, "training-free"):
        notes += (f"{name} was asked for, but the weights look {learned}: {_SIGNS[learned]}",)
    return Setting(name, calibrated, seen, notes)


def labeller(
    segmenter: Segmenter,
    class_names: Sequence[str],
    calibrated: Sequence[int],
    entries: Sequence[Sequence[str]] | None = None,
) -> Callable[..., np.ndarray]:
    """`segmenter` as evaluation calls it: image uint8 [H, W, 3] (and its path) -> labels [H, W] among `class_names`.

    Args:
        calibrated: the classes that count as seen, see `Setting`.
        entries: the names that compete for each class; None: its own.
    """
    from zs3fast.text import whole_names  # the text room brings open_clip

    names = whole_names(class_names) if entries is None else list(entries)
    segmenter.check(names, seen=calibrated)

    def label(image: np.ndarray, path: Path | None = None) -> np.ndarray:
        return segmenter(image, names, seen=calibrated, source=path).labels

    return label


def published_items(dataset: str, fold: int | None = None) -> int | None:
    """How many images (or pairs of a fold) the published test set has; None where it is not known."""
    known = PUBLISHED_ITEMS.get(dataset)
    return known[fold] if isinstance(known, tuple) and fold is not None else known if isinstance(known, int) else None


def _same_names(first: Sequence[str], second: Sequence[str]) -> bool:
    from zs3fast.text.vocabulary import same_name  # the text room brings open_clip

    return [same_name(name) for name in first] == [same_name(name) for name in second]
