"""Training: configurations, steps, the loop, checkpoints."""

from zs3fast.training.config import TrainConfig, list_configs, load_config

__all__ = ["TrainConfig", "list_configs", "load_config", "train"]


def __getattr__(name: str) -> object:
    # The loop brings datasets, evaluation and torch.distributed; reading a configuration does not need them.
    if name == "train":
        from zs3fast.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
