"""CLIP weights through open_clip into our image towers."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor

from zs3fast.encoders.clip_vit import ClipViT, resize_positions


def load_clip_weights(encoder: ClipViT, clip: str | dict[str, Any], pretrained: str) -> None:
    """Copy the image tower of open_clip's `clip` with `pretrained` weights (a tag or a file) into `encoder`.

    The position table is resized bilinearly to the encoder's own grid, once.

    Raises:
        ValueError: open_clip cannot load these weights (unknown tag, no network, not a CLIP checkpoint).
    """
    tower = open_clip_model(clip, pretrained).visual
    load_tower_state(encoder, {name: tensor.detach().float() for name, tensor in tower.state_dict().items()})


def open_clip_model(clip: str | dict[str, Any], pretrained: str | None) -> torch.nn.Module:
    """open_clip's own model; failures to find or fetch weights become one clear error."""
    if isinstance(clip, dict):
        sizes = {key: clip[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        model = open_clip.CLIP(**sizes, quick_gelu=clip.get("quick_gelu", False))
        if pretrained is not None:
            open_clip.load_checkpoint(model, pretrained)
        return model
    try:
        return open_clip.create_model(clip, pretrained=pretrained)
    except Exception as error:  # the hub, the network and the unpickler each raise their own
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) or "none"
        raise ValueError(
            f"pretrained: open_clip could not load {pretrained!r} for {clip} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Expected a checkpoint file or one of its "
            f"tags, which are downloaded on first use: {tags}"
        ) from None


def load_tower_state(encoder: ClipViT, state: dict[str, Tensor]) -> None:
    """Load an open_clip / OpenAI image tower state dict; parameters CLIP does not have (prompts) stay as they are."""
    state = dict(state)
    side = round((encoder.positional_embedding.shape[0] - 1) ** 0.5)
    state["positional_embedding"] = resize_positions(state["positional_embedding"], (side, side))
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    missing = [name for name in missing if "prompt" not in name]
    if missing or unexpected:
        raise ValueError(f"pretrained: not a plain CLIP image tower: missing {missing}, unexpected {list(unexpected)}")
