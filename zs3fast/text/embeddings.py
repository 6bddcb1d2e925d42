"""Prepared text embeddings: the .npy files that come with the official code."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from zs3fast.utils.arrays import read_npy


def load_text_embeddings(path: str | os.PathLike[str], num_classes: int | None = None) -> Tensor:
    """Text embeddings [C, D] float32 of a NumPy file, a row a class in dataset order.

    Rows stored in half precision are promoted and not renormalised: official results rest on the rounded values.

    Args:
        path: .npy file, [C, D] float16, float32 or float64.
        num_classes: the C expected, if known.
    Raises:
        ValueError: not a .npy file, truncated, pickled objects, another shape or dtype, or values that are not finite.
        FileNotFoundError: no such file.
    """
    array = read_npy(path, "text_embeddings")
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"text_embeddings: {path}: expected float16, float32 or float64, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"text_embeddings: {path}: expected [C, D], got {list(array.shape)}")
    if num_classes is not None and len(array) != num_classes:
        raise ValueError(f"text_embeddings: {path}: expected a row for each of {num_classes} classes, got {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError(f"text_embeddings: {path}: expected finite numbers, got others")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
