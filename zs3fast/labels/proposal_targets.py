"""What mask proposals are compared with in training (MAFT section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def soft_iou(masks: Tensor, targets: Tensor) -> Tensor:
    """Soft IoU [K, Nq] = sum(t p) / (sum t + sum p - sum t p + 1e-7) of masks [Nq, H, W] with targets [K, H, W]."""
    masks, targets = masks.flatten(1).float(), targets.flatten(1).float()
    both = targets @ masks.t()
    return both / (targets.sum(1, keepdim=True) + masks.sum(1) - both + 1e-7)


def class_masks(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """One binary mask a class present: labels [B, H, W] -> masks [B, G, H, W] bool and classes [B, G] int64.

    Values outside 0..num_classes - 1 are no class. Images with fewer classes than G are filled up with class -1.
    """
    present = [image.unique() for image in labels]
    present = [values[(values >= 0) & (values < num_classes)].long() for values in present]
    most = max((len(values) for values in present), default=0)
    classes = torch.full((len(labels), most), -1, dtype=torch.int64, device=labels.device)
    for row, values in zip(classes, present):
        row[: len(values)] = values
    masks = (labels.unsqueeze(1) == classes[:, :, None, None]) & (classes >= 0)[:, :, None, None]
    return masks, classes
