"""Soft IoU and class masks against loops."""

from __future__ import annotations

import torch

from zs3fast.labels.proposal_targets import class_masks, soft_iou


def test_soft_iou_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    masks, targets = torch.rand(4, 6, 5, generator=generator), torch.rand(3, 6, 5, generator=generator) > 0.6
    got = soft_iou(masks, targets)
    for k in range(3):
        for n in range(4):
            both = sum(float(p) for p, t in zip(masks[n].flatten(), targets[k].flatten()) if t)
            union = float(masks[n].sum()) + int(targets[k].sum()) - both
            assert abs(got[k, n].item() - both / (union + 1e-7)) < 1e-5
    assert torch.equal(soft_iou(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)), torch.zeros(1, 2))


def test_one_mask_a_class_and_padding() -> None:
    labels = torch.tensor([[[0, 0, 255], [3, 3, 7]], [[255, 255, 255], [2, 255, 255]]])
    masks, classes = class_masks(labels, 5)  # 7 is no class
    assert classes.tolist() == [[0, 3], [2, -1]]
    assert torch.equal(masks[0, 0], labels[0] == 0) and torch.equal(masks[0, 1], labels[0] == 3)
    assert torch.equal(masks[1, 0], labels[1] == 2) and not masks[1, 1].any()
    masks, classes = class_masks(torch.full((2, 4, 4), 255), 5)
    assert masks.shape == (2, 0, 4, 4) and classes.shape == (2, 0)
