"""Class names that come with a dataset on disk, before those in the package: PASCAL Context 459 and ADE20K-847."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zs3fast.utils.errors import FileFormatError
from zs3fast.utils.text_files import read_json, read_text

# In the dataset's folder, the first that is there; {} is the dataset's name.
CLASS_FILES = ("class_names.txt", "classes.txt", "labels.txt", "{}.txt", "{}.json", "class_names.json")
_NUMBERED = re.compile(r"\s*(\d+)\s*[:\t]\s*(.*\S)\s*$")


def read_class_names(dataset: str, place: Path, known: Sequence[str]) -> tuple[str, ...]:
    """The names of a dataset, from the first of `CLASS_FILES` in its folder or the folder above; else the `known` ones.

    Text files hold as many names, one a line or "7: name" with numbers 1..count (0, the background, may be there) or
    0..count - 1, in any order. Synonyms after commas stay in the name. JSON files hold a list of names.
    """
    files = [name.format(dataset) for name in CLASS_FILES]
    for folder in (place, place.parent):
        for name in files:
            if (folder / name).is_file():
                return _read(folder / name, len(known))
    return tuple(known)


def _read(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = read_json(path) if path.suffix == ".json" else _lines(read_text(path), count)
    except ValueError as error:  # what is not JSON or UTF-8, and ours
        reason = str(error).removeprefix(f"{path} is ")
        raise FileFormatError(f"{path} is no list of class names: {reason}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise FileFormatError(f"{path} is no list of class names: expected a list of strings, got other values")
    if len(names) != count:
        raise FileFormatError(f"{path}: expected {count} class names, got {len(names)}")
    return tuple(name.strip() for name in names)


def _lines(text: str, count: int) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    matches = [_NUMBERED.match(line) for line in lines]
    found = [match for match in matches if match]
    if len(found) != len(lines):
        return lines
    numbers = [int(match[1]) for match in found]
    numbered = {number: match[2] for number, match in zip(numbers, found, strict=True)}
    if len(numbered) != len(found):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"expected each number once, got {twice} twice")
    first = 0 if 0 in numbered and count not in numbered else 1
    missing = [number for number in range(first, first + count) if number not in numbered]
    if missing:
        raise ValueError(f"expected all numbers of {first}..{first + count - 1}, got none with {missing[0]}")
    extra = numbered.keys() - set(range(first + count))
    if extra:
        raise ValueError(f"expected numbers up to {first + count - 1}, got {min(extra)}")
    return [numbered[number] for number in range(first, first + count)]
