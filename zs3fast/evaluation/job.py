"""From names and paths to an evaluation that is ready to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zs3fast.data import SegmentationDataset, open_dataset, test_pairs
from zs3fast.data.datasets import ids_digest
from zs3fast.encoders.quantize import KINDS, quantize_encoder
from zs3fast.evaluation.evaluate import ItemScore, Report, evaluate, evaluate_pairs
from zs3fast.evaluation.pairs import PairSegmenter, ZoomingPairSegmenter
from zs3fast.evaluation.protocols import PAIR_DATASETS, labeller, learned_setting, published_items, resolve_setting
from zs3fast.evaluation.scores import DENOMINATORS
from zs3fast.inference.segmenter import Segmenter, find_weights, is_converted
from zs3fast.inference.window_protocols import WindowProtocol, window_protocol
from zs3fast.models.registry import create_model
from zs3fast.proposals import load_box_proposer, load_mask_proposer
from zs3fast.text import class_names, competing_names, datasets, load_text_embeddings, seen_classes
from zs3fast.text.cache import tensor_digest
from zs3fast.text.vocabulary import same_name
from zs3fast.utils.options import one_of
from zs3fast.utils.rendering import UNLABELLED

EVAL_SIZES = ("original", "input")


@dataclass(frozen=True)
class Job:
    """An evaluation that only has to be run.

    run:      `evaluate` or `evaluate_pairs` with everything bound but how: limit, device, workers, progress, partial.
    shown:    (image, item) -> label map [H, W] to look at, see `worst_images`.
    settings: what the counts depend on; JSON-safe.
    published: how many images (or pairs) the published test set has; None: unknown, or not the one that is scored.
    """

    dataset: SegmentationDataset
    run: Callable[..., Report]
    shown: Callable[[np.ndarray, ItemScore], np.ndarray]
    settings: dict[str, Any]
    published: int | None


def prepare(
    weights: str | None,
    dataset: str,
    data: Path | None,
    *,
    method: str | None = None,
    clip: str = "ViT-B-16",
    pretrained: str | None = None,
    attention: str | None = None,
    protocol: str | None = None,
    refine: int | None = None,
    split: str = "val",
    setting: str | None = None,
    trained_on: str | None = None,
    text_embeddings: Path | None = None,
    templates: str | None = None,
    proposer: str | None = None,
    crops: str | None = None,
    boxes: str | None = None,
    no_box: str = "whole_image",
    fold: int | None = None,
    episodes: str = "all",
    threshold: float = 0.5,
    eval_size: str = "original",
    denominator: str = "gt_or_pred",
    quantize: str | None = None,
    device: str = "cpu",
) -> Job:
    """Open everything and check that it fits together; see `zs3fast eval --help` for the arguments."""
    if dataset in PAIR_DATASETS and fold is None:
        raise ValueError(f"fold: {dataset} is tested fold by fold, expected 0..3")
    if dataset not in PAIR_DATASETS and fold is not None:
        raise ValueError(f"fold: {dataset} has no folds, only {' and '.join(PAIR_DATASETS)} have")
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator: expected one of {', '.join(DENOMINATORS)}, got {denominator!r}")
    if fold is None and boxes is not None:
        raise ValueError(f"boxes: are for the folds of {' and '.join(PAIR_DATASETS)}, got them for {dataset}")
    one_of("eval_size", eval_size, EVAL_SIZES)
    if eval_size != "original" and (fold is None or boxes is not None):
        raise ValueError(f"eval_size: {eval_size} is for folds without boxes")
    if fold is not None and setting is not None:
        raise ValueError(f"setting: a fold of {dataset} has one setting of its own, got {setting!r}")
    if quantize is not None:
        one_of("quantize", quantize, KINDS)
    plain = {"method": method, "pretrained": pretrained, "attention": attention}
    if weights is not None:
        for name, value in plain.items():
            if value is not None:
                raise ValueError(f"{name}: is for CLIP's weights alone, expected none beside weights, got {value!r}")
    elif pretrained is None:
        raise ValueError("weights: expected a weight file, or a method and pretrained weights of CLIP's own")
    if refine is not None and protocol is None:
        raise ValueError(f"refine: goes with a protocol, got {refine} without one")
    path = None if weights is None else find_weights(weights)
    images = open_dataset(dataset, data, split, fold=fold)
    names = images.class_names if fold is None else images.class_names[: images.background]  # which stands last
    rows = None if text_embeddings is None else load_text_embeddings(text_embeddings, len(names))
    masks = None if proposer is None else load_mask_proposer(proposer, device)
    steps = None if protocol is None else _window_protocol(protocol, dataset, refine)
    entries = images.classes[: len(names)]
    if steps is not None and rows is None and dataset in datasets():
        entries = competing_names(dataset, steps.synonyms)
    options = {"class_names": entries, "text_embeddings": rows, "templates": templates, "protocol": steps}
    if path is None:
        segmenter = _plain_clip(clip, plain, {**options, "proposer": masks, "crops": crops}, device)
    else:
        segmenter = _segmenter(path, trained_on, {**options, "proposer": masks, "crops": crops}, device)
    settings = {
        "method": segmenter.model.config["method"],
        "weights": f"{clip} {pretrained}" if path is None else f"{path.name}, {path.stat().st_size} bytes",
        "weights_sha256": _weights_digest(segmenter.model),
        "dataset": dataset,
        "split": split,
        "items": len(images),
        "items_sha256": ids_digest(images.ids),
        "proposer": proposer,
        "text": " | ".join(segmenter.templates) if rows is None else text_embeddings.name,
    }
    if crops is not None:
        settings["crops"] = crops
    if steps is not None:
        settings |= {"protocol": protocol, **asdict(steps)}
        del settings["templates"]  # which may be others; the sentences stand under text
    if attention is not None:
        settings["attention"] = attention
    if quantize is not None:
        quantize_encoder(segmenter.model, quantize)  # after the digest, which is of the weights that were given
        settings["quantize"] = quantize
    if fold is not None:
        if settings["method"] != "clsclip":
            raise ValueError(f"weights: {dataset} is for clsclip, these are {settings['method']}'s")
        rows = _text_rows(segmenter, rows)
        masks = _pair_segmenter(segmenter, rows, boxes, no_box, threshold, device)
        settings |= {"text_sha256": tensor_digest(rows)}
        settings |= {"fold": fold, "episodes": episodes, "threshold": threshold}
        if boxes is not None:
            settings |= {"method": "clsclip+", "boxes": boxes, "no_box": no_box}
        label_size = None if eval_size == "original" else (segmenter.model.image_size,) * 2
        if label_size is not None:
            settings["eval_size"] = eval_size
        return _pair_job(masks, images, fold, episodes, label_size, settings, _fold_notes(segmenter.model, images))
    return _label_job(segmenter, images, rows, setting, denominator, settings)


def noted(report: Report, published: int | None) -> Report:
    """The report, with notes on what keeps it from comparing with published rows.

    Args:
        published: how many images (or pairs) the published test set has; None: unknown.
    """
    notes, scored = list(report.notes), sum(item.times for item in report.items)
    if published not in (None, scored):
        what = "images" if report.items[0].class_index is None else "pairs"
        notes.append(f"scored {scored} {what}, the published test set has {published}: not comparable")
    if "eval_size" in report.settings:
        notes.append("scored at the network's input size, label maps shrunk to it, as few-shot code does")
    if "boxes" in report.settings:
        notes.append("boxes come from a detector: if it was trained on the asked classes, this is not zero-shot")
    return replace(report, notes=tuple(notes))


def _label_job(
    segmenter: Segmenter,
    images: SegmentationDataset,
    rows: Tensor | None,
    name: str | None,
    denominator: str,
    settings: dict[str, Any],
) -> Job:
    model = segmenter.model
    setting = resolve_setting(name, images, model.config.get("class_names"), learned_setting(model))
    if setting.name == "cross-dataset" and model.method == "tagclip" and model.trusty_token is not None:
        model.trusty_token, model.trusty_weighting = None, "off"
        setting = replace(setting, notes=(*setting.notes, "cross-dataset: the trusty token is left out, as published"))
    label = labeller(segmenter, images.class_names, setting.calibrated, segmenter.classes)
    settings = {**settings, "text_sha256": tensor_digest(_text_rows(segmenter, rows))}
    settings |= {"setting": setting.name, "denominator": denominator}
    options = {"setting": setting, "denominator": denominator, "pass_paths": True, "settings": settings}
    return Job(
        dataset=images,
        run=bound(evaluate, label, images, **options),
        shown=lambda image, item: label(image, images.image_path(item.image)),
        settings=settings,
        published=published_items(images.name) if images.split == "val" else None,
    )


def _pair_segmenter(
    segmenter: Segmenter, rows: Tensor, boxes: str | None, no_box: str, threshold: float, device: str
) -> PairSegmenter | ZoomingPairSegmenter:
    """ClsCLIP, or with boxes ClsCLIP+."""
    if boxes is None:
        return PairSegmenter(segmenter.model, rows, threshold)
    names = [entry[0] for entry in segmenter.classes]
    return ZoomingPairSegmenter(segmenter.model, rows, names, load_box_proposer(boxes, device), no_box, threshold)


def _fold_notes(model: nn.Module, images: SegmentationDataset) -> tuple[str, ...]:
    """A word on weights that learned what the fold holds out."""
    if model.class_names is None:
        return ()
    learned = {_joined(model.class_names[c]) for c in model.seen}
    leaked = [images.class_names[c] for c in images.unseen if _joined(images.class_names[c]) in learned]
    if not leaked:
        return ()
    return (f"fold {images.fold} holds out what the weights saw in training: {', '.join(leaked)}: not zero-shot",)


def _joined(name: str) -> str:
    """A name without its spaces, of which VOC's own have none."""
    return same_name(name).replace(" ", "")


