"""zs3fast: CLIP-based zero-shot semantic segmentation on fused kernels.

Importing the package costs nothing: what it offers is imported when it is first used. Its ops register with torch then,
or at once where torch is loaded already (`import zs3fast.ops` does it in any order).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from zs3fast._version import __version__

if TYPE_CHECKING:
    from zs3fast import ops
    from zs3fast.data import open_dataset
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.models.registry import create_model, list_models
    from zs3fast.text import TextEncoder
    from zs3fast.types import Segmentation
    from zs3fast.utils.errors import Zs3fastError
    from zs3fast.weights import load, load_official

_HOMES = {
    "Segmentation": "zs3fast.types",
    "Segmenter": "zs3fast.inference.segmenter",
    "TextEncoder": "zs3fast.text",
    "Zs3fastError": "zs3fast.utils.errors",
    "create_model": "zs3fast.models.registry",
    "list_models": "zs3fast.models.registry",
    "load": "zs3fast.weights",
    "load_official": "zs3fast.weights",
    "open_dataset": "zs3fast.data",
}
__all__ = [
    "Segmentation",
    "Segmenter",
    "TextEncoder",
    "Zs3fastError",
    "__version__",
    "create_model",
    "list_models",
    "load",
    "load_official",
    "open_dataset",
    "ops",
]


def __getattr__(name: str) -> object:
    if name == "ops":
        return importlib.import_module("zs3fast.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zs3fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:  # a program that runs `torch.ops.zs3fast`, or an exported graph, finds the ops
    importlib.import_module("zs3fast.ops")
