"""Weights on disk: official checkpoints in, safetensors with their configuration out and in."""

from zs3fast.utils.errors import CheckpointError
from zs3fast.weights.files import load, save
from zs3fast.weights.official import load_official, official_keys

__all__ = ["CheckpointError", "load", "load_official", "official_keys", "save"]
