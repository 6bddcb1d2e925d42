"""The scores of the published protocols, from one confusion over a whole test set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zs3fast.evaluation.binary import BinaryCounts
from zs3fast.evaluation.confusion import Confusion
from zs3fast.evaluation.ratios import harmonic_mean, json_number, mean, percent

DENOMINATORS = ("gt_or_pred", "gt")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of label maps in percent, full precision; nan where nothing was counted.

    With I, G, P the pixels of a class that are right, in the truth, in the prediction:

    pacc:   sum I / sum G.
    miou, miou_seen, miou_unseen: means of IoU = I / (G + P - I) over all, the seen, the unseen classes, skipping nan.
    hiou:   2 * miou_seen * miou_unseen / (miou_seen + miou_unseen).
    macc:   mean of I / G over the classes in the truth.
    fwiou:  IoU weighted by G.
    fb_iou: every class against the rest, foreground and background pooled over classes: see `BinaryCounts`. It comes
        out high, since each pixel is background of all classes but one; the published FB-IoU are of test pairs.
    iou, accuracy: float64 [C].
    """

    pacc: float
    miou: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    macc: float
    fwiou: float
    fb_iou: float
    iou: np.ndarray
    accuracy: np.ndarray

    def headline(self) -> dict[str, float]:
        """The single numbers by their published names, most telling first."""
        return {
            "pAcc": self.pacc,
            "mIoU(S)": self.miou_seen,
            "mIoU(U)": self.miou_unseen,
            "hIoU": self.hiou,
            "mIoU": self.miou,
            "mAcc": self.macc,
            "fwIoU": self.fwiou,
            "FB-IoU": self.fb_iou,
        }

    def to_dict(self) -> dict[str, Any]:
        """The single numbers, for JSON; nan becomes None."""
        return {name: json_number(value) for name, value in asdict(self).items() if isinstance(value, float)}


def scores(confusion: Confusion, seen: Iterable[int] | None = None, denominator: str = "gt_or_pred") -> Scores:
    """Scores of a whole test set.

    Args:
        confusion: counts of all its images.
        seen: indices of the seen classes; all others are unseen. None: no such split, so their means are nan.
        denominator: which classes count in a mean of IoU. "gt_or_pred": those in the truth or in the prediction (a
            class that is only predicted has IoU 0). "gt": those in the truth.
    """
    iou = class_iou(confusion.table, denominator)
    accuracy = percent(*(part.cpu().numpy() for part in (confusion.counts.diagonal(), confusion.table.sum(1))))
    truth = confusion.table.sum(1).cpu().numpy()
    present = truth > 0
    groups = [np.array([], int)] * 2 if seen is None else _groups(seen, confusion.num_classes)
    miou_seen, miou_unseen = (mean(iou[group]) for group in groups)
    return Scores(
        pacc=pixel_accuracy(confusion.table),
        miou=mean(iou),
        miou_seen=miou_seen,
        miou_unseen=miou_unseen,
        hiou=harmonic_mean(miou_seen, miou_unseen),
        macc=mean(accuracy),
        fwiou=float((iou[present] * truth[present]).sum() / truth.sum()) if present.any() else float("nan"),
        fb_iou=BinaryCounts.from_confusion(confusion).fb_iou(),
        iou=iou,
        accuracy=accuracy,
    )


def class_iou(table: Tensor, denominator: str = "gt_or_pred") -> np.ndarray:
    """IoU of every class in percent, float64 [C], from counts [C, C + 1]; nan for classes that do not count."""
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator: expected one of {', '.join(DENOMINATORS)}, got {denominator!r}")
    counts = table[:, :-1]
    sums = torch.stack([counts.diagonal(), table.sum(1), counts.sum(0)])  # where the counts are: C x C stays there
    hit, truth, predicted = sums.cpu().numpy()
    union = truth + predicted - hit
    out: np.ndarray = percent(hit, union if denominator == "gt_or_pred" else np.where(truth > 0, union, 0))
    return out


def pixel_accuracy(table: Tensor) -> float:
    """Share of right pixels in percent, from counts [C, C + 1]; nan where nothing is labelled."""
    return float(percent(table.diagonal().sum().item(), table.sum().item()))


def _groups(seen: Iterable[int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the seen and of all other classes."""
    is_seen = np.zeros(num_classes, bool)
    for index in seen:
        if not 0 <= index < num_classes:
            raise ValueError(f"seen: expected indices in 0..{num_classes - 1}, got {index}")
        is_seen[index] = True
    return np.flatnonzero(is_seen), np.flatnonzero(~is_seen)
