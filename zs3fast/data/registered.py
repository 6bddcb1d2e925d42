"""Datasets of one's own: described in a YAML file, or registered by a program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zs3fast.data.layouts import INVALID, Source, names_in, read_ids
from zs3fast.data.sources import PAINTED, SOURCES
from zs3fast.text import parse_classes
from zs3fast.text.vocabulary import ClassEntry, same_name
from zs3fast.utils.errors import FileFormatError
from zs3fast.utils.options import did_you_mean
from zs3fast.utils.text_files import read_yaml

Opener = Callable[[Path, str], Source]
_KEYS = ("root", "images", "masks", "lists", "names", "unseen", "ignore", "label_offset", "palette")
_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
_MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
_VALUES = 65536  # of a mask
_registered: dict[str, tuple[Mapping[str, Any] | Opener, Path | None]] = {}


def register_dataset(name: str, description: str | os.PathLike[str] | Mapping[str, Any] | Opener) -> None:
    """Have `open_dataset(name, ...)` and everything above it know a dataset; a name registered before is replaced.

    Args:
        name: any but those of `list_datasets()` and of files.
        description: a YAML file or its contents, see `docs/data.md`; or a function of (root, split) that gives a
            `zs3fast.data.layouts.Source`.

    A description holds:
        images, masks: folders under `root`, with {split} in their names, or by split: {train: ..., val: ...}. A mask
            belongs to the image of its stem.
        lists: files with the ids of a split, in the same form; left out: every mask of the folder.
        names: the classes in the order of their labels; a list of synonyms is one class, displayed by its first name.
        unseen: names, or indices, of classes that zero-shot training never sees; left out: none.
        label_offset: the mask value of the first class, 0 unless given; values below are ignored.
        ignore: mask values (or colours, with a palette) that are ignored; 255 unless given.
        palette: for masks in colours: [red, green, blue] of every class. Left out: masks hold numbers.
        root: what the folders lie in, from the description's own folder; left out: that folder. `--data` overrides it.
    """
    if not name or is_file_name(name) or name in (*SOURCES, PAINTED):
        raise ValueError(f"name: expected a new name for a dataset, got {name!r}")
    if callable(description):
        _registered[name] = description, None
    elif isinstance(description, Mapping):
        _registered[name] = _checked(description, f"dataset {name}"), None
    else:
        path = Path(description)
        _registered[name] = _checked(read_yaml(path, "dataset"), f"dataset: {path}"), path.parent


def registered() -> list[str]:
    """Names that were registered."""
    return list(_registered)


def is_file_name(name: str) -> bool:
    """Whether a dataset's name is that of a YAML file."""
    return name.lower().endswith((".yaml", ".yml"))


def described_classes(name: str) -> list[ClassEntry] | None:
    """The classes, with their synonyms, of a registered dataset or a YAML file; None for other names."""
    found = _description(name)
    return None if found is None or callable(found[0]) else _entries(found[0], _where(name))


def registered_source(name: str, root: str | os.PathLike[str] | None, split: str) -> tuple[Source, Path] | None:
    """The pairs of a registered dataset or a YAML file, and its root; None for other names."""
    found = _description(name)
    if found is None:
        return None
    description, beside = found
    if callable(description):
        if root is None:
            raise ValueError(f"root: expected the folder of {name}, got None")
        return description(Path(root), split), Path(root)
    if root is None:
        root = (beside or Path()) / str(description.get("root", ""))
    return _source(description, Path(root), split, _where(name)), Path(root)


def _description(name: str) -> tuple[Mapping[str, Any] | Opener, Path | None] | None:
    if name in _registered:
        return _registered[name]
    if is_file_name(name):
        return _checked(read_yaml(name, "dataset"), _where(name)), Path(name).parent
    return None


def _where(name: str) -> str:
    return f"dataset: {name}" if is_file_name(name) else f"dataset {name}"


def _checked(content: Any, where: str) -> Mapping[str, Any]:
    """A description with known keys and everything that is needed."""
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{where}: expected keys such as images, masks and names, got {type(content).__name__}")
    for key in content:
        if key not in _KEYS:
            raise FileFormatError(
                f"{where}: unknown key {key!r}, expected {', '.join(_KEYS)}{did_you_mean(str(key), _KEYS)}"
            )
    missing = [key for key in ("images", "masks", "names") if content.get(key) is None]
    if missing:
        raise FileFormatError(f"{where}: expected {', '.join(missing)} too, got none")
    entries = _entries(content, where)
    _unseen(content, entries, where)
    _numbers(content, entries, where)
    _colours(content, entries, where)
    for key in ("images", "masks", "lists"):
        _place(content, key, "train", where)
    return content


def _entries(content: Mapping[str, Any], where: str) -> list[ClassEntry]:
    names = content["names"]
    if not isinstance(names, list) or not names:
        raise FileFormatError(f"{where}: names: expected a list of class names, got {type(names).__name__}")
    words = [item if isinstance(item, list) else [item] for item in names]
    odd = next((word for item in words for word in item or [None] if not isinstance(word, str)), "")
    if not isinstance(odd, str):  # "no", "on" and 1 are no strings in YAML
        raise FileFormatError(f"{where}: names: expected names, got {odd!r}; put it in quotes if it is one")
    return parse_classes([tuple(item) for item in words], f"{where}: names")


def _unseen(content: Mapping[str, Any], entries: list[ClassEntry], where: str) -> tuple[int, ...]:
    position = {same_name(name): index for index, entry in enumerate(entries) for name in entry}
    found = set()
    for item in _list(content, "unseen", [], where):
        index = position.get(same_name(item)) if isinstance(item, str) else item
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(entries):
            raise FileFormatError(f"{where}: unseen: expected names of the list or 0..{len(entries) - 1}, got {item!r}")
        found.add(index)
    return tuple(sorted(found))


