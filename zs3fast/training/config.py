"""What a training run is made of: dataclasses, read from YAML, every key checked, every key kept beside the run."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from zs3fast.utils.files import replacing

SETTINGS = ("inductive", "transductive", "supervised")
ONE_STAGE = ("zegclip", "tagclip", "clip_rc")
METHODS = (*ONE_STAGE, "clsclip", "maft")

# Keys that a resumed run may change: where things lie, how they are spread and shown, but not what is computed.
FREE = (
    "output",
    "device",
    "parallel",
    "checkpoint_activations",
    "data.root",
    "data.workers",
    "text.embeddings",
    "checkpoint",
    "log",
    "validation",
)


@dataclass(frozen=True)
class DataConfig:
    """The training images.

    name, root, split, fold: see `zs3fast.data.open_dataset`; "world" has no root.
    recipe: augmentation, "zegclip", "maft", "clsclip" or "flip".  crop_size: side of a training crop in pixels.
    workers: processes that read ahead, for each process that trains.
    negative_prob, drop_unseen_images: of ClsCLIP's pairs, see `zs3fast.data.sampling.PairSet`.
    """

    name: str = "voc20"
    root: str | None = None
    split: str = "train"
    fold: int | None = None
    recipe: str = "zegclip"
    crop_size: int = 512
    workers: int = 4
    negative_prob: float = 0.0
    drop_unseen_images: bool = False


@dataclass(frozen=True)
class TextConfig:
    """Class embeddings: a prepared .npy file with a row for every class, in dataset order, or CLIP's text tower.

    templates: of the text tower: "single", "multi", "maft", "clipseg" or a list; None: those of the method, or "multi".
    shuffle: ClsCLIP alone: each sample of training takes one of the templates at random (None: CLIPSeg's four);
        validation takes the method's own.
    """

    embeddings: str | None = None
    templates: Any = None
    shuffle: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. no_decay: "none" (no parameter is exempt), "norms" or "norms_and_biases".  clip_norm: global L2 norm."""

    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    no_decay: str = "none"
    clip_norm: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the iterations, see `zs3fast.training.schedules`."""

    kind: str = "poly"
    min_lr: float = 1e-6
    power: float = 0.9
    warmup_iterations: int = 1500
    warmup_ratio: float = 1e-6
    cycles: int = 1


@dataclass(frozen=True)
class ProposalConfig:
    """Mask proposals for MAFT.

    proposer: "ground_truth" (connected regions of the labels), or as `zs3fast.proposals.load_mask_proposer` takes it:
        "mask2former:facebook/mask2former-swin-small-coco-instance".
    distillation: hold the student's whole-image scores against the untouched CLIP's.
    generator_eval: run FreeSeg's generator without its dropout; published: with it.
    """

    proposer: str = "ground_truth"
    distillation: bool = True
    generator_eval: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """every: iterations between checkpoints.  keep: how many of the last ones stay.

    export_at: iterations whose weights are also exported for good (a self-training run starts from one of them).
    """

    every: int = 500
    keep: int = 2
    export_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class LogConfig:
    """every: iterations between two lines of the log.  tensorboard: write event files as well."""

    every: int = 50
    tensorboard: bool = True


@dataclass(frozen=True)
class ValidationConfig:
    """every: iterations between two validations (0: none).  limit: images of the validation split (None: all).

    metric: what "best" means; pictures: predictions drawn at each validation.
    """

    every: int = 0
    limit: int | None = None
    split: str = "val"
    metric: str = "hiou"
    pictures: int = 4


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    method, setting: what is trained, and on which labels ("inductive", "transductive", "supervised").
    model: further options of `create_model`: clip, pretrained, num_prompts, loss_weights, ...
    iterations or epochs: length of the run; one of both.
    batch_size: images (ClsCLIP: image-class pairs) an iteration, over all processes.
    micro_batch: images a forward pass; None: batch_size / processes. Less than that accumulates gradients.
    precision: "fp32", or "bf16" for autocast of the model; losses stay in float32.
    checkpoint_activations: recompute frozen encoder blocks in the backward pass instead of storing them.
    parallel: "ddp", or "fsdp" to shard the encoder too.
    init_from: weights to start from (a file of `zs3fast.weights.save`); optimiser and schedule start afresh.
    device: None: cuda if there is one.
    """

    name: str = "run"
    method: str = "zegclip"
    setting: str = "inductive"
    seed: int = 0
    iterations: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    precision: str = "fp32"
    compile: bool = False
    checkpoint_activations: bool = False
    parallel: str = "ddp"
    device: str | None = None
    init_from: str | None = None
    output: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as YAML and JSON hold them."""
        return plain(dataclasses.asdict(self))

    @property
    def folder(self) -> Path:
        """Where the run is kept: `output`, or runs/<name>."""
        return Path(self.output or os.path.join("runs", self.name))


def list_configs() -> list[str]:
    """Names of the published settings that `load_config` knows."""
    folder = resources.files("zs3fast.training") / "configs"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """A configuration from a YAML file or the name of a published setting, with overrides.

    A file may name another one under `base` (a published setting, or a path beside the file), whose keys it changes.

    Args:
        source: path, or one of `list_configs()`.
        overrides: "key=value" with dots between levels, "optimizer.lr=1e-4"; values are YAML.
    Raises:
        FileNotFoundError, ValueError: no such file or name, broken YAML, an unknown key (close ones are named), a value
            of the wrong type or out of range.
    """
    values = _read(source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: expected KEY=VALUE, got {override!r}")
        level = values
        *parents, last = key.strip().split(".")
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise ValueError(f"--set: {parent} in {key!r} holds a value, not further keys")
        level[last] = parse_yaml(text, f"--set {key}")
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from nested dicts; unknown keys and wrong types are errors that name the key."""
    return build(TrainConfig, values, "")


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write every key of the configuration as YAML that `load_config` reads back."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def changed_keys(before: dict[str, Any], after: dict[str, Any], free: typing.Sequence[str] = FREE) -> list[str]:
    """Lines "key: old -> new" for every key that differs between two `to_dict()`s and is not free to change."""
    old, new = _flatten(before), _flatten(after)
    names = sorted(old.keys() | new.keys())
    fixed = [n for n in names if not any(n == f or n.startswith(f"{f}.") for f in free)]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in fixed if old.get(n) != new.get(n)]


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(source: str | os.PathLike[str], beside: Path | None = None, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    text, where, folder = _find(source, beside)
    if where in seen:
        raise ValueError(f"base: {' -> '.join((*seen, where))} goes round in a circle")
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{where}: base must be a name or a path, got {base!r}")
    return _merge(_read(base, folder, (*seen, where)), values)


def _find(source: str | os.PathLike[str], beside: Path | None) -> tuple[str, str, Path | None]:
    """Text of a configuration, what to call it, and its folder if it is a user's file."""
    name = os.fspath(source)
    for path in (Path(name), *([beside / name] if beside else [])):
        if path.is_file():
            return path.read_text(), str(path), path.parent
    known = list_configs()
    if name in known:
        return (resources.files("zs3fast.training") / "configs" / f"{name}.yaml").read_text(), name, None
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; settings: {', '.join(known)}"
    raise FileNotFoundError(f"config: no file and no setting called {name!r}{hint}")


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}: not valid YAML{place}: {getattr(error, 'problem', error)}") from None


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# --- checking --------------------------------------------------------------------------------------------------------


