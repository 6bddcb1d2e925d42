"""`zs3fast data check`: what it counts, and the first broken pair it names."""

from __future__ import annotations

import os

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.data.trees import folders, picture, stripes, voc, write_image
from zs3fast.data import open_dataset
from zs3fast.data.check import check_dataset, find_datasets
from zs3fast.data.command import data_check

REAL = os.environ.get("ZS3FAST_DATA")
app = typer.Typer()
app.command()(data_check)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_counts(tmp_path):
    voc(tmp_path, values={"d": (0, 1), "e": (1, 2, 255, 255)})
    seen = []
    report = check_dataset(
        open_dataset("voc20", tmp_path, "val"), progress=lambda done, total: seen.append((done, total))
    )
    assert (report.name, report.split, report.pairs, report.checked, report.broken) == ("voc20", "val", 2, 2, [])
    assert report.images[:3].tolist() == [2, 1, 0] and report.pixels[:3].tolist() == [96 + 48, 48, 0]
    assert report.ignored == 96 + 96 and report.absent[:2] == ["bird", "boat"] and len(report.absent) == 18
    assert seen == [(1, 2), (2, 2)]
    assert check_dataset(open_dataset("voc20", tmp_path, "val"), limit=1).checked == 1
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        check_dataset(open_dataset("voc20", tmp_path, "val"), limit=0)


def test_sixteen_bits(tmp_path):
    masks = {"x": stripes((3, 65535), dtype=np.uint16)}
    place = folders(tmp_path / "pascal_ctx_d2", "images/validation", "annotations_ctx459/validation", masks, ".tif")
    (place / "labels.txt").write_text("\n".join(f"n{i}" for i in range(459)))
    report = check_dataset(open_dataset("pc459", tmp_path, "val"))
    assert report.images.tolist() == [0, 0, 0, 1] + [0] * 455 and report.ignored == 96


def test_sound_data(tmp_path):
    voc(tmp_path)
    output = run(tmp_path)
    assert "voc20 │ train │ 3 │ 10582 │ 3 │ 0" in output and "voc20 │ val │ 2 │ 1449 │ 2 │ 0" in output
    assert "broken" in output and "first pair" not in output and "voc5i" not in output


def test_the_first_broken_pair_is_named(tmp_path):
    place = voc(tmp_path, train=("a", "b"), aug=("c",), values={"c": (0, 99)})
    write_image(place / "JPEGImages/b.jpg", picture(0, (12, 15)))
    output = run(tmp_path, "--dataset", "voc20", "--split", "train", code=1)
    assert "voc20 │ train │ 3 │ 10582 │ 3 │ 2" in output
    assert "broken voc20 train, first pair b: labels: " in output
    assert "SegmentationClass/b.png is 16 x 12 pixels, its image" in output and "(2 broken in all)" in output
    (place / "JPEGImages/a.jpg").unlink()
    output = run(place, "--split", "train", code=1)
    assert "first pair a: image: no file" in output and "JPEGImages/a.jpg (3 broken in all)" in output
    assert "val" not in run(place, "--split", "train", "--limit", 1, code=1).split("│")


def test_one_split_is_enough(tmp_path):
    folders(tmp_path, "images/val2017", "annotations/val2017", {"7": stripes((12, 255))})
    output = run(tmp_path, "--dataset", "coco171")
    assert "note root: " in output and "train" in output and "coco171 │ val │ 1 │ 5000 │ 1 │ 0" in output
    assert "coco20i │ val │ 1" in run(tmp_path, "--dataset", "coco20i", "--split", "val")


def test_images_without_a_mask_are_mentioned(tmp_path):
    place = folders(tmp_path, "images/val2017", "annotations/val2017", {"7": stripes((12, 255))})
    write_image(place / "images/val2017/8.jpg", picture(1))
    for name in ("coco171", "coco20i"):
        output = run(tmp_path, "--dataset", name, "--split", "val")
        assert f"note {name} val: 1 image has no label map, first " in output and "val2017/8.jpg" in output
    write_image(place / "images/val2017/9.jpg", picture(1))
    assert "val: 2 images have no label map" in run(tmp_path, "--dataset", "coco171", "--split", "val")
    shared = folders(tmp_path / "VOC2010", "JPEGImages", "annotations_detectron2/pc59_val", {"x": stripes((0, 58))})
    write_image(shared / "JPEGImages/of_another_split.jpg", picture(2))
    assert "no label map" not in run(shared, "--dataset", "context59", "--split", "val")


def test_what_a_folder_holds(tmp_path):
    folders(tmp_path / "one", "images/val2017", "annotations/val2017", {"7": stripes((12, 255))})
    folders(tmp_path / "two/COCO2014", "train2014", "annotations/train2014", {"8": stripes((0, 80))})
    assert [(d.name, d.split) for d in find_datasets(tmp_path / "one")] == [("coco171", "val"), ("coco_object", "val")]
    assert [(d.name, d.split) for d in find_datasets(tmp_path / "two")] == [("coco20i", "train")]
    assert find_datasets(tmp_path / "two", "train")[0].ids == ["8"]


def test_bad_arguments(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "ROOT: expected ade150, " in run(tmp_path / "empty", code=2)
    assert "no folder" in run(tmp_path / "nowhere", code=2)
    assert "--dataset: expected one of ade150" in run(tmp_path, "--dataset", "voc", code=2)
    assert "--split: expected train or val, got 'test'" in run(tmp_path, "--split", "test", code=2)
    assert "does not hold PASCAL VOC 2012" in run(tmp_path / "empty", "--dataset", "voc20", code=2)
    voc(tmp_path)
    assert "limit: expected at least 1, got 0" in run(tmp_path, "--limit", "0", code=2)


@pytest.mark.skipif(not REAL, reason="ZS3FAST_DATA, the folder with real samples, is not set")
def test_real_samples_are_sound():
    output = run(REAL, "--limit", 40)
    for row in (
        "ade150 │ train │ 6",
        "ade150 │ val │ 9",
        "coco171 │ train │ 13",
        "coco171 │ val │ 8",
        "voc20 │ val │ 240",
    ):
        assert row in output
