"""The page's answers: kept images, limits, what is shown, what travels to the browser."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zs3fast.app import models as offering
from zs3fast.app.desk import KEPT, Desk, as_shown
from zs3fast.app.models import Models, offered
from zs3fast.app.scenes import example_scenes
from zs3fast.app.view import LARGEST, STEPS, view
from zs3fast.inference.limits import Limits
from zs3fast.inference.segmenter import Segmenter
from zs3fast.types import Segmentation
from zs3fast.utils.rendering import palette

TINY = "zs3fast-tiny-zegclip"


def picture(seed: int, height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(offered(), Limits(max_bytes=100_000, max_pixels=10_000, max_classes=50, max_name=30))


def test_it_says_what_the_segmenter_says(desk: Desk) -> None:
    for background in (False, True):
        got = desk.segment(picture(1), ["red sand", "star"], background, TINY)
        expected = Segmenter.from_pretrained(TINY)(
            picture(1), "red sand, star", background="auto" if background else ""
        )
        assert (got.labels == expected.labels).all()
        np.testing.assert_allclose(got.scores, expected.scores, atol=1e-6)


def test_refinement_is_the_segmenters(desk: Desk) -> None:
    words = "red sand, star"
    plain = desk.segment(picture(1), words, False, TINY, "none")
    refined = desk.segment(picture(1), words, False, TINY, "PAMR")
    expected = Segmenter.from_pretrained(TINY, refine=True)(picture(1), words)
    np.testing.assert_allclose(refined.scores, expected.scores, atol=1e-6)
    assert (refined.scores != plain.scores).any()
    assert desk.models.get(TINY, 0).model is desk.models.get(TINY, 10).model  # weights are there once
    with pytest.raises(ValueError, match="refinement: expected one of as published, none, PAMR, got 'pamr'"):
        desk.segment(picture(1), words, False, TINY, "pamr")


def test_words_cost_no_encoder_and_images_are_let_go(desk: Desk) -> None:
    desk.segment(picture(2), "star", False, TINY)
    before = desk.encoded
    for words in ("star, ring", "red bricks", "star"):
        desk.segment(picture(2), words, True, TINY)
    assert desk.encoded == before
    for seed in range(10, 10 + KEPT):
        desk.segment(picture(seed), "star", False, TINY)
    assert desk.encoded == before + KEPT and len(desk._images) == KEPT
    desk.segment(picture(2), "star", False, TINY)
    assert desk.encoded == before + KEPT + 1


@pytest.mark.parametrize(
    ("image", "words", "model", "said"),
    [
        (b"no image", "star", TINY, "image: the data is not an image"),
        (b"", "star", TINY, "image: expected the bytes of an image file, got none"),
        (picture(1)[:200], "star", TINY, "image: "),
        (bytes(200_000), "star", TINY, "image: expected at most 0.0954 MiB, got 0.191 MiB"),
        (picture(1, 104, 104), "star", TINY, "image: expected at most 10,000 pixels, got 104 x 104 = 10,816"),
        (picture(1), [f"n{i}" for i in range(10_000)], TINY, "classes: expected at most 50 names, got 10,000"),
        (picture(1), ",".join(f"n{i}" for i in range(10_000)), TINY, "classes: expected at most 50 names, got 10,000"),
        (picture(1), [",".join(f"n{i}" for i in range(60))], TINY, "classes: expected at most 50 names, got 60 with"),
        (picture(1), "star, , ring", TINY, "classes: expected names with commas between them, got an empty name"),
        (picture(1), [], TINY, "classes: expected at least one class"),
        (picture(1), "", TINY, "classes: expected names with commas between them, got no class"),
        (picture(1), "x" * 31, TINY, "classes: expected names of at most 30 characters, got one of 31"),
        (picture(1), "star, Star", TINY, "classes: 'Star' is given twice"),
        (picture(1), ["star", 3], TINY, "classes: expected text, or a list of texts, got list"),
        (picture(1), None, TINY, "classes: expected text, or a list of texts, got NoneType"),
        (picture(1), "star", "zs3fast-tiny-zegclap", "model: expected one of"),
        (picture(1), "star", ["zs3fast-tiny"], "model: expected a name, got list"),
    ],
)
def test_what_is_no_good_is_a_line(desk: Desk, image: bytes, words: object, model: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        desk.segment(image, words, False, model)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_decoders_that_start_programs_are_not_asked() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="image: expected AVIF, .*, got EPS"):
        Limits().image(eps)


def test_a_large_claim_is_refused_before_a_pixel_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"got 9000 x 9000 = 81,000,000"):
        Limits().image(buffer.getvalue())
    with pytest.raises(ValueError, match="max_pixels: expected at least 1, got 0"):
        Limits(max_pixels=0)


def test_models_are_loaded_when_asked_for_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(offering, "KEPT", 2)
    segmenter = Segmenter.from_pretrained(TINY)

    def loader(name: str) -> offering.Loader:
        def load() -> Segmenter:
            loaded.append(name)
            return segmenter

        return load

    models = Models({name: loader(name) for name in "abc"})
    assert models.names == ["a", "b", "c"] and loaded == []
    for name in "abacab":
        models.get(name)
    assert loaded == ["a", "b", "c", "b"]


def test_what_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path))
    names = offered().names
    assert names[0] == "zs3fast-tiny-clip_rc" and "zs3fast-tiny-maft" not in names  # which needs proposals
    assert "scclip (ViT-B-16, openai)" in names
    assert offered([TINY]).names[0] == TINY
    assert offered(clip="RN50", pretrained="x.pt").names[0] == "scclip (RN50, x.pt)"
    with pytest.raises(FileNotFoundError, match="no-such"):
        offered(["no-such"])


def test_examples_are_scenes_the_small_models_know(tmp_path: Path) -> None:
    desk = Desk(offered())
    for path, names in example_scenes(tmp_path):
        labels = desk.segment(path.read_bytes(), names, False, "zs3fast-tiny-clip_rc").labels
        assert len(names) >= 2 and len(np.unique(labels)) == len(names)


def result(height: int = 30, width: int = 40, names: tuple[str, ...] = ("cat", "<b>dog</b>")) -> Segmentation:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, len(names), (height, width)).astype(np.int32)
    scores = rng.random((height, width), np.float32)
    return Segmentation(labels, names, scores, rng.integers(0, 256, (height, width, 3), np.uint8))


def test_what_is_not_shown_is_unlabelled() -> None:
    whole = result()
    shown = as_shown(whole, 0.5, ["cat", "no such"])
    expected = (whole.labels == 1) & (whole.scores >= 0.5)
    assert ((shown.labels >= 0) == expected).all() and (shown.labels[expected] == 1).all()
    assert (as_shown(whole, 0, []).labels == whole.labels).all()


def unpacked(content: dict, model: int = 0) -> tuple[np.ndarray, np.ndarray]:
    size = content["height"], content["width"]
    data = gzip.decompress(base64.b64decode(content["models"][model]["map"]))
    pixels = size[0] * size[1]
    labels = np.frombuffer(data, "<u2", pixels).reshape(size)
    return labels, np.frombuffer(data, np.uint8, offset=2 * pixels).reshape(size)


def test_what_travels_is_the_result() -> None:
    whole = result()
    text = view([("one", whole), ("<two>", whole)])
    assert "<" not in text  # whatever reads it, no name is a tag
    content = json.loads(text)
    labels, steps = unpacked(content, 1)
    assert (labels.astype(np.int32) == np.where(whole.labels < 0, 65535, whole.labels)).all()
    for threshold in (0.01, 0.29, 0.57, 0.58, 0.99):  # of two decimals: the page cuts where Python does
        assert ((steps < round(threshold * STEPS)) == (whole.scores.astype(np.float64) < threshold)).all()
    assert content["names"] == ["cat", "<b>dog</b>"] and [m["title"] for m in content["models"]] == ["one", "<two>"]
    assert content["colours"] == ["#" + bytes(colour).hex() for colour in palette(2)]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(content["image"].partition(",")[2]))))
    assert (image == whole.image).all()
    assert content["models"][0]["shares"][1] == pytest.approx(100 * (whole.labels == 1).mean(), abs=0.01)


def test_large_images_travel_smaller() -> None:
    whole = result(1500, 3000)
    content = json.loads(view([("one", whole)]))
    assert (content["height"], content["width"]) == (LARGEST // 2, LARGEST)
    labels, _ = unpacked(content)
    assert labels[0, 0] == whole.labels[0, 0] % 65536 and labels.shape == (640, 1280)
    assert content["image"].startswith("data:image/jpeg") and len(json.dumps(content)) < 6e6
