"""The 8-bit image tower: close to the float one for every method, forward only, refused where it cannot be."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.goldens_data import relative
from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from zs3fast import weights
from zs3fast.encoders.quantize import quantize_encoder

pytest.importorskip("torchao", reason="needs torchao (pip install 'zs3fast[quantize]')")

METHODS = (*ONE_STAGE, "clsclip", "maft", "maskclip")
ERROR = 0.02  # relative, of the tower's output, for random weights; 0.003 to 0.011 was measured
AGREEMENT = 0.9  # of labels, where all scores are noise: trained models agree more
SIDE = 64


def model_of(method: str, **options: Any) -> nn.Module:
    if method != "maskclip":
        return tiny_model(method, **options)
    from tests.tiny_clip import CONFIG
    from zs3fast import create_model

    torch.manual_seed(0)
    return create_model("maskclip", clip=CONFIG, **options).eval()


def masks() -> Tensor:
    """Five proposals [2, 5, 64, 64] that cover stripes."""
    rows = torch.arange(SIDE).view(1, 1, SIDE, 1) // 13
    return (rows == torch.arange(5).view(1, 5, 1, 1)).float().expand(2, -1, -1, SIDE).contiguous()


def run(method: str, model: nn.Module, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What the tower says, and the labels."""
    out = model(images, text, masks()) if method == "maft" else model(images, text)
    tower = out.proposal_embeddings if method == "maft" else out.patch_tokens
    return tower, model.predict_labels(out, (SIDE, SIDE))


def pictures() -> Tensor:
    """Images [2, 3, 64, 64] of smooth colours, as labels of noise would be noise."""
    coarse = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