def _numbers(content: Mapping[str, Any], entries: list[ClassEntry], where: str) -> tuple[int, list[Any]]:
    """The label offset, and what is ignored."""
    offset = content.get("label_offset", 0)
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < _VALUES - len(entries):
        raise FileFormatError(f"{where}: label_offset: expected the first class's value, 0 or more, got {offset!r}")
    colours = content.get("palette") is not None
    ignored = _list(content, "ignore", [] if colours else [255], where)
    for value in ignored:
        if not (_is_colour(value) if colours else type(value) is int and 0 <= value < _VALUES):
            kind = "colours [red, green, blue]" if colours else f"mask values 0..{_VALUES - 1}"
            raise FileFormatError(f"{where}: ignore: expected {kind}, got {value!r}")
        if not colours and "ignore" in content and offset <= value < offset + len(entries):
            raise FileFormatError(
                f"{where}: ignore: expected labels of no class, got {value}, {entries[value - offset][0]!r}"
            )
    return offset, ignored


def _colours(content: Mapping[str, Any], entries: list[ClassEntry], where: str) -> np.ndarray | None:
    """int64 [C, 3], or None where masks hold numbers."""
    if content.get("palette") is None:
        return None
    palette = _list(content, "palette", [], where)
    if len(palette) != len(entries) or not all(map(_is_colour, palette)):
        raise FileFormatError(f"{where}: palette: expected [red, green, blue] for each of {len(entries)} names")
    taken = [*map(tuple, palette), *map(tuple, _numbers(content, entries, where)[1])]
    twice = next((list(colour) for colour in taken if taken.count(colour) > 1), None)
    if twice is not None:
        raise FileFormatError(f"{where}: palette: expected different colours, got {twice} twice")
    if content.get("label_offset"):
        raise FileFormatError(
            f"{where}: label_offset: expected none for masks in colours, got {content['label_offset']!r}"
        )
    return np.array(palette, np.int64)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)


def _list(content: Mapping[str, Any], key: str, default: list[Any], where: str) -> list[Any]:
    value = content.get(key, default)
    value = [] if value is None else [value] if isinstance(value, (int, str)) else value
    if not isinstance(value, list):
        raise FileFormatError(f"{where}: {key}: expected a list, got {type(value).__name__}")
    return value


def _place(content: Mapping[str, Any], key: str, split: str, where: str) -> str | None:
    """The folder or list of a split; None where there is none."""
    value = content.get(key)
    if isinstance(value, Mapping):
        odd = next((part for part in value if part not in ("train", "val")), None)
        if odd is not None:
            raise FileFormatError(f"{where}: {key}: expected train and val, got {odd!r}")
        value = value.get(split)
    if value is not None and not isinstance(value, str):
        raise FileFormatError(f"{where}: {key}: expected a path, with {{split}} in it or by split, got {value!r}")
    return None if value is None else value.replace("{split}", split)


def _source(content: Mapping[str, Any], root: Path, split: str, where: str) -> Source:
    entries = _entries(content, where)
    folders = {}
    for key in ("images", "masks"):
        place = _place(content, key, split, where)
        if place is None:
            raise ValueError(f"{where}: {key}: expected one for the split {split}, got none")
        folders[key] = root / place
        if not folders[key].is_dir():
            raise FileNotFoundError(f"{where}: {key}: no folder {folders[key]}")
    images, masks = _by_stem(folders["images"], _IMAGES), _by_stem(folders["masks"], _MASKS)
    listing = _place(content, "lists", split, where)
    ids = sorted(masks) if listing is None else read_ids(root / listing)
    if not ids:
        raise ValueError(f"{where}: expected masks ({', '.join(_MASKS)}), got none in {folders['masks']}")
    ignore_index = 255 if len(entries) <= 255 else _VALUES - 1
    offset, ignored = _numbers(content, entries, where)
    palette = _colours(content, entries, where)
    return Source(
        ids,
        str(folders["images"] / "{}.jpg"),
        (str(folders["masks"] / "{}.png"),),
        tuple(entry[0] for entry in entries),
        _table(len(entries), offset, [] if palette is not None else ignored, ignore_index),
        ignore_index,
        shared=listing is not None or folders["images"] == folders["masks"],
        unseen=_unseen(content, entries, where),
        classes=tuple(entries),
        files={name: (images.get(name, f"{name}.jpg"), masks.get(name, f"{name}.png")) for name in ids},
        palette=None if palette is None else _coded(palette, ignored, ignore_index),
    )


def _table(count: int, offset: int, ignored: Iterable[int], ignore_index: int) -> np.ndarray:
    table = np.full(_VALUES, INVALID, np.int32)
    table[:offset] = ignore_index
    table[list(ignored)] = ignore_index
    table[offset : offset + count] = np.arange(count)  # after the default 255, which may be a class
    return table


def _coded(palette: np.ndarray, ignored: list[list[int]], ignore_index: int) -> dict[tuple[int, int, int], int]:
    colours = {(int(r), int(g), int(b)): index for index, (r, g, b) in enumerate(palette)}
    return {**colours, **{(r, g, b): ignore_index for r, g, b in ignored}}


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Stem -> file name of what a folder holds; of two files of one stem, the first suffix's."""
    found: dict[str, str] = {}
    for name in sorted(names_in(folder), key=lambda n: (_rank(n, suffixes), n)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            found.setdefault(stem, name)
    return found


def _rank(name: str, suffixes: tuple[str, ...]) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return suffixes.index(suffix) if suffix in suffixes else len(suffixes)
