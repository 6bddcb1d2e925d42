"""Ratios of counts in percent, where 0 / 0 is nan and means skip nan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def percent(part: Any, whole: Any) -> Any:
    """100 * part / whole in float64, elementwise; nan where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return 100 * np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; nan where none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 where both are 0, nan where one is nan."""
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def json_number(value: float) -> float | None:
    """A number that JSON can hold: None for nan."""
    return None if math.isnan(value) else float(value)
