"""What an efficiency table says beside time and memory: parameters, those that train, multiply-adds of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.setting import ONE_STAGE

# Which parameters the official training code declares trainable, by name; our models say it themselves.
_OFFICIAL: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(ONE_STAGE, lambda name: "prompt" in name or name.startswith("decode_head.")),
    "maft": lambda name: any(part in name for part in (".attn.", ".ln_1.", ".ln_2.", "ln_post.")),
    "clsclip": lambda name: name.startswith(("navigation.", "decoder.")),
}


def parameters(model: nn.Module, method: str, ours: bool) -> dict[str, int]:
    """How many parameters a model has (no text tower in any of them), and how many of them its recipe trains."""
    trains = (lambda name: name in model.trainable()) if ours else _OFFICIAL[method]
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {"parameters": sum(counts.values()), "trainable": sum(n for name, n in counts.items() if trains(name))}


class Counted:
    """A call whose first run is watched by torch's FLOP counter: products and convolutions, the ops' own included.

    gmac: 1e9 multiply-adds of that run (half its FLOPs), what the papers call GFLOPs; None before it.
    """

    def __init__(self, run: Callable[[], Any], model: nn.Module):
        self.run, self.model = run, model
        self.gmac: float | None = None

    def __call__(self) -> Any:
        if self.gmac is not None:
            return self.run()
        with frozen(self.model), without_fast_path(), counter() as counted:
            result = self.run()
        self.gmac = round(counted.get_total_flops() / 2e9, 3)
        return result


def counter() -> FlopCounterMode:
    """torch's counter, with the attention on a CPU that it has no formula for."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _sdpa})


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """torch's own attention without its fused path, of which the counter sees nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside: the counter's hooks refuse one that is a module's input under no_grad."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
