"""From a configuration to the things a run needs; everything that can be wrong with it is found here."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

from zs3fast import weights
from zs3fast.data import open_dataset
from zs3fast.data.datasets import SegmentationDataset
from zs3fast.data.sampling import PairSet, PositionSampler, TrainingSet, seed_worker
from zs3fast.data.sources import SOURCES
from zs3fast.data.transforms import train_transform
from zs3fast.encoders.clip_vit import resize_positions
from zs3fast.evaluation.evaluate import Reader
from zs3fast.models.base import SegmentationModel, ZeroShotModel
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.models.maft import MAFT
from zs3fast.models.registry import create_model
from zs3fast.proposals.generator import ProposalGenerator, load_generator
from zs3fast.text import TextEncoder, load_text_embeddings, resolve_templates, whole_names
from zs3fast.training.config import GENERATORS, TextConfig, TrainConfig
from zs3fast.training.generating import GeneratorStep
from zs3fast.training.proposing import build_proposal_step
from zs3fast.training.settings import plain
from zs3fast.training.steps import OneStageStep, PairStep, Step
from zs3fast.training.trained import Trained, trained_class
from zs3fast.utils.checkpoint_io import existing, strict_load
from zs3fast.utils.distributed import DistEnv, encoder_blocks
from zs3fast.utils.options import did_you_mean

logger = logging.getLogger("zs3fast")

OF_DATASET = ("num_classes", "class_names", "seen")  # options of the model
POSITIONS = "positional_embedding"
_BLOCKS = 4  # synthetic label maps are so many blocks a side: as many regions as a busy image has


class Vocabulary(Protocol):
    """What a model and its training step need to know of a dataset."""

    @property
    def class_names(self) -> list[str]: ...

    @property
    def seen(self) -> list[int]: ...

    @property
    def ignore_index(self) -> int: ...


@dataclass(frozen=True)
class Shares:
    """How the images of an iteration are split: `micro_batches` forward passes a process of `micro_batch` images."""

    total: int
    per_process: int
    micro_batch: int
    micro_batches: int


def shares(config: TrainConfig, world: int) -> Shares:
    """The split of a batch over processes and forward passes, or an error that names what does not divide."""
    total = config.batch_size
    if total % world:
        raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {total}")
    per_process = total // world
    micro = config.micro_batch or per_process
    if per_process % micro:
        raise ValueError(
            f"micro_batch: expected a divisor of the {per_process} images a process has, got {micro} (batch_size "
            f"{total} "
            f"on {world} processes)"
        )
    return Shares(total, per_process, micro, per_process // micro)


def open_data(config: TrainConfig, split: str | None = None) -> SegmentationDataset:
    """The dataset of the configuration, or of another split of it."""
    data = config.data
    if data.root is None and data.name in SOURCES:  # others say themselves where they lie
        raise ValueError(f"data.root: expected the folder of {data.name} (--data FOLDER), got none")
    return open_dataset(data.name, data.root, split or data.split, fold=data.fold)


def training_set(config: TrainConfig, dataset: SegmentationDataset, model: Trained) -> TrainingSet:
    """Augmented samples by position, normalised as the model wants them."""
    transform = train_transform(
        config.data.recipe,
        config.data.crop_size,
        mean=model.pixel_mean,
        std=model.pixel_std,
        ignore_index=dataset.ignore_index,
    )
    if model.pairwise:
        return PairSet(
            dataset,
            transform,
            config.seed,
            negative_prob=config.data.negative_prob,
            drop_unseen_images=config.data.drop_unseen_images,
        )
    return TrainingSet(dataset, transform, config.seed)


def iterations(config: TrainConfig, samples: int) -> int:
    """Length of the run: as given, or epochs times samples, the last incomplete batch filled up."""
    if config.iterations is not None:
        return config.iterations
    assert config.epochs is not None  # one of both is given
    return -(-config.epochs * samples // config.batch_size)


def make_loader(
    data: TrainingSet, config: TrainConfig, split: Shares, env: DistEnv, start: int, stop: int
) -> DataLoader:
    """Batches of this process from iteration `start` to `stop`, in order, read ahead by worker processes.

    In place of a batch that cannot be read comes the error, for the loop to raise.
    """
    sampler = PositionSampler(start, split.total, env.rank, env.world, stop)
    count = config.data.workers
    return DataLoader(
        Reader(data),
        batch_sampler=sampler,
        num_workers=count,
        pin_memory=env.device.type == "cuda",
        worker_init_fn=seed_worker,
        collate_fn=_collated,
    )


def _collated(items: list[Any]) -> Any:
    """A `collate_fn`: the batch, or the first error in it."""
    return next((item for item in items if isinstance(item, Exception)), None) or default_collate(items)


def build_model(config: TrainConfig, dataset: SegmentationDataset) -> Trained:
    """The model of the method with the dataset's vocabulary, on the CPU, seeded; weights of `init_from` in place."""
    model = new_model(config, dataset)
    if config.init_from is not None:
        _load_initial(model, existing(config.init_from, "init_from"))
    elif config.setting == "transductive":
        raise ValueError(
            "init_from: self-training starts from weights of the inductive run, "
            "expected their file (--init-from runs/.../weights_00010000.safetensors)"
        )
    elif not model.weights_loaded:
        logger.warning("model.pretrained is not set: the image encoder starts from random weights")
    return model


