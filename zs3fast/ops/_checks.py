"""Checks of arguments that several ops make: each raises one line that names op and argument."""

from __future__ import annotations

import torch
from torch import Tensor


def is_int(n: object) -> bool:
    """An int, or one that torch traces; a bool is none."""
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def check_float_tensor(op: str, label: str, x: object) -> Tensor:
    """x, a tensor of real floating point numbers.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {label}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {label}: expected a floating-point tensor, got {x.dtype}")
    check_strided(op, label, x)
    return x


def check_strided(op: str, label: str, x: Tensor) -> None:
    """A tensor whose elements lie in memory: neither sparse nor nested.

    Raises:
        TypeError: it is not.
    """
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{op}: {label}: expected a dense tensor, got {'nested' if x.is_nested else x.layout}")


def check_number(op: str, label: str, x: object, *, optional: bool = False) -> None:
    """An int or a float, traced ones included; None too if it is optional.

    Raises:
        TypeError: it is none.
    """
    if optional and x is None:
        return
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        expected = "a number or None" if optional else "a number"
        raise TypeError(f"{op}: {label}: expected {expected}, got {type(x).__name__}")


def check_bool(op: str, label: str, x: object) -> None:
    """True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(x, bool):
        raise TypeError(f"{op}: {label}: expected True or False, got {x!r}")


# Pixel coordinates are exact in float32, and the index of a pixel fits in an int32: no kernel counts further.
MAX_SIDE = 2**24
MAX_PIXELS = 2**31 - 1


def check_size(op: str, label: str, pair: object) -> None:
    """Two positive ints (height, width), each at most 2^24, with at most 2^31 - 1 pixels.

    Raises:
        TypeError: not two ints.
        ValueError: too small or too large.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(f"{op}: {label}: expected two ints (height, width), got {pair!r}")
    height, width = pair
    if height < 1 or width < 1:
        raise ValueError(f"{op}: {label}: expected at least (1, 1), got {tuple(pair)}")
    if height > MAX_SIDE or width > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(f"{op}: {label}: expected at most 2^24 a side and fewer than 2^31 pixels, got {tuple(pair)}")


LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def check_label_dtype(op: str, classes: int, dtype: torch.dtype) -> None:
    """A type of label maps that holds as many classes, or a ValueError."""
    if dtype not in LABEL_DTYPES:
        expected = ", ".join(str(d)[6:] for d in LABEL_DTYPES)
        raise ValueError(f"{op}: dtype: expected one of {expected}, got {dtype}")
    if classes - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"{op}: dtype: expected one that holds {classes} classes, got {dtype}")
