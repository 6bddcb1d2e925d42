"""The image tower in 8 bits on our kernels: close to the float one, without torchao, whole whatever is done to it."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.goldens_data import relative
from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from tests.tiny_clip import CONFIG
from zs3fast import Segmenter
from zs3fast.encoders import quantize
from zs3fast.encoders.quantize import Int8Linear, quantize_encoder, runs_kernels
from zs3fast.inference import dtypes
from zs3fast.inference.options import SegmenterOptions
from zs3fast.ops import use_backend
from zs3fast.ops.fused_linear_int8 import kernels

pytestmark = pytest.mark.skipif(not kernels(), reason="no int8 kernel of the extension on this machine")

CLIP = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 64, "head_width": 16}}
ERROR = 0.02  # relative, of the tower's output, for random weights
SIDE = 64


def model_of(method: str = "zegclip", **options: Any) -> nn.Module:
    if method == "maskclip":
        from zs3fast import create_model

        torch.manual_seed(0)
        return create_model("maskclip", **{"clip": CLIP, **options}).eval()
    return tiny_model(method, **{"clip": CLIP, **options})


def smooth() -> Tensor:
    """Images [2, 3, 64, 64] of smooth colours, as labels of noise would be noise."""
    coarse = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What the tower says, and the labels."""
    dtype = next(model.parameters()).dtype
    images, text = smooth().to(dtype), tiny_inputs()[1].to(dtype)
    rows = torch.arange(SIDE).view(1, 1, SIDE, 1) // 13
    masks = (rows == torch.arange(5).view(1, 5, 1, 1)).to(dtype).expand(2, -1, -1, SIDE).contiguous()
    with torch.inference_mode():
        out = model(images, text, masks) if model.method == "maft" else model(images, text)
        tower = out.proposal_embeddings if model.method == "maft" else out.patch_tokens
        return tower.float(), model.predict_labels(out, (SIDE, SIDE))


def layers(model: nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def segmenter_of(model: nn.Module, **options: Any) -> Segmenter:
    names = [f"thing {i}" for i in range(7)]
    return Segmenter(model, text_embeddings=tiny_inputs()[1], class_names=names, **options)


def photo() -> np.ndarray:
    return (smooth()[0].permute(1, 2, 0).clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy()


@pytest.mark.parametrize("quick", [True, False], ids=["quick-gelu", "gelu"])
@pytest.mark.parametrize("method", [*ONE_STAGE, "clsclip", "maft", "maskclip"])
def test_outputs_stay_close_without_torchao(method: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = model_of(method, clip={**CLIP, "quick_gelu": quick})
    expected, labels = run(model)
    assert runs_kernels(model, "int8") and quantize_encoder(model) is model and model.quantized == "int8"
    assert len(layers(model)) == 4 * 3 and all(layer.weight.dtype == torch.int8 for layer in layers(model))
    got, got_labels = run(model)
    assert 1e-4 < relative(got, expected) < ERROR
    assert (got_labels == labels).float().mean() > 0.9
    with use_backend("reference"):
        assert relative(run(model)[0], got) < 1e-4
    half = quantize_encoder(model_of(method, clip={**CLIP, "quick_gelu": quick}).bfloat16())
    assert relative(run(half)[0], expected) < 2 * ERROR


def test_scales_stay_float32_in_a_bfloat16_model() -> None:
    model = quantize_encoder(model_of())
    before = [(layer.weight.clone(), layer.scale.clone()) for layer in layers(model)]
    assert model.bfloat16() is model
    for layer, (weight, scale) in zip(layers(model), before, strict=True):
        assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.weight, weight)
        assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)
    for name in ("double", "half", "float"):
        getattr(model, name)()
        assert all(torch.equal(layer.scale, scale) for layer, (_, scale) in zip(layers(model), before, strict=True))
    assert all(layer.scale.is_meta for layer in layers(copy.deepcopy(model).to("meta")))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_and_pickles(dtype: str, again: Any) -> None:
    """A Segmenter is handed to other processes whole: same labels, and as closed to training as the first."""
    segmenter = segmenter_of(model_of(), quantize="int8", dtype=dtype)
    twin = again(segmenter)
    assert np.array_equal(twin(photo()).labels, segmenter(photo()).labels)
    assert twin.model.quantized == "int8" and {layer.scale.dtype for layer in layers(twin.model)} == {torch.float32}
    with pytest.raises(ValueError, match="for inference only"):
        twin.model.train()
    with pytest.raises(ValueError, match="neither saved nor loaded"):
        twin.model.state_dict()


def test_a_callers_model_stays_as_it_was() -> None:
    model = model_of()
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    labels = segmenter_of(model)(photo()).labels
    segmenter = segmenter_of(model, quantize="int8")
    assert (segmenter(photo()).labels == labels).mean() > 0.9 and not layers(model) and not hasattr(model, "quantized")
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][1] and torch.equal(tensor, before[name][0]), name
    first = segmenter(photo()).labels
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert np.array_equal(segmenter(photo()).labels, first)  # nothing of the copy is the caller's


