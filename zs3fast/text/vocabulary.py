"""Class lists as users write them in strings and sequences; files of them are read by `class_files`.

A class is a tuple of names: the first is displayed, the others are synonyms whose embeddings are averaged with its own.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

ClassEntry = tuple[str, ...]
_LONGEST_NAME = 1000  # characters


def parse_classes(classes: str | Iterable[str | Sequence[str]], argument: str = "classes") -> list[ClassEntry]:
    """Classes in the order given.

    Args:
        classes: one string of classes with commas between them, "cat, grass"; or a sequence with one item a class: a
            name, a line "sofa, couch" (the first name is displayed, the others are synonyms) or a tuple of names, whose
            commas are part of them.
        argument: what error messages call `classes`.
    Raises:
        ValueError: no class, an empty name, another notation ("cat; dog", "0: cat"), or a class given twice
            (`same_name` says which spellings CLIP reads alike).
    """
    if isinstance(classes, str):
        entries: list[ClassEntry] = [(name,) for name in names_of(classes, argument)]
    else:
        entries = [_entry(item, argument) for item in classes]
    return check_entries(entries, argument)


def whole_names(names: Iterable[str]) -> list[ClassEntry]:
    """A dataset's class names as classes: each is one name, commas and all, as published text embeddings read them."""
    return [(name,) for name in names]


def check_entries(entries: list[ClassEntry], argument: str) -> list[ClassEntry]:
    """`entries`, unless there are none, a name is no name by its length, or two display the same name."""
    if not entries:
        raise ValueError(f"{argument}: expected at least one class, got none")
    longest = max((name for entry in entries for name in entry), key=len)
    if len(longest) > _LONGEST_NAME:  # tokenizers take the square of a word's length in time
        raise ValueError(
            f"{argument}: expected names of at most {_LONGEST_NAME} characters, got {len(longest)}: {longest[:40]!r}..."
        )
    first: dict[str, int] = {}
    for index, entry in enumerate(entries):
        earlier = first.setdefault(same_name(entry[0]), index)
        if earlier != index:
            raise ValueError(f"{argument}: {entry[0]!r} is given twice (classes {earlier + 1} and {index + 1})")
    return entries


@functools.lru_cache(maxsize=4096)
def same_name(name: str) -> str:
    """What of a name CLIP's tokenizer tells apart.

    Case and spacing do not matter to it, nor how an accent is encoded (NFC, NFD), curled quotes, wide letters and
    ligatures, which it mends with ftfy, nor HTML's names of characters ("&amp;"). What nobody sees (zero-width spaces,
    soft hyphens, marks of direction) it does tell apart; readers do not.
    """
    import ftfy  # what open_clip's tokenizer uses

    name = html.unescape(html.unescape(ftfy.fix_text(name)))
    name = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()


def _entry(item: str | Sequence[str], argument: str) -> ClassEntry:
    if isinstance(item, str):
        return tuple(names_of(item, argument))
    if not isinstance(item, Sequence) or not item or not all(isinstance(name, str) for name in item):
        raise TypeError(
            f"{argument}: expected a name, a line of synonyms or a tuple of names for each class, got {item!r}"
        )
    return tuple(_name(name, name, argument) for name in item)


def names_of(line: str, argument: str) -> list[str]:
    """The names of a line, commas between them."""
    check_spelling(line, argument)
    return [_name(name, line, argument) for name in line.split(",")]


def check_spelling(line: str, argument: str) -> None:
    """Raise for what is a list in another notation, "cat; dog" or "0: cat", and show the right one."""
    better = _better(html.unescape(html.unescape(line)).strip())
    if better is not None:
        raise ValueError(f"{argument}: expected names with commas between them, got {line.strip()!r}; write {better!r}")


def _better(line: str) -> str | None:
    """The line as it should have been written, where it looks like another notation."""
    separators = r"[;|\n\uff1b\uff0c\u3001]"  # the last ones: wide semicolon and comma, ideographic comma
    if re.search(separators, line):
        return _joined(re.split(f"{separators}|,", line))
    if re.match(r"\d+\s*[:=\t]\s*\S|\d+[.)]\s+\S", line):  # "0: cat" and "1. cat", as lists of labels are kept
        return _joined(re.sub(r"^\s*\d+\s*[:=\t.)]\s*", "", part) for part in line.split(","))
    if re.match(r"[-*]\s+\S", line):  # a list of YAML or Markdown
        return line[1:].strip()
    if re.fullmatch(r"\[.*[,'\"].*\]|\{.*[,'\"].*\}|\(.*[,'\"].*\)", line):  # a list of JSON or Python
        return _joined(part.strip(" '\"") for part in line[1:-1].split(","))
    return None


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part.strip() for part in parts if part.strip())


def _name(name: str, line: str, argument: str) -> str:
    """A name with single spaces; `line` is what it stands in."""
    if not name.strip():
        what = f"an empty name in {line!r}" if line.strip(", ") else "no class"
        raise ValueError(f"{argument}: expected names with commas between them, got {what}")
    return " ".join(name.split())
