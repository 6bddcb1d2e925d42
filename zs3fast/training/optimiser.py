"""AdamW over what the recipe trains, in groups by weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zs3fast.proposals.generator import ProposalGenerator
from zs3fast.training.config import OptimizerConfig
from zs3fast.training.trained import Trained
from zs3fast.utils.distributed import DistEnv, full_tensor


def freeze(model: Trained) -> dict[str, nn.Parameter]:
    """The parameters that the method's recipe trains, by name; all others stop requiring gradients."""
    trained = model.trainable()
    if not trained:
        raise ValueError(f"model: {type(model).__name__} says that its recipe trains nothing")
    kept = {id(parameter) for parameter in trained.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return trained


def parameter_groups(model: Trained, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups {"params", "names", "weight_decay", "lr_factor"} of the trained parameters: decayed ones first.

    no_decay: "none" decays all; "norms" exempts the parameters of LayerNorms, "norms_and_biases" every bias as well.
    lr_factor: 1, and `backbone_lr` for the backbone of a mask generator.
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

    backbone = model.backbone() if isinstance(model, ProposalGenerator) else {}
    split: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.trainable().items():
        factor = config.backbone_lr if name in backbone else 1.0
        split.setdefault((exempt(name, parameter), factor), []).append((name, parameter))
    return [
        {
            "names": [name for name, _ in members],
            "params": [parameter for _, parameter in members],
            "weight_decay": 0.0 if without else config.weight_decay,
            "lr_factor": factor,
        }
        for (without, factor), members in sorted(split.items(), key=lambda item: item[0])
    ]


class FlaggedAdamW(torch.optim.AdamW):
    """AdamW with the flag that its fused form reads: while `found_inf` is 1 a step changes nothing."""

    found_inf: Tensor


def make_optimizer(model: Trained, config: OptimizerConfig) -> FlaggedAdamW:
    """AdamW whose state holds the trained parameters and nothing of the frozen ones.

    Fused, for its flag on the device: while `found_inf` is 1 a step changes nothing, neither weights nor state.
    """
    groups = parameter_groups(model, config)
    optimizer = FlaggedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer.found_inf = torch.zeros((), device=next(iter(model.trainable().values())).device)
    return optimizer


def finite_step(
    optimizer: FlaggedAdamW, terms: Mapping[str, Tensor], env: DistEnv, clip_norm: float | None = None
) -> Tensor:
    """One step of the optimiser, unless a loss term or the gradients are not finite: then neither this nor a later one.

    The flag is raised on the device, by all processes alike, and nothing is waited for: weights and state stay those of
    the last finite iteration until the log finds the numbers.

    Args:
        terms: this process's loss terms.  clip_norm: largest L2 norm of all gradients together.
    Returns:
        The norm of the gradients, before clipping.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    norm = full_tensor(norm.detach())
    finite = torch.stack([norm, *(term.detach().to(norm) for term in terms.values())]).isfinite().all()
    bad = env.total((~finite).to(optimizer.found_inf)) > 0
    optimizer.found_inf.copy_(torch.maximum(optimizer.found_inf, bad.to(optimizer.found_inf)))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
