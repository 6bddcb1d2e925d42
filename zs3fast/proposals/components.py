"""A label map taken apart: one binary mask a class, or one a connected region."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def connected_components(labels: np.ndarray) -> np.ndarray:
    """Number the regions of equal value; pixels touch at their sides and corners (8 neighbours).

    Regions are numbered 0, 1, ... by their first pixel in reading order. Horizontal runs are joined through a
    union-find in which every region hooks to a smaller neighbour at once, so the rounds are logarithmic in the runs.

    Args:
        labels: [H, W] of any integer or bool type.
    Returns:
        int64 [H, W].
    """
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels: expected [H, W] with pixels in it, got {list(labels.shape)}")
    starts = np.ones(labels.shape, dtype=bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = np.cumsum(starts.ravel()).reshape(labels.shape) - 1
    pairs = []
    height, width = labels.shape
    for shift in (-1, 0, 1):  # a pixel and its three upper neighbours
        above = (slice(0, height - 1), slice(max(0, shift), width + min(0, shift)))
        below = (slice(1, height), slice(max(0, -shift), width + min(0, -shift)))
        same = labels[above] == labels[below]
        pairs.append(np.stack([runs[above][same], runs[below][same]]))
    first, second = np.unique(np.concatenate(pairs, axis=1), axis=1)
    parent = np.arange(runs[-1, -1] + 1)
    while True:
        low, high = np.minimum(parent[first], parent[second]), np.maximum(parent[first], parent[second])
        if (low == high).all():
            break
        np.minimum.at(parent, high, low)
        while (parent[parent] != parent).any():
            parent = parent[parent]
    out: np.ndarray = np.unique(parent, return_inverse=True)[1].reshape(-1)[runs]
    return out


def label_masks(
    labels: np.ndarray | Tensor, *, ignore_index: int = 255, connected: bool = False, min_area: int = 1
) -> tuple[Tensor, Tensor]:
    """The binary masks of a label map, and the class of each.

    Args:
        labels: integer [H, W].
        ignore_index: pixels of no mask.
        connected: one mask a connected region instead of one a class.
        min_area: smaller masks are left out, in pixels.
    Returns:
        bool [Nq, H, W] and int64 [Nq], in the order of the classes, then of reading; Nq = 0 where all is ignored.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers [H, W], got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"labels: expected [H, W] with pixels in it, got {list(array.shape)}")
    array = array.astype(np.int64)
    parts = connected_components(array) if connected else array
    values, first, areas = np.unique(parts, return_index=True, return_counts=True)
    classes = array.ravel()[first]
    keep = (classes != ignore_index) & (areas >= min_area)
    order = np.argsort(classes[keep], kind="stable")
    values, classes = values[keep][order], classes[keep][order]
    masks = np.empty((len(values), *array.shape), dtype=bool)
    for mask, value in zip(masks, values):
        np.equal(parts, value, out=mask)
    return torch.from_numpy(masks), torch.from_numpy(classes)
