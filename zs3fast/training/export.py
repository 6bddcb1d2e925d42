"""Trained weights for use: one file that `zs3fast segment --weights` and `zs3fast.weights.load` take."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.distributed.tensor import DTensor

from zs3fast import weights
from zs3fast.models.registry import create_model
from zs3fast.training.checkpoints import durable
from zs3fast.training.distributed import Workers, whole


def export_weights(model: nn.Module, path: Path, group: Workers) -> None:
    """Write the whole model, frozen weights included; every process must call this."""
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        state = {name: whole(tensor).cpu() for name, tensor in state.items()}
        if group.main:
            model = create_model(**{**model.config, "pretrained": None})
            model.load_state_dict(state)
    if group.main:
        weights.save(model, path)
        durable(path)
