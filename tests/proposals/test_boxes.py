"""Boxes from masks, from users and from files; the choice of a class's boxes by its word."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from zs3fast.proposals import (
    ALIASES,
    BoxProposer,
    FileBoxProposer,
    box_file,
    boxes_for_class,
    boxes_from_labels,
    boxes_from_masks,
    load_box_proposer,
    make_boxes,
    unknown_words,
)
from zs3fast.proposals.boxes import mask_boxes

SIZE = (60, 80)


def test_boxes_are_tight_and_end_past_the_last_pixel():
    masks = torch.zeros(4, *SIZE, dtype=torch.bool)
    masks[0, 5, 7] = True
    masks[1, 10:20, 30:50] = True
    masks[1, 15, 60] = True
    masks[2] = True
    boxes, filled = mask_boxes(masks)
    assert boxes.tolist() == [[7, 5, 8, 6], [30, 10, 61, 20], [0, 0, 80, 60], [0, 0, 0, 0]]
    assert filled.tolist() == [True, True, True, False]
    got = boxes_from_masks(masks[:3], ["a", "b", "a"])
    assert got.boxes.tolist() == boxes[:3].tolist() and got.scores.tolist() == [1, 1, 1]
    assert (got.names, got.vocabulary, got.image_size) == (("a", "b", "a"), ("a", "b"), SIZE)
    with pytest.raises(ValueError, match=r"masks: mask 3 \('c'\) is empty and has no box"):
        boxes_from_masks(masks, ["a", "b", "a", "c"])


def test_random_boxes_against_nonzero():
    masks = torch.rand(20, 9, 7) < 0.05
    boxes, filled = mask_boxes(masks)
    for mask, box, full in zip(masks, boxes.tolist(), filled.tolist()):
        rows, columns = mask.nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if full else [0, 0, 0, 0]
        assert box == [int(value) for value in expected] and full == bool(mask.any())


def test_boxes_of_a_label_map():
    labels = np.full(SIZE, 255)
    labels[0:10, 0:10] = 1
    labels[0, 0] = 0  # one pixel in the corner
    labels[30:40, 50:70] = 1
    got = boxes_from_labels(labels, ["cat", "dog", "cow"])
    assert got.names == ("cat", "dog", "dog") and got.vocabulary == ("cat", "dog", "cow")
    assert got.boxes.tolist() == [[0, 0, 1, 1], [0, 0, 10, 10], [50, 30, 70, 40]]
    assert boxes_from_labels(labels, ["cat", "dog"], min_area=150).boxes.tolist() == [[50, 30, 70, 40]]
    nothing = boxes_from_labels(np.full(SIZE, 255), ["cat"])
    assert nothing.boxes.shape == (0, 4) and nothing.image_size == SIZE and nothing.vocabulary == ("cat",)
    with pytest.raises(ValueError, match=r"labels: expected 0..0 or 255 \(ignored\), got 1"):
        boxes_from_labels(labels, ["cat"])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([10, 10, 10, 20], "has no area"),
        ([30, 20, 12, 10], "has no area; expected x0 y0 x1 y1 .* perhaps it is x y width height"),
        ([100, 10, 120, 20], "lies outside the image of 80 x 60 pixels"),
        ([-30, 10, -2, 20], "lies outside the image"),
        ([10, 10, 95, 20], "reaches over the edge"),
        ([-4, 10, 30, 20], "reaches over the edge"),
        ([0.1, 0.1, 0.5, 0.9], "lies within one pixel; .* relative"),
        ([10, 10, float("nan"), 20], "is not finite"),
        ([10, 10, float("inf"), 20], "is not finite"),
    ],
)
def test_bad_boxes_are_named(box, message):
    with pytest.raises(ValueError, match=rf"boxes: box 1 \('dog'\) .* {message}"):
        make_boxes([[1, 2, 3, 4], box], ["cat", "dog"], SIZE)


def test_rounding_over_the_edge_is_clipped():
    got = make_boxes([[-0.4, 0, 80.6, 60.2]], ["cat"], SIZE)
    assert got.boxes.tolist() == [[0, 0, 80, 60]]


@pytest.mark.parametrize(
    ("boxes", "names", "options", "message"),
    [
        ([[1, 2, 3]], ["a"], {}, r"boxes: expected \[K, 4\], x0 y0 x1 y1, got \[1, 3\]"),
        ([1, 2, 3, 4], ["a"], {}, r"boxes: expected \[K, 4\], .* got \[4\]"),
        ([[1, 2, 3, 4]], [], {}, "names: expected 1, one a box, got 0"),
        ([[1, 2, 3, 4]], ["a"], {"scores": [1.2]}, r"scores: expected 1 values in \[0, 1\]"),
        ([[1, 2, 3, 4]], ["a"], {"scores": [float("nan")]}, r"scores: expected 1 values in \[0, 1\]"),
        ([[1, 2, 3, 4]], ["a"], {"image_size": (0, 4)}, "image_size: expected .* at least 1"),
    ],
)
def test_bad_tables(boxes, names, options, message):
    with pytest.raises(ValueError, match=message):
        make_boxes(boxes, names, **{"image_size": SIZE, **options})


PAIRS = [  # every pair that the two vocabularies spell differently
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("diningtable", "dining table"),
    ("pottedplant", "potted plant"),
    ("sofa", "couch"),
    ("tvmonitor", "tv"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS + [pair[::-1] for pair in PAIRS] + [("Hot-Dog", "hot dog")])
def test_words_of_one_meaning(one, other):
    found = make_boxes([[0, 0, 9, 9], [1, 1, 8, 8], [2, 2, 7, 7]], [other, "cat", other], SIZE, scores=[0.9, 0.8, 0.7])
    got = boxes_for_class(found, one)
    assert got.names == (other, other) and got.boxes[:, 0].tolist() == [0, 2]
    torch.testing.assert_close(got.scores, torch.tensor([0.9, 0.7]))
    assert boxes_for_class(found, ["zebra", one]).names == (other, other)
    assert boxes_for_class(found, "dog").names == ()
    assert unknown_words([one, "cat", "dog", ("doggy", "pup")], [other, "cat"]) == ["dog", "doggy"]


def test_own_aliases_and_unknown_vocabularies():
    found = make_boxes([[0, 0, 9, 9]], ["person"], SIZE)
    assert boxes_for_class(found, "rider").names == ()
    assert boxes_for_class(found, "rider", aliases=[*ALIASES, ("rider", "person")]).names == ("person",)
    assert unknown_words(["anything"], None) == []
    with pytest.raises(TypeError, match="class_words: expected a sequence of words, got the string 'cat'"):
        unknown_words("cat", ["cat"])


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


SIMPLE = {
    "pictures": [
        {
            "file_name": "street.jpg",
            "width": 80,
            "height": 60,
            "boxes": [{"box": [1, 2, 30, 40], "name": "dog", "score": 0.9}, {"box": [5, 5, 80, 60], "name": "cat"}],
        },
        {"file_name": "a/empty.jpg", "boxes": []},
    ]
}


def test_simple_files(tmp_path):
    path = write(tmp_path / "boxes.json", SIMPLE)
    got = box_file(path, "photos/street.jpg")
    assert got.boxes.tolist() == [[1, 2, 30, 40], [5, 5, 80, 60]] and got.names == ("dog", "cat")
    torch.testing.assert_close(got.scores, torch.tensor([0.9, 1.0]))
    assert got.image_size == SIZE and got.vocabulary == ("dog", "cat")
    proposer = load_box_proposer(f"files:{path}")
    assert isinstance(proposer, BoxProposer) and proposer.file_names == ("street.jpg", "a/empty.jpg")
    assert proposer(np.zeros((7, 9, 3), np.uint8), "empty.jpg").image_size == (7, 9)
    one = write(tmp_path / "one.json", {"vocabulary": ["dog", "cow"], "pictures": SIMPLE["pictures"][1:]})
    assert box_file(one, image_size=(7, 9)).vocabulary == ("dog", "cow")


def test_coco_files(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "x.jpg", "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [10, 20, 30.5, 15], "iscrowd": 0},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 80, 60], "iscrowd": 1},
        ],
    }
    got = box_file(write(tmp_path / "coco.json", coco))
    assert got.boxes.tolist() == [[10, 20, 40.5, 35], [0, 0, 80, 60]]
    assert got.names == ("dog", "person") and got.vocabulary == ("person", "dog") and got.image_size == SIZE
    coco["annotations"].append({"image_id": 7, "category_id": 1, "bbox": [10, 20, 0, 15]})
    with pytest.warns(UserWarning, match="coco.json has 1 boxes without area, left out"):
        assert len(box_file(write(tmp_path / "coco.json", coco)).names) == 2
    coco["annotations"] = [{"image_id": 7, "category_id": 1, "bbox": [10, 20, 15]}]
    with pytest.raises(ValueError, match=r"expected bbox x y width height, got \[10, 20, 15\]"):
        box_file(write(tmp_path / "coco.json", coco))


def changed(**change):
    return {"pictures": [{**SIMPLE["pictures"][0], **change}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "boxes.json is not JSON"),
        ([], "neither a list `pictures` nor COCO's `annotations`"),
        ({"pictures": 3}, "neither a list `pictures`"),
        ({"pictures": [{"boxes": []}]}, "an entry lacks or misnames 'file_name'"),
        (changed(boxes=[{"bbox": [1, 2, 3, 4], "name": "dog"}]), "an entry lacks or misnames 'box'"),
        (changed(boxes=[{"box": [1, 2, 3], "name": "dog"}]), r"street.jpg: boxes: expected \[K, 4\]"),
        (changed(boxes=[{"box": [50, 2, 20, 9], "name": "dog"}]), r"street.jpg: boxes: box 0 \('dog'\) .* has no area"),
        (changed(boxes=[{"box": ["a", 2, 20, 9], "name": "dog"}]), "boxes.json, street.jpg: "),
        (changed(boxes=[{"box": [1, 2, 3, 4], "name": "dog", "score": 3}]), "street.jpg: scores: expected 1 values"),
        (changed(height=None), "image_size: .* does not say the size of street.jpg"),
        ({"pictures": [SIMPLE["pictures"][0]] * 2}, "expected each image once, got 'street.jpg' twice"),
        (SIMPLE, "name: expected a file name, as .* is about 2 images"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        box_file(write(tmp_path / "boxes.json", content))


def test_files_of_other_pictures(tmp_path):
    proposer = FileBoxProposer(write(tmp_path / "boxes.json", SIMPLE))
    with pytest.raises(ValueError, match=r"expected \(60, 80\), as .* says of street.jpg, got \(60, 81\)"):
        proposer(np.zeros((60, 81, 3), np.uint8), "street.jpg")
    with pytest.raises(ValueError, match="has 0 images named 'road.jpg'; it has street.jpg"):
        proposer(np.zeros((60, 80, 3), np.uint8), "road.jpg")
    with pytest.raises(FileNotFoundError, match="boxes: no file"):
        box_file(tmp_path / "none.json")


@pytest.mark.parametrize("boxes", ["abc", [["a", 1, 2, 3]], [[None, 1, 2, 3]]])
def test_boxes_that_are_no_numbers(boxes):
    with pytest.raises(ValueError, match=r"boxes: expected numbers \[K, 4\], x0 y0 x1 y1, got"):
        make_boxes(boxes, ["cat"], SIZE)
    with pytest.raises(ValueError, match=r"scores: expected numbers \[K\], got \['high'\]"):
        make_boxes([[1, 2, 3, 4]], ["cat"], SIZE, scores=["high"])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "null",
        '{"pictures": 5}',
        '{"pictures": [5]}',
        '{"pictures": [{"file_name": "a", "width": 1e999, "height": 3, "boxes": []}]}',
        '{"pictures": [{"file_name": "a", "width": NaN, "height": 3, "boxes": []}]}',
        '{"pictures": [{"file_name": "a", "width": "wide", "height": 3, "boxes": []}]}',
        '{"pictures": [{"file_name": "a", "width": 4, "height": 3, "boxes": [{"box": [0, 0, 1e999, 1], "name": ""}]}]}',
        '{"pictures": [{"file_name": "a", "width": 4, "height": 3, "boxes": [{"box": [0, 0, 1], "name": "x"}]}]}',
        '{"pictures": [{"file_name": "a", "width": 4, "height": 3, "boxes": [{"box": 7, "name": "x"}]}]}',
        '{"pictures": [{"file_name": ["a"], "boxes": []}]}',
        '{"images": [{"id": 1, "file_name": "a", "width": 1e999, "height": 3}], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [{"image_id": [1]}], "categories": []}',
    ],
    ids=range(14),
)
def test_json_that_holds_anything_names_the_file(tmp_path, text):
    """1e999 is infinity, whose int() is an OverflowError; deep nesting is a RecursionError."""
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match="boxes.json"):
        box_file(tmp_path / "boxes.json", "a", (3, 4))
