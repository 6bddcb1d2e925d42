"""The Segmenter's former address; it lives in `zs3fast.inference.segmenter`."""

from zs3fast.inference.loading import find_weights, is_converted, read_official
from zs3fast.inference.segmenter import Segmenter

__all__ = ["Segmenter", "find_weights", "is_converted", "read_official"]
