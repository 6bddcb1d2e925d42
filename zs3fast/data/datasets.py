"""Datasets of images and label maps, opened by name in the layouts people have on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from zs3fast.data import ade, cityscapes, coco, context, voc
from zs3fast.data.folds import fold_classes
from zs3fast.data.layouts import INVALID, Source, fill, names_in
from zs3fast.data.registered import registered, registered_source
from zs3fast.text import unseen_classes, whole_names
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.utils.errors import ImageError
from zs3fast.utils.images import read_colours, read_image_file, read_mask_file
from zs3fast.utils.options import did_you_mean

logger = logging.getLogger("zs3fast")

SPLITS = ("train", "val")
PAINTED = "world"  # `zs3fast.data.world`: the one dataset that lies in no folder
FOLDED = ("coco20i", "voc5i")
SOURCES: dict[str, Callable[[Path, str], Source]] = {
    "ade150": ade.ade150,
    "ade847": ade.ade847,
    "cityscapes": cityscapes.cityscapes,
    "coco171": coco.coco171,
    "coco20i": coco.coco20i,
    "coco_object": coco.coco_object,
    "context59": context.context59,
    "context60": context.context60,
    "pc459": context.pc459,
    "voc20": voc.voc20,
    "voc21": voc.voc21,
    "voc5i": voc.voc5i,
}
_PUBLISHED_SPLITS = ("coco171", "context59", "context60", "voc20")
_RARE = 10  # ADE20K-847: classes in at most so many training images are unseen


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture and its labels.

    image:  uint8 [H, W, 3] RGB.
    labels: int32 [H, W], dataset indices 0..C-1 or the dataset's ignore_index.
    id:     the pair's name, the stem of its files.
    """

    image: np.ndarray
    labels: np.ndarray
    id: str


class SegmentationDataset(Dataset[Sample]):
    """Pairs of an image and a label map; open one with `open_dataset`.

    name, split:  what it was opened as.  fold: of PASCAL-5i and COCO-20i, else None.
    class_names:  C names; labels are indices into them.
    ignore_index: the label of pixels that count nowhere: 255, or 65535 where C > 255.
    ids:          names of the pairs.
    background:   of PASCAL-5i and COCO-20i the last class, which is a negative for all others; else None.
    notes:        remarks on pairs that were read and can be used, the first of each kind.
    """

    def __init__(self, name: str, split: str, source: Source, root: Path, fold: int | None = None) -> None:
        self.name = name
        self.split = split
        self.fold = fold
        self.root = root
        self.class_names = list(source.class_names)
        self.ignore_index = source.ignore_index
        self.ids = source.ids
        self.background = self.num_classes - 1 if name in FOLDED else None
        self.notes: dict[str, str] = {}
        self._source = source

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def classes(self) -> list[ClassEntry]:
        """The classes as text: each a name and its synonyms, which only datasets of one's own have."""
        return whole_names(self.class_names) if self._source.classes is None else list(self._source.classes)

    @cached_property
    def unseen(self) -> list[int]:
        """Classes that zero-shot training never sees: of the published split, of the fold, or none.

        ADE20K-847: those in at most 10 training images, counted once and cached (MAFT section 9); none where the
        training images are not there.
        """
        if self._source.unseen is not None:
            return list(self._source.unseen)
        if self.name in FOLDED:
            return fold_classes(self.name, self.fold)
        if self.name in _PUBLISHED_SPLITS:
            return unseen_classes(self.name)
        return self._rare_classes() if self.name == "ade847" else []

    @cached_property
    def seen(self) -> list[int]:
        """All classes but the unseen ones and the background of PASCAL-5i and COCO-20i."""
        left_out = {*self.unseen, self.background}
        return [c for c in range(self.num_classes) if c not in left_out]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        """A pair. FileNotFoundError or ValueError, naming the file, where it is missing, unreadable or does not fit."""
        labels = self.read_labels(index)
        path = self.image_path(index)
        image, orientation = read_image_file(path)
        if image.shape[:2] != labels.shape:
            sizes = [f"{width} x {height}" for height, width in (image.shape[:2], labels.shape)]
            stored = orientation >= 5 and image.shape[1::-1] == labels.shape
            why = f" (upright; its EXIF orientation is {orientation}, and the labels lie on the stored pixels)"
            raise ImageError(
                f"labels: {self.label_path(index)} is {sizes[1]} pixels, its image {path} {sizes[0]}"
                f"{why if stored else ''}"
            )
        if orientation != 1:
            self.note(
                "EXIF",
                f"{path} was turned upright, its EXIF orientation is {orientation}; its labels are taken to be upright",
            )
        return Sample(image, labels, self.ids[index])

    def note(self, kind: str, text: str) -> None:
        """Keep and log a remark on pairs that can be used, the first of its kind."""
        if self.notes.setdefault(kind, text) is text:
            logger.warning("%s %s: %s", self.name, self.split, text)

    def image_path(self, index: int) -> Path:
        path = fill(self._source.image_pattern, self.ids[index])
        files = self._source.files
        return path if files is None else path.with_name(files[self.ids[index]][0])

    def label_path(self, index: int) -> Path:
        choice = self._source.label_choice
        pattern = self._source.label_patterns[0 if choice is None else choice[index]]
        path, files = fill(pattern, self.ids[index]), self._source.files
        return path if files is None else path.with_name(files[self.ids[index]][1])

    def read_labels(self, index: int) -> np.ndarray:
        """Int32 [H, W] labels of a pair, without its image."""
        path = self.label_path(index)
        if self._source.palette is not None:
            return read_colour_labels(path, self._source.palette, self.name)
        values, note = read_mask_file(path)
        if note is not None:
            self.note("palette", note)
        table = self._source.table
        known = values.max(initial=0) < len(table) and values.min(initial=0) >= 0
        labels = table[values] if known else np.full(values.shape, INVALID, np.int32)
        if labels.min(initial=0) == INVALID:
            value = values[_invalid(values, table)][0]
            raise ValueError(f"labels: {path} holds the value {value}, which is no label of {self.name}")
        return labels

    def missing(self) -> list[tuple[str, Path]]:
        """(id, file) of every image or label map that is not there, in dataset order. Folders are listed once each."""
        folders: dict[Path, set[str]] = {}
        absent = []
        for index, name in enumerate(self.ids):
            for path in (self.image_path(index), self.label_path(index)):
                if path.parent not in folders:
                    folders[path.parent] = names_in(path.parent)
                if path.name not in folders[path.parent]:
                    absent.append((name, path))
        return absent

    def unlabelled(self) -> list[Path]:
        """Images beside those of the pairs that have no label map; none where their folder holds other splits too."""
        if self._source.shared:
            return []
        folder, known = self.image_path(0).parent, {self.image_path(index).name for index in range(len(self))}
        extra = sorted(names_in(folder) - known)
        return [folder / name for name in extra if name.endswith(".jpg") and not name.startswith(".")]

    def stamps(self) -> Iterator[str]:
        """What the label maps depend on, for the key of what is cached about them."""
        for index in range(len(self)):
            path = self.label_path(index).absolute()
            status = os.stat(path)
            yield f"{path} {status.st_size} {status.st_mtime_ns}"

    def _rare_classes(self) -> list[int]:
        from zs3fast.data.presence import images_per_class

        try:
            training = self if self.split == "train" else open_dataset(self.name, self.root, "train")
        except (ValueError, OSError) as error:
            logger.warning("%s: no seen/unseen split, it is counted on the training images (%s)", self.name, error)
            return []
        return [c for c, images in enumerate(images_per_class(training)) if images <= _RARE]


