"""Refinement of every method's maps: what labels are then, and the doors to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.inference.test_predictors import Boxes, Regions, segmenter
from tests.inference.test_segmenter import photo, text_rows
from tests.tiny import tiny_model
from zs3fast.cli import app
from zs3fast.evaluation.pairs import PairSegmenter, ZoomingPairSegmenter
from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.predictors import Request, normalise, squash
from zs3fast.inference.segmenter import Segmenter
from zs3fast.labels import refinement
from zs3fast.ops.refine_maps import reference
from zs3fast.proposals import resize_for_proposer

METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "zegclip": ("zegclip", {}),
    "tagclip": ("tagclip", {}),
    "clip_rc": ("clip_rc", {}),
    "clsclip": ("clsclip", {}),
    "clsclip+": ("clsclip", {"boxes": Boxes()}),
    "maft": ("maft", {"proposer": Regions()}),
    "maft-crops": ("maft", {"proposer": Regions(), "crops": "mask_crop"}),
    "maskclip": ("maskclip", {}),
}
SIZE = (75, 100)


def guide(seg: Segmenter, image: np.ndarray) -> torch.Tensor:
    """The image that a method's maps are refined beside, [1, 3, h, w]: as its model sees it."""
    model = seg.model
    if model.method == "maft":
        return resize_for_proposer(image).pixels[None]
    if model.method == "clsclip":
        whole = normalise(image, model.pixel_mean, model.pixel_std)
        return (whole if seg.options.boxes else squash(image, model.image_size, model.pixel_mean, model.pixel_std))[
            None
        ]
    return seg._predictor._canvas(Request(image, torch.empty(0), (), None))[None]


def class_maps(seg: Segmenter, image: np.ndarray) -> torch.Tensor:
    """What is refined, [1, C, H, W]."""
    if seg.options.boxes is not None:
        plus, names = seg._predictor.plus, [entry[0] for entry in seg.classes]
        pixels = normalise(image, seg.model.pixel_mean, seg.model.pixel_std)
        return plus.class_scores(
            pixels, seg._texts.embeddings(tuple(seg.classes)), seg.options.boxes(image, None), names
        )[None]
    scores = torch.from_numpy(seg(image, details=True).class_scores())[None]
    return scores.log() if seg.model.method == "maskclip" else scores  # logits, up to a sum that has no class


@pytest.mark.parametrize("tile_pixels", [3000, 1 << 20], ids=["tiles", "whole"])
@pytest.mark.parametrize("name", METHODS)
def test_labels_are_the_best_of_the_refined_maps(monkeypatch, name: str, tile_pixels: int) -> None:
    monkeypatch.setattr(refinement, "TILE_PIXELS", tile_pixels)
    method, options = METHODS[name]
    image = photo(*SIZE)
    plain = segmenter(method, text_rows(5), **options)
    given = {"text_embeddings": text_rows(5), "class_names": plain.classes, "options": plain.options}
    seg = Segmenter(plain.model, **given, refine=2)  # which reaches 32 pixels
    expected = reference(guide(plain, image), class_maps(plain, image), steps=2)[0]
    result = seg(image, min_score=-1.0) if method == "clsclip" else seg(image)
    best = expected.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-4).numpy()
    assert clear.mean() > 0.8 and np.array_equal(result.labels[clear], expected.argmax(0).numpy()[clear])
    scores = expected.softmax(0) if name == "maskclip" else expected
    np.testing.assert_allclose(result.scores, scores.amax(0).numpy(), atol=2e-4)
    unrefined = plain(image, min_score=-1.0) if method == "clsclip" else plain(image)
    assert np.abs(unrefined.scores - result.scores).max() > 1e-3
    none = Segmenter(plain.model, **given, refine=0)
    again = none(image, min_score=-1.0) if method == "clsclip" else none(image)
    assert np.array_equal(again.scores, unrefined.scores)
    if name != "clsclip+":
        details = seg(image, details=True)
        assert (details.class_scores().argmax(0) == result.labels)[clear].all()
        assert np.array_equal(
            seg(seg.encode(image), min_score=-1.0 if method == "clsclip" else None).labels, result.labels
        )


@pytest.mark.parametrize("name", ["zegclip", "clsclip", "maft", "maskclip"])
def test_a_stream_equals_calls(name: str) -> None:
    method, options = METHODS[name]
    seg = segmenter(method, text_rows(5), refine=2, **options)
    images = [photo(70, 100), photo(64, 64, seed=3)]
    for (_, got), expected in zip(seg.stream(images, workers=1), map(seg, images), strict=True):
        assert np.array_equal(got.labels, expected.labels) and np.array_equal(got.scores, expected.scores)


