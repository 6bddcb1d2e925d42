"""CLIP pre-training on the procedural world, with open_clip's model, tokenizer and loss."""

from tools.world.contrastive.config import ContrastiveConfig, load_contrastive_config

__all__ = ["ContrastiveConfig", "load_contrastive_config", "train_clip"]


def __getattr__(name: str) -> object:
    # Training brings open_clip and the loop; reading a configuration does not need them.
    if name == "train_clip":
        from tools.world.contrastive.run import train_clip

        return train_clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
