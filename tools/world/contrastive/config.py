"""What a contrastive run is made of; read from YAML like the other runs, and kept beside the run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from zs3fast.training.config import CheckpointConfig, LogConfig, OptimizerConfig, ScheduleConfig
from zs3fast.training.settings import (
    Count,
    CountOrZero,
    Text,
    Values,
    build,
    plain,
    read_text,
    read_values,
    save_yaml,
    settings,
)
from zs3fast.utils.options import did_you_mean

_CLIP_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")

# Keys that a resumed run may change.
FREE = ("output", "device", "data.workers", "checkpoint", "log", "probe_images")


@settings
class CaptionConfig:
    """The (scene, caption) pairs.  size: side of a scene in pixels.  workers: processes that paint ahead."""

    size: Count = 64
    workers: CountOrZero = 1


@settings
class ContrastiveConfig:
    """A contrastive run.

    clip: open_clip's configuration: embed_dim, quick_gelu, vision_cfg, text_cfg.
    batch_size: pairs that are told apart from each other in an iteration.
    precision: "fp32", or "bf16" for autocast of both towers.
    probe_images: images a class of the zero-shot probe at every checkpoint; 0: none.
    device: None: cuda if there is one.  output: the run's folder; None: runs/<name>.
    """

    clip: dict[str, Any]
    name: Text = "clip"
    seed: CountOrZero = 0
    iterations: Count = 1000
    batch_size: Annotated[int, Strict(), Field(ge=2)] = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    probe_images: CountOrZero = 4
    device: Text | None = None
    output: Text | None = None
    data: CaptionConfig = field(default_factory=CaptionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        missing = [key for key in _CLIP_KEYS[:3] if key not in self.clip]
        if missing:
            raise ValueError(f"clip: the configuration lacks {', '.join(missing)}, expected those of open_clip")
        for key in self.clip:
            if key not in _CLIP_KEYS:
                raise ValueError(f"clip: unknown {key}{did_you_mean(key, _CLIP_KEYS)}")
        side = self.clip["vision_cfg"].get("image_size", 224)
        if side != self.data.size:
            raise ValueError(f"data.size: expected clip.vision_cfg.image_size, {side}, got {self.data.size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as YAML and JSON hold them."""
        return plain(dataclasses.asdict(self))

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.output or os.path.join("runs", self.name))


def load_contrastive_config(source: str | os.PathLike[str] = "world_clip") -> ContrastiveConfig:
    """A configuration from a YAML file, or the one that comes with the package, "world_clip".

    Raises:
        FileNotFoundError, ValueError: no such file or name, broken YAML, an unknown key, a value of the wrong type or
            out of range.
    """
    return build(ContrastiveConfig, read_values(source, _find))


def contrastive_from_dict(values: dict[str, Any]) -> ContrastiveConfig:
    """A configuration from nested dicts; unknown keys and wrong types are errors that name the key."""
    return build(ContrastiveConfig, Values(values, "config"))


def save_contrastive_config(config: ContrastiveConfig, path: str | os.PathLike[str]) -> None:
    """Write every key as YAML that `load_contrastive_config` reads back."""
    save_yaml(config.to_dict(), path)


def _find(name: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """Text of a configuration, what to call it, and its folder if it is a user's file."""
    own = Path(__file__).parents[1] / "configs"
    known = sorted(entry.name[:-5] for entry in own.iterdir())
    for path in (Path(name), *([beside / name] if beside else [])):
        if path.is_file():
            return read_text(path), str(path), path.parent
    if name in known:
        return read_text(own / f"{name}.yaml"), name, None
    raise FileNotFoundError(f"config: no file {name!r}; those of the package: {', '.join(known)}")
