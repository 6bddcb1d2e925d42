"""CLIP weights through open_clip into our image towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from zs3fast.encoders.clip_vit import ClipViT, resize_positions
from zs3fast.utils.checkpoint_io import strict_load
from zs3fast.utils.open_clip import clip_state

if TYPE_CHECKING:
    from zs3fast.encoders.proposal_clip import ProposalClipResNet


def load_clip_weights(encoder: ClipViT | ProposalClipResNet, clip: str | dict[str, Any], pretrained: str) -> None:
    """Copy the image tower of open_clip's `clip` with `pretrained` weights (a tag or a file) into `encoder`.

    The position table is resized bilinearly to the encoder's own grid, once.

    Raises:
        ValueError: open_clip cannot load these weights (unknown tag, no network, not a CLIP checkpoint).
    """
    state = {name: tensor.detach().float() for name, tensor in clip_state(clip, pretrained).image.items()}
    what = clip if isinstance(clip, str) else "this configuration"
    load_tower_state(encoder, state, f"pretrained: {pretrained!r} for the image tower of {what}")


def load_tower_state(
    encoder: ClipViT | ProposalClipResNet, state: dict[str, Tensor], source: str = "pretrained"
) -> None:
    """Load an open_clip / OpenAI image tower state dict; parameters CLIP does not have (prompts) stay as they are.

    An encoder that is no ViT holds open_clip's own module as `visual`.

    Args:
        source: what errors begin with.
    """
    if not isinstance(encoder, ClipViT):
        strict_load(encoder.visual, state, source)
        return
    state, positions = dict(state), "positional_embedding"
    if positions in state and state[positions].dim() == 2:
        side = round((encoder.positional_embedding.shape[0] - 1) ** 0.5)
        state[positions] = resize_positions(state[positions], (side, side))
    strict_load(encoder, state, source, optional=lambda name: "prompt" in name or "region" in name)
    encoder.reset_added_tokens()
