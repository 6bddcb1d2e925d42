"""What is recorded, replayed and recorded anew; a recording on the CPU stands in for a CUDA graph."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.goldens_data import relative
from tests.inference.test_predictors import NAMES
from tests.inference.test_segmenter import photo, text_rows
from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from zs3fast.inference import repeated
from zs3fast.inference.compiled import CompiledModel
from zs3fast.inference.repeated import Repeated, RepeatedModel
from zs3fast.inference.segmenter import Segmenter
from zs3fast.utils.recording import is_recording


class Recording:
    """As a CUDA graph: inputs and outputs keep their memory, and `run` sees the inputs' alone."""

    made: list[Recording] = []
    replayed = 0

    def __init__(self, run: Callable[..., Any], given: Sequence[Tensor]):
        self.run, self.inputs = run, [tensor.clone() for tensor in given]
        self.outputs = run(*self.inputs)
        Recording.made.append(self)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        Recording.replayed += 1
        for kept, tensor in zip(self.inputs, given, strict=True):
            kept.copy_(tensor)
        for kept, new in zip(self.outputs, self.run(*self.inputs), strict=True):
            if kept is not None:
                kept.copy_(new)
        return self.outputs


@pytest.fixture(autouse=True)
def _recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repeated, "records", lambda self, images: True)
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(Recording, "replayed", 0)


def recorded(model: torch.nn.Module) -> RepeatedModel:
    run = RepeatedModel(model)
    run.repeated._record = Recording
    return run


def assert_same(got: Any, out: Any) -> None:
    assert relative(got.mask_logits, out.mask_logits) < 1e-5
    assert (got.trusty_logits is None) == (out.trusty_logits is None)
    if out.trusty_logits is not None:
        assert relative(got.trusty_logits, out.trusty_logits) < 1e-5


@pytest.mark.parametrize("method", [*ONE_STAGE, "maskclip"])
@torch.no_grad()
def test_the_third_call_of_a_size_replays(method: str) -> None:
    model = tiny_model(method)
    run, (images, text) = recorded(model), tiny_inputs(1)
    results = []
    for turn in range(4):
        given = images + turn, text.roll(turn, 0)
        results.append((run(*given), model(*given)))
        assert len(Recording.made) == min(turn, 1)
    assert Recording.replayed == 3
    for got, out in results:  # no result lies in memory that a later replay wrote to
        assert_same(got, out)


@torch.no_grad()
def test_ops_know_that_they_are_recorded() -> None:
    """From the warm-up on, which is part of what records; in plain calls and where a recording fails they are not."""
    seen: list[bool] = []

    def run(images: Tensor, text: Tensor, contexts: Any) -> tuple[Tensor, None]:
        seen.append(is_recording())
        return images.sum(1, keepdim=True), None

    def fails(run: Callable[..., Any], given: Sequence[Tensor]) -> Any:
        run(*given)
        raise RuntimeError("out of memory")

    for record in (Recording, fails):
        seen.clear()
        repeated_run = Repeated(run, list, record)
        for batch in (1, 1, 3):
            repeated_run(*tiny_inputs(batch))
        assert seen[0] is False and seen[1] is True and seen[-1] is False and not is_recording()


@torch.no_grad()
def test_small_batches_only() -> None:
    model = tiny_model("zegclip")
    run = recorded(model)
    for _ in range(2):
        for batch in (1, 2, 3, 8):
            images, text = tiny_inputs(batch)
            assert_same(run(images, text), model(images, text))
    assert {len(recording.inputs[0]) for recording in Recording.made} == {1, 2}


@torch.no_grad()
def test_weights_that_are_written_to() -> None:
    """The prompts' keys and values are computed anew, so the graph that reads the old ones is not replayed."""
    model = tiny_model("tagclip")
    run, (images, text) = recorded(model), tiny_inputs(1)
    for _ in range(3):
        run(images, text)
    before = run(images, text).mask_logits
    model.encoder.prompt_embeddings.mul_(3)
    after = run(images, text)
    assert_same(after, model(images, text))
    assert relative(after.mask_logits, before) > 1e-3 and len(Recording.made) == 2


