"""Class lists as users write them: strings, sequences and files.

A class is a tuple of names: the first is displayed, the others are synonyms whose embeddings are averaged with its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ClassEntry = tuple[str, ...]


def parse_classes(classes: str | Iterable[str | Sequence[str]], argument: str = "classes") -> list[ClassEntry]:
    """Classes in the order given.

    Args:
        classes: one string of classes with commas between them, "cat, grass"; or a sequence with one item a class: a
            name, a line "sofa, couch" (the first name is displayed, the others are synonyms) or a tuple of names, whose
            commas are part of them.
        argument: what error messages call `classes`.
    Raises:
        ValueError: no class, an empty name, or a class given twice (case and spacing do not tell names apart: CLIP
            reads both alike).
    """
    if isinstance(classes, str):
        entries = [(name,) for name in _names(classes, argument)]
    else:
        entries = [_entry(item, argument) for item in classes]
    return check_entries(entries, argument)


def whole_names(names: Iterable[str]) -> list[ClassEntry]:
    """A dataset's class names as classes: each is one name, commas and all, as published text embeddings read them."""
    return [(name,) for name in names]


def read_class_file(path: str | os.PathLike[str]) -> list[ClassEntry]:
    """Classes of a text file: one a line, synonyms after commas, "sofa, couch"; UTF-8.

    A `#` at the start of a line or after a space begins a comment; empty lines are skipped; order is kept.

    Raises:
        ValueError: not UTF-8, no class, an empty name, a class given twice. FileNotFoundError: no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"classes: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            entries.append(tuple(_names(line, f"classes: {path}, line {number}")))
    return check_entries(entries, f"classes: {path}")


def check_entries(entries: list[ClassEntry], argument: str) -> list[ClassEntry]:
    """`entries`, unless there are none or two display the same name."""
    if not entries:
        raise ValueError(f"{argument}: expected at least one class, got none")
    first: dict[str, int] = {}
    for index, entry in enumerate(entries):
        earlier = first.setdefault(same_name(entry[0]), index)
        if earlier != index:
            raise ValueError(f"{argument}: {entry[0]!r} is given twice (classes {earlier + 1} and {index + 1})")
    return entries


def same_name(name: str) -> str:
    """What of a name CLIP's tokenizer tells apart: case and spacing do not matter."""
    return " ".join(name.split()).casefold()


def _entry(item: str | Sequence[str], argument: str) -> ClassEntry:
    if isinstance(item, str):
        return tuple(_names(item, argument))
    if not isinstance(item, Sequence) or not item or not all(isinstance(name, str) for name in item):
        raise TypeError(f"{argument}: each class is a name, a line of synonyms or a tuple of names, got {item!r}")
    return tuple(_name(name, name, argument) for name in item)


def _names(line: str, argument: str) -> list[str]:
    return [_name(name, line, argument) for name in line.split(",")]


def _name(name: str, line: str, argument: str) -> str:
    """A name with single spaces; `line` is what it stands in."""
    if not name.strip():
        what = f"an empty name in {line!r}" if line.strip(", ") else "no class"
        raise ValueError(f"{argument}: expected names with commas between them, got {what}")
    return " ".join(name.split())
