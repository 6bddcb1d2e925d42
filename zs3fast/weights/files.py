"""Weight files of our own: the model's tensors, its configuration in the header, and what travels along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import create_model
from zs3fast.proposals.generator import METADATA_KEY as GENERATOR_KEY
from zs3fast.utils.checkpoint_io import (
    compare,
    existing,
    plain_module,
    plain_name,
    read_safetensors,
    read_state_dict,
    sketch,
    strict_load,
    unwrap_state_dict,
)
from zs3fast.utils.errors import CheckpointError, FileFormatError
from zs3fast.utils.files import replacing
from zs3fast.weights.packing import BASE_KEY, put_base, read_base

METADATA_KEY = "zs3fast"
TEXT_PREFIX = "text_encoder."

__all__ = ["CheckpointError", "load", "read_state_dict", "save", "unwrap_state_dict"]


def save(model: nn.Module, path: str | os.PathLike[str], extra_tensors: dict[str, Tensor] | None = None) -> None:
    """Write a model to one safetensors file, its configuration in the header.

    The file is written beside `path` under a temporary name and renamed, so a failed write leaves the old file.

    Args:
        model: the model, also inside torch.compile's or DistributedDataParallel's wrapper.
        extra_tensors: tensors that travel along and are not the model's, such as a text tower under `text_encoder.`.
    """
    model = plain_module(model)
    tensors = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    clash = set(tensors) & set(extra_tensors or {})
    if clash:
        raise ValueError(f"extra_tensors: expected other names than the model's own weights, got {sorted(clash)}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in {**tensors, **(extra_tensors or {})}.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(model.config)})


def load(path: str | os.PathLike[str]) -> tuple[ZeroShotModel, dict[str, Tensor]]:
    """Read a file written by `save`: the model in eval mode, and the extra tensors that travelled along.

    A file that builds on a packed CLIP beside it (`packing.save_on_base`) gives the text tower of that CLIP along.

    Raises:
        CheckpointError: not such a file, truncated, or with weights that do not fit its own configuration.
    """
    path = existing(path)
    tensors, metadata = read_safetensors(path)
    if GENERATOR_KEY in metadata:
        raise CheckpointError(f"{path}: holds a mask generator, expected a model's weights; it goes with --proposer")
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path}: no zs3fast configuration inside. Official checkpoints go through load_official, or "
            "`zs3fast convert`"
        )
    config = _config(metadata[METADATA_KEY], path)
    base = read_base(_beside(path, metadata[BASE_KEY])) if BASE_KEY in metadata else {}
    with _configured(path):
        plan = sketch(lambda: create_model(**config), [*tensors.values(), *base.values()], str(path))
    expected = plan.state_dict()
    own = {name: tensors.pop(name) for name in list(tensors) if name in expected}
    compare(expected, own, str(path), optional=lambda name: bool(base))
    with _configured(path):
        model = create_model(**config)
        model.note_origin(json.loads(metadata[METADATA_KEY]).get("pretrained"))
    if base:
        tower = put_base(model, base, str(path))
        tensors |= {TEXT_PREFIX + name: tensor for name, tensor in tower.items()}
    strict_load(model, own, str(path), optional=lambda name: bool(base))
    return model.eval(), tensors


def _config(header: str, path: Path) -> dict[str, Any]:
    """Arguments of `create_model` from a header; the weights are in the file, so none are fetched."""
    try:
        config = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its zs3fast configuration is not JSON ({type(error).__name__})") from None
    if not isinstance(config, dict) or not isinstance(config.get("method"), str):
        got = f"an object without `method`: {sorted(config)}" if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{path}: its zs3fast configuration is no model's, expected `method`, got {got[:200]}")
    return {**config, "pretrained": None}


def _beside(path: Path, name: str) -> Path:
    """A file of the same folder, which a header names."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise CheckpointError(f"{path}: expected the name of a file in its folder to build on, got {name[:200]!r}")
    return existing(path.with_name(name))


@contextmanager
def _configured(path: Path) -> Iterator[None]:
    """Errors of a constructor as one that names the file: its configuration may hold anything that JSON can."""
    try:
        yield
    except FileFormatError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: its zs3fast configuration cannot be used ({reason})") from None
