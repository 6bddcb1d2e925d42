"""What must not be computed in half precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off on a device; nothing on the meta device, where torch has none and raises."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
