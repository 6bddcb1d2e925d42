"""The Segmenter against the slow composition, and everything a call can be given."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import zs3fast
from tests.tiny_clip import CONFIG, text_state, tiny_clip
from zs3fast import ops, weights
from zs3fast.inference import plan
from zs3fast.inference.predictors import MAX_WINDOWS, prepare
from zs3fast.inference.segmenter import Segmenter
from zs3fast.ops import _extension
from zs3fast.text import MULTI, SINGLE, TextEncoder
from zs3fast.utils.images import read_image
from zs3fast.weights.official import official_keys

DATA = os.environ.get("ZS3FAST_DATA")
NAMES = ["cat", "dog", "sofa", "sky", "grass"]
SEEN = [0, 1, 3]
SIDE = 64


def make_model(method="zegclip", **options):
    torch.manual_seed(0)
    options = {"seen": SEEN, "num_classes": len(NAMES), "class_names": NAMES, **options}
    model = zs3fast.create_model(method, clip=CONFIG, image_size=SIDE, num_prompts=3, decoder_heads=4, **options).eval()
    with torch.no_grad():  # spread the mask logits: scores of a fresh model are all about one half
        model.decoder.layers[-1].multihead_attn.q.weight.mul_(30)
    return model


def text_rows(count, seed=1):
    return F.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)


def photo(height, width, seed=2):
    """Smooth enough to survive resizing, uneven enough to give several classes."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def bilinear_by_hand(image, size):
    """Half-pixel centres, edges repeated, no antialiasing: what OpenCV and the official code do."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = result.shape[axis]
        where = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
        low = np.minimum(np.floor(where).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = np.clip(where - low, 0, 1).reshape([-1 if a == axis else 1 for a in range(3)])
        result = result.take(low, axis) * (1 - part) + result.take(high, axis) * part
    return result


def slow_scores(model, image, text):
    """The published recipe in plain torch: `class_scores` of each window, summed, divided by the cover, resized."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = [int(side * SIDE / short + 0.5) for side in (height, width)]
    pixels = torch.tensor(cv2.resize(image, size[::-1])).permute(2, 0, 1).float() / 255
    canvas = (pixels - torch.tensor(model.pixel_mean)[:, None, None]) / torch.tensor(model.pixel_std)[:, None, None]
    stride = int(426 / 512 * SIDE)
    starts = [
        [min(stride * i, side - SIDE) for i in range(max(side - SIDE + stride - 1, 0) // stride + 1)] for side in size
    ]
    total, cover = torch.zeros(1, len(text), *size), torch.zeros(size)
    with torch.no_grad():
        for y in starts[0]:
            for x in starts[1]:
                out = model(canvas[None, :, y : y + SIDE, x : x + SIDE], text)
                total[:, :, y : y + SIDE, x : x + SIDE] += model.class_scores(out, (SIDE, SIDE))
                cover[y : y + SIDE, x : x + SIDE] += 1
        return F.interpolate(total / cover, (height, width), mode="bilinear", align_corners=False)[0]


def agree(result, scores):
    """Labels are the argmax, but for pixels whose two best scores rounding cannot tell apart."""
    best = scores.topk(min(2, len(scores)), dim=0).values
    clear = (best[0] - best[-1] > 2e-6) if len(scores) > 1 else torch.ones_like(best[0], dtype=torch.bool)
    assert clear.float().mean() > 0.99
    expected = scores.argmax(0).numpy()
    assert (result.labels == expected)[clear.numpy()].all()
    np.testing.assert_allclose(result.scores, best[0].numpy(), atol=2e-6)
    return np.unique(expected)


@pytest.mark.parametrize("method", ["zegclip", "tagclip"])
@pytest.mark.parametrize("size", [(64, 64), (75, 100), (100, 75), (31, 97), (200, 130)], ids="{0[0]}x{0[1]}".format)
def test_equals_the_slow_composition(method, size):
    model, text, image = make_model(method), text_rows(5), photo(*size)
    result = Segmenter(model, text_embeddings=text, window_batch=2)(image)
    assert result.labels.shape == size and result.labels.dtype == np.int32 and result.scores.dtype == np.float32
    assert len(agree(result, slow_scores(model, image, text))) > 1, "an image of one class would prove little"
    assert result.class_names == tuple(NAMES)


def test_seen_offset_and_trusty_map_matter_in_that_comparison():
    """The guard of the test above: without calibration the same image has other labels."""
    model, text, image = make_model("tagclip"), text_rows(5), photo(75, 100)
    calibrated = Segmenter(model, text_embeddings=text)(image).labels
    plain = Segmenter(model, text_embeddings=text)(image, seen=[]).labels
    assert (calibrated != plain).any()


def test_a_uint8_picture_is_resized_as_opencv_does():
    image = photo(75, 100)
    got = prepare(image, 64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert got.shape == (3, 64, 85)  # int(100 * 64 / 75 + 0.5)
    expected = (cv2.resize(image, (85, 64)) / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    by_hand = np.rint(bilinear_by_hand(image, (64, 85)))
    assert np.abs(cv2.resize(image, (85, 64)) - by_hand).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 2)])
def test_tiny_pictures(size):
    result = Segmenter(make_model(), text_embeddings=text_rows(5))(photo(*size))
    assert result.labels.shape == size and result.nan_pixels == 0
    result.overlay()


def test_too_long_a_strip_is_refused():
    with pytest.raises(ValueError, match=f"100000 x 1 pixels are too long a strip.*more than {MAX_WINDOWS} windows"):
        Segmenter(make_model(), text_embeddings=text_rows(5))(np.zeros((1, 100000, 3), np.uint8))


def test_every_kind_of_input_gives_the_same_labels(tmp_path):
    image = photo(50, 70)
    Image.fromarray(image).save(tmp_path / "photo.png")
    seg = Segmenter(make_model(), text_embeddings=text_rows(5))
    expected = seg(image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(image), tensor, tensor / 255):
        assert np.array_equal(seg(given).labels, expected.labels)
    assert seg(tmp_path / "photo.png").source == str(tmp_path / "photo.png") and expected.source is None
    assert np.array_equal(expected.image, image)


def test_order_given_is_kept():
    seg, image = Segmenter(make_model(), text_embeddings=text_rows(5), class_names=NAMES), photo(75, 100)
    forward, backward = seg(image, NAMES), seg(image, NAMES[::-1])
    assert backward.class_names == tuple(NAMES[::-1])
    same = [
        forward.class_names[a] == backward.class_names[b]
        for a, b in zip(forward.labels.flat, backward.labels.flat, strict=True)
    ]
    assert np.mean(same) > 0.999  # exact ties go to the lowest index


def seen_of(seg, classes, **options):
    """The seen indices a call would use."""
    entries = seg._plan.entries(classes)
    return plan.seen_of(seg.model, entries, entries, options.get("seen"))


def test_which_classes_count_as_seen():
    known = Segmenter(make_model(), text_embeddings=text_rows(5))
    assert seen_of(known, None) == SEEN
    assert seen_of(known, ["grass", "Sky", "sofa"]) == [1], "by name, whatever the order and case"
    assert seen_of(known, ["moon", "unicorn"]) == [], "names that training never had"
    assert seen_of(known, ["kitten, cat", "sofa, couch"]) == [0], "any synonym"
    unnamed = Segmenter(make_model(class_names=None), text_embeddings=text_rows(5), class_names=NAMES)
    assert seen_of(unnamed, list("vwxyz")) == SEEN, "as many as the vocabulary: by position"
    assert seen_of(unnamed, ["cat", "dog"]) is None, "nothing is known"
    assert seen_of(known, ["moon", "cat"], seen=["moon"]) == [0]
    assert seen_of(known, ["moon", "cat"], seen=[1, 0, 1]) == [0, 1]
    assert seen_of(known, ["moon", "cat"], seen=[]) == []


@pytest.mark.parametrize(
    ("seen", "error"),
    [(["sun"], ValueError), ([2], ValueError), ([-1], ValueError), ([0.5], ValueError), ("cat", TypeError)],
)
def test_bad_seen(seen, error):
    with pytest.raises(error, match="seen: expected"):
        Segmenter(make_model(), text_embeddings=text_rows(5))(photo(9, 9), ["cat", "dog"], seen=seen)


def test_where_only_one_kind_is_listed_the_trusty_map_is_left_out():
    seg, image = Segmenter(make_model("tagclip"), text_embeddings=text_rows(5)), photo(75, 100)
    everything_unseen, unknown = seg(image, seen=[]), seg(image, seen=[])
    seg.model.trusty_weighting = "off"
    off = seg(image, seen=[])
    np.testing.assert_array_equal(everything_unseen.scores, off.scores)
    np.testing.assert_array_equal(unknown.labels, off.labels)


def test_min_score_and_background():
    seg, image = Segmenter(make_model(), text_embeddings=text_rows(5)), photo(75, 100)
    plain = seg(image)
    limit = float(np.median(plain.scores))
    cut = seg(image, min_score=limit)
    assert np.array_equal(cut.labels, np.where(plain.scores >= limit, plain.labels, -1))
    winner = int(np.bincount(plain.labels.ravel()).argmax())
    rejected = seg(image, background=NAMES[winner].upper())
    assert np.array_equal(rejected.labels, np.where(plain.labels == winner, -1, plain.labels))
    assert rejected.class_names == tuple(NAMES)
    others = [name for i, name in enumerate(NAMES) if i != winner]
    outside = seg(image, others, background=[NAMES[winner]])
    assert outside.class_names == tuple(others), "a background name from outside competes, but is not listed"
    names = np.array([*others, "unlabelled"])
    want = np.where(plain.labels == winner, "unlabelled", np.array(NAMES)[plain.labels])
    assert (names[outside.labels] == want).mean() > 0.999
    with pytest.raises(ValueError, match="min_score: expected a finite number"):
        seg(image, min_score=float("nan"))
    with pytest.raises(ValueError, match="background: 'sky' is given twice"):
        seg(image, background=["sky", "sky"])


def test_nan_pixels_are_counted_and_warned_of():
    model = make_model()
    with torch.no_grad():
        model.decoder.layers[-1].multihead_attn.k.weight.fill_(float("nan"))
    seg = Segmenter(model, text_embeddings=text_rows(5))
    with pytest.warns(UserWarning, match="192 pixels of the image have no score"):
        result = seg(photo(12, 16))
    assert result.nan_pixels == 12 * 16
    with pytest.warns(UserWarning, match="no score"):
        assert (seg(photo(12, 16), min_score=0.1).labels == -1).all()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes: expected at least one class, got none"),
        ("", "classes: .*no class"),
        (["cat", "cat"], "classes: 'cat' is given twice"),
        (["moon"], "classes: no text_embeddings for moon; there are rows for cat, dog"),
    ],
)
def test_bad_class_lists(classes, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(make_model(), text_embeddings=text_rows(5))(photo(9, 9), classes)


def test_bad_constructions():
    with pytest.raises(ValueError, match="class_names: expected the names of the rows of text_embeddings"):
        Segmenter(make_model(class_names=None), text_embeddings=text_rows(5))
    with pytest.raises(ValueError, match=r"text_embeddings: expected \[C, D\] with a row for each of 5.*got \[4, 32\]"):
        Segmenter(make_model(), text_embeddings=text_rows(4))
    with pytest.raises(ValueError, match="templates: expected 'single', 'multi'"):
        Segmenter(make_model(), templates="photo")
    with pytest.raises(ValueError, match="window_batch: expected at least 1, got 0"):
        Segmenter(make_model(), window_batch=0)
    encoder = TextEncoder.from_state_dict(text_state(tiny_clip()), cache=False)
    with pytest.raises(ValueError, match="text_embeddings: expected these or a text_encoder, got both"):
        Segmenter(make_model(), text_encoder=encoder, text_embeddings=text_rows(5))
    with pytest.raises(ValueError, match="classes: expected class names"):
        Segmenter(make_model(class_names=None), text_encoder=encoder)(photo(9, 9))
    loaded = make_model()
    loaded.load_state_dict(make_model().state_dict())
    with pytest.raises(ValueError, match="text_encoder: expected one"):
        Segmenter(loaded)(photo(9, 9), ["cat"])
    with pytest.raises(ValueError, match=r"text_embeddings: expected \[C, 32\]"):
        Segmenter(make_model(), text_embeddings=torch.zeros(5, 31))  # not with every image of a folder


def test_an_untrained_model_segments_and_says_so_once(caplog):
    """Nothing is fetched for a model whose own weights are random: its text tower is random too."""
    seg = Segmenter(make_model())
    with caplog.at_level("WARNING", "zs3fast"):
        first = seg(photo(40, 50), ["cat", "moon"])
        again = seg(photo(40, 50), ["cat", "moon"])
    assert first.labels.shape == (40, 50) and np.array_equal(first.labels, again.labels)
    assert sum("untrained" in record.getMessage() for record in caplog.records) == 1


def test_names_are_encoded_once_a_list():
    encoder = TextEncoder.from_state_dict(text_state(tiny_clip()), cache=False)
    lists = []
    encode = encoder.encode

    def recording(entries, templates, **options):
        lists.append((entries, templates))
        return encode(entries, templates, **options)

    encoder.encode = recording
    seg = Segmenter(make_model(), text_encoder=encoder)
    first = seg(photo(40, 50), ["kitten, cat", "grass"])
    seg(photo(41, 50), "kitten, cat, grass")
    seg(photo(42, 50), "kitten, cat, grass")
    assert lists == [
        ((("kitten", "cat"), ("grass",)), MULTI),
        ((("kitten",), ("cat",), ("grass",)), MULTI),
    ]
    assert first.class_names == ("kitten", "grass")
    text = encode([("kitten", "cat"), "grass"], "multi")
    again = Segmenter(make_model(), text_embeddings=text, class_names=["kitten", "grass"])
    assert np.array_equal(again(photo(40, 50), seen=["kitten"]).labels, first.labels)


def test_templates_follow_the_published_recipes():
    encoder = TextEncoder.from_state_dict(text_state(tiny_clip()), cache=False)
    assert Segmenter(make_model(), text_encoder=encoder).templates == MULTI
    voc = make_model(class_names=None, num_classes=20)
    assert Segmenter(voc, text_encoder=encoder).templates == SINGLE
    assert Segmenter(voc, text_encoder=encoder, templates="the {}").templates == ("the {}",)


def test_another_tokenizer():
    clip = tiny_clip()
    seen = []

    def tokenizer(sentences):
        seen.extend(sentences)
        return torch.tensor([[49406, 320, 49407] + [0] * 74] * len(sentences))

    encoder = TextEncoder.from_state_dict(text_state(clip), cache=False)
    Segmenter(make_model(), tokenizer, text_encoder=encoder, templates="the {}")(photo(9, 9), ["cat", "dog"])
    assert seen == ["the cat", "the dog"]


def test_from_pretrained_with_its_text_tower(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    model, state = make_model(), text_state(tiny_clip(), "text_encoder.")
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    weights.save(model, tmp_path / "cache" / "weights" / "tiny.safetensors", state)
    encoder = TextEncoder.from_state_dict(state, cache=False)
    expected = Segmenter(model, text_encoder=encoder)(photo(40, 50), ["cat", "moon"]).labels
    for name in ("tiny", tmp_path / "cache" / "weights" / "tiny.safetensors"):
        seg = Segmenter.from_pretrained(name)
        assert np.array_equal(seg(photo(40, 50), ["cat", "moon"]).labels, expected)
    assert seg(photo(40, 50)).class_names == tuple(NAMES), "the training vocabulary is the default list"
    given = Segmenter.from_pretrained("tiny", text_embeddings=text_rows(5))
    assert np.array_equal(
        given(photo(40, 50)).labels, Segmenter(model, text_embeddings=text_rows(5))(photo(40, 50)).labels
    )
    with pytest.raises(ValueError, match="official: expected none, as .* carries its own settings, got seen"):
        Segmenter.from_pretrained("tiny", official={"seen": [0]})


def test_from_pretrained_official(tmp_path):
    model = make_model()
    state = {official_keys(model)[key]: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, **text_state(tiny_clip(), "text_encoder.")}}, tmp_path / "official.pth")
    official = {"seen": SEEN, "num_classes": 5, "class_names": NAMES, "heads": 4, "decoder_heads": 4}
    seg = Segmenter.from_pretrained(tmp_path / "official.pth", official=official)
    assert seg.model.seen == SEEN
    encoder = TextEncoder.from_state_dict(text_state(tiny_clip()), cache=False)
    expected = Segmenter(model, text_encoder=encoder)(photo(40, 50)).labels
    assert np.array_equal(seg(photo(40, 50)).labels, expected)


