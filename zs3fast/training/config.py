"""What a training run is made of: read from YAML, every key checked, every key kept beside the run."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from zs3fast.training.settings import (
    Count,
    CountOrZero,
    Decay,
    Flag,
    Number,
    Pair,
    Positive,
    Share,
    Text,
    Texts,
    Values,
    build,
    flatten,
    override,
    plain,
    read_text,
    read_values,
    save_yaml,
)
from zs3fast.utils.options import close_names

if TYPE_CHECKING:
    from dataclasses import dataclass as settings  # what a type checker needs to know of it
else:
    from zs3fast.training.settings import settings

Setting = Literal["inductive", "transductive", "supervised"]
Method = Literal["zegclip", "tagclip", "clip_rc", "clsclip", "maft", "maskformer", "mask2former"]
SETTINGS: tuple[str, ...] = get_args(Setting)
METHODS: tuple[str, ...] = get_args(Method)
GENERATORS = ("maskformer", "mask2former")  # of mask proposals for MAFT

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


@settings
class DataConfig:
    """The training images.

    name, root, split, fold: see `zs3fast.data.open_dataset`; "world" has no root.
    recipe: augmentation, "zegclip", "maft", "clsclip" or "flip".  crop_size: side of a training crop in pixels.
    workers: processes that read ahead, for each process that trains.
    negative_prob, drop_unseen_images: of ClsCLIP's pairs, see `zs3fast.data.sampling.PairSet`.
    """

    name: Text = "voc20"
    root: Text | None = None
    split: Text = "train"
    fold: CountOrZero | None = None
    recipe: Literal["zegclip", "maft", "clsclip", "flip"] = "zegclip"
    crop_size: Count = 512
    workers: CountOrZero = 4
    negative_prob: Share = 0.0
    drop_unseen_images: Flag = False


@settings
class TextConfig:
    """Class embeddings: a prepared .npy file with a row for every class, in dataset order, or CLIP's text tower.

    templates: of the text tower: "single", "multi", "maft", "clipseg" or a list; None: those of the method, or "multi".
    shuffle: ClsCLIP alone: each sample of training takes one of the templates at random (None: CLIPSeg's four);
        validation takes the method's own.
    """

    embeddings: Text | None = None
    templates: Texts = None
    shuffle: Flag = False


@settings
class OptimizerConfig:
    """AdamW. no_decay: "none" (no parameter is exempt), "norms" or "norms_and_biases".  clip_norm: global L2 norm.

    backbone_lr: factor of the learning rate for the backbone of a mask generator.
    """

    lr: Number = 2e-4
    weight_decay: Number = 0.01
    betas: Annotated[tuple[Decay, Decay], Pair] = (0.9, 0.999)
    eps: Number = 1e-8
    no_decay: Literal["none", "norms", "norms_and_biases"] = "none"
    clip_norm: Positive | None = None
    backbone_lr: Number = 1.0


@settings
class ScheduleConfig:
    """Learning rate over the iterations, see `zs3fast.training.schedules`."""

    kind: Literal["poly", "cyclic_cosine"] = "poly"
    min_lr: Number = 1e-6
    power: Number = 0.9
    warmup_iterations: CountOrZero = 1500
    warmup_ratio: Number = 1e-6
    cycles: Count = 1


@settings
class ProposalConfig:
    """Mask proposals for MAFT.

    proposer: "ground_truth" (connected regions of the labels), or as `zs3fast.proposals.load_mask_proposer` takes it:
        "mask2former:facebook/mask2former-swin-small-coco-instance".
    distillation: hold the student's whole-image scores against the untouched CLIP's.
    generator_eval: run FreeSeg's generator without its dropout; published: with it.
    """

    proposer: Text = "ground_truth"
    distillation: Flag = True
    generator_eval: Flag = False


@settings
class CheckpointConfig:
    """every: iterations between checkpoints.  keep: how many of the last ones stay.

    export_at: iterations whose weights are also exported for good (a self-training run starts from one of them).
    """

    every: Count = 500
    keep: Count = 2
    export_at: tuple[Count, ...] = ()


@settings
class LogConfig:
    """every: iterations between two lines of the log.  tensorboard: write event files as well."""

    every: Count = 50
    tensorboard: Flag = True


@settings
class ValidationConfig:
    """every: iterations between two validations (0: none).  limit: images of the validation split (None: all).

    metric: what "best" means; images: predictions drawn at each validation.
    """

    every: CountOrZero = 0
    limit: Count | None = None
    split: Text = "val"
    metric: Text = "hiou"
    pictures: CountOrZero = 4


@settings
class TrainConfig:
    """A training run.

    method, setting: what is trained, and on which labels ("inductive", "transductive", "supervised").
    model: further options of `create_model`: clip, pretrained, num_prompts, loss_weights, ...; of maskformer and
        mask2former those of `zs3fast.proposals.generator.ProposalGenerator`.
    iterations or epochs: length of the run; one of both.
    batch_size: images (ClsCLIP: image-class pairs) an iteration, over all processes.
    micro_batch: images a forward pass; None: batch_size / processes. Less than that accumulates gradients.
    precision: "fp32", or "bf16" for autocast of the model; losses stay in float32.
    checkpoint_activations: recompute frozen encoder blocks in the backward pass instead of storing them.
    parallel: "ddp", or "fsdp" to shard the encoder too.
    init_from: weights to start from (a file of `zs3fast.weights.save`); optimiser and schedule start afresh.
    device: None: cuda if there is one.
    """

    name: Text = "run"
    method: Method = "zegclip"
    setting: Setting = "inductive"
    seed: CountOrZero = 0
    iterations: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 16
    micro_batch: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Flag = False
    checkpoint_activations: Flag = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: Text | None = None
    init_from: Text | None = None
    output: Text | None = None
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
        if self.setting == "transductive":
            from zs3fast.training.trained import trained_class  # torch, which a help text does without

            if not trained_class(self.method).self_training:
                able = ", ".join(method for method in METHODS if trained_class(method).self_training)
                raise ValueError(f"setting: expected one of {able} for transductive training, got {self.method}")
        if self.method in GENERATORS and (self.parallel != "ddp" or self.checkpoint_activations):
            raise ValueError(
                f"parallel, checkpoint_activations: {self.method} trains all of its network, expected ddp and false"
            )
        if (self.iterations is None) == (self.epochs is None):
            given = "both" if self.iterations is not None else "neither"
            raise ValueError(f"iterations, epochs: expected one of them, got {given}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as YAML and JSON hold them."""
        out: dict[str, Any] = plain(dataclasses.asdict(self))
        return out

    @property
    def folder(self) -> Path:
        """Where the run is kept: `output`, or runs/<name>."""
        return Path(self.output or os.path.join("runs", self.name))


def list_configs() -> list[str]:
    """Names of the published settings that `load_config` knows."""
    folder = resources.files("zs3fast.training") / "configs"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def describe(name: str) -> str:
    """The line on a published setting: the first sentence of its file, of at most 76 characters."""
    text, _, _ = _find(name, None)
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    sentence = re.split(r"[.;]( |$)", " ".join(line.lstrip("# ") for line in lines))[0]
    short = sentence if len(sentence) <= 76 else sentence.split(": ")[0]
    return textwrap.shorten(short, 76, placeholder=" ...")


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """A configuration from a YAML file or the name of a published setting, with overrides.

    A file may name another one under `base` (a published setting, or a path beside the file), whose keys it changes.

    Args:
        source: path, or one of `list_configs()`.
        overrides: "key=value" with dots between levels, "optimizer.lr=1e-4"; values are YAML.
    Raises:
        FileNotFoundError, ValueError: no such file or name, broken YAML; `SettingsError`, with a line for each unknown
            key (close ones are named) and each value of the wrong type or out of range.
    """
    return build(TrainConfig, override(read_values(source, _find), overrides))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from nested dicts; unknown keys and wrong types are errors that name the key."""
    return build(TrainConfig, Values(values, "config"))


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write every key of the configuration as YAML that `load_config` reads back."""
    save_yaml(config.to_dict(), path)


def changed_keys(before: dict[str, Any], after: dict[str, Any], free: Sequence[str] = FREE) -> list[str]:
    """Lines "key: old -> new" for every key that differs between two `to_dict()`s and is not free to change.

    A key that was not known yet when `before` was written has its default there.
    """
    defaults, new = flatten(TrainConfig(iterations=1).to_dict()), flatten(after)
    old = {**{name: value for name, value in defaults.items() if name in new}, **flatten(before)}
    names = sorted(old.keys() | new.keys())
    fixed = [n for n in names if not any(n == f or n.startswith(f"{f}.") for f in free)]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in fixed if old.get(n) != new.get(n)]


def _find(name: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """Text of a configuration, what to call it, and its folder if it is a user's file."""
    for path in (Path(name), *([beside / name] if beside else [])):
        if path.is_file():
            return read_text(path), str(path), path.parent
    known = list_configs()
    if name in known:
        return (resources.files("zs3fast.training") / "configs" / f"{name}.yaml").read_text(), name, None
    close = close_names(name, known, 3)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; settings: {', '.join(known)}"
    raise FileNotFoundError(f"config: no file and no setting called {name!r}{hint}")
