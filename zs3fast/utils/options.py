"""Options: names, shares and counts have one check each, and one way to say what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, or an error that names the argument and its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")
    return value


def share(name: str, value: object, *, whole: bool = True) -> float:
    """`value` as a float in [0, 1], without 1 where not `whole`, or an error that names the argument."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    if not (0 <= number <= 1 and (whole or number < 1)):
        raise ValueError(f"{name}: expected a share in {'0..1' if whole else '[0, 1)'}, got {value!r}")
    return number


def count(name: str, value: object, least: int = 0) -> int:
    """`value` as a whole number from `least` on, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r}")
    return int(value)


def close_names(given: object, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names nearest to what was given, best first."""
    return difflib.get_close_matches(str(given), list(known), n=most)


def did_you_mean(given: object, known: Iterable[str], most: int = 1) -> str:
    """'; did you mean ...?' where a known name is close, else nothing."""
    close = close_names(given, known, most)
    return f"; did you mean {' or '.join(close)}?" if close else ""
