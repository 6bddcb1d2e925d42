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

from zs3fast.data.layouts import INVALID, Source, fill, names_in
from zs3fast.data.sources import FOLDED
from zs3fast.text import whole_names
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.utils.errors import ImageError
from zs3fast.utils.images import read_colours, read_image_file, read_mask_file

logger = logging.getLogger("zs3fast")


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its labels.

    image:  uint8 [H, W, 3] RGB.
    labels: int32 [H, W], dataset indices 0..C-1 or the dataset's ignore_index.
    id:     the pair's name, the stem of its files.
    """

    image: np.ndarray
    labels: np.ndarray
    id: str


def _none(dataset: SegmentationDataset) -> list[int]:
    return []


class SegmentationDataset(Dataset[Sample]):
    """Pairs of an image and a label map; open one with `open_dataset`.

    name, split:  what it was opened as.  fold: of PASCAL-5i and COCO-20i, else None.
    class_names:  C names; labels are indices into them.
    ignore_index: the label of pixels that count nowhere: 255, or 65535 where C > 255.
    ids:          names of the pairs.
    background:   of PASCAL-5i and COCO-20i the last class, which is a negative for all others; else None.
    notes:        remarks on pairs that were read and can be used, the first of each kind.
    """

    def __init__(
        self,
        name: str,
        split: str,
        source: Source,
        root: Path,
        fold: int | None = None,
        unseen: Callable[[SegmentationDataset], list[int]] = _none,
    ) -> None:
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
        self._unseen = unseen

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def classes(self) -> list[ClassEntry]:
        """The classes as text: each a name and its synonyms, which only datasets of one's own have."""
        return whole_names(self.class_names) if self._source.classes is None else list(self._source.classes)

    @cached_property
    def unseen(self) -> list[int]:
        """Classes that zero-shot training never sees, as they were handed in; asked for once."""
        return list(self._unseen(self))

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
        known = np.max(values, initial=0) < len(table) and np.min(values, initial=0) >= 0
        labels = table[values] if known else np.full(values.shape, INVALID, np.int32)
        if np.min(labels, initial=0) == INVALID:
            value = values[_invalid(values, table)][0]
            raise ValueError(f"labels: {path}: expected labels of {self.name}, got {value}")
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


def ids_digest(ids: Iterable[str]) -> str:
    """SHA-256 of the names of a dataset's pairs, in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def read_colour_labels(path: Path, palette: dict[tuple[int, int, int], int], name: str) -> np.ndarray:
    """Int32 [H, W] of a mask in colours."""
    colours = read_colours(path, "labels").astype(np.int32)
    codes = colours[:, :, 0] << 16 | colours[:, :, 1] << 8 | colours[:, :, 2]
    found, places = np.unique(codes, return_inverse=True)
    labels = np.empty(len(found), np.int32)
    for index, code in enumerate(found.tolist()):
        colour = (code >> 16, code >> 8 & 255, code & 255)
        if colour not in palette:
            raise ImageError(f"labels: {path}: expected colours of {name}'s palette, got {list(colour)}")
        labels[index] = palette[colour]
    return labels[places].reshape(codes.shape)


def _invalid(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    outside = (values < 0) | (values >= len(table))
    out: np.ndarray = outside | (table[np.where(outside, 0, values)] == INVALID)
    return out
