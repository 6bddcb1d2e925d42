"""Label files, colours, the overlay and the summary of a result."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.full_disk import files_up_to
from zs3fast.types import Segmentation
from zs3fast.utils import rendering
from zs3fast.utils.files import replacing


def result(labels, count, **fields):
    labels = np.asarray(labels, np.int32)
    names = tuple(f"class {i}" for i in range(count))
    scores = np.full(labels.shape, 0.5, np.float32)
    return Segmentation(labels, names, scores, np.full((*labels.shape, 3), 99, np.uint8), **fields)


@pytest.mark.parametrize("count", [1, 20, 171, 255])
def test_palette_png(tmp_path, count):
    labels = np.array([[0, count - 1, -1], [count // 2, 0, -1]])
    result(labels, count).save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "P" and image.size == (3, 2)
        assert np.array_equal(np.asarray(image), np.where(labels < 0, 255, labels))
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown[0, 1], rendering.palette(count)[count - 1])
    assert (shown[0, 2] == 255).all(), "unlabelled is white"


@pytest.mark.parametrize("count", [256, 847])
def test_sixteen_bit_png(tmp_path, count):
    labels = np.array([[0, count - 1, -1], [255, 65, -1]])
    result(labels, count).save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode.startswith("I;16")
        assert np.array_equal(np.asarray(image), np.where(labels < 0, 65535, labels))


def test_only_png(tmp_path):
    with pytest.raises(ValueError, match="path: expected a .png file for a label map, got .*out.jpg"):
        result([[0]], 1).save(tmp_path / "out.jpg")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.png"
    result([[0]], 1).save(path)
    before = path.read_bytes()

    with files_up_to(50), pytest.raises(OSError, match="File too large: '.*/out.png'"):
        result([[1, 1]], 2).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_replacing_makes_folders_and_ordinary_files(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
    (tmp_path / "plain").write_text("")
    assert path.read_text() == "new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_colours_are_distinct_and_stay_with_their_class():
    colours = rendering.palette(171)
    assert len({tuple(colour) for colour in colours.tolist()}) == 171
    assert np.array_equal(rendering.palette(20), colours[:20])
    lab = rendering.cielab(rendering.palette(20).astype(float))
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(20)
    assert apart.min() > 25, "a just noticeable difference is about 2"


def test_overlay_shows_colours_and_lists_what_is_present():
    labels = np.full((240, 320), 2)
    labels[:60] = 0
    labels[:10, :10] = -1
    rows = rendering._rows(labels, ["sky", "cat", "grass"])
    assert [(name, share) for _, name, share in rows] == [
        ("grass", "75.0 %"),
        ("sky", "24.9 %"),
        ("unlabelled", "0.1 %"),
    ]
    picture = np.asarray(result(labels, 3).overlay())
    assert picture.shape[0] == 240 and picture.shape[1] > 320
    assert (picture[5, 5] == 99).all(), "unlabelled pixels show the photo"
    blend = np.rint(0.4 * 99 + 0.6 * rendering.palette(3).astype(float))
    assert np.abs(picture[100, 100] - blend[2]).max() <= 1 and np.abs(picture[30, 100] - blend[0]).max() <= 1
    legend = picture[:, 320:].reshape(-1, 3)
    for index in (0, 2):
        assert (legend == rendering.palette(3)[index]).all(1).sum() >= 100, "a swatch in the pure colour"
    assert not (legend == rendering.palette(3)[1]).all(1).any(), "absent classes are not listed"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (8, 8)])
def test_overlay_of_tiny_pictures_is_readable(size):
    overlay = result(np.zeros(size, int), 1).overlay()
    assert min(overlay.size) >= 14 and max(overlay.size) >= 200
    assert (np.asarray(overlay.convert("L")) < 100).sum() > 50, "letters"


def test_overlay_with_many_and_long_names():
    labels = np.arange(171).reshape(9, 19)
    names = ["a very long name " * 20] + [f"class {i}" for i in range(170)]
    overlay = rendering.overlay(np.zeros((9, 19, 3), np.uint8), labels, names)
    assert overlay.width < 6000 and overlay.height < 2000


def test_summary():
    labels = np.array([[0, 0, -1, 2]])
    res = Segmentation(
        labels.astype(np.int32),
        ("cat", "dog", "sky"),
        np.array([[0.25, 0.75, 0.1, np.nan]], np.float32),
        np.zeros((1, 4, 3), np.uint8),
        nan_pixels=1,
        source="a.jpg",
    )
    summary = json.loads(json.dumps(res.to_dict(), allow_nan=False))
    assert summary["classes"][0] == {"index": 0, "name": "cat", "pixels": 2, "percent": 50.0, "mean_score": 0.5}
    assert summary["classes"][1]["pixels"] == 0 and summary["classes"][1]["mean_score"] is None
    assert summary["classes"][2]["mean_score"] is None
    assert (summary["unlabelled_pixels"], summary["nan_pixels"], summary["source"]) == (1, 1, "a.jpg")
    assert (summary["height"], summary["width"]) == (1, 4)


def test_a_large_photo_is_drawn_in_strips():
    """66 bytes a pixel were needed beside the photo: 2.4 GB for 36 megapixels."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3000, 3000, 3), np.uint8)
    labels = rng.integers(-1, 3, (3000, 3000)).astype(np.int32)
    tracemalloc.start()
    whole = rendering.overlay(image, labels, ["a", "b", "c"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * labels.size
    colours = rendering.palette(3).astype(np.float32)
    expected = image.astype(np.float32)
    expected[labels >= 0] = np.float32(0.4) * expected[labels >= 0] + np.float32(0.6) * colours[labels[labels >= 0]]
    got = np.asarray(whole)[:, :3000]
    assert np.abs(got - expected).max() <= 0.51
    counts, sums = rendering.class_sums(labels, 3, np.full(labels.shape, 0.5, np.float32))
    assert counts.tolist() == [(labels == c).sum() for c in range(3)] and np.allclose(sums, counts / 2)
