"""Learning rates by the specifications' numbers; who trains, who decays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import tiny_model
from zs3fast.training.config import OptimizerConfig, ScheduleConfig
from zs3fast.training.optimiser import finite_step, freeze, make_optimizer
from zs3fast.training.schedules import learning_rate
from zs3fast.utils.distributed import DistEnv


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


class Trained(nn.Linear):
    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


@pytest.mark.parametrize("bad", ["loss", "loss_dice", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_changes_neither_weights_nor_state(bad: str, value: float) -> None:
    """The loss used to be looked at some iterations after it had gone into the weights."""
    torch.manual_seed(0)
    model = Trained(3, 2)
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1))
    env = DistEnv(0, 1, torch.device("cpu"))

    def step(terms: dict[str, Tensor]) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if bad == "gradient" and terms:
            model.weight.grad[1, 1] = value
        finite_step(optimizer, {"loss": torch.tensor(1.0), "loss_dice": torch.tensor(0.5), **terms}, env)
        assert all(parameter.grad is None for parameter in model.parameters())
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]

    start = [parameter.detach().clone() for parameter in model.parameters()]
    before = step({})
    assert not any(torch.equal(a, b) for a, b in zip(start, before))
    after = step({bad: torch.tensor(value)} if bad != "gradient" else {"loss": torch.tensor(1.0)})
    later = step({})  # the run has gone wrong: it does not go on behind the reader's back
    for first, second, third in zip(before, after, later, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


def test_the_norm_is_that_before_clipping() -> None:
    model = Trained(3, 2, bias=False)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0))
    start = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 2.0)
    norm = finite_step(optimizer, {}, DistEnv(0, 1, torch.device("cpu")), clip_norm=0.6)
    clipped = 2.0 * 0.6 / 24**0.5  # to within torch's 1e-6
    assert float(norm) == pytest.approx(24**0.5)
    assert (start - model.weight).detach().numpy() == pytest.approx(clipped / (clipped + 1.0), rel=1e-4)
