"""Sizes of a CLIP image tower, read off open_clip's model configurations or off the shapes of a checkpoint."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import open_clip

# Tower options of open_clip that change the computation in ways `ClipViT` does not follow.
_UNSUPPORTED = {
    "timm_model_name": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "ls_init_value": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "act_kwargs": None,
}


@dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a CLIP ViT. `image_size` is the one CLIP was trained at; `embed_dim` is the joint width D."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    embed_dim: int
    mlp_width: int
    quick_gelu: bool = True

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


def clip_model_config(clip: str | dict[str, Any]) -> dict[str, Any]:
    """The open_clip model configuration (embed_dim, vision_cfg, text_cfg) of a name, or the dict itself.

    Raises:
        ValueError: open_clip has no model of that name; the message lists close ones.
    """
    if isinstance(clip, dict):
        for key in ("embed_dim", "vision_cfg"):
            if key not in clip:
                raise ValueError(f"clip: the configuration has no {key!r}, expected open_clip's embed_dim and vision_cfg")
        return clip
    if not isinstance(clip, str):
        raise TypeError(f"clip: expected an open_clip model name or configuration dict, got {type(clip).__name__}")
    config = open_clip.get_model_config(clip)
    if config is None:
        known = open_clip.list_models()
        close = difflib.get_close_matches(clip, known, n=5, cutoff=0.4) or ["ViT-B-16", "ViT-L-14"]
        raise ValueError(f"clip: open_clip has no model {clip!r}; close names: {', '.join(close)}")
    return config


def vision_config(
    clip: str | dict[str, Any], pretrained: str | None = None, quick_gelu: bool | None = None
) -> ClipVisionConfig:
    """Sizes of the image tower of an open_clip model.

    Args:
        clip: an open_clip ViT name such as "ViT-B-16", or an open_clip configuration dict.
        pretrained: the weights that will be loaded; an open_clip tag decides the activation.
        quick_gelu: overrides the activation. None: what the weights were trained with; a name without weights means
            QuickGELU, since every published checkpoint of these methods grew from OpenAI's CLIP.
    Raises:
        ValueError: unknown name, or a tower that is not a plain CLIP ViT (ResNet, timm, attentional pooling, ...).
    """
    config = clip_model_config(clip)
    vision = config["vision_cfg"]
    name = clip if isinstance(clip, str) else "this configuration"
    odd = [key for key, plain in _UNSUPPORTED.items() if (vision.get(key) or plain) != plain]
    if not isinstance(vision.get("layers", 12), int):
        odd.append("layers (a ResNet)")
    if odd:
        raise ValueError(f"clip: the image tower of {name} is not a plain CLIP ViT ({', '.join(odd)})")
    sizes = vision.get("image_size", 224), vision.get("patch_size", 16)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"clip: image_size and patch_size of {name} must be single integers, got {sizes}")
    image_size, patch_size = sizes
    width = vision.get("width", 768)
    head_width = vision.get("head_width", 64)
    if width % head_width:
        raise ValueError(f"clip: width {width} of {name} is not a multiple of head_width {head_width}")
    if quick_gelu is None:
        quick_gelu = _activation(clip, config, pretrained)
    return ClipVisionConfig(
        width=width,
        layers=vision.get("layers", 12),
        heads=width // head_width,
        patch_size=patch_size,
        image_size=image_size,
        embed_dim=config["embed_dim"],
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        quick_gelu=quick_gelu,
    )


def _activation(clip: str | dict[str, Any], config: dict[str, Any], pretrained: str | None) -> bool:
    if isinstance(clip, str):
        if pretrained is None:
            return True
        tag = open_clip.get_pretrained_cfg(clip, pretrained)
        if tag:
            return bool(tag.get("quick_gelu", False)) or bool(config.get("quick_gelu", False))
    return bool(config.get("quick_gelu", False))
