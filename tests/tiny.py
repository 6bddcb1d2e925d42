"""Models small enough to run in milliseconds, and real in every part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import zs3fast
from tests.tiny_clip import CONFIG as CLIP

ONE_STAGE = ("clip_rc", "tagclip", "zegclip")  # methods with the common contract (images, text) -> masks
NUM_CLASSES = 7
SEEN = [0, 1, 2, 4, 6]


def tiny_model(method: str, **options: Any) -> nn.Module:
    """A seeded model in eval mode."""
    torch.manual_seed(0)
    if method == "clip_rc":
        options.setdefault("regions", 4)
    settings = {"clip": CLIP, "num_prompts": 3, "image_size": 64, "num_classes": NUM_CLASSES, "seen": SEEN}
    if method in ONE_STAGE:
        settings.update(decoder_heads=4)
    else:
        del settings["num_prompts"]
    if method == "clsclip":
        settings.update(nav_layers=(1, 2), text_token="projected", decoder_ffn=64)
    if method == "maft":
        settings.update(start_layer=1)
    return zs3fast.create_model(method, **{**settings, **options}).eval()


def tiny_inputs(batch: int = 2, size: tuple[int, int] = (64, 64), classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] and unit text embeddings [C, D]."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(classes, 32, generator=generator)
    return torch.randn(batch, 3, *size, generator=generator), text / text.norm(dim=-1, keepdim=True)


def tiny_labels(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Labels [B, H, W] over all classes, in blocks, with an ignored border."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, NUM_CLASSES, (batch, 1, 4, 4), generator=generator).float()
    labels = nn.functional.interpolate(coarse, size=size, mode="nearest").long()[:, 0]
    labels[:, :3] = 255
    return labels
