"""Models under inference mode, deep copies, half precision and autocast."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.goldens_data import relative
from tests.tiny import ONE_STAGE, SEEN, tiny_inputs, tiny_labels, tiny_model

pytestmark = pytest.mark.parametrize("method", ONE_STAGE)


def test_what_inference_mode_cached_serves_no_grad_and_copies(method: str) -> None:
    model, inputs = tiny_model(method), tiny_inputs()
    expected = model(*inputs).mask_logits
    with torch.inference_mode():
        assert relative(model(*inputs).mask_logits, expected) < 1e-5
    with torch.no_grad():
        assert relative(model(*inputs).mask_logits, expected) < 1e-5
        assert relative(copy.deepcopy(model)(*inputs).mask_logits, expected) < 1e-5


def test_half_precision(method: str) -> None:
    model, (images, text) = tiny_model(method), tiny_inputs()
    with torch.no_grad():
        expected = model(images, text).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(images, text).mask_logits.float(), expected) < 0.05
        half = copy.deepcopy(model).bfloat16()
        out = half(images.bfloat16(), text.bfloat16())
        wide = torch.float32 if method in ("zegclip", "tagclip") else torch.bfloat16  # whose scores are one product
        assert out.mask_logits.dtype == wide and relative(out.mask_logits.float(), expected) < 0.05
        labels, scores = half.predict_labels(out, (64, 64)), half.class_scores(out, (64, 64))
        assert (labels == scores.argmax(1)).float().mean() > 0.999  # near-ties may fall either way


def test_training_under_autocast(method: str) -> None:
    model, (images, text) = tiny_model(method), tiny_inputs()
    plain = model.loss(model(images, text[SEEN]), tiny_labels())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model(images, text[SEEN]), tiny_labels())["loss"]
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
