"""Models on the CPU's kernels, called directly and in a Segmenter: one speed, and nothing kept that weights outgrew."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from tests.tiny_clip import CONFIG
from zs3fast import Segmenter
from zs3fast.ops import _dispatch
from zs3fast.ops.encoder_attention import kernels as attention_kernels
from zs3fast.ops.fused_linear import kernels

CLIP = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 64, "head_width": 16}}  # sizes that kernels take
NAMES = [f"thing {i}" for i in range(7)]
METHODS = (*ONE_STAGE, "clsclip")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def model_of(method: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """In this type, in eval mode, with weights of its own."""
    model = tiny_model(method, clip=CLIP)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def answer(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    images, text = tiny_inputs()
    with torch.inference_mode():
        out = model(images.to(dtype), text.to(dtype))
        return torch.cat([out.mask_logits.float().flatten(), model.predict_labels(out, (64, 64)).float().flatten()])


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The ops that run, each with its backend."""
    ran: list[str] = []
    call = _dispatch.call

    def record(op: str, *args: Any) -> Any:
        ran.append(f"{op} {_dispatch.choose(op, *args)}")
        return call(op, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "call", record)
        yield ran


@TYPES
@pytest.mark.parametrize("method", METHODS)
def test_a_direct_call_runs_what_a_segmenter_runs(method: str, dtype: torch.dtype) -> None:
    if not kernels(dtype) or not attention_kernels(dtype):
        pytest.skip("no kernel of the extension on this machine")
    model = model_of(method, torch.float32)
    segmenter = Segmenter(model, text_embeddings=tiny_inputs()[1], class_names=NAMES, dtype=dtype)
    answer(segmenter.model)  # the prompts' keys and values are made once
    with recorded() as inside:
        answer(segmenter.model)
    answer(model.to(dtype).eval())
    with recorded() as direct:
        got = answer(model)
    assert direct == inside and torch.equal(got, answer(segmenter.model))
    from zs3fast.ops.fused_linear import _measured_faster

    if _measured_faster(dtype):
        assert "fused_linear cpp" in direct


def loaded(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


def written(model: nn.Module, other: nn.Module) -> nn.Module:
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    return model


def replaced(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def stepped(model: nn.Module, other: nn.Module) -> nn.Module:
    """By an optimiser, to where the other is."""
    pairs = [(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True)]
    for mine, theirs in pairs:
        mine.requires_grad_(True).grad = (mine - theirs).detach()
    torch.optim.SGD([mine for mine, _ in pairs], lr=1.0).step()
    return written(model, other)  # what rounding left


@TYPES
@pytest.mark.parametrize("change", [loaded, written, replaced, stepped])
@pytest.mark.parametrize("method", METHODS)
def test_new_weights_are_seen(method: str, change: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    model, other = model_of(method, dtype), model_of(method, dtype, seed=1)
    before, expected = answer(model), answer(copy.deepcopy(other))
    assert not torch.equal(before, expected)
    assert torch.equal(answer(change(model, other)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_to_another_type_and_back(method: str) -> None:
    model = model_of(method, torch.bfloat16)
    expected = answer(model)
    wide = answer(model.float())
    assert torch.equal(answer(model.bfloat16()), expected)
    assert not torch.equal(wide, expected)
    assert torch.equal(answer(model_of(method, torch.bfloat16).float()), wide)


@TYPES
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_of_a_warm_segmenter(method: str, again: Callable[..., Any], dtype: torch.dtype) -> None:
    """What calls left behind goes with neither, and a copy's weights are its own."""
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    segmenter = Segmenter(
        model_of(method, torch.float32), text_embeddings=tiny_inputs()[1], class_names=NAMES, dtype=dtype
    )
    labels = segmenter(image).labels
    twin = again(segmenter)
    assert np.array_equal(twin(image).labels, labels)
    written(twin.model, model_of(method, dtype, seed=1))
    changed = twin(image).labels
    assert np.array_equal(segmenter(image).labels, labels)
    fresh = Segmenter(model_of(method, dtype, seed=1), text_embeddings=tiny_inputs()[1], class_names=NAMES, dtype=dtype)
    assert np.array_equal(changed, fresh(image).labels)
