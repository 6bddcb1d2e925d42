"""zs3fast: CLIP-based zero-shot semantic segmentation on fused kernels."""

from zs3fast import ops
from zs3fast._version import __version__
from zs3fast.models.registry import create_model, list_models
from zs3fast.weights import load_official

__all__ = ["Segmenter", "__version__", "create_model", "list_models", "load_official", "ops"]


def __getattr__(name: str) -> object:
    # The segmenter brings image reading and text encoders; a training script does not need them.
    if name == "Segmenter":
        from zs3fast.inference.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module 'zs3fast' has no attribute {name!r}")
