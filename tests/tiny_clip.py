"""A CLIP small enough for tests, with open_clip's own modules, random weights and the real tokenizer."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 48, "patch_size": 16, "head_width": 12},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


def tiny_clip(seed: int = 0) -> open_clip.CLIP:
    """Random weights, biases and norms included, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_state(model: open_clip.CLIP, prefix: str = "") -> dict[str, torch.Tensor]:
    """The text tower's tensors under open_clip's (OpenAI's) keys."""
    parts = ("positional_embedding", "token_embedding.", "text_projection", "ln_final.", "transformer.")
    return {f"{prefix}{key}": value for key, value in model.state_dict().items() if key.startswith(parts)}