def new_model(config: TrainConfig, dataset: Vocabulary) -> Trained:
    """The model of the method with the dataset's vocabulary, on the CPU, seeded; of `model.pretrained` or random."""
    options = _model_options(config, dataset)
    torch.manual_seed(config.seed)
    if config.method in GENERATORS:
        return ProposalGenerator(method=config.method, **options)
    return create_model(config.method, **options)


def text_embeddings(config: TrainConfig, dataset: SegmentationDataset, model: Trained) -> Tensor:
    """Embeddings [C, D] of all classes of the dataset: the prepared file, or CLIP's text tower.

    A file may leave out the background of a fold, which is never asked for: its row is 0 then. A mask generator, which
    reads no names, has D = 0.
    """
    if isinstance(model, ProposalGenerator):
        if config.text != TextConfig():
            raise ValueError(f"text: {config.method} reads no class names, expected nothing under it")
        return torch.zeros(dataset.num_classes, 0)
    if config.text.shuffle and (not trained_class(config.method).pairwise or config.text.embeddings is not None):
        raise ValueError("text.shuffle: expected false but for clsclip with its text tower, got true")
    if config.text.embeddings is not None:
        rows = load_text_embeddings(config.text.embeddings)
        if len(rows) == dataset.background:  # which stands last
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if len(rows) != dataset.num_classes:
            raise ValueError(
                f"text.embeddings: {config.text.embeddings}: expected a row for each of {dataset.num_classes} classes "
                f"of {dataset.name}, got {len(rows)}"
            )
    else:
        own = None if config.text.shuffle else config.text.templates
        [rows] = _encoded(dataset, model, own or model.templates or "multi")
    if rows.shape[1] != model.embed_dim:
        raise ValueError(
            f"text.embeddings: expected rows of the model's joint width {model.embed_dim}, got {rows.shape[1]}"
        )
    return rows.cpu()


def prompts(config: TrainConfig, dataset: Vocabulary, model: ZeroShotModel) -> Tensor | None:
    """Text tokens [T, C, D] of every template by itself, for a sample to take one of; None: they are not shuffled."""
    if not config.text.shuffle:
        return None
    templates = resolve_templates(config.text.templates or "clipseg")
    return torch.stack(_encoded(dataset, model, *([template] for template in templates))).cpu()


def _encoded(dataset: Vocabulary, model: ZeroShotModel, *templates: str | Sequence[str]) -> list[Tensor]:
    """Embeddings [C, D] of all classes by the text tower of the model's CLIP, for each choice of templates."""
    clip = model.config
    if not isinstance(clip["clip"], str) and clip["pretrained"] is None:
        raise ValueError(
            "text.embeddings: expected a .npy file (--text-embeddings FILE), since this model's CLIP has no text tower "
            "to load"
        )
    encoder = TextEncoder.from_open_clip(clip["clip"], clip["pretrained"] or "openai")
    names = dataset.classes if isinstance(dataset, SegmentationDataset) else whole_names(dataset.class_names)
    return [encoder.encode(names, template, text_token=model.text_token) for template in templates]


def build_step(config: TrainConfig, dataset: Vocabulary, model: Trained, text: Tensor, device: torch.device) -> Step:
    """The training step of the method, on its device, recomputing and compiled where the configuration says so."""
    common: dict[str, Any] = {"ignore_index": dataset.ignore_index, "precision": config.precision}
    step: Step
    if isinstance(model, SegmentationModel):
        step = OneStageStep(model, text, setting=config.setting, **common)
    elif isinstance(model, ProposalGenerator):
        everything = range(len(dataset.class_names))
        classes = everything if config.setting == "supervised" else dataset.seen
        step = GeneratorStep(model, text, classes=classes, **common)
    elif isinstance(model, ClsCLIP):
        step = PairStep(model, text, prompts=prompts(config, dataset, model), **common)
    else:
        assert isinstance(model, MAFT), config.method  # the methods that are trained are these
        step = build_proposal_step(config, model, text, device, common)
    if config.checkpoint_activations:
        checkpoint_blocks(model)
    if config.compile:
        check_compiler(device)
        step.compile()
    return step.to(device).train()


def synthetic_batch(config: TrainConfig, vocabulary: Vocabulary, size: int) -> dict[str, Tensor]:
    """A batch as the loader would give it: noise [B, 3, S, S], labels [B, S, S] of blocks of classes, one asked for."""
    generator = torch.Generator().manual_seed(config.seed)
    side = config.data.crop_size
    blocks = torch.randint(len(vocabulary.class_names), (size, 1, _BLOCKS, _BLOCKS), generator=generator)
    blocks[:, 0, 0, 0] = vocabulary.seen[0]  # a class that is trained on is in every image
    labels = torch.nn.functional.interpolate(blocks.float(), size=(side, side), mode="nearest")[:, 0].long()
    return {
        "images": torch.randn(size, 3, side, side, generator=generator),
        "labels": labels,
        "class_index": torch.full((size,), vocabulary.seen[0]),
    }


