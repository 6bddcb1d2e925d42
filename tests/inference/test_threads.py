"""One Segmenter, many threads, each with its own classes: the bits of one thread alone, whatever the switching."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from tests.tiny_clip import CONFIG, text_state, tiny_clip
from zs3fast.inference.segmenter import Segmenter
from zs3fast.proposals import from_masks
from zs3fast.text import TextEncoder
from zs3fast.types import Proposals
from zs3fast.utils.weight_cache import WeightCache

LISTS = (
    ["cat", "dog"],
    ["grass", "a very long name of a thing that nobody has seen", "sky"],
    ["sofa, couch", "sky", "potted plant", "cat"],
    ["moon"],
)
ROUNDS = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def _busy() -> Iterator[None]:
    """Threads are switched as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any], threads: int) -> list[Any]:
    """`work(index)` on that many threads that start together; what one raises is raised."""
    start, results, errors = threading.Barrier(threads), [None] * threads, []

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    return results


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return text_state(tiny_clip())


def encoder(**options: Any) -> TextEncoder:
    return TextEncoder.from_state_dict(weights(), name="tiny", **options)


def quarters(pictures: list[np.ndarray], names: object = None) -> Proposals:
    """Regions for MAFT: the image's quarters."""
    masks = []
    for height, width in (picture.shape[:2] for picture in pictures):
        mask = np.zeros((4, height, width), bool)
        for i in range(4):
            y, x = divmod(i, 2)
            mask[i, y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2] = True
        masks.append(mask)
    return from_masks(masks)


def segmenter(method: str, **options: Any) -> Segmenter:
    special = {"clsclip": {"text_token": "pre_projection"}, "maskclip": {"seen": []}, "maft": {"seen": []}}
    model = tiny_model(method, **special.get(method, {}))
    return Segmenter(
        model, text_encoder=encoder(**options), proposer=quarters if method == "maft" else None, templates="single"
    )


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8)


@pytest.mark.usefixtures("_busy")
@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc", "clsclip", "maskclip", "maft"])
def test_threads_get_the_bits_of_one_thread(method: str, cache: Path) -> None:
    alone = segmenter(method, cache=False)
    options = {} if method == "maft" else {"min_score": 0.0}
    expected = [alone(photo(i), names, **options) for i, names in enumerate(LISTS)]
    shared = segmenter(method)

    def work(index: int) -> list[Any]:
        return [shared(photo(index), LISTS[index], **options) for _ in range(ROUNDS)]

    for results, one in zip(at_once(work, len(LISTS)), expected, strict=True):
        for result in results:
            np.testing.assert_array_equal(result.labels, one.labels)
            np.testing.assert_array_equal(result.scores, one.scores)
            assert result.class_names == one.class_names
    assert len(list(cache.iterdir())) == len(LISTS)
    later, fresh, token = encoder(), encoder(cache=False), shared.model.text_token
    for names in LISTS:  # what another process reads
        assert torch.equal(
            later.encode(names, "single", text_token=token), fresh.encode(names, "single", text_token=token)
        )


@pytest.mark.usefixtures("_busy")
@pytest.mark.parametrize("token", ["projected", "pre_projection"])
def test_a_text_tower_is_left_as_it_was(token: str) -> None:
    shared = encoder(cache=False)
    mask, hooks = shared.tower.attn_mask, len(shared.tower.ln_final._forward_hooks)
    expected = [shared.encode(names, text_token=token) for names in LISTS]
    results = at_once(lambda index: [shared.encode(LISTS[index], text_token=token) for _ in range(10)], len(LISTS))
    for got, want in zip(results, expected, strict=True):
        assert all(torch.equal(rows, want) for rows in got)
    assert shared.tower.attn_mask is mask and len(shared.tower.ln_final._forward_hooks) == hooks


@pytest.mark.usefixtures("_busy")
def test_a_weight_cache_returns_what_its_own_tensors_give() -> None:
    cache = WeightCache()
    tensors = [torch.tensor(float(index)) for index in range(4)]

    def work(index: int) -> set[float]:
        with torch.no_grad():
            return {float(cache.get([tensors[index]], lambda: tensors[index] + 10)) for _ in range(3000)}

    assert at_once(work, 4) == [{10.0}, {11.0}, {12.0}, {13.0}]


def test_the_text_tower_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random for an untrained model, two of them would disagree."""
    built = []

    def from_open_clip(*_: object, **__: object) -> TextEncoder:
        built.append(encoder(cache=False))
        return built[-1]

    monkeypatch.setattr(TextEncoder, "from_open_clip", from_open_clip)
    shared = Segmenter(tiny_model("zegclip", clip=CONFIG), class_names=["cat"])
    towers = at_once(lambda _: shared.text_encoder, 8)
    assert len(built) == 1 and all(tower is built[0] for tower in towers)


def test_more_lists_than_are_kept() -> None:
    model, names = tiny_model("zegclip"), [f"thing {index}" for index in range(20)]
    shared = Segmenter(model, text_embeddings=torch.eye(20, 32), class_names=names)
    first = [shared(photo(0), [name, "thing 3", "thing 5"][: 1 + (name not in names[3:6])]).scores for name in names]
    assert len(shared._texts.kept) < len(names)
    np.testing.assert_array_equal(shared(photo(0), ["thing 0", "thing 3"]).scores, first[0])