def build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{path or 'config'}: expected keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {_join(path, close[0])!r}?" if close else f"known keys: {', '.join(hints)}"
            raise ValueError(f"config: unknown key {_join(path, key)!r}; {hint}")
    return cls(**{key: _convert(value, hints[key], _join(path, key)) for key, value in values.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), path)
    if hint is Any:
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{path}: expected {len(arguments)} values, got {value!r}")
        return tuple(_convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected keys and values, got {value!r}")
        return dict(value)
    return _scalar(value, hint, path)


def _scalar(value: Any, kind: type, path: str) -> Any:
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and not good and not isinstance(value, bool):
        try:  # YAML 1.1 takes 1e-4 for text
            value, good = float(value), True
        except (TypeError, ValueError):
            pass
    if not good:
        raise ValueError(f"{path}: expected {wanted}, got {value!r}")
    return value


def _check(config: TrainConfig) -> None:
    def choice(key: str, value: str, choices: typing.Sequence[str]) -> None:
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}{hint}")

    def at_least(key: str, value: float | None, least: float) -> None:
        if value is not None and not value >= least:
            raise ValueError(f"{key}: expected at least {least}, got {value}")

    choice("method", config.method, METHODS)
    choice("setting", config.setting, SETTINGS)
    choice("precision", config.precision, ("fp32", "bf16"))
    choice("parallel", config.parallel, ("ddp", "fsdp"))
    choice("data.recipe", config.data.recipe, ("zegclip", "maft", "clsclip", "flip"))
    choice("optimizer.no_decay", config.optimizer.no_decay, ("none", "norms", "norms_and_biases"))
    choice("schedule.kind", config.schedule.kind, ("poly", "cyclic_cosine"))
    if config.setting == "transductive" and config.method not in ONE_STAGE:
        raise ValueError(f"setting: {config.method} has no transductive training, only {', '.join(ONE_STAGE)} have")
    if (config.iterations is None) == (config.epochs is None):
        given = "both" if config.iterations is not None else "neither"
        raise ValueError(f"iterations, epochs: expected one of them, got {given}")
    for key, value, least in (
        ("iterations", config.iterations, 1),
        ("epochs", config.epochs, 1),
        ("batch_size", config.batch_size, 1),
        ("micro_batch", config.micro_batch, 1),
        ("data.crop_size", config.data.crop_size, 1),
        ("data.workers", config.data.workers, 0),
        ("optimizer.lr", config.optimizer.lr, 0),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0),
        ("optimizer.clip_norm", config.optimizer.clip_norm, 0),
        ("schedule.min_lr", config.schedule.min_lr, 0),
        ("schedule.warmup_iterations", config.schedule.warmup_iterations, 0),
        ("schedule.cycles", config.schedule.cycles, 1),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("log.every", config.log.every, 1),
        ("validation.every", config.validation.every, 0),
        ("validation.limit", config.validation.limit, 1),
        ("validation.pictures", config.validation.pictures, 0),
    ):
        at_least(key, value, least)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, _join(path, key))
        else:
            flat[_join(path, key)] = value
    return flat
