"""Learning rates by the specifications' numbers; who trains, who decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import tiny_model
from zs3fast.training.config import OptimizerConfig, ScheduleConfig
from zs3fast.training.optimiser import freeze, make_optimizer
from zs3fast.training.schedules import learning_rate


def test_poly_with_warm_up() -> None:
    schedule = ScheduleConfig()
    assert learning_rate(schedule, 0, 20_000, 2e-4) == pytest.approx(2e-10)  # ZegCLIP: lr at t = 0
    t = 700
    plain = (2e-4 - 1e-6) * (1 - t / 20_000) ** 0.9 + 1e-6
    assert learning_rate(schedule, t, 20_000, 2e-4) == pytest.approx(plain * (1 - (1 - t / 1500) * (1 - 1e-6)))
    assert learning_rate(schedule, 1500, 20_000, 2e-4) == pytest.approx((2e-4 - 1e-6) * 0.925**0.9 + 1e-6)


def test_poly_to_zero() -> None:
    schedule = ScheduleConfig(min_lr=0.0, warmup_iterations=0)
    assert learning_rate(schedule, 0, 1000, 1e-5) == 1e-5
    assert learning_rate(schedule, 999, 1000, 1e-5) == pytest.approx(1e-5 * 0.001**0.9)


def test_cyclic_cosine() -> None:
    schedule = ScheduleConfig(kind="cyclic_cosine", min_lr=1e-5, cycles=4)
    rates = [learning_rate(schedule, t, 400, 1e-3) for t in range(400)]
    assert rates[0] == rates[100] == rates[300] == 1e-3
    assert rates[50] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[99] == pytest.approx(1e-5, rel=0.05) and rates[99] > 1e-5


def test_only_the_recipe_trains() -> None:
    model = tiny_model("zegclip").requires_grad_(True)
    with pytest.raises(ValueError, match="trains nothing"):
        freeze(tiny_model("zegclip").requires_grad_(False))
    model = tiny_model("zegclip")
    trained = freeze(model)
    inside = {name for name in trained if name.startswith("encoder.")}
    assert inside == {
        "encoder.prompt_embeddings",
        "encoder.deep_prompt_embeddings",
        "encoder.prompt_proj.weight",
        "encoder.prompt_proj.bias",
        "encoder.prompt_norm.weight",
        "encoder.prompt_norm.bias",
    }
    outside = {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    assert outside == trained.keys() - inside
    optimizer = make_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]  # ZegCLIP: norms and biases decay too


@pytest.mark.parametrize("no_decay", ["norms", "norms_and_biases"])
def test_exempt_from_decay(no_decay: str) -> None:
    model = tiny_model("tagclip")
    optimizer = make_optimizer(model, OptimizerConfig(no_decay=no_decay))
    decayed, exempt = (set(group["names"]) for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert norms <= exempt
    biases = {name for name in decayed | exempt if name.endswith("bias")}
    assert exempt - norms == (biases - norms if no_decay == "norms_and_biases" else set())


def test_no_state_for_frozen_weights() -> None:
    model = tiny_model("clip_rc")
    freeze(model)
    optimizer = make_optimizer(model, OptimizerConfig())
    for parameter in model.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.trainable().values()}
