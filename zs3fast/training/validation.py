"""Scores and images during training, by the evaluation room."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from zs3fast.data import test_pairs
from zs3fast.data.datasets import SegmentationDataset
from zs3fast.evaluation.drawing import panels
from zs3fast.evaluation.evaluate import Report, evaluate, evaluate_pairs
from zs3fast.evaluation.pairs import PairSegmenter
from zs3fast.evaluation.protocols import labeller, resolve_setting
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.proposals.generator import ProposalGenerator
from zs3fast.text import whole_names
from zs3fast.training import generating, setup
from zs3fast.training.config import GENERATORS, TrainConfig
from zs3fast.training.export import whole_model
from zs3fast.training.logs import RunLog
from zs3fast.training.trained import Trained, trained_class
from zs3fast.utils.distributed import DistEnv
from zs3fast.utils.rendering import save_image

METRICS = ("hiou", "miou", "miou_seen", "miou_unseen", "pacc", "macc")
PAIR_METRICS = ("miou", "fb_iou")


def validate(
    config: TrainConfig, model: Trained, text: Tensor, env: DistEnv, log: RunLog, done: int
) -> dict[str, float]:
    """Score the model on the validation split, each image in one of the processes, and draw its first images.

    The model is back in training mode afterwards.
    """
    dataset = setup.open_data(config, config.validation.split)
    limit = config.validation.limit
    if isinstance(model, ProposalGenerator):
        try:
            values = generating.score_regions(model, dataset, limit, env)
        finally:
            model.train()
        log.scores(done, values)
        return values
    shown = whole_model(model).to(env.device)
    try:
        if isinstance(shown, ClsCLIP):
            report = _pairs(shown, text, dataset, limit)
        else:
            names, dtype = whole_names(dataset.class_names), next(shown.parameters()).dtype  # scored as it is
            segmenter = Segmenter(shown, text_embeddings=text, class_names=names, dtype=dtype)
            setting = resolve_setting(config.setting, dataset, dataset.class_names)
            label = labeller(segmenter, dataset.class_names, setting.calibrated)
            report = evaluate(label, dataset, setting=setting, limit=limit, device=env.device)
            if env.main:
                for index in range(min(config.validation.pictures, len(dataset))):
                    _draw(config, dataset, index, label, log, done)
    finally:
        model.train()
    values = {name: value for name, value in report.scores.to_dict().items() if value is not None}
    log.scores(done, values)
    return values


def _pairs(model: ClsCLIP, text: Tensor, dataset: SegmentationDataset, limit: int | None) -> Report:
    return evaluate_pairs(PairSegmenter(model, text), dataset, test_pairs(dataset, dataset.unseen), limit=limit)


def _draw(
    config: TrainConfig,
    dataset: SegmentationDataset,
    index: int,
    label: Callable[[np.ndarray], np.ndarray],
    log: RunLog,
    done: int,
) -> None:
    """Image, truth, prediction and mistakes side by side, as predictions/<iteration>_<image>.png and in TensorBoard."""
    sample = dataset[index]
    ignored = sample.labels == dataset.ignore_index
    truth = np.where(ignored, -1, sample.labels)
    parts = panels(sample.image, truth, label(sample.image), ignored, dataset.num_classes)
    pixels = np.concatenate([np.asarray(part) for part in parts], axis=1)
    save_image(Image.fromarray(pixels), config.folder / "predictions" / f"{done:08d}_{sample.id}.png")
    log.image(done, f"predictions/{sample.id}", pixels)


def check(config: TrainConfig) -> None:
    """Raise now what a validation would: the split is opened, and the method has to be one that can be validated."""
    method, proposing = trained_class(config.method), config.method in GENERATORS
    if method.protocol == "proposals" and not proposing:  # of another model, which training does not hold
        every = config.validation.every
        raise ValueError(f"validation.every: expected 0 for {config.method}, scored by `zs3fast eval`, got {every}")
    pairwise = method.pairwise
    known = generating.METRICS if proposing else PAIR_METRICS if pairwise else METRICS
    if config.validation.metric not in known:
        raise ValueError(f"validation.metric: expected one of {', '.join(known)}, got {config.validation.metric!r}")
    dataset = setup.open_data(config, config.validation.split)
    if pairwise and not test_pairs(dataset, dataset.unseen):
        raise ValueError(
            f"validation.split: expected pairs of fold {dataset.fold} to score, got none in {dataset.name} "
            f"{dataset.split}"
        )
