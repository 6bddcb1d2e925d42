"""Class lists in files: text, JSON, CSV."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

from zs3fast.text.vocabulary import ClassEntry, check_entries, check_spelling, names_of
from zs3fast.utils.text_files import parse_json, read_text

_HEADINGS = ("class", "class_name", "classes", "label", "labels", "name", "names")


def read_class_file(path: str | os.PathLike[str]) -> list[ClassEntry]:
    """Classes of a UTF-8 file, in its order.

    - Text: one class a line, synonyms after commas, "sofa, couch". A `#` at the start of a line or after a space begins
      a comment; empty lines are skipped.
    - JSON (whatever the suffix): a list of names, of which one may be a list of synonyms, or an object from names to
      their synonyms, {"sofa": ["couch"], "cat": []}. Commas are part of a name.
    - CSV (by the suffix): one column, with or without a heading such as "name". Commas are part of a name.

    Raises:
        ValueError: not UTF-8, another format, no class, an empty name, a class given twice; it names the file.
        FileNotFoundError: no such file.
    """
    argument = f"classes: {path}"
    text = read_text(path, "classes")
    if text.lstrip()[:1] in ("[", "{") or Path(path).suffix.lower() == ".json":
        entries = _from_json(parse_json(text, argument, pairs=_Pairs), argument)
    elif Path(path).suffix.lower() == ".csv":
        entries = _from_csv(text, argument)
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                entries.append(tuple(names_of(line, f"{argument}, line {number}")))
    return check_entries(entries, argument)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs: a dict would keep the last of two equal names alone."""


def _from_json(content: Any, argument: str) -> list[ClassEntry]:
    expected = "expected a list of names, or an object from each name to its synonyms"
    if isinstance(content, _Pairs):
        if content and all(name.strip().isdigit() for name, _ in content):
            raise ValueError(f"{argument}: {expected}, got numbered names; write a list of them")
        items = [[name, *_listed(synonyms)] for name, synonyms in content]
    elif isinstance(content, list):
        items = [_listed(item) for item in content]
    else:
        raise ValueError(f"{argument}: {expected}, got {type(content).__name__}")
    for item in items:
        odd = next((name for name in item if not isinstance(name, str) or not name.strip()), None if item else item)
        if odd is not None:
            shown = "an object" if isinstance(odd, _Pairs) else repr(odd)
            raise ValueError(f"{argument}: {expected}, got {shown[:60]} for a name")
    return [tuple(" ".join(name.split()) for name in item) for item in items]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list) and not isinstance(value, _Pairs):
        return value
    return [] if value is None else [value]


def _from_csv(text: str, argument: str) -> list[ClassEntry]:
    try:
        rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{argument}: not a CSV file ({error})") from None
    if rows and len(rows[0]) == 1 and rows[0][0].strip().casefold() in _HEADINGS:
        rows = rows[1:]
    wide = next((row for row in rows if len([cell for cell in row if cell.strip()]) > 1), None)
    if wide is not None:
        raise ValueError(f"{argument}: expected one column, a name a line, got {len(wide)} in {','.join(wide)[:60]!r}")
    cells = [cell for row in rows for cell in row if cell.strip()]
    for cell in cells:
        check_spelling(cell, argument)
    return [(" ".join(cell.split()),) for cell in cells]