def _pair_job(
    masks: PairSegmenter | ZoomingPairSegmenter,
    images: SegmentationDataset,
    fold: int,
    episodes: str,
    label_size: tuple[int, int] | None,
    settings: dict[str, Any],
    notes: tuple[str, ...],
) -> Job:
    if episodes != "all" and not episodes.isdecimal():
        raise ValueError(f"episodes: expected all or a number, got {episodes!r}")
    pairs = test_pairs(images, images.unseen, episodes="all" if episodes == "all" else int(episodes))

    def shown(image: np.ndarray, item: ItemScore) -> np.ndarray:
        mask = masks(image, [item.class_index], images.image_path(item.image))[0].cpu().numpy()
        return np.where(mask, item.class_index, UNLABELLED)

    scored = masks
    if label_size is not None:
        scored = PairSegmenter(masks.model, masks.text_embeddings, masks.threshold, label_size)
    options = {"pass_paths": True, "label_size": label_size, "settings": settings, "notes": notes}
    return Job(
        dataset=images,
        run=bound(evaluate_pairs, scored, images, pairs, **options),
        shown=shown,
        settings=settings,
        published=published_items(images.name, fold) if (images.split, episodes) == ("val", "all") else None,
    )


def _text_rows(segmenter: Segmenter, rows: Tensor | None) -> Tensor:
    """Embeddings of the segmenter's classes: those given, or the text tower's."""
    if rows is not None:
        return rows
    names = [(name,) for name in dict.fromkeys(name for entry in segmenter.classes for name in entry)]
    classes = names if segmenter.names_apart else segmenter.classes
    return segmenter.text_encoder.encode(classes, segmenter.templates, text_token=segmenter.model.text_token)


