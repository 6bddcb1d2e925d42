"""Reading and writing weight files: never unpickles code, never leaves half a file."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from zs3fast.models.registry import create_model
from zs3fast.utils.errors import CheckpointError
from zs3fast.utils.files import replacing
from zs3fast.weights.packing import BASE_KEY, put_base

METADATA_KEY = "zs3fast"
TEXT_PREFIX = "text_encoder."


def save(model: nn.Module, path: str | os.PathLike[str], extra_tensors: dict[str, Tensor] | None = None) -> None:
    """Write a model to one safetensors file, its configuration in the header.

    The file is written beside `path` under a temporary name and renamed, so a failed write leaves the old file.

    Args:
        extra_tensors: tensors that travel along and are not the model's, such as a text tower under `text_encoder.`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    clash = set(tensors) & set(extra_tensors or {})
    if clash:
        raise ValueError(f"extra_tensors: {sorted(clash)} are names of the model's own weights")
    tensors.update({name: tensor.detach().cpu().contiguous() for name, tensor in (extra_tensors or {}).items()})
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(model.config)})


def load(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Read a file written by `save`: the model in eval mode, and the extra tensors that travelled along.

    A file that builds on a packed CLIP beside it (`packing.save_on_base`) gives the text tower of that CLIP along.

    Raises:
        CheckpointError: not such a file, truncated, or with weights that do not fit its own configuration.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(_existing(path), framework="pt") as file:
            metadata = file.metadata() or {}
            header = metadata.get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if header is None:
        raise CheckpointError(
            f"{path}: no zs3fast configuration inside. Official checkpoints go through load_official, or "
            "`zs3fast convert`"
        )
    config = json.loads(header)
    model = create_model(**{**config, "pretrained": None})  # the weights are here
    model.note_origin(config.get("pretrained"))
    own = {name: tensors.pop(name) for name in list(tensors) if name in model.state_dict()}
    if BASE_KEY in metadata:
        tower = put_base(model, _existing(path.with_name(metadata[BASE_KEY])))
        own = {**model.state_dict(), **own}
        tensors |= {TEXT_PREFIX + name: tensor for name, tensor in tower.items()}
    strict_load(model, own, str(path))
    return model.eval(), tensors


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; wrappers such as {"state_dict": ...} are opened.

    Only `torch.load(weights_only=True)` is used: a file with pickled code is refused, not run.
    """
    path = _existing(Path(path))
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise CheckpointError(
            f"{path}: holds pickled objects other than tensors and is not loaded, since that could run code "
            f"({reason.strip()})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a readable torch file, truncated perhaps ({type(error).__name__}: {error})"
        ) from None
    return unwrap_state_dict(content, str(path))


def unwrap_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Open {"state_dict": ...} / {"model": ...} wrappers, strip a leading "module.", take NumPy arrays as tensors."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{source}: expected a state dict of named tensors, got {type(content).__name__}")
    content = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in content.items()
    }
    odd = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{source}: entries that are not named tensors: {odd[:5]}")
    return {key.removeprefix("module."): value for key, value in content.items()}


def strict_load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every weight or raise with three lists: missing, unexpected, wrong shape."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(report(source, missing, unexpected, shapes))
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def report(source: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """One message for a checkpoint that does not fit."""
    lines = [f"{source}: the weights do not fit the model"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
        lines.append(f"  {title} ({len(names)}): {shown or 'none'}")
    return "\n".join(lines)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    return path
