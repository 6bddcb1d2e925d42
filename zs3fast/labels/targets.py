"""Dataset label maps -> what the losses are computed against (ZegCLIP section 3.4; TagCLIP journal section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zs3fast import ops


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Labels [B, H, W] of an integer type, each 0..num_classes - 1 or `ignore_index`; else an error with the place.

    Values are not looked at while a graph is traced.
    """
    if labels.dim() != 3:
        raise ValueError(f"labels: expected [B, H, W], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer type, got {labels.dtype}")
    if torch.compiler.is_compiling():
        return
    values = labels.long()  # in a narrow type a bound may wrap round
    bad = (values != ignore_index) & ((values < 0) | (values >= num_classes))
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels: value {labels[tuple(place)].item()} at [b, y, x] = {place}, "
            f"expected 0..{num_classes - 1} or {ignore_index} (ignore)"
        )


def _table(values: dict[int, int], size: int, fill: int, device: torch.device) -> Tensor:
    table = torch.full((size,), fill, dtype=torch.long)
    table[list(values)] = torch.tensor(list(values.values()), dtype=torch.long)
    return table.to(device)


def inductive_labels(labels: Tensor, seen: Sequence[int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Seen classes become 0..S-1 in the order of `seen`; unseen pixels become `ignore_index`."""
    size = max(num_classes, ignore_index + 1)
    table = _table({c: i for i, c in enumerate(seen)}, size, ignore_index, labels.device)
    return table[labels.long()]


def unseen_pixels(labels: Tensor, seen: Sequence[int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Bool [B, H, W]: where the unmapped label is a class outside `seen`; ignored pixels are not."""
    size = max(num_classes, ignore_index + 1)
    seen_or_ignored = dict.fromkeys((*seen, ignore_index), 0)
    return _table(seen_or_ignored, size, 1, labels.device)[labels.long()].bool()


@torch.no_grad()
def pseudo_labels(
    labels: Tensor, mask_logits: Tensor, seen: Sequence[int], num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Self-training labels: every unseen pixel takes the model's best unseen class, all else stays.

    Sigmoid is monotone and seen channels are out of the race, so the choice is an argmax over the unseen channels;
    no full-size score map is made. mask_logits [B, C, h, w] with C = num_classes, the current train-mode output.
    """
    unseen = sorted(set(range(num_classes)) - set(seen))
    if not unseen:
        return labels
    index = torch.tensor(unseen, device=labels.device)
    best = ops.masks_to_labels(mask_logits[:, index], tuple(labels.shape[-2:]))
    return torch.where(unseen_pixels(labels, seen, num_classes, ignore_index), index[best], labels.long())
