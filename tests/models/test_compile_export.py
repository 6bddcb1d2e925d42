"""A full model under torch.compile(fullgraph=True) and torch.export, image to labels."""

from __future__ import annotations

import pytest
import torch

from tests.goldens_data import relative
from tests.tiny import ONE_STAGE, SEEN, tiny_inputs, tiny_labels, tiny_model


class ImageToLabels(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(images, text)
        return out.mask_logits, self.model.predict_labels(out, self.size)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["native", "resized"])
@pytest.mark.parametrize("method", ONE_STAGE)
def test_compile_fullgraph(method: str, size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    pipeline, inputs = ImageToLabels(tiny_model(method), size), tiny_inputs()
    with torch.no_grad():
        masks, labels = pipeline(*inputs)
        got_masks, got_labels = torch.compile(pipeline, fullgraph=True)(*inputs)
    assert relative(got_masks, masks) < 1e-5
    assert (got_labels == labels).float().mean() > 0.999


@pytest.mark.parametrize("method", ONE_STAGE)
def test_export(method: str) -> None:
    pipeline, inputs = ImageToLabels(tiny_model(method), (64, 64)), tiny_inputs()
    with torch.no_grad():
        masks, labels = pipeline(*inputs)
        got_masks, got_labels = torch.export.export(pipeline, inputs).module()(*inputs)
    assert relative(got_masks, masks) < 1e-5
    assert (got_labels == labels).float().mean() > 0.999


@pytest.mark.parametrize("method", ONE_STAGE)
def test_model_output_can_be_exported(method: str) -> None:
    model, inputs = tiny_model(method), tiny_inputs()
    with torch.no_grad():
        out = torch.export.export(model, inputs).module()(*inputs)
    assert relative(out.mask_logits, model(*inputs).mask_logits) < 1e-5


def test_training_step_compiles() -> None:
    torch._dynamo.reset()
    model = tiny_model("tagclip")  # eval mode: dropout draws differ under compile

    def step(images: torch.Tensor, text: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model.loss(model(images, text), labels)["loss"]

    images, text = tiny_inputs()
    plain = step(images, text[SEEN], tiny_labels())
    compiled = torch.compile(step, fullgraph=True)(images, text[SEEN], tiny_labels())
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    compiled.backward()
    assert model.trusty_token.grad.abs().sum() > 0
