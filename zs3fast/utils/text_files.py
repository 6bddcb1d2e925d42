"""Reading text, JSON and YAML that users hand in; an error is one line that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zs3fast.utils.errors import FileFormatError, FileLimitError

_LARGEST = 1 << 30  # bytes; COCO's annotations, the largest such file in use, have half of that


def read_text(path: str | os.PathLike[str], what: str = "") -> str:
    """A UTF-8 text file, without its byte order mark.

    Args:
        what: the argument that the file was given as; errors begin with it.
    Raises:
        FileNotFoundError: no such file.  FileFormatError (a ValueError): not UTF-8, or no text file at all.
    """
    path, name = Path(path), _name(path, what)
    if not path.is_file():
        if path.exists():
            raise FileFormatError(f"{name} is {'a folder' if path.is_dir() else 'no plain file'}, expected a text file")
        raise FileNotFoundError(f"{what}{': ' if what else ''}no file {path}")
    if path.stat().st_size > _LARGEST:
        raise FileLimitError(f"{name}: expected at most {_LARGEST} bytes of a text file, got {path.stat().st_size}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(
    path: str | os.PathLike[str], what: str = "", pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """What a JSON file holds.

    Args:
        what: as for `read_text`.
        pairs: makes what stands for an object from its (name, value) pairs; None: a dict.
    """
    return parse_json(read_text(path, what), _name(path, what), pairs)


def parse_json(text: str, name: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What JSON text holds; `name` is what errors begin with."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise FileFormatError(f"{name} is not JSON ({reason})") from None


def read_yaml(path: str | os.PathLike[str], what: str = "") -> Any:
    """What a YAML file holds, of plain types alone."""
    import yaml

    text, name = read_text(path, what), _name(path, what)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, KeyError, AttributeError) as error:
        # besides YAMLError: what the constructors of numbers and dates make of what looks like one
        reason = "too deeply nested" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise FileFormatError(f"{name} is not YAML ({reason or type(error).__name__})") from None


def _name(path: str | os.PathLike[str], what: str) -> str:
    return f"{what}: {os.fspath(path)}" if what else os.fspath(path)