@torch.no_grad()
def test_weights_that_moved() -> None:
    model = tiny_model("maskclip")
    run, (images, text) = recorded(model), tiny_inputs(1)
    for _ in range(3):
        run(images, text)
    model.encoder.conv1.weight.data = model.encoder.conv1.weight * 2
    assert_same(run(images, text), model(images, text))
    assert len(Recording.made) == 2


@torch.no_grad()
def test_the_size_not_asked_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "MAX_RECORDINGS", 2)
    run = recorded(tiny_model("zegclip"))
    for classes in (3, 4, 3, 5, 3, 4):
        for _ in range(2):
            run(*tiny_inputs(1, classes=classes))
    assert len(run.repeated) == 2
    assert [len(recording.inputs[1]) for recording in Recording.made] == [3, 4, 5, 4]


def test_gradients_and_autocast_are_not_recorded() -> None:
    run, (images, text) = recorded(tiny_model("zegclip")), tiny_inputs(1)
    for _ in range(3):
        run(images, text)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            run(images, text)
    assert Recording.made == []


@torch.no_grad()
def test_a_recording_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Any, given: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model("zegclip")
    run, (images, text) = RepeatedModel(model), tiny_inputs(1)
    run.repeated._record = fail
    with caplog.at_level("WARNING", "zs3fast"):
        for _ in range(4):
            assert_same(run(images, text), model(images, text))
    assert caplog.text.count("recording failed (operation not permitted") == 1


@torch.no_grad()
def test_a_copy_runs_its_own_model() -> None:
    model = tiny_model("zegclip")
    run, (images, text) = recorded(model), tiny_inputs(1)
    for _ in range(3):
        run(images, text)
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert len(other.repeated) == 0
        other.model.encoder.prompt_embeddings.mul_(3)
        for _ in range(3):
            assert_same(other(images, text), other.model(images, text))
    assert_same(run(images, text), model(images, text))


@torch.no_grad()
def test_compiled_code_is_recorded_too() -> None:
    model = tiny_model("tagclip")
    run = CompiledModel(model, backend="eager")
    run.repeated._record = Recording
    for _ in range(3):
        for classes in (7, 4):
            images, text = tiny_inputs(1, classes=classes)
            assert_same(run(images, text), model(images, text))
    assert len(Recording.made) == 2


def test_threads_take_turns() -> None:
    model = tiny_model("zegclip")
    run = recorded(model)
    problems = [(images + number, text) for number, (images, text) in enumerate([tiny_inputs(1)] * 4)]
    with torch.no_grad():
        expected = [model(*problem) for problem in problems]
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_same(run(*problems[number]), expected[number])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(Recording.made) == 1


def test_a_segmenter_replays() -> None:
    model = tiny_model("zegclip", num_classes=5, class_names=NAMES, seen=[0, 1])
    seg = Segmenter(model, text_embeddings=text_rows(5), class_names=NAMES)
    seg._predictor.run.repeated._record = Recording  # type: ignore[attr-defined]
    first = seg(photo(64, 64))
    for _ in range(3):
        assert (seg(photo(64, 64)).labels == first.labels).all()
    assert Recording.made and Recording.replayed


@pytest.mark.parametrize("compiled", [False, True])
def test_warmup(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it neither a graph is made nor a name encoded for images of these sizes."""
    model = tiny_model("zegclip", num_classes=5, class_names=NAMES, seen=[0, 1])
    seg = Segmenter(model, text_embeddings=text_rows(5), class_names=NAMES, window_batch=4)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    if compiled:
        seg._predictor.run = CompiledModel(model, backend=backend)  # type: ignore[attr-defined,arg-type]
    seg.warmup(["cat", "dog", "sofa"], sizes=[(64, 64), (100, 160)])
    made = len(graphs)
    assert made == (2 if compiled else 0), "one window, several"
    seg(photo(64, 64), ["sky", "grass"])
    seg(photo(160, 100), ["cat", "sky", "grass"])
    assert len(graphs) == made


def test_what_warmup_refuses() -> None:
    model = tiny_model("zegclip", num_classes=5, class_names=NAMES, seen=[0, 1])
    seg = Segmenter(model, text_embeddings=text_rows(5), class_names=NAMES)
    with pytest.raises(ValueError, match=r"sizes: expected \(height, width\) of at least 1 x 1, got \(0, 4\)"):
        seg.warmup(sizes=[(0, 4)])
    with pytest.raises(ValueError, match="unicorn"):
        seg.warmup(["unicorn"])
