"""Trained weights for use: one file that `zs3fast segment --weights` and `zs3fast.weights.load` take."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from zs3fast import weights
from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import create_model
from zs3fast.proposals.generator import ProposalGenerator, save_generator
from zs3fast.text import TextEncoder
from zs3fast.training.checkpoints import durable
from zs3fast.training.trained import Trained
from zs3fast.utils.distributed import DistEnv, full_tensor, is_sharded
from zs3fast.weights.files import TEXT_PREFIX


def export_weights(model: Trained, path: Path, env: DistEnv) -> None:
    """Write the whole model, frozen weights included; every process must call this.

    A CLIP that has no name to find its text tower by takes it along. A mask generator is a proposer's file.
    """
    if isinstance(model, ProposalGenerator):
        if env.main:
            save_generator(model, path)
            durable(path)
        return
    tower = _own_tower(model) if env.main else {}
    model = whole_model(model)
    if env.main:
        weights.save(model, path, tower)
        durable(path)


def whole_model(model: ZeroShotModel) -> ZeroShotModel:
    """The model, or where it is sharded a whole copy of it on the CPU; every process must call this."""
    state = model.state_dict()
    if not any(is_sharded(tensor) for tensor in state.values()):
        return model
    copy = create_model(**{**model.config, "pretrained": None})
    copy.load_state_dict({name: full_tensor(tensor).cpu() for name, tensor in state.items()})
    return copy


def _own_tower(model: ZeroShotModel) -> dict[str, Tensor]:
    clip, pretrained = model.config["clip"], model.config.get("pretrained")
    if isinstance(clip, str) or pretrained is None:
        return {}
    tower = TextEncoder.from_open_clip(clip, pretrained, cache=False).tower
    return {TEXT_PREFIX + name: tensor for name, tensor in tower.state_dict().items()}
