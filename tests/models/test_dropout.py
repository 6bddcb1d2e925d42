"""Dropout is an option of every method that has any, and an attribute of every module that drops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import tiny_inputs, tiny_model
from zs3fast.heads.self_attention import TransformerLayer
from zs3fast.heads.trusty import TrustyLearner

METHODS = ("zegclip", "tagclip", "clip_rc", "clsclip")
VARIANTS = ({}, {"descriptor": "attn:q_s_s"}, {"descriptor": "self_attn:q"}, {"descriptor": "attn_cat:q_s_s"})


def dropping(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "dropout", None), float)]


def twice(model: nn.Module, images: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    return [model(images, text).mask_logits for _ in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_option(method: str) -> None:
    images, text = tiny_inputs()
    assert tiny_model(method).config["dropout"] == 0.1
    off = tiny_model(method, dropout=0.0).train()
    assert torch.equal(*twice(off, images, text))
    assert off.config["dropout"] == 0.0
    assert not torch.equal(*twice(tiny_model(method, dropout=0.5).train(), images, text))


@pytest.mark.parametrize("method", METHODS)
def test_attribute(method: str) -> None:
    images, text = tiny_inputs()
    model = tiny_model(method).train()
    assert not torch.equal(*twice(model, images, text))
    for module in dropping(model):
        module.dropout = 0.0
    assert torch.equal(*twice(model, images, text))


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in METHODS), *(("tagclip", options) for options in VARIANTS[1:])],
    ids=str,
)
def test_the_option_reaches_every_attribute(method: str, options: dict[str, str]) -> None:
    """The attention of TagCLIP's learner said 0, and ClsCLIP's layers held modules that no number could replace."""
    images, text = tiny_inputs()
    model = tiny_model(method, dropout=0.5, **options).train()
    found = [module for module in model.modules() if hasattr(module, "dropout")]
    assert found and {module.dropout for module in found} == {0.5}
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in found:
        module.dropout = 0.0
    assert torch.equal(*twice(model, images, text))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_descriptors_of_tagclip(options: dict[str, str]) -> None:
    images, text = tiny_inputs()
    model = tiny_model("tagclip", dropout=0.0, **options).train()
    assert torch.equal(*twice(model, images, text))


@pytest.mark.parametrize("wrong", [1.0, -0.1, True, "0.1", float("nan")])
def test_what_is_no_share(wrong: object) -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match=r"dropout: expected a share in \[0, 1\), got"):
            tiny_model(method, dropout=wrong)


@pytest.mark.parametrize("share", [0, np.float32(0.25), np.float64(0.5)], ids=repr)
@pytest.mark.parametrize("method", METHODS)
def test_any_number_is_a_share(method: str, share: float) -> None:
    model = tiny_model(method, dropout=share)
    assert type(model.config["dropout"]) is float and model.config["dropout"] == share
    drops = [module for module in dropping(model) if not isinstance(module, nn.MultiheadAttention)]  # parameters alone
    assert drops and {module.dropout for module in drops} == {float(share)}


def test_a_part_and_its_attention_share_one_number() -> None:
    """Parity sets the part's own attribute, or that of every module: either is enough."""
    for part in (TransformerLayer(32, 2, 64, 0.5), TrustyLearner(32, 2, 0.5)):
        x = torch.randn(2, 5, 32)
        assert not torch.equal(part(x), part(x))
        assert not torch.equal(part.attend(x), part.attend(x))  # probabilities are dropped too
        part.dropout = 0.0
        assert part.self_attn.dropout == 0.0 and torch.equal(part(x), part(x))
        part.self_attn.dropout = 0.5
        assert part.dropout == 0.5 and not torch.equal(part(x), part(x))
