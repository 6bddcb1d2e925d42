"""Counting pixels: truth against prediction, from label maps alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zs3fast.utils.distributed import sum_over_processes
from zs3fast.utils.rendering import UNLABELLED

Labels = Tensor | np.ndarray


class Confusion:
    """Pixel counts of a whole test set, kept on one device.

    table[g, p] = pixels with truth g and prediction p; pixels whose truth is `ignore_index` are counted nowhere.
    Predictions of -1 (unlabelled) are in the last column: they miss their class and hit no other.

    Args:
        num_classes: C.
        ignore_index: truth that is skipped; no class index.
        device: where the counts live. Label maps from elsewhere are moved there.

    Attributes:
        table: int64 [C, C + 1], the last column for pixels without a prediction.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: str | torch.device = "cpu"):
        check_counter(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.table = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    @property
    def counts(self) -> Tensor:
        """int64 [C, C], rows are truth, columns are predictions."""
        return self.table[:, : self.num_classes]

    def update(self, prediction: Labels, target: Labels) -> Tensor:
        """Add label maps of any equal shape.

        Args:
            prediction: integers 0..C-1, or -1 for none.
            target: integers 0..C-1, or `ignore_index`.
        Returns:
            int64 [C, C + 1]: what this call added.
        Raises:
            ValueError: other values, or shapes that differ.  TypeError: not integers.
        """
        classes, device = self.num_classes, self.table.device
        prediction, target = as_labels("prediction", prediction, device), as_labels("target", target, device)
        check_pair(prediction, target, classes, self.ignore_index)
        check_range("prediction", prediction, UNLABELLED, classes, None)
        cell = target * (classes + 1) + torch.where(prediction == UNLABELLED, classes, prediction)
        cells = classes * (classes + 1)
        cell = torch.where(target == self.ignore_index, cells, cell)  # one cell too many, for what is skipped
        added = torch.bincount(cell.flatten(), minlength=cells + 1)[:cells].view(classes, classes + 1)
        self.table += added
        return added

    def all_reduce(self) -> Confusion:
        """Sum the counts of all processes into each (once: a second call would count the others again)."""
        sum_over_processes(self.table)
        return self


def check_counter(num_classes: int, ignore_index: int) -> None:
    """The arguments of a counter, or an error."""
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index: expected none of the {num_classes} classes, got {ignore_index}")


def as_labels(name: str, labels: Labels, device: torch.device) -> Tensor:
    """A label map as int64 on `device`; it travels there in its own type."""
    if isinstance(labels, np.ndarray):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array of labels, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer labels, got {labels.dtype}")
    return labels.to(device).long()


def check_pair(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Equal shapes and a target of known labels, or an error."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction: expected the target's shape {list(target.shape)}, got {list(prediction.shape)}")
    check_range("target", target, 0, num_classes, ignore_index)


def check_range(name: str, labels: Tensor, low: int, num_classes: int, besides: int | None) -> None:
    """Labels within low..num_classes - 1, or equal to `besides`; else an error that shows one of the others."""
    bad = (labels < low) | (labels >= num_classes)
    if besides is not None:
        bad &= labels != besides
    if bad.any():
        known = f"{low}..{num_classes - 1}" + ("" if besides is None else f" or {besides} (ignore)")
        raise ValueError(f"{name}: expected labels {known}, got {labels[bad][0].item()}")
