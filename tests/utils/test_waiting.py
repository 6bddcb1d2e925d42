"""Checks that would wait for a device: answered later there, at once on a CPU. A CPU stands in for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.inference.test_predictors import NAMES, Regions
from tests.inference.test_segmenter import photo, text_rows
from tests.tiny import SEEN, tiny_inputs, tiny_labels, tiny_model
from zs3fast import ops
from zs3fast.inference.segmenter import Segmenter
from zs3fast.training.steps import OneStageStep, PairStep, Step
from zs3fast.types import Proposals
from zs3fast.utils import waiting


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, taken for a device that is waited for, and whose answers take long."""
    monkeypatch.setattr(waiting, "waits", lambda device: True)
    monkeypatch.setattr(waiting._Sent, "arrived", lambda sent: sent.event is not None and sent.event.query())
    waiting._copied.cache_clear()
    return torch.device("cpu")


def negative(values: Tensor) -> None:
    waiting.check(values < 0, values, lambda place, value: ValueError(f"{value} at {place}"))


BAD = torch.tensor([[1, -2], [3, -4]])


def test_a_cpu_is_asked_at_once() -> None:
    with waiting.collecting() as checks, pytest.raises(ValueError, match=r"^-2 at \[0, 1\]$"):
        negative(BAD)
    assert not checks


def test_without_gradients_or_a_block_a_device_is_waited_for(device: torch.device) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"^-2 at \[0, 1\]$"):
        negative(BAD)


def test_a_block_keeps_checks_for_its_end(device: torch.device) -> None:
    with waiting.collecting() as checks:
        negative(BAD.abs())
        negative(BAD.t())
        negative(BAD)
    assert len(checks) == 3
    with pytest.raises(ValueError, match=r"^-2 at \[1, 0\]$"):
        checks.settle()
    checks.settle()  # the error was raised


def test_an_empty_tensor_holds_nothing_bad(device: torch.device) -> None:
    with waiting.collecting() as checks:
        negative(BAD[:0])
    assert not checks


