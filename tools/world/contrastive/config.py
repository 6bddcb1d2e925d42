"""What a contrastive run is made of; read from YAML like the other runs, and kept beside the run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zs3fast.training.config import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    build,
    parse_yaml,
    plain,
)
from zs3fast.utils.files import replacing

# Keys that a resumed run may change.
FREE = ("output", "device", "data.workers", "checkpoint", "log", "probe_images")


@dataclass(frozen=True)
class CaptionConfig:
    """The (scene, caption) pairs.  size: side of a scene in pixels.  workers: processes that paint ahead."""

    size: int = 64
    workers: int = 1


@dataclass(frozen=True)
class ContrastiveConfig:
    """A contrastive run.

    clip: open_clip's configuration: embed_dim, quick_gelu, vision_cfg, text_cfg.
    batch_size: pairs that are told apart from each other in an iteration.
    precision: "fp32", or "bf16" for autocast of both towers.
    probe_images: pictures a class of the zero-shot probe at every checkpoint; 0: none.
    device: None: cuda if there is one.  output: the run's folder; None: runs/<name>.
    """

    clip: dict[str, Any]
    name: str = "clip"
    seed: int = 0
    iterations: int = 1000
    batch_size: int = 256
    precision: str = "fp32"
    probe_images: int = 4
    device: str | None = None
    output: str | None = None
    data: CaptionConfig = field(default_factory=CaptionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in self.clip]
        if missing:
            raise ValueError(f"clip: the configuration lacks {', '.join(missing)}, expected those of open_clip")
        unknown = sorted(set(self.clip) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"})
        if unknown:
            raise ValueError(f"clip: unknown {', '.join(unknown)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: expected fp32 or bf16, got {self.precision!r}")
        side = self.clip["vision_cfg"].get("image_size", 224)
        if side != self.data.size:
            raise ValueError(f"data.size: expected clip.vision_cfg.image_size, {side}, got {self.data.size}")
        for key, value, least in (
            ("seed", self.seed, 0),
            ("iterations", self.iterations, 1),
            ("batch_size", self.batch_size, 2),
            ("probe_images", self.probe_images, 0),
            ("data.workers", self.data.workers, 0),
            ("optimizer.lr", self.optimizer.lr, 0),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("log.every", self.log.every, 1),
        ):
            if not value >= least:
                raise ValueError(f"{key}: expected at least {least}, got {value}")

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
    name = os.fspath(source)
    own = Path(__file__).parents[1] / "configs"
    known = sorted(entry.name[:-5] for entry in own.iterdir())
    path = Path(name) if Path(name).is_file() else own / f"{name}.yaml" if name in known else None
    if path is None:
        raise FileNotFoundError(f"config: no file {name!r}; those of the package: {', '.join(known)}")
    values = parse_yaml(path.read_text(encoding="utf-8"), name)
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected keys and values, got {type(values).__name__}")
    return contrastive_from_dict(values)


def contrastive_from_dict(values: dict[str, Any]) -> ContrastiveConfig:
    """A configuration from nested dicts; unknown keys and wrong types are errors that name the key."""
    return build(ContrastiveConfig, {"clip": {}, **values}, "")


def save_contrastive_config(config: ContrastiveConfig, path: str | os.PathLike[str]) -> None:
    """Write every key as YAML that `load_contrastive_config` reads back."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