def test_from_pretrained_of_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path))
    message = "no file zegclip, no such name among the weights .*nor in the package .zs3fast-tiny, .*zs3fast convert"
    with pytest.raises(FileNotFoundError, match=message):
        Segmenter.from_pretrained("zegclip")
    weights.save(make_model(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.safetensors: not a readable safetensors file"):
        Segmenter.from_pretrained(tmp_path / "cut.safetensors")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="bare.safetensors: no official checkpoint of a known method"):
        Segmenter.from_pretrained(tmp_path / "bare.safetensors")


def test_the_text_tower_is_looked_for_where_the_model_says(monkeypatch):
    asked = []

    def from_open_clip(clip, pretrained, **options):
        asked.append((clip, pretrained))
        return TextEncoder.from_state_dict(text_state(tiny_clip()), cache=False)

    monkeypatch.setattr(TextEncoder, "from_open_clip", from_open_clip)
    model = make_model()
    model.load_state_dict(model.state_dict())  # no longer the random weights of the constructor
    config = model.config
    for clip, pretrained in (("ViT-B-16", None), ("ViT-B-32", "laion2b_e16")):
        changed = {**config, "clip": clip, "pretrained": pretrained}
        monkeypatch.setattr(type(model), "config", changed)
        Segmenter(model)(photo(9, 9))
    assert asked == [("ViT-B-16", "openai"), ("ViT-B-32", "laion2b_e16")]


def test_nothing_known_is_logged(caplog):
    seg = Segmenter(make_model(class_names=None), text_embeddings=text_rows(5), class_names=NAMES)
    with caplog.at_level(logging.INFO, "zs3fast"):
        seg(photo(9, 9), ["cat", "dog"])
    assert "none of the 2 classes counts as seen" in caplog.text


@pytest.mark.parametrize("method", ["zegclip", "tagclip"])
def test_half_precision(method):
    """The model's type is the constructor's; labels are those of float32 but for close races."""
    full = Segmenter(make_model(method), text_embeddings=text_rows(5))
    half = Segmenter(make_model(method), text_embeddings=text_rows(5), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    image = photo(75, 100)
    got, expected = half(image), full(image)
    assert got.scores.dtype == np.float32 and (got.labels == expected.labels).mean() > 0.9
    np.testing.assert_allclose(got.scores, expected.scores, atol=0.05)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, auto, got torch.int8"):
        Segmenter(make_model(), text_embeddings=text_rows(5), dtype=torch.int8)


SIZES = [(64, 64), (75, 100), (31, 97), (130, 90), (64, 64), (100, 75)]


def save_photos(folder):
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    for index, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        Image.fromarray(photo(*size, seed=index)).save(path)
    return paths


def assert_equal(got, expected):
    for name in ("labels", "scores", "image"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert (got.class_names, got.nan_pixels, got.source) == (
        expected.class_names,
        expected.nan_pixels,
        expected.source,
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_equals_calls_bit_for_bit(tmp_path, workers):
    seg, paths = Segmenter(make_model("tagclip"), text_embeddings=text_rows(5)), save_photos(tmp_path)
    options = {"seen": ["cat"], "min_score": 0.3, "background": "sky"}
    expected = [seg(path, ["cat", "dog", "grass"], **options) for path in paths]
    found = list(seg.stream(paths, ["cat", "dog", "grass"], **options, workers=workers))
    assert [path for path, _ in found] == paths
    for (_, got), one in zip(found, expected, strict=True):
        assert_equal(got, one)
    assert len({result.labels.tobytes() for _, result in found}) > 3, "images of one label would prove little"


@pytest.mark.parametrize("method", ["zegclip", "tagclip"])
def test_pictures_share_the_model_s_batches(method):
    seg = Segmenter(make_model(method), text_embeddings=text_rows(5), window_batch=4)
    images = [photo(*size, seed=index) for index, size in enumerate(SIZES)]
    batches = []
    seg.model.register_forward_hook(lambda model, inputs, out: batches.append(len(inputs[0])))
    expected = [seg(image) for image in images]
    windows = sum(batches)
    assert len(batches) == len(images) < windows
    batches.clear()
    together = list(seg.stream(images, batch_size=len(images), workers=1))
    assert batches == [4] * (windows // 4) + [windows % 4] * bool(windows % 4), "of images of all sizes"
    for (_, got), one in zip(together, expected, strict=True):
        assert (got.labels == one.labels).mean() > 0.999
        np.testing.assert_allclose(got.scores, one.scores, atol=2e-6)


def test_a_stream_goes_on_behind_bad_pictures(tmp_path):
    seg, paths = Segmenter(make_model(), text_embeddings=text_rows(5)), save_photos(tmp_path)[:4]
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[3].unlink()
    failed = []
    found = list(seg.stream(paths, workers=2, failed=lambda path, error: failed.append((path, str(error)))))
    assert [path for path, _ in found] == [paths[0], paths[2]]
    assert [path for path, _ in failed] == [paths[1], paths[3]]
    assert "cannot be read" in failed[0][1] and "no file" in failed[1][1]
    results = seg.stream(paths, workers=2)
    assert next(results)[0] == paths[0]
    with pytest.raises(ValueError, match="1.png cannot be read"):
        next(results)


def test_a_stream_holds_a_few_pictures():
    seg, drawn = Segmenter(make_model(), text_embeddings=text_rows(5)), []

    def camera():
        for index in range(9):
            drawn.append(index)
            yield photo(20, 30, seed=index)

    for count, _ in enumerate(seg.stream(camera(), workers=2, batch_size=2)):
        assert len(drawn) <= count + 1 + 2 + 2
    assert len(drawn) == 9


def test_a_stream_s_mistakes_are_said_at_once():
    seg = Segmenter(make_model(), text_embeddings=text_rows(5))
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected 0 or more threads, got -1"),
        ({"classes": ["moon"]}, "classes: no text_embeddings for moon"),
        ({"min_score": float("inf")}, "min_score: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            seg.stream([], **options)


def test_compiled_labels_are_the_same():
    """One compilation for images of other sizes, with other numbers of windows, and for other class lists."""
    torch._dynamo.reset()
    seg = Segmenter(make_model("tagclip"), text_embeddings=text_rows(5), compile=True)
    plain = Segmenter(seg.model, text_embeddings=text_rows(5))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size, names in (((75, 100), None), ((40, 160), NAMES[::-1]), ((70, 100), NAMES[:3])):
        got, expected = (one(photo(*size), names, seen=[0]) for one in (seg, plain))
        assert (got.labels == expected.labels).mean() > 0.999 and len(np.unique(got.labels)) > 1
        np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.skipif(
    bool(_extension.objections()), reason="the C++ extension is not loaded, the reference stores scores"
)
def test_no_tensor_of_all_classes_at_picture_size():
    """[C, H, W] scores of this call would take 847 * 600 * 800 * 4 bytes = 1.6 GB; count what torch allocates."""
    names = [f"class {i}" for i in range(847)]
    model = make_model(class_names=None, num_classes=None, seen=[])
    seg, image = Segmenter(model, text_embeddings=text_rows(847), class_names=names), photo(600, 800)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with ops.use_backend("auto"), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        seg(image)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 200e6, f"{largest / 1e6:.0f} MB"


@pytest.mark.skipif(not DATA, reason="ZS3FAST_DATA is not set: no real photos here")
def test_real_photos():
    folder = Path(DATA) / "VOCdevkit" / "VOC2012" / "JPEGImages"
    seg = Segmenter(make_model(), text_embeddings=text_rows(5))
    for path in sorted(folder.glob("*.jpg"))[:5]:
        result = seg(path)
        image, _ = read_image(path)
        assert result.labels.shape == image.shape[:2]
        agree(result, slow_scores(seg.model, image, text_rows(5)))