def test_the_next_step_of_an_optimiser_raises(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    negative(BAD)
    weight.sum().backward()
    with pytest.raises(ValueError, match=r"^-2 at \[0, 1\]$"):
        optimizer.step()
    assert weight.tolist() == [1, 1]
    optimizer.step()
    assert weight.tolist() == [0, 0]


def test_another_thread_s_check_is_not_raised_here(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    weight.sum().backward()
    thread = threading.Thread(target=negative, args=(BAD,))
    thread.start()
    thread.join()
    torch.optim.SGD([weight], lr=1.0).step()
    assert weight.tolist() == [0]


def test_a_check_that_is_through_is_raised_by_the_next(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    negative(BAD)
    negative(BAD.abs())
    monkeypatch.setattr(waiting._Sent, "arrived", lambda sent: True)
    with pytest.raises(ValueError, match=r"^-2 at \[0, 1\]$"):
        negative(BAD.abs())


def test_a_check_without_an_answer_yet_is_left_alone(device: torch.device) -> None:
    class Event:
        waited = False

        def query(self) -> bool:
            return self.waited

        def synchronize(self) -> None:
            self.waited = True

    checks = waiting.Checks()
    checks.send(BAD < 0, BAD, lambda place, value: ValueError(f"{value} at {place}"))
    checks._sent[0] = replace(checks._sent[0], event=Event())
    checks.settle(arrived=True)
    assert len(checks) == 1
    with pytest.raises(ValueError, match=r"^-2 at \[0, 1\]$"):
        checks.settle()


def test_constants_are_copied_once(device: torch.device) -> None:
    with torch.inference_mode():
        first = waiting.constant([3, 1], device)
    assert waiting.constant((3, 1), device) is first and first.tolist() == [3, 1]
    assert not first.is_inference()


def test_an_op_s_labels(device: torch.device) -> None:
    logits, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 2, 5] = 7
    with waiting.collecting() as checks:
        ops.mask_loss(logits, labels)
    with pytest.raises(ValueError, match=r"got 7 at \(b, y, x\) = \(0, 2, 5\)"):
        checks.settle()


# --- training steps --------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails at whatever reads a value of the device, has a size that depends on one, or copies from the host."""

    WAITS = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "lift_fresh"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def one_stage(method: str, setting: str) -> tuple[Step, dict[str, Tensor]]:
    step = OneStageStep(tiny_model(method), tiny_inputs()[1], setting=setting, ignore_index=255)
    return step.train(), {"images": tiny_inputs()[0], "labels": tiny_labels()}


def pairs(method: str, setting: str) -> tuple[Step, dict[str, Tensor]]:
    step = PairStep(tiny_model(method), tiny_inputs()[1], ignore_index=255)
    return step.train(), {"images": tiny_inputs()[0], "labels": tiny_labels(), "class_index": torch.tensor(SEEN[:2])}


STEPS = [
    ("zegclip", "inductive", one_stage),
    ("tagclip", "inductive", one_stage),
    ("clip_rc", "inductive", one_stage),
    ("zegclip", "transductive", one_stage),
    ("tagclip", "transductive", one_stage),
    ("clsclip", "inductive", pairs),
]
Make = Callable[[str, str], tuple[Step, dict[str, Tensor]]]


def run(step: Step, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    average = step.count(batch)
    step(batch, None if average is None else average.clamp_min(1))["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize(("method", "setting", "make"), STEPS, ids=[f"{m}-{s}" for m, s, _ in STEPS])
def test_a_training_step_does_not_wait(
    method: str, setting: str, make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, batch = make(method, setting)
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    run(step, batch, optimizer)  # constants are copied
    with monkeypatch.context() as patch, NoWaiting():
        patch.setattr(waiting.Checks, "settle", lambda self, arrived=False: None)  # reads the host's memory
        patch.setattr(Tensor, "tolist", lambda self: pytest.fail("tolist waits for the device"))
        average = step.count(batch)
        step(batch, None if average is None else average.clamp_min(1))["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize(("method", "setting", "make"), STEPS, ids=[f"{m}-{s}" for m, s, _ in STEPS])
@pytest.mark.parametrize("value", [9, 300, -7])
def test_a_bad_label_stops_the_step(method: str, setting: str, make: Make, value: int, device: torch.device) -> None:
    """Whatever it is, nothing is read out of bounds before the optimiser raises it."""
    step, batch = make(method, setting)
    labels = batch["labels"].clone()
    labels[1, 3, 4] = value
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in step.parameters()]
    with pytest.raises(ValueError, match=rf"labels: value {value} at \[b, y, x\] = \[1, 3, 4\], expected 0..6 or 255"):
        run(step, {**batch, "labels": labels}, optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, step.parameters(), strict=True))
    run(step, batch, optimizer)


def test_a_step_on_a_device_is_still_one_graph(device: torch.device) -> None:
    step, batch = pairs("clsclip", "inductive")
    torch.compile(step.eval(), fullgraph=True, backend="eager")(batch)["loss"].backward()


@pytest.mark.parametrize("pair", [[2, 0], [-1, 0], [0, 7]])
def test_a_bad_pair_stops_the_step(pair: list[int], device: torch.device) -> None:
    model, (images, text) = tiny_model("clsclip").train(), tiny_inputs()
    optimizer, asked = torch.optim.SGD(model.parameters(), lr=0.1), torch.tensor([[0, 1], pair])
    asked = asked.clone()
    model.loss(model(images, text, asked), tiny_labels(), "supervised", pairs=asked)["loss"].backward()
    expected = rf"pairs: row 1 is \[{pair[0]}, {pair[1]}\], expected an image in 0..1 and a class in 0..6"
    with pytest.raises(ValueError, match=expected):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_labels": 9}, r"gt_labels: expected classes 0..6 or -1 .* got 2..9; first 9 at \[b, g\] = \[1, 0\]"),
        ({"masks": float("nan")}, r"proposals: the masks hold NaN, first at \[b, n, y, x\] = \[1, 2, 3, 4\]"),
        ({"masks": 3.0}, r"got 0..3; logits go in mask_logits; the first outside is at .* = \[1, 2, 3, 4\]"),
    ],
    ids=["label", "nan", "range"],
)
def test_what_maft_is_given(change: dict[str, float], message: str, device: torch.device) -> None:
    model, (images, text) = tiny_model("maft").train(), tiny_inputs()
    masks, gt_labels = torch.zeros(2, 4, 64, 64), torch.full((2, 1), 2)
    masks[:, :, 8:40, 8:40] = 0.75
    if "masks" in change:
        masks[1, 2, 3, 4] = change["masks"]
    gt_labels[1] = int(change.get("gt_labels", 2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    out = model(images, text, masks)
    model.loss(out, torch.ones(2, 1, 64, 64), gt_labels)["loss"].backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


# --- results ---------------------------------------------------------------------------------------------------------


class NothingValid(Regions):
    def __call__(self, pictures: Any, names: Any = None) -> Proposals:
        found = super().__call__(pictures)
        return replace(found, valid=torch.zeros_like(found.valid))


def test_no_region_is_said_before_a_result_is_handed_out(device: torch.device) -> None:
    model = tiny_model("maft", num_classes=5, class_names=NAMES, seen=[0, 1])
    seg = Segmenter(model, text_embeddings=text_rows(5), class_names=NAMES, proposer=NothingValid())
    for call in (seg, seg.encode, lambda image: list(seg.stream([image]))):
        with pytest.raises(ValueError, match="proposer: it found no region in the image"):
            call(photo(64, 64))
    failures: list[tuple[Any, Exception]] = []
    image = photo(64, 64)
    assert list(seg.stream([image, image], failed=lambda *what: failures.append(what))) == []
    assert [str(error) for _, error in failures] == ["proposer: it found no region in the image"] * 2
