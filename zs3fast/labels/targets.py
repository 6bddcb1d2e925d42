"""Dataset label maps -> what the losses are computed against (ZegCLIP section 3.4; TagCLIP journal section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zs3fast import ops
from zs3fast.utils.waiting import check, constant


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Labels [B, H, W] of an integer type, each 0..num_classes - 1 or `ignore_index`; else an error with the place.

    Values are not looked at while a graph is traced; on a GPU they are without waiting for it, see
    `zs3fast.utils.waiting`.
    """
    if labels.dim() != 3:
        raise ValueError(f"labels: expected [B, H, W], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer type, got {labels.dtype}")
    if torch.compiler.is_compiling():
        return
    values = labels.long()  # in a narrow type a bound may wrap round
    bad = (values != ignore_index) & ((values < 0) | (values >= num_classes))

    def error(place: list[int], value: int) -> ValueError:
        expected = f"expected 0..{num_classes - 1} or {ignore_index} (ignore)"
        return ValueError(f"labels: value {value} at [b, y, x] = {place}, {expected}")

    check(bad, labels, error)


def _mapped(labels: Tensor, values: dict[int, int], size: int, fill: int) -> Tensor:
    """`values[label]`, or `fill` for one that is not there; keys lie in 0..size - 1, labels anywhere."""
    table = [fill] * (size + 2)  # one more at both ends, for what lies outside
    for label, value in values.items():
        table[label + 1] = value
    return constant(table, labels.device)[labels.long().clamp(-1, size) + 1]


def present_classes(labels: Tensor, count: int) -> Tensor:
    """Bool [B, count]: which of the labels 0..count - 1 an image [B, ...] has; other values are nobody's."""
    held = labels.flatten(1).long().clamp(-1, count) + 1
    present = held.new_zeros(len(held), count + 2, dtype=torch.bool).scatter_(1, held, True)
    return present[:, 1:-1]


def inductive_labels(labels: Tensor, seen: Sequence[int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Seen classes become 0..S-1 in the order of `seen`; unseen pixels become `ignore_index`."""
    return _mapped(labels, {c: i for i, c in enumerate(seen)}, num_classes, ignore_index)


def unseen_pixels(labels: Tensor, seen: Sequence[int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Bool [B, H, W]: where the unmapped label is a class outside `seen`; ignored pixels are not."""
    return _mapped(labels, dict.fromkeys(seen, 0), num_classes, 1).bool() & (labels != ignore_index)


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
    index = constant(unseen, labels.device)
    best = ops.masks_to_labels(mask_logits[:, index], tuple(labels.shape[-2:]))
    return torch.where(unseen_pixels(labels, seen, num_classes, ignore_index), index[best], labels.long())
