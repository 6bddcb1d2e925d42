"""NumPy's scalars and arrays in pickled files, as mmcv keeps them in `meta` (best_score, PALETTE).

NumPy's own constructors are not safe to be called by a file: a dtype's state decides what bytes are taken for pointers.
So the names that a pickle calls are given to the stand-ins below, which take plain numbers and strings alone.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[<>=|]?([biufc]\d{1,2}|[?]|[SU]\d{1,9})")


class PlainDtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ValueError(f"expected a NumPy type of plain numbers or strings, got {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, byte_order, *parts = state  # (version, byte order, subtype, names, fields, size, alignment, flags)
        if parts[:3] != [None, None, None] or byte_order not in ("<", ">", "=", "|"):
            raise ValueError("expected a NumPy type of plain numbers or strings, got a structured one")
        if byte_order != "|":
            self.dtype = self.dtype.newbyteorder(byte_order)


class PlainArray:
    """Stands in for `numpy.ndarray`; `array` is set once its state was read."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = np.ndarray(
            shape, _plain(dtype), _checked(shape, dtype, data), order="F" if fortran else "C"
        ).copy()


def _reconstruct(kind: Any, shape: Any, code: Any) -> PlainArray:
    return PlainArray()


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return np.ndarray((), _plain(dtype), _checked((), dtype, data))[()]


def _plain(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, PlainDtype):
        raise ValueError(f"expected a NumPy type, got {type(dtype).__name__}")
    return dtype.dtype


def _checked(shape: Any, dtype: Any, data: Any) -> bytes:
    """The bytes of an array, if they are as many as it needs."""
    sides = [int(side) for side in shape]
    size = _plain(dtype).itemsize
    for side in sides:
        size *= side
    if not isinstance(data, bytes) or any(side < 0 for side in sides) or len(data) != size:
        raise ValueError(f"expected {size} bytes for a NumPy array {sides}")
    return data


def _no_bytes() -> bytes:
    return b""


# (what stands in, the name that a pickle calls): NumPy 2 writes `numpy._core`, NumPy 1 wrote `numpy.core`.
NUMPY_GLOBALS: list[Any] = [
    (PlainDtype, "numpy.dtype"),
    (PlainArray, "numpy.ndarray"),
    *((_no_bytes, f"{builtins}.bytes") for builtins in ("builtins", "__builtin__")),  # the data of empty arrays
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
