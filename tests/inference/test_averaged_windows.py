"""Protocols of training-free methods: sizes, windows, names, and images of any shape through the Segmenter."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.inference.test_segmenter import photo
from tests.tiny import tiny_inputs, tiny_model
from tests.tiny_clip import text_state, tiny_clip
from zs3fast.inference.averaged_windows import AveragedWindows
from zs3fast.inference.predictors import Request, predictor_for
from zs3fast.inference.segmenter import Segmenter
from zs3fast.inference.window_protocols import PROTOCOLS, WindowProtocol, window_protocol
from zs3fast.text import IMAGENET, TextEncoder

SMALL = WindowProtocol(short_side=96, window=64, stride=32)


def named(count: int) -> list[tuple[str, ...]]:
    return [(f"class {i}",) for i in range(count)]


def test_presets_are_the_published_settings() -> None:
    base = {name: window_protocol(name) for name in PROTOCOLS}
    assert set(base) == {"maskclip", "sclip", "clearclip", "naclip", "rcs", "scclip"}
    for name in ("sclip", "naclip", "rcs", "scclip"):
        one = base[name]
        assert (one.short_side, one.window, one.stride, one.logit_scale) == (336, 224, 112, 40)
        assert window_protocol(name, "cityscapes").short_side == 560
    assert (base["clearclip"].short_side, base["clearclip"].window, base["clearclip"].stride) == (448, 448, 224)
    assert (window_protocol("clearclip", "cityscapes").window, base["clearclip"].pad) == (224, True)
    assert window_protocol("sclip", "coco171").short_side == 448 and window_protocol("naclip", "voc21").window is None
    for name, values in {  # voc21, context60, coco_object
        "sclip": (0.1, 0.1, 0.1),
        "naclip": (0.1, 0.1, 0.1),
        "rcs": (0.1, 0.1, 0.1),
        "scclip": (0.15, 0.15, 0.35),
        "clearclip": (0.5, 0.15, 0.4),
    }.items():
        of = [window_protocol(name, dataset).prob_thd for dataset in ("voc21", "context60", "coco_object", "ade150")]
        assert tuple(of) == (*values, 0)
    assert [window_protocol(n, "voc21").area_thd for n in ("sclip", "scclip", "naclip")] == [0.1, 0.1, None]
    assert [window_protocol("scclip", d).logit_scale for d in ("voc21", "coco_object", "voc20")] == [50, 55, 40]
    assert (base["naclip"].refine, base["rcs"].refine, window_protocol("naclip", refine=0).refine) == (10, 0, 0)
    assert all(one.templates == "imagenet" and one.merge == "max" and not one.antialias for one in base.values())


@pytest.mark.parametrize("method", ["sclip", "clearclip", "naclip", "rcs", "scclip"])
def test_a_named_method_segments_as_published_unless_told(method: str) -> None:
    model = tiny_model(method)
    assert predictor_for(model, 8).protocol == window_protocol(method)
    assert predictor_for(model, 8, protocol=SMALL).protocol == SMALL
    plain = predictor_for(tiny_model("maskclip", attention=method), 8).protocol
    assert (plain.window, plain.antialias, plain.merge) == (64, True, "mean")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 0}, "short_side: expected at least 1, got 0"),
        ({"stride": 300}, "stride: expected 224, the window, at most, got 300"),
        ({"logit_scale": 0.0}, "logit_scale: expected a positive number, got 0.0"),
        ({"prob_thd": 1.5}, "prob_thd: expected a share in 0..1, got 1.5"),
        ({"area_thd": -0.1}, "area_thd: expected a share in 0..1, got -0.1"),
        ({"merge": "sum"}, "merge: expected one of mean, max, got 'sum'"),
        ({"refine": -1}, "refine: expected 0 or more steps, got -1"),
    ],
)
def test_bad_protocols(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_protocol("sclip", **changes)


def test_unknown_or_unwanted_protocols_are_one_line() -> None:
    with pytest.raises(ValueError, match="protocol: expected one of .*, got 'sclp'; did you mean sclip"):
        Segmenter(tiny_model("maskclip"), protocol="sclp")
    with pytest.raises(ValueError, match="protocol: expected None for zegclip"):
        Segmenter(tiny_model("zegclip"), protocol="sclip")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((375, 500), (336, 448)), ((500, 333), (505, 336)), ((100, 3000), (68, 2048)), ((1, 1), (336, 336))],
)
def test_resized_as_opencv_does(size, expected) -> None:
    """Into 2048 x 336: factor min(2048 / long, 336 / short), sides int(x f + 0.5)."""
    predictor = AveragedWindows(tiny_model("maskclip", attention="sclip"), 8, window_protocol("sclip"))
    pixels = photo(*size)
    got = predictor.prepare(pixels).numpy()
    assert got.shape[:2] == expected == predictor.canvas_size(size)
    assert np.array_equal(got, cv2.resize(pixels, expected[::-1], interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("size", [(375, 500), (90, 61), (30, 41)], ids="{0[0]}x{0[1]}".format)
def test_without_a_protocol_resized_as_pillow_does(size: tuple[int, int]) -> None:
    """CLIP's own images were; an exact resize gives other bytes here and there, by one grey level."""
    predictor = AveragedWindows(tiny_model("maskclip"), 8)
    pixels = photo(*size)
    height, width = predictor.canvas_size(size)
    got = predictor.prepare(pixels).numpy()
    assert min(height, width) == 64
    assert np.array_equal(got, Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("method", ["scclip", "sclip", "clearclip"])
@pytest.mark.parametrize("size", [(1, 1), (20, 700), (700, 3), (97, 130)], ids="{0[0]}x{0[1]}".format)
def test_images_of_any_shape(method: str, size: tuple[int, int]) -> None:
    """A strip becomes no thinner than the encoder can look at, SC-CLIP's 31 patches included."""
    model = tiny_model(method, class_names=None)
    protocol = WindowProtocol(short_side=96, window=64 if method != "scclip" else 96, stride=48, max_long=256)
    names = [entry[0] for entry in named(7)]
    segmenter = Segmenter(model, text_embeddings=tiny_inputs()[1], class_names=names, protocol=protocol)
    result = segmenter(photo(*size))
    assert result.labels.shape == size and np.isfinite(result.scores).all() and result.labels.min() >= 0


class Recorded(nn.Module):
    """A model that tells what it was shown."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, images, text):
        self.shapes.append(tuple(images.shape))
        return self.model(images, text)


def run_of(protocol: WindowProtocol, *sizes: tuple[int, int]):
    predictor = AveragedWindows(tiny_model("maskclip", attention="kk"), 4, protocol)
    predictor.run = Recorded(predictor.model)
    text = tiny_inputs()[1]
    with torch.no_grad():
        predictions = predictor([Request(photo(*size), text, named(7), None) for size in sizes])
    return predictor.run.shapes, predictions


def test_windows_of_several_images_share_batches_and_agree_with_one_at_a_time() -> None:
    sizes = [(60, 90), (96, 96), (200, 96)]
    shapes, together = run_of(SMALL, *sizes)
    assert {shape[1:] for shape in shapes} == {(3, 64, 64)} and all(shape[0] == 4 for shape in shapes[:-1])
    for size, prediction in zip(sizes, together, strict=True):
        (alone,) = run_of(SMALL, size)[1]
        assert (alone.labels == prediction.labels).float().mean() > 0.99 and alone.labels.shape == size


def test_the_whole_image_is_one_window() -> None:
    shapes, _ = run_of(WindowProtocol(short_side=96, window=None, stride=48), (96, 150), (96, 150), (150, 96))
    assert shapes == [(2, 3, 96, 150), (1, 3, 150, 96)]


def test_windows_are_padded_to_whole_patches() -> None:
    """Zeros half on each side; what the windows say of them is cut off again."""
    protocol = WindowProtocol(short_side=75, window=75, stride=40, pad=True)
    shapes, (padded,) = run_of(protocol, (75, 75))
    assert shapes == [(1, 3, 80, 80)]
    model, text, pixels = tiny_model("maskclip", attention="kk"), tiny_inputs()[1], photo(75, 75)
    predictor = AveragedWindows(model, 4, protocol)
    canvas = predictor._canvas(Request(pixels, text, named(7), None))
    whole = torch.zeros(1, 3, 80, 80)
    whole[0, :, 2:77, 2:77] = canvas
    with torch.no_grad():
        z = nn.functional.interpolate(model(whole, text).mask_logits, (80, 80), mode="bilinear")[0, :, 2:77, 2:77]
    scores = (z * 0.4).softmax(0)  # the protocol's 40 for the model's 100
    assert torch.equal(padded.labels.long(), scores.argmax(0))
    torch.testing.assert_close(padded.scores, scores.amax(0), atol=1e-5, rtol=1e-4)


def test_names_compete_apart_and_the_best_one_counts() -> None:
    """merge="max": a class of three names is the union of three classes."""
    theirs = tiny_clip()
    model = tiny_model("maskclip", attention="sclip", class_names=None)
    encoder = TextEncoder.from_state_dict(text_state(theirs), cache=False)
    segmenter = Segmenter(model, text_encoder=encoder, protocol=SMALL)
    assert segmenter.templates == IMAGENET
    image = photo(60, 80)
    apart = segmenter(image, ["cat", "dog", "sofa", "sky"])
    together = segmenter(image, [("cat", "sofa"), "dog, sky"])
    assert np.array_equal(together.labels, np.array([0, 1, 0, 1])[apart.labels])
    np.testing.assert_allclose(together.scores, apart.scores, rtol=1e-4)
    assert together.class_names == ("cat", "dog")
    assert len(np.unique(together.labels)) == 2
    twice = segmenter(image, [("cat", "bed"), "dog", "bed"])  # a name of two classes: the first has it
    assert 2 not in twice.labels


def test_areas_and_probabilities_below_thresholds_become_the_first_class() -> None:
    text, pixels = tiny_inputs()[1], photo(96, 128)
    model = tiny_model("maskclip", attention="sclip")

    def run(**changes):
        predictor = AveragedWindows(model, 8, WindowProtocol(short_side=96, window=64, stride=32, **changes))
        with torch.no_grad():
            return predictor([Request(pixels, text, named(7), None)])[0]

    plain = run()
    limit = float(plain.scores.median())
    cut = run(prob_thd=limit)
    assert torch.equal(cut.labels, plain.labels.masked_fill(plain.scores < limit, 0)) and (plain.labels[0] > -1).all()
    areas = plain.labels.long().flatten().bincount(minlength=7)
    share = float(areas[1:].sort().values[-2]) / float(areas[1:].sum())
    kept = run(area_thd=share)  # the second largest is not above its own share
    assert set(kept.labels.unique().tolist()) <= {0, int(areas[1:].argmax()) + 1}
