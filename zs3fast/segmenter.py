"""The Segmenter's former address; it lives in `zs3fast.inference.segmenter`."""

from zs3fast.inference.segmenter import Segmenter

__all__ = ["Segmenter"]