def _weights_digest(model: nn.Module) -> str:
    """A digest of a model: its configuration and its tensors."""
    config = json.dumps(model.config, sort_keys=True)
    return tensor_digest(torch.tensor(list(config.encode()), dtype=torch.uint8), *model.state_dict().values())


def _window_protocol(name: str, dataset: str, refine: int | None) -> WindowProtocol:
    changes = {} if refine is None else {"refine": refine}
    return window_protocol(name, dataset, **changes)


def _plain_clip(clip: str, plain: dict[str, str | None], options: dict[str, Any], device: str) -> Segmenter:
    """The segmenter of a method that needs CLIP's weights alone."""
    given = {name: value for name, value in plain.items() if value is not None}
    model = create_model(given.pop("method", "maskclip"), clip=clip, **given)
    if not model.training_free:
        raise ValueError(f"weights: {model.method} is trained, expected weights of it")
    return Segmenter(model, **options, device=device)


def _segmenter(path: Path, trained_on: str | None, options: dict[str, Any], device: str) -> Segmenter:
    """The segmenter of a weight file, for a dataset's classes."""
    official = {}
    if is_converted(path):
        if trained_on is not None:
            raise ValueError(f"trained_on: is for official checkpoints, {path} knows its own training vocabulary")
    elif trained_on is not None:
        learned = class_names(trained_on)
        official = {"class_names": learned, "num_classes": len(learned), "seen": seen_classes(trained_on)}
    return Segmenter.from_pretrained(path, **options, device=device, official=official)
