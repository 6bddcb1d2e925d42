"""Small files: models as what they add to a packed CLIP (`utils/packed_clip.py`).

A model that was trained on a frozen CLIP holds that CLIP again, and its file need not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
from torch import Tensor

from zs3fast.encoders.open_clip_weights import load_tower_state
from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import list_models
from zs3fast.utils.checkpoint_io import read_safetensors
from zs3fast.utils.errors import CheckpointError
from zs3fast.utils.files import replacing
from zs3fast.utils.limits import check_unpacked
from zs3fast.utils.packed_clip import BASE, ROWS, SIZE, TOKENS, bundled, pack_clip, unpack_clip

__all__ = [
    "BASE",
    "BASE_KEY",
    "bundled",
    "pack_clip",
    "packed_models",
    "packed_path",
    "put_base",
    "read_base",
    "save_on_base",
    "unpack_clip",
]

BASE_KEY = "zs3fast_base"  # in a header: the name of the packed CLIP beside the file
_VISUAL = "visual."
_SCALARS = ("logit_scale", "logit_bias")


def packed_path(folder: Path, method: str) -> Path:
    """Where a folder of small models has the one of a method."""
    return folder / f"tiny-{method}.safetensors"


def packed_models(folder: Path) -> dict[str, Path]:
    """The small models in a folder: method -> weight file."""
    found = {method: packed_path(folder, method) for method in list_models()}
    return {method: path for method, path in found.items() if path.is_file()}


def save_on_base(
    model: ZeroShotModel, path: str | os.PathLike[str], base: str | os.PathLike[str], names: Iterable[str], key: str
) -> None:
    """Write the named weights of a model in half precision; the others are those of the packed CLIP beside the file.

    Args:
        base: the packed CLIP, in the same folder as `path`.
        names: of `model.state_dict()`.  key: of the configuration in the header.
    """
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().half().contiguous() for name in names}
    with replacing(path) as temporary:
        header = {key: json.dumps({**model.config, "pretrained": None}), BASE_KEY: Path(base).name}
        safetensors.torch.save_file(tensors, temporary, metadata=header)


def read_base(path: Path) -> dict[str, Tensor]:
    """The weights of a packed CLIP's file, unpacked."""
    packed, _ = read_safetensors(path)
    missing = [name for name in (ROWS, TOKENS, SIZE) if name not in packed]
    if missing:
        raise CheckpointError(f"{path}: not a packed CLIP, it has no {', '.join(missing)}")
    rows, tokens, size = packed[ROWS], packed[TOKENS].long(), packed[SIZE]
    fits = rows.dim() == 2 and tokens.shape == rows.shape[:1] and size.numel() == 1
    if not fits or (len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < int(size)):
        raise CheckpointError(f"{path}: not a packed CLIP, the rows of its word table do not fit its size")
    check_unpacked(int(size) * rows.shape[1] * 4, str(path), "its word table")
    return unpack_clip(packed)


def put_base(model: ZeroShotModel, clip: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Load the image tower of a CLIP (`read_base`) into a model's encoder; the weights of its text tower."""
    visual = {k.removeprefix(_VISUAL): v for k, v in clip.items() if k.startswith(_VISUAL)}
    load_tower_state(model.encoder, visual, source)
    return {name: tensor for name, tensor in clip.items() if not name.startswith(_VISUAL) and name not in _SCALARS}
