"""AdamW over what the recipe trains, in groups by weight decay."""

from __future__ import annotations

import torch
from torch import nn

from zs3fast.training.config import OptimizerConfig


def freeze(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the method's recipe trains, by name; all others stop requiring gradients."""
    trained = model.trainable()
    if not trained:
        raise ValueError(f"model: {type(model).__name__} says that its recipe trains nothing")
    kept = {id(parameter) for parameter in trained.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return trained


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Groups {"params", "names", "weight_decay"} of the trained parameters: decayed ones first.

    no_decay: "none" decays all; "norms" exempts the parameters of LayerNorms, "norms_and_biases" every bias as well.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for parameter in module.parameters(recurse=False)
    }

    def exempt(name: str, parameter: nn.Parameter) -> bool:
        if config.no_decay == "none":
            return False
        bias = name.rpartition(".")[2].endswith("bias")  # also `in_proj_bias`
        return id(parameter) in norms or (bias and config.no_decay == "norms_and_biases")

    split: dict[bool, list[tuple[str, nn.Parameter]]] = {False: [], True: []}
    for name, parameter in model.trainable().items():
        split[exempt(name, parameter)].append((name, parameter))
    return [
        {
            "names": [name for name, _ in members],
            "params": [parameter for _, parameter in members],
            "weight_decay": 0.0 if without else config.weight_decay,
        }
        for without, members in split.items()
        if members
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW whose state holds the trained parameters and nothing of the frozen ones."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One rate for all groups, as every recipe here has it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