def test_a_protocol_s_refinement_unless_told_otherwise() -> None:
    model, text = tiny_model("naclip", class_names=None), text_rows(3)
    given = {"text_embeddings": text, "class_names": ["a", "b", "c"]}
    for refine, steps in ((None, 10), (0, 0), (1, 1), (3, 3), (True, 10), (False, 0)):
        assert Segmenter(model, **given, refine=refine)._predictor.protocol.refine == steps
    assert Segmenter(model, **given, protocol="scclip")._predictor.protocol.refine == 0
    assert Segmenter(tiny_model("maskclip", class_names=None), **given)._predictor.protocol.refine == 0


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError("refine: expected 0 or more steps, got -1")), ("x", TypeError("refine: expected a number of"))],
)
def test_bad_steps(value: Any, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        SegmenterOptions(refine=value)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zs3fast.data.world import WorldDataset

    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(WorldDataset("test")[0].image).save(path)
    return path


NAMES = ["--classes", "red ring, blue star, sand, water"]


def labels_of(*command: str) -> np.ndarray:
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 0, result.output
    folder = Path(command[command.index("--output") + 1])
    return np.array(Image.open(next(folder.glob("*_labels.png"))))


@pytest.mark.parametrize("method", ["zegclip", "maskclip"])
def test_segment_refines_with_and_without_a_number(scene: Path, tmp_path: Path, method: str) -> None:
    command = ["segment", str(scene), *NAMES, "--weights", f"zs3fast-tiny-{method}"]
    plain = labels_of(*command, "--output", str(tmp_path / "plain"))
    ten = labels_of(*command, "--output", str(tmp_path / "ten"), "--refine", "10")
    assert np.array_equal(labels_of("segment", "--refine", *command[1:], "--output", str(tmp_path / "bare")), ten)
    assert np.array_equal(labels_of(*command, "--output", str(tmp_path / "none"), "--refine", "0"), plain)
    three = labels_of(*command, "--refine=3", "--output", str(tmp_path / "three"))
    assert 0 < (three != plain).mean() < 0.5 and (ten != three).any()


def test_protocols_are_for_methods_without_training(scene: Path, tmp_path: Path) -> None:
    command = ["segment", str(scene), *NAMES, "--output", str(tmp_path), "--weights"]
    small = labels_of(*command, "zs3fast-tiny-maskclip")
    other = labels_of(*command, "zs3fast-tiny-maskclip", "--protocol", "clearclip")
    assert (small != other).any()
    for weights, protocol, message in (
        (
            "zs3fast-tiny-zegclip",
            "sclip",
            "--protocol: expected None for zegclip, which is trained and has its own, got 'sclip'",
        ),
        ("zs3fast-tiny-maskclip", "slip", "--protocol: expected one of clearclip, "),
    ):
        result = CliRunner().invoke(app, [*command, weights, "--protocol", protocol])
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*command, "zs3fast-tiny-maskclip", "--refine", "-2"])
    assert result.exit_code == 2 and "--refine" in result.output


@pytest.mark.parametrize("method", ["tagclip", "maskclip"])
def test_eval_refines_every_method(tmp_path: Path, method: str) -> None:
    scores = {}
    for refine in ("0", "10"):
        command = [
            "eval",
            "--weights",
            f"zs3fast-tiny-{method}",
            "--dataset",
            "world",
            "--split",
            "test",
            "--limit",
            "2",
        ]
        command += ["--refine", refine, "--worst", "0", "--output", str(tmp_path / refine)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / refine / "report.json").read_text())
        assert report["settings"]["refine"] == int(refine)
        scores[refine] = report["scores"]
    assert scores["0"] != scores["10"]


@pytest.mark.parametrize("zooming", [False, True])
def test_masks_of_pairs_are_refined_scores_over_the_threshold(zooming: bool) -> None:
    model, image, text = tiny_model("clsclip", num_classes=5, seen=[0, 1]), photo(60, 90), text_rows(5)
    names = ["cat", "dog", "sofa", "sky", "grass"]
    plain, refined = (
        ZoomingPairSegmenter(model, text, names, Boxes(), refine=refine)
        if zooming
        else PairSegmenter(model, text, refine=refine)
        for refine in (0, 2)
    )
    pixels = normalise(image, model.pixel_mean, model.pixel_std)
    if zooming:
        scores = plain.plus.class_scores(pixels, text[[1, 3]], Boxes()(image), [names[1], names[3]])
    else:
        pixels = squash(image, model.image_size, model.pixel_mean, model.pixel_std)
        scores = model.class_scores(model(pixels[None], text[[1, 3]]), (60, 90))[0].detach()
    threshold = float(scores.median())
    plain.threshold = refined.threshold = threshold
    expected = reference(pixels[None], scores[None], steps=2)[0]
    clear = (expected - threshold).abs() > 1e-5
    got = refined(image, [1, 3])
    assert torch.equal(got[clear], (expected > threshold)[clear]) and (got != plain(image, [1, 3])).any()
