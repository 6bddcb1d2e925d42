"""Options given by name: one check, one way to say what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, or an error that names the argument and its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")
    return value


def close_names(given: object, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names nearest to what was given, best first."""
    return difflib.get_close_matches(str(given), list(known), n=most)


def did_you_mean(given: object, known: Iterable[str], most: int = 1) -> str:
    """'; did you mean ...?' where a known name is close, else nothing."""
    close = close_names(given, known, most)
    return f"; did you mean {' or '.join(close)}?" if close else ""