@pytest.mark.parametrize("kind", ["int8", "int8-weights"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_labels_stay_close(method: str, kind: str) -> None:
    model = model_of(method)
    inputs = pictures(), tiny_inputs()[1]
    with torch.no_grad():
        expected, labels = run(method, model, *inputs)
    assert quantize_encoder(model, kind) is model and model.quantized == kind
    with torch.inference_mode():
        got, got_labels = run(method, model, *inputs)
    with torch.no_grad():
        again, _ = run(method, model, *inputs)
    assert torch.equal(got, again)
    error, agreement = relative(got, expected), (got_labels == labels).float().mean()
    assert 1e-4 < error < ERROR, f"{error:.4f}"  # below that, nothing would be in 8 bits
    assert agreement > AGREEMENT, f"{agreement:.3f}"


@pytest.mark.parametrize("attention", ["self-self"])
def test_maskclip_with_queries(attention: str) -> None:
    model, images = model_of("maskclip", attention=attention), pictures()
    with torch.inference_mode():
        expected = model.encoder(images).patch_tokens
        got = quantize_encoder(model).encoder(images).patch_tokens
    assert relative(got, expected) < ERROR


def test_bfloat16_models_and_plain_gelu() -> None:
    from tests.tiny_clip import CONFIG

    model = tiny_model("zegclip", clip={**CONFIG, "quick_gelu": False})
    images = pictures()
    with torch.no_grad():
        expected = model.encoder(images).patch_tokens
        half = quantize_encoder(copy.deepcopy(model).bfloat16()).encoder(images.bfloat16()).patch_tokens
        got = quantize_encoder(model).encoder(images).patch_tokens
    assert half.dtype == torch.bfloat16 and relative(half.float(), expected) < ERROR
    assert relative(got, expected) < ERROR


def test_products_are_of_eight_bits() -> None:
    """Weights of blocks hold one byte each, everything else what it held."""
    from torchao.quantization import Int8Tensor

    model = quantize_encoder(tiny_model("tagclip"))
    block = model.encoder.transformer.resblocks[0]
    parts = (block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
    assert all(isinstance(part, Int8Tensor) and part.qdata.dtype == torch.int8 for part in parts)
    cut = block.attn.key_value_weight
    assert cut.qdata.untyped_storage().data_ptr() == block.attn.in_proj_weight.qdata.untyped_storage().data_ptr()
    rest = [p for name, p in model.named_parameters() if ".attn." not in name and ".mlp." not in name]
    assert not any(isinstance(p, Int8Tensor) for p in rest)
    assert not any(isinstance(p, Int8Tensor) for p in model.decoder.parameters())


def test_a_segmenter_takes_it() -> None:
    from zs3fast import Segmenter

    names = [f"thing {i}" for i in range(7)]
    model = tiny_model("zegclip", class_names=names)
    segmenter = Segmenter(model, text_embeddings=tiny_inputs()[1], class_names=names)
    picture = (pictures()[0].permute(1, 2, 0).clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy()
    expected = segmenter(picture).labels
    quantize_encoder(segmenter.model)
    assert (segmenter(picture).labels == expected).mean() > AGREEMENT


def test_forward_only() -> None:
    model = quantize_encoder(tiny_model("zegclip"))
    images, text = tiny_inputs()
    assert not model(images, text).mask_logits.requires_grad and not model.trainable()
    with pytest.raises(ValueError, match="images: expected none that require a gradient"):
        model(images.requires_grad_(True), text)
    with pytest.raises(ValueError, match="quantised .int8., which is for inference only"):
        model.train()
    assert not model.training and model.eval() is model
    model.encoder.train()
    with pytest.raises(ValueError, match="got train mode; call model.eval()"):
        model(images.detach(), text)
    model.eval()
    with pytest.raises(ValueError, match="got an empty batch"):
        model(images[:0].detach(), text)


def test_weights_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    plain = tiny_model("zegclip")
    state = plain.state_dict()
    model = quantize_encoder(copy.deepcopy(plain))
    with pytest.raises(ValueError, match="save before quantising"):
        weights.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="quantise after loading"):
        model.load_state_dict(state)
    weights.save(plain, tmp_path / "model.safetensors")
    images, text = tiny_inputs()
    with torch.no_grad():
        loaded = quantize_encoder(weights.load(tmp_path / "model.safetensors")[0])(images, text)
        assert torch.equal(loaded.mask_logits, model(images, text).mask_logits)
        twin = copy.deepcopy(model)
        assert torch.equal(loaded.mask_logits, twin(images, text).mask_logits)
    with pytest.raises(ValueError, match="for inference only"):
        twin.train()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind: expected one of int8, int8-weights, fp8, got 'int4'"):
        quantize_encoder(tiny_model("zegclip"), "int4")
    with pytest.raises(TypeError, match="model: expected one of create_model or load_official, got Linear"):
        quantize_encoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got train mode; call model.eval"):
        quantize_encoder(tiny_model("zegclip").train())
    model = tiny_model("zegclip")
    with pytest.raises(ValueError, match="expected a model on a CUDA GPU for fp8, got cpu; int8 runs everywhere"):
        quantize_encoder(model, "fp8")
    assert not hasattr(model, "quantized")
    quantize_encoder(model)
    with pytest.raises(ValueError, match="expected an image tower that is not quantised, got int8"):
        quantize_encoder(model, "int8-weights")
    from zs3fast.encoders.proposal_clip import ProposalClipResNet

    resnet = tiny_model("maft")
    resnet.encoder = ProposalClipResNet({"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 16}, 32)
    with pytest.raises(ValueError, match="expected a ViT as image tower, got ProposalClipResNet"):
        quantize_encoder(resnet.eval())
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"needs torchao 0.18 or later: pip install 'zs3fast\[quantize\]'"):
        quantize_encoder(tiny_model("zegclip"))


def test_fp8_names_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from zs3fast.encoders.quantize import _check_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX A6000")
    with pytest.raises(ValueError, match="needs compute capability 8.9 or later, RTX A6000 has 8.6"):
        _check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    _check_fp8(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_arithmetic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies float8 on the CPU too, slowly: with the checks of the card lifted, the path can be run here."""
    from torchao.quantization import Float8Tensor, quant_api

    from zs3fast.encoders import quantize

    monkeypatch.setattr(quantize, "_check_fp8", lambda device: None)
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    model, images = tiny_model("zegclip").to(dtype), pictures().to(dtype)
    with torch.inference_mode():
        expected = model.encoder(images).patch_tokens
        got = quantize_encoder(model, "fp8").encoder(images).patch_tokens
    assert isinstance(model.encoder.transformer.resblocks[0].mlp.c_fc.weight, Float8Tensor)
    assert 1e-3 < relative(got.float(), expected.float()) < 2 * ERROR  # three bits of mantissa


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    encoder, images = quantize_encoder(tiny_model("zegclip")).encoder, pictures()
    with torch.inference_mode():
        expected = encoder(images).patch_tokens
        got = torch.compile(encoder, backend="aot_eager", fullgraph=True)(images).patch_tokens
    assert relative(got, expected) < 1e-5
