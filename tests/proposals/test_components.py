"""Connected regions and the masks of label maps, against a flood fill."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from zs3fast.proposals import connected_components, from_labels, label_masks


def flood(labels: np.ndarray) -> np.ndarray:
    """Regions by flood fill in reading order, 8 neighbours."""
    out = np.full(labels.shape, -1)
    height, width = labels.shape
    count = 0
    for start in np.ndindex(height, width):
        if out[start] >= 0:
            continue
        stack = [start]
        out[start] = count
        while stack:
            y, x = stack.pop()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    v, u = y + dy, x + dx
                    if 0 <= v < height and 0 <= u < width and out[v, u] < 0 and labels[v, u] == labels[y, x]:
                        out[v, u] = count
                        stack.append((v, u))
        count += 1
    return out


def spiral(side: int) -> np.ndarray:
    """One region that winds inwards: joins that are found last connect what was numbered first."""
    array = np.zeros((side, side), dtype=np.int64)
    y, x, dy, dx, length = 0, 0, 0, 1, side - 1
    array[0, 0] = 1
    while length > 0:
        for _ in range(2):
            for _ in range(length):
                y, x = y + dy, x + dx
                if not (0 <= y < side and 0 <= x < side):
                    return array
                array[y, x] = 1
            dy, dx = dx, -dy
        length -= 2
    return array


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 1), (2, 2), (13, 29), (31, 8)], ids=str)
@pytest.mark.parametrize("values", [1, 2, 4])
def test_components_equal_a_flood_fill(shape, values):
    rng = np.random.default_rng(values)
    for _ in range(5):
        labels = rng.integers(0, values, shape)
        np.testing.assert_array_equal(connected_components(labels), flood(labels))


@pytest.mark.parametrize("labels", [spiral(31), spiral(31).T, np.eye(9, dtype=bool), np.fliplr(np.eye(9, dtype=int))])
def test_windings_and_diagonals(labels):
    np.testing.assert_array_equal(connected_components(labels), flood(labels))
    assert len(np.unique(connected_components(labels)[labels == 1])) == 1


def test_masks_of_classes_and_of_regions():
    labels = np.array([[3, 3, 0, 3], [255, 0, 0, 255], [1, 0, 0, 3]])
    masks, classes = label_masks(labels)
    assert classes.tolist() == [0, 1, 3] and masks.dtype == torch.bool
    assert torch.equal(masks.sum((1, 2)), torch.tensor([5, 1, 4]))
    masks, classes = label_masks(labels, connected=True)
    assert classes.tolist() == [0, 1, 3, 3, 3]
    assert masks[2].nonzero().tolist() == [[0, 0], [0, 1]] and masks[3].nonzero().tolist() == [[0, 3]]
    masks, classes = label_masks(torch.from_numpy(labels), connected=True, min_area=2)
    assert classes.tolist() == [0, 3]
    masks, classes = label_masks(np.full((2, 3), 255))
    assert masks.shape == (0, 2, 3) and classes.shape == (0,)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.zeros((2, 2)), TypeError, "labels: expected integers .* got float64"),
        (np.zeros((2, 2, 1), int), ValueError, r"labels: expected \[H, W\] .* got \[2, 2, 1\]"),
        (np.zeros((0, 2), int), ValueError, r"labels: .* got \[0, 2\]"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        label_masks(labels)


def test_real_labels_are_covered_once():
    root = os.environ.get("ZS3FAST_DATA")
    files = sorted(Path(root).rglob("SegmentationClass*/*.png")) if root else []
    if not files:
        pytest.skip("ZS3FAST_DATA with VOC labels is not set")
    from PIL import Image

    labels = np.asarray(Image.open(files[0])).astype(np.int64)
    for connected in (False, True):
        masks, classes = label_masks(labels, connected=connected)
        assert torch.equal(masks.sum(0), torch.from_numpy((labels != 255).astype(np.int64)))
        rebuilt = (masks.long() * classes[:, None, None]).sum(0)
        assert torch.equal(rebuilt, torch.from_numpy(np.where(labels == 255, 0, labels)))
    proposals = from_labels([labels], connected=True)
    assert proposals.valid.all() and proposals.original_sizes == (labels.shape,)
