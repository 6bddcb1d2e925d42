"""ClsCLIP+: crops with context, batches of boxes, OR as a maximum, classes without boxes, bad boxes."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from tests.goldens_data import relative
from tests.models.test_clsclip import TEXT_WIDTH, make
from zs3fast.models.clsclip_plus import ClsCLIPPlus, zoom_windows
from zs3fast.proposals import make_boxes
from zs3fast.types import BoxProposals

SIZE = (90, 130)  # H, W
WORDS = ["cat", "sofa", "tv"]
BOXES = [  # overlapping, nested, at the border, tiny, the whole image
    ([10, 10, 60, 50], "cat"),
    ([40.5, 20.2, 90, 70.9], "cat"),
    ([50, 30, 70, 45], "cat"),
    ([0, 60, 30, 90], "couch"),
    ([127, 86, 130, 90], "couch"),
    ([0, 0, 130, 90], "tvmonitor"),
    ([10, 10, 60, 50], "tv monitor"),
    ([10, 10, 60, 50], "dog"),
]


def make_image() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, *SIZE, generator=generator), torch.randn(3, TEXT_WIDTH, generator=generator)


def boxes_of(boxes: list = BOXES, vocabulary: list[str] | None = None) -> BoxProposals:
    return make_boxes([box for box, _ in boxes], [name for _, name in boxes], SIZE, vocabulary=vocabulary)


def one_by_one(plus: ClsCLIPPlus, image: torch.Tensor, text: torch.Tensor, c: int, boxes: list) -> torch.Tensor:
    """Eq. 9 by hand: the masks [K, H, W] as scores, one crop and one class at a time; 0 outside the crop."""
    height, width = SIZE
    scores = []
    for x0, y0, x1, y1 in boxes:
        if x1 - x0 < 4:
            x0, x1 = (x0 + x1) / 2 - 8, (x0 + x1) / 2 + 8
        if y1 - y0 < 4:
            y0, y1 = (y0 + y1) / 2 - 8, (y0 + y1) / 2 + 8
        dx, dy = plus.crop_margin * (x1 - x0), plus.crop_margin * (y1 - y0)
        left, top = max(math.floor(x0 - dx), 0), max(math.floor(y0 - dy), 0)
        right, bottom = min(math.ceil(x1 + dx), width), min(math.ceil(y1 + dy), height)
        crop = image[None, :, top:bottom, left:right]
        side = plus.model.image_size
        crop = F.interpolate(crop, (side, side), mode="bilinear", align_corners=False, antialias=True)
        with torch.no_grad():
            logits = plus.model(crop, text[c : c + 1]).mask_logits
        z = F.interpolate(logits, (bottom - top, right - left), mode="bilinear", align_corners=False)
        full = torch.zeros(SIZE)
        full[top:bottom, left:right] = z[0, 0].sigmoid()
        scores.append(full)
    return torch.stack(scores)


def means(word: str, name: str) -> bool:
    return name in {"cat": ["cat"], "sofa": ["couch"], "tv": ["tvmonitor", "tv monitor"]}[word]


@pytest.mark.parametrize("at_once", [1, 2, 20])
def test_masks_are_the_or_over_boxes(at_once: int) -> None:
    """Overlapping, nested, tiny and border boxes, a box shared by two classes, batches of every size."""
    plus = ClsCLIPPlus(make(memory_budget=at_once * 17 * 8 * 48 * 4))
    image, text = make_image()
    scores = plus.class_scores(image, text, boxes_of(), WORDS)
    masks = plus.predict_masks(image, text, boxes_of(), WORDS, threshold=0.55)
    for c, word in enumerate(WORDS):
        each = one_by_one(plus, image, text, c, [box for box, name in BOXES if means(word, name)])
        assert relative(scores[c], each.amax(0)) < 1e-5, word
        clear = ((each - 0.55).abs() > 1e-5).all(0)
        assert torch.equal(masks[c][clear], (each > 0.55).any(0)[clear]), word
        assert masks[c].any() and not masks[c].all()
    assert (scores[1][:40] == 0).all()  # no couch up there


def test_labels_are_the_argmax_of_scores() -> None:
    plus = ClsCLIPPlus(make())
    image, text = make_image()
    scores = plus.class_scores(image, text, boxes_of(), WORDS)
    labels, best = plus.predict_labels(image, text, boxes_of(), WORDS, threshold=None)
    assert torch.equal(labels, scores.argmax(0)) and torch.equal(best, scores.amax(0))
    labels, _ = plus.predict_labels(image, text, boxes_of(), WORDS)
    assert torch.equal(labels, torch.where(scores.amax(0) > 0.5, scores.argmax(0), -1))
    no_tv = ClsCLIPPlus(plus.model, no_box="empty")
    labels, best = no_tv.predict_labels(image, text, boxes_of(BOXES[3:4]), WORDS)
    assert set(labels.unique().tolist()) <= {-1, 1} and (labels[:40] == -1).all() and (best[:40] == 0).all()


def test_equal_scores_go_to_the_lowest_class() -> None:
    """Two classes with one text token tie everywhere; the order of boxes must not decide."""
    plus = ClsCLIPPlus(make(memory_budget=1))
    image, text = make_image()
    text[1] = text[0]
    boxes = boxes_of([([0, 0, 40, 40], "couch"), ([60, 40, 120, 80], "cat"), ([0, 0, 40, 40], "cat")])
    labels, _ = plus.predict_labels(image, text[:2], boxes, ["cat", "sofa"], threshold=None)
    assert (labels == 0).all()


def test_one_box_over_everything_is_plain_clsclip() -> None:
    plus = ClsCLIPPlus(make())
    image, text = make_image()
    crop = F.interpolate(image[None], (64, 64), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        plain = plus.model.class_scores(plus.model(crop, text), SIZE)[0]
    everywhere = boxes_of([([0, 0, 130, 90], word) for word in WORDS])
    assert relative(plus.class_scores(image, text, everywhere, WORDS), plain) < 1e-5
    nothing = boxes_of([])
    assert relative(plus.class_scores(image, text, nothing, WORDS), plain) < 1e-5
    empty = ClsCLIPPlus(plus.model, no_box="empty")
    assert not empty.class_scores(image, text, nothing, WORDS).any()
    some = plus.class_scores(image, text, boxes_of(BOXES[:1]), WORDS)  # cat has a box, the others fall back
    assert relative(some[1:], plain[1:]) < 1e-5 and relative(some[:1], plain[:1]) > 0.1


def test_a_window_is_cut_once_for_all_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    plus = ClsCLIPPlus(make())
    plan = plus.plan(boxes_of(BOXES[5:7] + [([10, 10, 60, 50], "cat")]), ["tv", "cat", "sofa"])
    assert plan.windows == ((0, 0, 130, 90), (5, 6, 65, 54))
    assert plan.pairs == ((0, 0), (0, 2), (1, 0), (1, 1))  # the sofa has no box and takes the whole image
    image, text = make_image()
    prefix, seen = plus.model.encoder.prefix, []
    monkeypatch.setattr(plus.model.encoder, "prefix", lambda crops: seen.append(len(crops)) or prefix(crops))
    plus.class_scores(image, text, boxes_of([]), WORDS)
    assert seen == [1]


def test_synonyms_of_the_asked_class_match() -> None:
    plus = ClsCLIPPlus(make(), no_box="empty")
    boxes = boxes_of([([0, 0, 20, 20], "Kitten"), ([5, 5, 9, 9], "dining-table")])
    assert plus.plan(boxes, [("cat", "kitten"), "diningtable", "dog"]).pairs == ((0, 0), (1, 1))


def test_words_the_detector_does_not_know_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    plus = ClsCLIPPlus(make(), no_box="empty")
    boxes = boxes_of(BOXES[:3], vocabulary=["cat", "couch"])
    with caplog.at_level(logging.WARNING, "zs3fast"):
        for _ in range(2):
            assert {c for _, c in plus.plan(boxes, WORDS).pairs} == {0}
    assert [record.getMessage() for record in caplog.records] == [
        "the detector has no word for tv: no_box='empty' applies"
    ]


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ([10, 20, 30, 60], (8, 16, 32, 64)),
        ([10.5, 20, 31, 60.2], (8, 15, 34, 65)),
        ([0, 0, 130, 90], (0, 0, 130, 90)),
        ([-0.8, 0, 20, 90.4], (0, 0, 23, 90)),
        ([50, 40, 53, 80], (41, 36, 62, 84)),  # 3 px wide: 16 around its middle, then the margin
        ([128, 88, 130, 90], (119, 79, 130, 90)),
    ],
)
def test_windows_have_context_and_stay_inside(box: list[float], window: tuple[int, ...]) -> None:
    assert zoom_windows(torch.tensor([box, box]), SIZE, 0.1) == [window]


def test_windows_without_a_margin_are_the_boxes() -> None:
    boxes = torch.tensor([[3.0, 4, 9, 11], [0, 0, 130, 90]])
    assert zoom_windows(boxes, SIZE, 0) == [(3, 4, 9, 11), (0, 0, 130, 90)]
    assert zoom_windows(boxes[:0], SIZE, 0.1) == []


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([140, 10, 160, 50], r"boxes: box 0 \('cat'\) .* lies outside the image of 130 x 90 pixels"),
        ([10, 10, 10, 50], r"boxes: box 0 \('cat'\) .* has no area"),
        ([60, 50, 20, 30], "perhaps it is x y width height"),
        ([0.1, 0.2, 0.8, 0.9], "perhaps it is relative to the image's size"),
        ([10, 10, float("nan"), 50], "is not finite"),
    ],
)
def test_bad_boxes_are_named(box: list[float], message: str) -> None:
    """Boxes made without `make_boxes` are checked as well."""
    boxes = BoxProposals(torch.tensor([box]), torch.ones(1), ("cat",), SIZE)
    with pytest.raises(ValueError, match=message):
        ClsCLIPPlus(make()).class_scores(*make_image(), boxes, WORDS)


def test_bad_input_is_named() -> None:
    plus, (image, text), boxes = ClsCLIPPlus(make()), make_image(), boxes_of()
    for args, error, message in [
        (
            (image[:, :80], text, boxes, WORDS),
            ValueError,
            "boxes: expected an image of H x W = 90 x 130, got one of 80",
        ),
        (
            (image[None], text, boxes, WORDS),
            ValueError,
            r"image: expected .* \[3, H, W\], got torch.float32 \[1, 3, 90",
        ),
        ((image.byte(), text, boxes, WORDS), ValueError, "image: expected a normalised floating-point image"),
        (
            (image, text, boxes, WORDS[:2]),
            ValueError,
            "class_words: expected a word for each of 3 text_embeddings, got 2",
        ),
        ((image, text, boxes, "cat"), TypeError, "class_words: expected a sequence of words, got the string 'cat'"),
        ((image, text, boxes.boxes, WORDS), TypeError, "boxes: expected BoxProposals, got Tensor"),
    ]:
        with pytest.raises(error, match=message):
            plus.class_scores(*args)
    with pytest.raises(ValueError, match="crop_margin: expected a share of at least 0, got -0.1"):
        ClsCLIPPlus(plus.model, crop_margin=-0.1)
    with pytest.raises(ValueError, match="no_box: expected one of whole_image, empty, got 'skip'"):
        ClsCLIPPlus(plus.model, no_box="skip")


def test_half_precision_weights() -> None:
    plus = ClsCLIPPlus(make())
    image, text = make_image()
    expected = plus.class_scores(image, text, boxes_of(), WORDS)
    plus.model.bfloat16()
    got = plus.class_scores(image, text, boxes_of(), WORDS)
    assert got.dtype == torch.float32 and relative(got, expected) < 0.05
