"""A CLIP in a small file: half precision, its word table without the words it never met; and the one in the package.

open_clip's tokenizer knows 49,408 tokens, the sentences of the procedural world a hundred. Rows of the others are zero,
and a file need not hold zeros.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zs3fast.utils.checkpoint_io import read_safetensors

TINY_CLIP = "zs3fast-tiny-clip"  # as `pretrained`: the CLIP of the procedural world that comes with the package
BASE = "tiny-clip.safetensors"  # its file, and what the small models of a folder build on
TABLE = "token_embedding.weight"
ROWS, TOKENS, SIZE = "token_embedding.rows", "token_embedding.tokens", "token_embedding.size"


def bundled() -> Path:
    """The folder of the small models in the package."""
    return Path(__file__).parents[1] / "weights" / "bundled"


def pack_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP in half precision, its word table as the rows that are not zero and their tokens."""
    packed = {name: tensor.half() for name, tensor in state.items() if name != TABLE}
    table = state[TABLE]
    tokens = table.abs().amax(1).nonzero()[:, 0]
    size = torch.tensor(len(table), dtype=torch.int32)
    return {**packed, ROWS: table[tokens].half(), TOKENS: tokens.int(), SIZE: size}


def unpack_clip(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of open_clip that `pack_clip` was given, rounded to half precision."""
    state = {name: tensor.float() for name, tensor in packed.items() if name not in (ROWS, TOKENS, SIZE)}
    rows = packed[ROWS].float()
    table = rows.new_zeros(int(packed[SIZE]), rows.shape[1])
    table[packed[TOKENS].long()] = rows
    return {**state, TABLE: table}


def tiny_clip_state() -> dict[str, Tensor]:
    """The float32 state dict of the CLIP in the package, in open_clip's layout."""
    return unpack_clip(read_safetensors(bundled() / BASE)[0])
