"""Finding the pairs of a dataset on disk: which folder a root means, and which of the known layouts it holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zs3fast.utils.files import hidden
from zs3fast.utils.text_files import read_text

_IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|tiff?|webp|bmp|gif)$", re.IGNORECASE)
_IMAGE_PATH = re.compile(rf"(.*?{_IMAGE_SUFFIX.pattern[:-1]})(?=\s|$)", re.IGNORECASE)

INVALID = -1  # in a table: this value is not a label of the dataset


@dataclass(frozen=True)
class Source:
    """Where the pairs of one split are and what the values of its masks mean.

    ids:            names of the pairs, in dataset order.
    image_pattern:  path of an image, its last {} for the id.
    label_patterns: the same for masks; `label_choice` [n] says which of them an id has (None: the first).
    class_names:    C names.
    table:          int32 [256] or [65536]: mask value -> class index, `ignore_index` or -1 for what is no label.
    ignore_index:   255, or 65535 where C > 255.
    shared:         whether the folder of images holds others too, so that an image without a mask means nothing.
    unseen:         of a dataset of one's own: classes that training never sees; None: by the dataset's name.
    classes:        names and synonyms of the C classes; None: the names alone.
    files:          id -> names of image and mask in the folders of the patterns; None: as the patterns say.
    palette:        of masks in colours: (red, green, blue) -> class index or `ignore_index`; None: masks hold numbers.
    """

    ids: list[str]
    image_pattern: str
    label_patterns: tuple[str, ...]
    class_names: tuple[str, ...]
    table: np.ndarray
    ignore_index: int
    label_choice: np.ndarray | None = None
    shared: bool = True
    unseen: tuple[int, ...] | None = None
    classes: tuple[tuple[str, ...], ...] | None = None
    files: dict[str, tuple[str, str]] | None = None
    palette: dict[tuple[int, int, int], int] | None = None


@dataclass(frozen=True)
class Folders:
    """A layout of parallel folders: an image for every mask, named alike.

    images, labels: folders under the root.  label_suffix: of the mask files; what comes before it is the id.
    table: meaning of the masks' values.  not_suffix: files that end so are no masks of this layout.
    shared: whether the folder of images holds those of other splits too.
    """

    images: str
    labels: str
    table: np.ndarray
    label_suffix: str = ".png"
    not_suffix: str | None = None
    shared: bool = False

    def __str__(self) -> str:
        return f"{self.images}/*.jpg with {self.labels}/*{self.label_suffix}"

    def ids(self, root: Path) -> list[str]:
        """Ids of the masks in the folder, sorted; none where either folder is missing."""
        if not (root / self.images).is_dir() or not (root / self.labels).is_dir():
            return []
        names = (name for name in os.listdir(root / self.labels) if name.endswith(self.label_suffix))
        skipped = (name for name in names if self.not_suffix is None or not name.endswith(self.not_suffix))
        return sorted(name[: -len(self.label_suffix)] for name in skipped if not hidden(name))


def find_root(root: Path, prefixes: Sequence[str], holds: Callable[[Path], bool], expected: str) -> Path:
    """The first of `root` and its sub-folders `prefixes` that holds the dataset; an error says what was expected."""
    if not root.is_dir():
        raise FileNotFoundError(f"root: no folder {root}")
    for prefix in ("", *prefixes):
        if holds(root / prefix):
            return root / prefix
    looked = ", ".join(["itself", *prefixes])
    raise ValueError(f"root: {root} ({looked}) does not hold {expected}")


def find_folders(root: Path, prefixes: Sequence[str], layouts: Sequence[Folders], what: str) -> tuple[Path, Folders]:
    """The root and the first layout that has masks there."""
    found: dict[Path, Folders] = {}

    def holds(place: Path) -> bool:
        layout = next((layout for layout in layouts if layout.ids(place)), None)
        if layout is not None:
            found[place] = layout
        return layout is not None

    place = find_root(root, prefixes, holds, f"{what}: {'; or '.join(map(str, layouts))}")
    return place, found[place]


def folder_source(place: Path, layout: Folders, class_names: Iterable[str], ignore_index: int) -> Source:
    """The pairs of a layout of folders."""
    return Source(
        layout.ids(place),
        str(place / layout.images / "{}.jpg"),
        (str(place / layout.labels / ("{}" + layout.label_suffix)),),
        tuple(class_names),
        layout.table,
        ignore_index,
        shared=layout.shared,
    )


def read_ids(path: Path) -> list[str]:
    """Ids of a list file, one a line; UTF-8, with or without a byte order mark.

    A line is an id, "2007_000032" or "IMG.0001 (2)"; or an id and VOC's -1, 0 or 1 behind it; or a path, or an image's
    and a mask's path, where the id is the first one's name without an image's suffix.
    """
    ids = [_id(line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not ids:
        raise ValueError(f"{path}: expected an id a line, got none")
    known: set[str] = set()
    for name in ids:
        if name in known:
            raise ValueError(f"{path}: expected each id once, got {name} twice")
        known.add(name)
    return ids


def _id(line: str) -> str:
    columns = line.split()
    if len(columns) > 1 and columns[-1] in ("-1", "0", "1"):  # VOC's lists of a class
        line = line[: -len(columns[-1])].rstrip()
    first = _IMAGE_PATH.match(line)
    if first:
        line = first[1]
    elif any("/" in column or "\\" in column for column in columns):
        line = line.split()[0]
    return _IMAGE_SUFFIX.sub("", re.split(r"[/\\]", line)[-1])


def fill(pattern: str, name: str) -> Path:
    """The path of an id: what stands for the pattern's last {}; braces of the folders above are their names'."""
    before, _, after = pattern.rpartition("{}")
    return Path(before + name + after)


def names_in(folder: Path) -> set[str]:
    """File names of a folder, hidden ones left out; none where there is no folder."""
    return {name for name in os.listdir(folder) if not hidden(name)} if folder.is_dir() else set()


def value_table(values: dict[int, int], ignored: Iterable[int], ignore_index: int) -> np.ndarray:
    """Table of mask values: those given, those ignored, all others invalid."""
    table = np.full(256 if ignore_index == 255 else 65536, INVALID, np.int32)
    table[list(ignored)] = ignore_index
    table[list(values)] = list(values.values())
    return table
