"""Sizes of a CLIP image tower, read off open_clip's model configurations or off the shapes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zs3fast.utils.open_clip import clip_model_config, uses_quick_gelu

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


# What timm's towers lack or are, by a word of their names.
_LACKS = {
    "siglip": "without a class token",
    "_gap": "without a class token",
    "vitamin": "without a class token",
    "convnext": "of convolutions",
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


def _oddness(key: str, value: Any) -> str:
    """What an option of open_clip's makes of a tower, in words."""
    if key == "layers":
        return "layers: a ResNet"
    if key != "timm_model_name":
        return f"{key}={value!r}"
    lacks = next((f", {what}" for word, what in _LACKS.items() if word in str(value).casefold()), "")
    return f"timm_model_name: timm's {value}{lacks}"


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
        odd.append("layers")
    if odd:
        what = "; ".join(_oddness(key, vision.get(key)) for key in odd)
        expected = "expected one such as ViT-B-16 or ViT-L-14"
        raise ValueError(f"clip: {expected}, got {name}, whose image tower is no plain CLIP ViT ({what})")
    sizes = vision.get("image_size", 224), vision.get("patch_size", 16)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"clip: expected single integers as image_size and patch_size of {name}, got {sizes}")
    image_size, patch_size = sizes
    width = vision.get("width", 768)
    head_width = vision.get("head_width", 64)
    if width % head_width:
        raise ValueError(f"clip: expected a multiple of head_width {head_width} as width of {name}, got {width}")
    if quick_gelu is None:
        named_only = isinstance(clip, str) and pretrained is None
        quick_gelu = named_only or uses_quick_gelu(clip, pretrained)
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
