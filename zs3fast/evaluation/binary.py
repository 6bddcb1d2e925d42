"""Counting for (image, class) pairs: a binary mask of the asked class against its pixels (PASCAL-5i, COCO-20i)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zs3fast.evaluation.confusion import (
    Confusion,
    Labels,
    as_labels,
    check_counter,
    check_pair,
)
from zs3fast.evaluation.ratios import json_number, mean, percent
from zs3fast.utils.distributed import sum_over_processes


@dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of binary masks over a test set, in percent; nan where nothing was asked.

    miou:   mean over the classes asked for of their IoU over the whole set (not a mean over images).
    fb_iou: (foreground IoU + background IoU) / 2, classes pooled before the division.
    iou:    float64 [C].
    """

    miou: float
    fb_iou: float
    iou: np.ndarray

    def headline(self) -> dict[str, float]:
        return {"mIoU": self.miou, "FB-IoU": self.fb_iou}

    def to_dict(self) -> dict[str, Any]:
        """The single numbers, for JSON; nan becomes None."""
        return {"miou": json_number(self.miou), "fb_iou": json_number(self.fb_iou)}


class BinaryCounts:
    """TP, FP, FN and TN of every asked class over a test set.

    IoU_c = TP_c / (TP_c + FP_c + FN_c).  mIoU = mean_c IoU_c.
    IoU_F = sum_c TP_c / sum_c (TP_c + FP_c + FN_c),  IoU_B = sum_c TN_c / sum_c (TN_c + FP_c + FN_c).
    FB-IoU = (IoU_F + IoU_B) / 2; not a mean of per-class values.

    Args:
        num_classes: C of the dataset; only the classes asked for have counts.
        ignore_index: truth that is skipped.  device: where the counts live.

    Attributes:
        table: int64 [C, 4], columns TP, FP, FN, TN.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: str | torch.device = "cpu"):
        check_counter(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.table = torch.zeros(num_classes, 4, dtype=torch.int64, device=device)

    @classmethod
    def from_confusion(cls, confusion: Confusion) -> BinaryCounts:
        """Every class against the rest: each pixel of the set is asked about each class."""
        table, counts = confusion.table, cls(confusion.num_classes, confusion.ignore_index, confusion.table.device)
        hit, truth, predicted = confusion.counts.diagonal(), table.sum(1), confusion.counts.sum(0)
        counts.table = torch.stack([hit, predicted - hit, truth - hit, table.sum() - truth - predicted + hit], dim=1)
        return counts

    def update(self, prediction: Labels, target: Labels, class_index: int, times: int = 1) -> Tensor:
        """Add one pair.

        Args:
            prediction: bool [H, W], where the class is said to be.
            target: integers [H, W], labels of all classes or `ignore_index`.
            class_index: the class asked for.
            times: how often the pair stands in the list of test pairs.
        Returns:
            int64 [4]: TP, FP, FN, TN of the pair, once.
        """
        device = self.table.device
        if isinstance(prediction, np.ndarray):
            prediction = torch.tensor(prediction)
        if not isinstance(prediction, Tensor) or prediction.dtype != torch.bool:
            raise TypeError(f"prediction: expected a bool mask, got {getattr(prediction, 'dtype', type(prediction))}")
        if not 0 <= class_index < self.num_classes:
            raise ValueError(f"class_index: expected 0..{self.num_classes - 1}, got {class_index}")
        prediction, target = prediction.to(device), as_labels("target", target, device)
        check_pair(prediction, target, self.num_classes, self.ignore_index)
        truth, valid = target == class_index, target != self.ignore_index
        parts = (prediction & truth, prediction & ~truth & valid, ~prediction & truth, ~prediction & ~truth & valid)
        added = torch.stack([part.sum() for part in parts])
        self.table[class_index] += times * added
        return added

    def all_reduce(self) -> BinaryCounts:
        """Sum the counts of all processes into each (once)."""
        sum_over_processes(self.table)
        return self

    def iou(self) -> np.ndarray:
        """float64 [C] in percent; nan for classes never asked for."""
        hit, false, missed, _ = self.table.cpu().numpy().T
        out: np.ndarray = percent(hit, hit + false + missed)
        return out

    def miou(self) -> float:
        """Mean IoU in percent over the classes asked for."""
        return mean(self.iou())

    def fb_iou(self) -> float:
        """Mean of foreground and background IoU in percent, each pooled over all classes first."""
        hit, false, missed, rest = self.table.sum(0).tolist()
        wrong = false + missed
        return float(np.mean([percent(hit, hit + wrong), percent(rest, rest + wrong)]))

    def scores(self) -> PairScores:
        return PairScores(miou=self.miou(), fb_iou=self.fb_iou(), iou=self.iou())
