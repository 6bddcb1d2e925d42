"""Upper bounds: the labels' own regions, classes and boxes through `zs3fast eval`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.test_command import app, common, place, report, run, tree  # noqa: F401 - fixtures
from tests.tiny import tiny_model
from zs3fast import weights
from zs3fast.data import open_dataset, test_pairs
from zs3fast.evaluation.ground_truth import TrueBoxes, TrueClasses, TrueRegions
from zs3fast.proposals import from_masks
from zs3fast.text import class_names, seen_classes

VOC = class_names("voc20")


class Two:
    """A dataset of two images whose labels are written here."""

    name, split, class_names, ignore_index, background = "two", "val", ["a", "b", "c", "rest"], 255, 3

    def __init__(self) -> None:
        first = np.zeros((4, 6), np.int32)
        first[:, 3:] = 2
        first[0, :2] = 255
        self.maps = [first, np.full((4, 6), 255, np.int32)]

    def __len__(self) -> int:
        return len(self.maps)

    def image_path(self, index: int) -> Path:
        return Path(f"images/{index}.jpg")

    def read_labels(self, index: int) -> np.ndarray:
        return self.maps[index]


def test_classes_are_named_by_their_iou_with_the_labels() -> None:
    """A mask over the left four columns: 10 of its 16 pixels are class 0, which has 10; 4 are class 2, which has 12."""
    masks = np.zeros((2, 4, 6), np.float32)
    masks[0, :, :4], masks[1, :, :3] = 0.9, 0.4  # the second is nowhere above 0.5

    def propose(pictures, names=None):
        return from_masks([masks for _ in pictures], short_side=4, long_side=6, divisor=1)

    data = Two()
    found = TrueClasses(data, propose)([np.zeros((4, 6, 3), np.uint8)], ["images/0.jpg"])
    assert found.class_names is None and found.class_scores.shape == (1, 2, 5)
    expected = torch.tensor([[10 / 16, 0, 4 / 24, 0, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(found.class_scores[0], expected, atol=1e-6, rtol=0)
    for wrong in (["elsewhere/0.jpg"], None):
        with pytest.raises(ValueError, match="names: expected an image of two val"):
            TrueClasses(data, propose)([np.zeros((4, 6, 3), np.uint8)], wrong)


def test_an_image_without_labels_has_one_region() -> None:
    found = TrueRegions(Two())([np.zeros((4, 6, 3), np.uint8)], ["images/1.jpg"])
    assert found.valid.tolist() == [[True]] and bool((found.masks[0, 0] > 0.99).any())


def test_boxes_are_those_of_connected_regions_and_the_rest_has_none() -> None:
    data = Two()
    data.maps[0][3, 5], data.maps[0][0, 0] = 3, 2
    found = TrueBoxes(data)(np.zeros((4, 6, 3), np.uint8), "images/0.jpg")
    assert sorted(zip(found.names, found.boxes.tolist())) == [
        ("a", [0, 0, 3, 4]),
        ("c", [0, 0, 1, 1]),
        ("c", [3, 0, 6, 4]),
    ]


def test_the_upper_bound_of_maft(tree: Path) -> None:  # noqa: F811
    """True regions named by a random CLIP are named wrong; by their IoU, right but at borders, which are resized."""
    weights.save(tiny_model("maft", class_names=VOC, num_classes=20, seen=seen_classes("voc20")), "maft.safetensors")
    options = common(weights="maft.safetensors", worst=0, proposer="ground_truth")
    run(*options, "-o", "plain")
    run(*options, "-o", "bound", "--upper-bound")
    plain, bound = report("plain"), report("bound")
    assert plain["scores"]["pacc"] < 60 and bound["scores"]["pacc"] > 95, (plain["scores"], bound["scores"])
    assert plain["notes"][-1] == "upper bound: the regions are the labels' own"
    assert "upper bound: proposals are named by their IoU with the labels, no CLIP is asked" in bound["notes"]
    assert bound["settings"]["upper_bound"] is True and "upper_bound" not in plain["settings"]
    assert bound["setting"] == "inductive" and bound["scores"]["miou_unseen"] is not None
    for more, message in (
        (["--crops", "mask"], "--upper-bound: goes with a proposer and without crops"),
        (["--weights", "tiny.safetensors"], "proposer: expected none for tagclip"),
    ):
        assert message in run(*options, "--upper-bound", *more, code=2)
    assert "--upper-bound: goes with a proposer" in run(*common(), "--upper-bound", code=2)


def test_true_boxes_and_boxes_as_masks(tree: Path) -> None:  # noqa: F811
    model = tiny_model("clsclip", class_names=VOC, num_classes=20, seen=list(range(15)), nav_layers=[1, 2])
    weights.save(model, "clsclip.safetensors")
    np.save("tokens.npy", np.random.default_rng(0).standard_normal((20, model.embed_dim), np.float32))
    options = common(weights="clsclip.safetensors", dataset="voc5i", worst=0, **{"text-embeddings": "tokens.npy"})
    options += ["--fold", "3", "--boxes", "ground_truth"]
    run(*options, "--boxes-as-masks", "-o", "masks")
    run(*options, "-o", "zoomed")
    found = report("masks")
    assert found["settings"]["method"] == "boxes as masks" and report("zoomed")["settings"]["method"] == "clsclip+"
    note = "upper bound: the regions are the labels' own"
    assert note in found["notes"] and not any("detector" in text for text in found["notes"])
    data = open_dataset("voc5i", tree, "val", fold=3)
    counts = np.zeros((21, 4), np.int64)
    for index, asked in test_pairs(data, data.unseen):
        labels = data[index].labels
        mask = np.zeros(labels.shape, bool)
        boxes = TrueBoxes(data)(data[index].image, str(data.image_path(index)))
        for name, (x0, y0, x1, y1) in zip(boxes.names, boxes.boxes.int().tolist()):
            if name == data.class_names[asked]:
                mask[y0:y1, x0:x1] = True
        assert mask[labels == asked].all(), "a region is in its box"
        valid, truth = labels != 255, labels == asked
        counts[asked] += [
            (p & t & valid).sum() for p, t in ((mask, truth), (mask, ~truth), (~mask, truth), (~mask, ~truth))
        ]
    assert np.array_equal(np.load("masks/counts.npy"), counts) and counts[:, 0].sum() > 0 and counts[:, 2].sum() == 0
    assert not np.array_equal(np.load("zoomed/counts.npy"), counts)
    options[options.index("--boxes") : options.index("--boxes") + 2] = []
    assert "--boxes-as-masks: goes with boxes and without refine" in run(*options, "--boxes-as-masks", code=2)


def test_the_trusty_token_may_cross_over(tree: Path) -> None:  # noqa: F811
    run(*common(setting="cross-dataset", output="dropped", worst=0))
    run(*common(setting="cross-dataset", output="kept", worst=0), "--keep-trusty-token")
    assert "cross-dataset: the trusty token is kept in the class list, unlike published" in report("kept")["notes"]
    assert report("kept")["settings"]["keep_trusty_token"] is True
    assert not np.array_equal(np.load("kept/counts.npy"), np.load("dropped/counts.npy"))
    refused = run(*common(output="no"), "--keep-trusty-token", code=2)
    assert "--keep-trusty-token: expected a TagCLIP with its token, cross-dataset, got tagclip inductive" in refused