def test_auto_chooses_the_type_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 for large models where it is the faster one; 8 bits are made of the weights as they came."""
    monkeypatch.setattr(dtypes, "_LARGE", 0)
    monkeypatch.setattr(dtypes, "auto_dtype", lambda device: torch.bfloat16)
    model = model_of()
    suited = dtypes.suited(model, SegmenterOptions(quantize="int8"))
    assert {p.dtype for p in suited.parameters()} == {torch.bfloat16}
    for ours, plain in zip(layers(suited), layers(quantize_encoder(copy.deepcopy(model))), strict=True):
        assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.scale, plain.scale)
    assert dtypes.suited(suited, SegmenterOptions(quantize="int8")) is suited
    kept = dtypes.suited(model, SegmenterOptions(quantize="int8", dtype="float32"))
    assert {p.dtype for p in kept.parameters()} == {torch.float32} and layers(kept)


def test_hooks_see_what_the_layers_give() -> None:
    model = quantize_encoder(model_of())
    expected, seen = run(model)[0], []
    layer = model.encoder.transformer.resblocks[0].mlp.c_fc
    with layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1])):
        assert relative(run(model)[0], expected) < 1e-4
    assert seen == [layer.out_features]


def test_autocast() -> None:
    model = quantize_encoder(model_of())
    expected, _ = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = run(model)
    assert relative(got, expected) < ERROR


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    encoder = quantize_encoder(model_of()).encoder
    with torch.inference_mode():
        expected = encoder(smooth()).patch_tokens
        got = torch.compile(encoder, backend="aot_eager", fullgraph=True)(smooth()).patch_tokens
    assert relative(got, expected) < 1e-4


def test_no_images_and_no_gradients() -> None:
    model = quantize_encoder(model_of())
    images, text = tiny_inputs()
    assert not model(images, text).mask_logits.requires_grad and not model.trainable()
    with pytest.raises(ValueError, match="expected none that require a gradient"):
        model(images.requires_grad_(True), text)
    with pytest.raises(ValueError, match="got an empty batch"):
        model(images[:0].detach(), text)


def test_weights_that_are_no_numbers_leave_the_model_whole() -> None:
    model = model_of()
    with torch.no_grad():
        model.encoder.transformer.resblocks[2].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite numbers to quantise"):
        quantize_encoder(model)
    assert not layers(model) and not hasattr(model, "quantized")


def test_what_is_left_to_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kinds and devices, sizes that the kernels are not built for, and machines without them."""
    assert not runs_kernels(model_of(), "int8-weights") and not runs_kernels(model_of(), None)
    assert not runs_kernels(tiny_model("zegclip"), "int8")  # 48 wide
    assert not runs_kernels(copy.deepcopy(model_of()).to("meta"), "int8")
    monkeypatch.setattr(quantize, "kernels", list)
    assert not runs_kernels(model_of(), "int8")