def ids_digest(ids: Iterable[str]) -> str:
    """SHA-256 of the names of a dataset's pairs, in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def list_datasets() -> list[str]:
    """Names of datasets on disk that `open_dataset` knows; it also knows "world", which is on none."""
    return list(SOURCES)


def open_dataset(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    fold: int | None = None,
    check_files: bool = True,
) -> SegmentationDataset:
    """The pairs of a dataset under a folder, in any of the layouts it is commonly kept in.

    Args:
        name: one of `list_datasets()`, "world" (`zs3fast.data.world`), a name of `register_dataset`, or a YAML file.
        root: the dataset's own folder (VOCdevkit/VOC2012, coco_stuff164k, ADEChallengeData2016, ...) or one above;
            None for "world", which is painted when it is read, and where a description of one's own says it.
        split: "train" or "val"; of "world" also "test". VOC's training set is the augmented one (10,582 images).
        fold: 0..3 for voc5i and coco20i, and for those only.
        check_files: whether every image and label map must be there.
    Raises:
        ValueError: an unknown name, split or fold; a root that holds no known layout of the dataset.
        FileNotFoundError: no such root, or (with `check_files`) a missing file, the first one named.
    """
    if name == PAINTED:
        return _open_world(root, split, fold)
    if split not in SPLITS:
        raise ValueError(f"split: expected train or val, got {split!r}")
    own = registered_source(name, root, split)
    if own is not None:
        if fold is not None:
            raise ValueError(f"fold: {name} has none, got {fold}")
        return _with_files(SegmentationDataset(name, split, *own), check_files)
    if name not in SOURCES:
        known = (*SOURCES, *registered(), PAINTED)
        raise ValueError(
            f"name: expected one of {', '.join(known)}, or a YAML file that describes a dataset, got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    if fold is not None or name in FOLDED:
        fold_classes(name, fold)
    if root is None:
        raise ValueError(f"root: expected the folder of {name}")
    root = Path(root)
    return _with_files(SegmentationDataset(name, split, SOURCES[name](root, split), root, fold), check_files)


def _with_files(dataset: SegmentationDataset, check_files: bool) -> SegmentationDataset:
    """The dataset, if every image and label map is there or it does not matter."""
    absent = dataset.missing() if check_files else []
    if absent:
        more = f", and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise FileNotFoundError(f"{dataset.name} {dataset.split}: no file {absent[0][1]}{more}")
    return dataset


def _open_world(root: str | os.PathLike[str] | None, split: str, fold: int | None) -> SegmentationDataset:
    from zs3fast.data.world import WorldDataset  # which is a SegmentationDataset

    if root is not None or fold is not None:
        raise ValueError(f"root, fold: {PAINTED} has neither, expected None, got {root} and {fold}")
    return WorldDataset(split)


def read_colour_labels(path: Path, palette: dict[tuple[int, int, int], int], name: str) -> np.ndarray:
    """Int32 [H, W] of a mask in colours."""
    colours = read_colours(path, "labels").astype(np.int32)
    codes = colours[:, :, 0] << 16 | colours[:, :, 1] << 8 | colours[:, :, 2]
    found, places = np.unique(codes, return_inverse=True)
    labels = np.empty(len(found), np.int32)
    for index, code in enumerate(found.tolist()):
        colour = (code >> 16, code >> 8 & 255, code & 255)
        if colour not in palette:
            raise ImageError(f"labels: {path} holds the colour {list(colour)}, which is none of {name}'s palette")
        labels[index] = palette[colour]
    return labels[places].reshape(codes.shape)


def _invalid(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    outside = (values < 0) | (values >= len(table))
    return outside | (table[np.where(outside, 0, values)] == INVALID)
