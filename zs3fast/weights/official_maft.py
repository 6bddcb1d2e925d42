"""Official MAFT checkpoints: only the fine-tuned image tower (and the text tower) is MAFT's own."""

from __future__ import annotations

import re

from torch import Tensor

# Parts that MAFT's encoder does not use: frozen copies of CLIP, the proposal generator and its loss.
_OTHERS = re.compile(r"(T|backbone|sem_seg_head|criterion|clip_adapter|input)\.")
_TEXT = "clip_adapter.clip_model."
_TEXT_PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def maft_key(name: str) -> str:
    """Our parameter name -> the official one."""
    return "IPCLIP." + name.removeprefix("encoder.")


def is_other_part(key: str) -> bool:
    """Whether an official key belongs to something else than the mask-aware image tower."""
    return _OTHERS.match(key) is not None


def text_tower(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The CLIP text tower inside a MAFT checkpoint, its keys under `prefix`; empty if there is none."""
    tower = {key[len(_TEXT) :]: value for key, value in state.items() if key.startswith(_TEXT)}
    return {prefix + key: value for key, value in tower.items() if key.startswith(_TEXT_PARTS)}