def unused_parameters(config: TrainConfig, dataset: Vocabulary, step: Step) -> list[str]:
    """Trained parameters that get no gradient from an image without labels, from which there is least to learn."""
    device = step.text_embeddings.device
    batch = {name: value.to(device) for name, value in synthetic_batch(config, dataset, 1).items()}
    batch["labels"].fill_(dataset.ignore_index)
    count = step.count(batch)
    step.forward(batch, None if count is None else count.clamp_min(1))["loss"].backward()  # not the compiled step
    unused = [name for name, parameter in step.model.trainable().items() if parameter.grad is None]
    step.zero_grad(set_to_none=True)
    return unused


def check_compiler(device: torch.device) -> None:
    """Raise where torch.compile would find no compiler, before anything is trained."""
    cuda = device.type == "cuda"
    if cuda and importlib.util.find_spec("triton") is None:
        raise ValueError("compile: torch.compile needs triton on a GPU (pip install triton), or compile=false")
    variable, usual = ("CC", "gcc") if cuda else ("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None and not (cuda and shutil.which("clang")):
        raise ValueError(
            f"compile: torch.compile needs a compiler, {compiler!r} is not on PATH; install it, name another in "
            f"{variable}, or train with compile=false"
        )


def checkpoint_blocks(model: Trained) -> None:
    """Have every frozen encoder block recompute its activations in the backward pass.

    Frozen blocks draw no random numbers, so none are kept for the second pass. Without gradients nothing changes.
    """
    for block in encoder_blocks(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            continue
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _model_options(config: TrainConfig, dataset: Vocabulary) -> dict[str, Any]:
    known = model_defaults(config.method)
    for key in config.model:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known: {', '.join(sorted(known))}"
            raise ValueError(f"config: unknown key 'model.{key}'{hint}")
    if config.method in GENERATORS:
        return {**_derived_options(config), **config.model}
    supervised = config.setting == "supervised"
    options = {
        "num_classes": len(dataset.class_names),
        "class_names": list(dataset.class_names),
        "seen": list(range(len(dataset.class_names))) if supervised else list(dataset.seen),
    }
    return {**options, **_derived_options(config), **config.model}


def _derived_options(config: TrainConfig) -> dict[str, Any]:
    """Options of the model that follow from the rest of the configuration, unless it says otherwise."""
    options: dict[str, Any] = {}
    proposing = trained_class(config.method).protocol == "proposals"
    if config.method in GENERATORS or not proposing:  # those images are squashed to CLIP's size once cropped
        options["image_size"] = config.data.crop_size
    if config.setting == "transductive":
        options["seen_offset"] = 0.0
    return options


def model_defaults(method: str) -> dict[str, Any]:
    """Keyword arguments of a model and of the bases it hands them on to, with their defaults."""
    model: Any = trained_class(method)
    defaults: dict[str, Any] = {}
    for cls in model.__mro__:
        if "__init__" in cls.__dict__ and cls is not nn.Module and cls is not object:
            for p in inspect.signature(cls.__dict__["__init__"]).parameters.values():
                if p.kind is p.KEYWORD_ONLY:
                    given = None if p.default is p.empty else p.default
                    defaults.setdefault(p.name, given)
    if defaults.get("loss_weights", 0) is None:
        defaults["loss_weights"] = dict(model.default_loss_weights)
    return defaults


def whole_config(config: TrainConfig) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Every key of a run with its value, options of the model included; and those that the dataset decides if unset."""
    of_data = [name for name in OF_DATASET if name not in config.model]
    defaults = model_defaults(config.method)
    derived = _derived_options(config)
    values = {**defaults, **derived, **config.model}
    if isinstance(values.get("loss_weights"), dict):
        values["loss_weights"] = {**defaults["loss_weights"], **values["loss_weights"]}
    model = {name: value for name, value in values.items() if name not in of_data}
    return {**config.to_dict(), "model": plain(model)}, tuple(of_data)


def _load_initial(model: Trained, path: Path) -> None:
    """Weights of an earlier run, by name. What this model does not have (TagCLIP's token) is left out, with a note.

    A position table for images of another size is resized, bilinearly as CLIP's own is.
    """
    source = load_generator(path) if isinstance(model, ProposalGenerator) else weights.load(path)[0]
    state, own = source.state_dict(), model.state_dict()
    for name in own.keys() & state.keys():
        given, wanted = state[name].shape, own[name].shape
        if name.endswith(POSITIONS) and given != wanted and given[1] == wanted[1]:
            side, before = math.isqrt(wanted[0] - 1), math.isqrt(given[0] - 1)
            state[name] = resize_positions(state[name], (side, side))
            logger.warning("init_from: %s resized from %d x %d to %d x %d patches", name, before, before, side, side)
    spare = strict_load(model, state, f"init_from: {path}", spare=lambda name: True)
    if spare:
        logger.warning("init_from: %s holds weights that this model has no use for: %s", path, ", ".join(spare))
