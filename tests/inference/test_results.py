"""What a program can ask of a Segmenter beyond labels: one image, many lists; many images; scores, windows, masks."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inference.test_threads import encoder, quarters
from tests.tiny import tiny_model
from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.base import SegmentationModel
from zs3fast.types import SegmentationOutput

METHODS = ["zegclip", "tagclip", "clip_rc", "clsclip", "maskclip", "naclip", "maft"]
LISTS = (["cat", "dog"], ["grass", "sky", "potted plant"], ["moon"])


def segmenter(method: str, **options: Any) -> Segmenter:
    special = {"clsclip": {"text_token": "pre_projection"}, "maft": {"seen": []}}
    special |= dict.fromkeys(("maskclip", "naclip"), {"seen": []})
    model = tiny_model(method, **special.get(method, {}))
    proposer = quarters if method == "maft" else None
    return Segmenter(model, text_encoder=encoder(cache=False), proposer=proposer, templates="single", **options)


def photo(seed: int = 0, size: tuple[int, int] = (70, 130)) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))


def towers_run(seg: Segmenter) -> list[str]:
    """Grows by one whenever the first block of the image tower runs."""
    calls: list[str] = []
    block = seg.model.encoder.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append("tower"))
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_a_second_class_list_does_not_run_the_encoder_again(method: str) -> None:
    seg = segmenter(method)
    proposed: list[int] = []
    if method == "maft":
        seg._predictor.proposer = lambda images, names: proposed.append(1) or quarters(images)
    expected = [seg(photo(), names, seen=names[:1]) for names in LISTS]
    proposed.clear()
    calls = towers_run(seg)
    encoded = seg.encode(photo())
    once = len(calls)
    for names, one in zip(LISTS, expected, strict=True):
        got = seg(encoded, names, seen=names[:1])
        np.testing.assert_array_equal(got.labels, one.labels)
        np.testing.assert_array_equal(got.scores, one.scores)
        np.testing.assert_array_equal(got.image, photo())
    assert once >= 1 and len(calls) == once and len(proposed) == (method == "maft")
    with pytest.raises(ValueError, match="image: expected one that this Segmenter's `encode` gave"):
        segmenter(method)(encoded, LISTS[0])


def test_protocols_encode_too() -> None:
    seg = segmenter("naclip", protocol="naclip")
    encoded = seg.encode(photo())
    for names in LISTS:
        np.testing.assert_array_equal(seg(encoded, names).scores, seg(photo(), names).scores)


def test_a_proposer_led_by_the_class_list_runs_for_each() -> None:
    class Led:
        def __init__(self) -> None:
            self.lists: list[int] = []

        def for_vocabulary(self, text: torch.Tensor) -> Any:
            def propose(images: Any, names: Any = None) -> Any:
                self.lists.append(len(text))
                return quarters(images)

            return propose

    seg, led = segmenter("maft"), Led()
    expected = [seg(photo(), names) for names in LISTS[:2]]
    seg._predictor.proposer = led
    calls = towers_run(seg)
    encoded = seg.encode(photo())
    once = len(calls)
    for names, one in zip(LISTS[:2], expected, strict=True):
        np.testing.assert_array_equal(seg(encoded, names).scores, one.scores)
    assert led.lists == [2, 3] and len(calls) == once


def test_encoded_images_stream_beside_others() -> None:
    seg = segmenter("zegclip")
    images = [photo(0), seg.encode(photo(1)), photo(2, (64, 64))]
    for batch_size in (1, 3):
        results = [result for _, result in seg.stream(images, LISTS[0], batch_size=batch_size)]
        for seed, result in enumerate(results):
            one = seg(photo(seed, (64, 64)) if seed == 2 else photo(seed), LISTS[0])
            np.testing.assert_allclose(result.scores, one.scores, atol=2e-6)


def test_an_encoded_image_that_comes_twice_has_details_twice() -> None:
    seg = segmenter("zegclip")
    encoded = seg.encode(photo())
    results = [result for _, result in seg.stream([encoded, encoded], LISTS[0], details=True, batch_size=2)]
    np.testing.assert_array_equal(results[0].class_scores(), results[1].class_scores())


def test_nothing_keeps_a_segmenter_that_nobody_holds() -> None:
    seg = segmenter("zegclip")
    seg(photo(), LISTS[0])
    gone = weakref.ref(seg)
    gc.disable()  # a cycle would hold the weights on the device until it is collected
    try:
        del seg
        assert gone() is None
    finally:
        gc.enable()


def test_several_images_bytes_and_files(tmp_path: Path) -> None:
    seg = segmenter("zegclip")
    Image.fromarray(photo(1)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        results = seg([photo(1), tmp_path / "a.png", data, io.BytesIO(data), file], LISTS[0])
    assert isinstance(results, list) and len(results) == 5 and results[1].source == str(tmp_path / "a.png")
    for result in results:
        np.testing.assert_array_equal(result.labels, seg(photo(1), LISTS[0]).labels)
    assert seg([], LISTS[0]) == []
    with pytest.raises(FileNotFoundError, match="none.png"):
        seg([photo(1), tmp_path / "none.png"], LISTS[0])


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_every_class_are_those_the_labels_came_from(method: str) -> None:
    seg = segmenter(method)
    options: dict[str, Any] = {"seen": ["grass"], "background": "cat", "details": True}
    if method == "clsclip":
        options["min_score"] = 0.0
    result = seg(photo(), LISTS[1], **options)
    scores = result.class_scores()
    assert scores.shape == (3, 70, 130) and scores.dtype == np.float32
    shown = result.labels >= 0
    best = scores.max(0)
    np.testing.assert_allclose(best[shown], result.scores[shown], atol=5e-6)
    clear = np.sort(scores, 0)[-2] < best - 1e-5
    assert (scores.argmax(0) == result.labels)[shown & clear].all()
    assert result.class_scores((20, 30)).shape == (3, 20, 30)
    (streamed,) = [one for _, one in seg.stream([photo()], LISTS[1], **options)]
    np.testing.assert_array_equal(streamed.class_scores((20, 30)), result.class_scores((20, 30)))
    with pytest.raises(ValueError, match="details: expected a result of Segmenter"):
        seg(photo(), LISTS[1]).class_scores()


def test_windows_and_the_trusty_map() -> None:
    seg = segmenter("tagclip")
    result = seg(photo(), LISTS[1], seen=["sky"], details=True)
    windows = result.windows
    assert windows.canvas_size == (64, 119) and windows.window_size == (64, 64)
    assert windows.corners == ((0, 0), (0, 53), (0, 55)) and windows.mask_logits.shape == (3, 3, 4, 4)
    assert windows.trusty_logits is not None and windows.trusty_logits.shape == (3, 1, 4, 4)
    trusty = result.trusty_map((64, 119))
    upsampled = torch.nn.functional.interpolate(windows.trusty_logits, (64, 64), mode="bilinear").sigmoid()
    np.testing.assert_allclose(trusty[:, :53], upsampled[0, 0, :, :53], atol=1e-6)
    assert result.trusty_map().shape == (70, 130)
    with pytest.raises(ValueError, match="trusty_map: the model has no trusty token"):
        segmenter("zegclip")(photo(), LISTS[1], details=True).trusty_map()
    with pytest.raises(ValueError, match="windows: expected a method that looks at windows"):
        _ = segmenter("clsclip")(photo(), LISTS[1], details=True).windows


def test_the_mask_of_a_class() -> None:
    result = segmenter("zegclip")(photo(), LISTS[1])
    for index, name in enumerate(LISTS[1]):
        np.testing.assert_array_equal(result.mask(name.upper()), result.labels == index)
        np.testing.assert_array_equal(result.mask(index), result.labels == index)
    with pytest.raises(ValueError, match="of: expected a class of the result .*got 'dog'"):
        result.mask("dog")
    with pytest.raises(ValueError, match=r"of: expected an index in 0..2, got 3"):
        result.mask(3)


@pytest.mark.parametrize("seen", [(), (0, 1, 2), (1,)])
def test_the_fused_path_follows_the_models_own_scores(seen: tuple[int, ...]) -> None:
    """One calibration: what `class_scores` says of a window is what a Segmenter shows, trusty map and all."""
    seg = segmenter("tagclip")
    image = photo(size=(64, 64))
    result = seg(image, LISTS[1], seen=list(seen), details=True)
    model: SegmentationModel = seg.model
    model.num_classes, model.seen = 3, list(seen)
    out = SegmentationOutput(
        result.windows.mask_logits, torch.zeros(1, 32), torch.zeros(1, 16, 32), result.windows.trusty_logits
    )
    scores = model.class_scores(out, (64, 64))[0]
    np.testing.assert_allclose(result.scores, scores.amax(0), atol=2e-6)
    assert (
        (result.labels == scores.argmax(0).numpy()) | (scores.topk(2, 0).values.diff(dim=0)[0].abs() < 1e-5).numpy()
    ).all()


@pytest.mark.parametrize("own", [True, False])
def test_a_model_is_never_converted_in_place(own: bool) -> None:
    model = tiny_model("zegclip")
    options = SegmenterOptions(dtype="float32" if own else "bfloat16")
    seg = Segmenter(model, text_embeddings=torch.eye(7, 32), class_names=[*"abcdefg"], options=options)
    assert next(model.parameters()).dtype == torch.float32 and (seg.model is model) == own
    assert seg.dtype == (torch.float32 if own else torch.bfloat16)


def test_the_automatic_type_is_for_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    import zs3fast.inference.dtypes as module

    monkeypatch.setattr(module, "auto_dtype", lambda device: torch.bfloat16)
    rows = {"text_embeddings": torch.eye(7, 32), "class_names": [*"abcdefg"]}
    for dtype in ("auto", None):
        assert Segmenter(tiny_model("zegclip"), **rows, dtype=dtype).dtype == torch.float32, "nothing to gain"
    monkeypatch.setattr(module, "_LARGE", 1000)
    model = tiny_model("zegclip")
    for dtype in ("auto", None):
        assert Segmenter(model, **rows, dtype=dtype).dtype == torch.bfloat16
    assert Segmenter(model, **rows, dtype=torch.float32).model is model
    assert Segmenter(model.double(), **rows).dtype == torch.float64, "chosen by its owner"


def test_options_and_keywords() -> None:
    rows = {"text_embeddings": torch.eye(7, 32), "class_names": [*"abcdefg"]}
    seg = Segmenter(tiny_model("zegclip"), **rows, options=SegmenterOptions(window_batch=3), templates="multi")
    assert seg.options == SegmenterOptions(window_batch=3, templates="multi")
    with pytest.raises(TypeError, match="Segmenter has no option 'window_bach'; did you mean window_batch"):
        Segmenter(tiny_model("zegclip"), **rows, window_bach=3)
    assert seg.to("cpu") is seg and seg(photo()).labels.shape == (70, 130)
