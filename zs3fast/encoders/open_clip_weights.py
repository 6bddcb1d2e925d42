"""CLIP weights through open_clip into our image towers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zs3fast.encoders.clip_vit import ClipViT, resize_positions
from zs3fast.utils.open_clip import clip_state


def load_clip_weights(encoder: nn.Module, clip: str | dict[str, Any], pretrained: str) -> None:
    """Copy the image tower of open_clip's `clip` with `pretrained` weights (a tag or a file) into `encoder`.

    The position table is resized bilinearly to the encoder's own grid, once.

    Raises:
        ValueError: open_clip cannot load these weights (unknown tag, no network, not a CLIP checkpoint).
    """
    state = {name: tensor.detach().float() for name, tensor in clip_state(clip, pretrained).image.items()}
    try:
        load_tower_state(encoder, state)
    except RuntimeError as error:  # torch's report of wrong shapes, many lines of it
        shapes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line or "key(s)" in line]
        what = clip if isinstance(clip, str) else "this configuration"
        raise ValueError(
            f"pretrained: the weights {pretrained!r} do not fit the image tower of {what}: {'; '.join(shapes[:3])}"
        ) from None


def load_tower_state(encoder: nn.Module, state: dict[str, Tensor]) -> None:
    """Load an open_clip / OpenAI image tower state dict; parameters CLIP does not have (prompts) stay as they are.

    An encoder that is no ViT holds open_clip's own module as `visual`.
    """
    if not isinstance(encoder, ClipViT):
        encoder.visual.load_state_dict(state)
        return
    state = dict(state)
    side = round((encoder.positional_embedding.shape[0] - 1) ** 0.5)
    state["positional_embedding"] = resize_positions(state["positional_embedding"], (side, side))
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    missing = [name for name in missing if not ("prompt" in name or "region" in name)]
    if missing or unexpected:
        raise ValueError(f"pretrained: not a plain CLIP image tower: missing {missing}, unexpected {list(unexpected)}")
    encoder.reset_added_tokens()
