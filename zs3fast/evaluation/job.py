"""From names and paths to an evaluation that is ready to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zs3fast.data import SegmentationDataset, open_dataset, test_pairs
from zs3fast.data.datasets import ids_digest
from zs3fast.encoders.quantize import KINDS, quantize_encoder
from zs3fast.evaluation.evaluate import ItemScore, Report, evaluate, evaluate_pairs
from zs3fast.evaluation.ground_truth import GROUND_TRUTH, TrueBoxes, TrueClasses, TrueRegions
from zs3fast.evaluation.options import EvalOptions
from zs3fast.evaluation.pairs import BoxPairSegmenter, PairSegmenter, ZoomingPairSegmenter
from zs3fast.evaluation.protocols import PAIR_DATASETS, labeller, learned_setting, published_items, resolve_setting
from zs3fast.evaluation.scores import DENOMINATORS
from zs3fast.inference.loading import find_weights, is_converted
from zs3fast.inference.segmenter import Segmenter
from zs3fast.inference.window_protocols import WindowProtocol, window_protocol
from zs3fast.models.base import ZeroShotModel
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.models.clsclip_plus import NO_BOX
from zs3fast.models.maft import MAFT
from zs3fast.models.registry import create_model
from zs3fast.models.tagclip import TagCLIP
from zs3fast.proposals import MaskProposer, load_box_proposer, load_mask_proposer
from zs3fast.text import competing_names, datasets, load_text_embeddings
from zs3fast.text.cache import tensor_digest
from zs3fast.text.class_lists import training_vocabulary
from zs3fast.text.vocabulary import ClassEntry, same_name
from zs3fast.utils.options import one_of
from zs3fast.utils.rendering import UNLABELLED

EVAL_SIZES = ("original", "input")
_CLIP = "ViT-B-16"
_OF_PLAIN_CLIP = ("method", "clip", "pretrained", "attention")


@dataclass(frozen=True)
class Job:
    """An evaluation that only has to be run.

    run:      `evaluate` or `evaluate_pairs` with everything bound but progress and partial.
    shown:    (image, item) -> label map [H, W] to look at, see `worst_images`.
    settings: what the counts depend on; JSON-safe.
    published: how many images (or pairs) the published test set has; None: unknown, or not the one that is scored.
    """

    dataset: SegmentationDataset
    run: Callable[..., Report]
    shown: Callable[[np.ndarray, ItemScore], np.ndarray]
    settings: dict[str, Any]
    published: int | None


def prepare(options: EvalOptions) -> Job:
    """Open everything and check that it fits together, on the device of the options (None: the CPU)."""
    device = options.device or "cpu"
    o = replace(options, device=device)
    _check(o)
    path = None if o.weights is None else find_weights(o.weights)
    images = open_dataset(o.dataset, o.data, o.split, fold=o.fold)
    names = images.class_names if o.fold is None else images.class_names[: images.background]  # which stands last
    rows = None if o.text_embeddings is None else load_text_embeddings(o.text_embeddings, len(names))
    steps = None if o.protocol is None else _window_protocol(o.protocol, o.dataset, o.refine)
    entries = images.classes[: len(names)]
    if steps is not None and rows is None and o.dataset in datasets():
        entries = competing_names(o.dataset, steps.synonyms)
    segmenter = _segmenter(
        path,
        o,
        class_names=entries,
        text_embeddings=rows,
        templates=o.templates,
        protocol=steps,
        refine=o.refine,
        proposer=None if o.proposer is None else _mask_proposer(o.proposer, images, o, device),
        crops=o.crops,
        device=device,
    )
    settings = {
        "method": segmenter.model.config["method"],
        "weights": f"{o.clip or _CLIP} {o.pretrained}" if path is None else f"{path.name}, {path.stat().st_size} bytes",
        "weights_sha256": _weights_digest(segmenter.model),
        "dataset": o.dataset,
        "split": o.split,
        "items": len(images),
        "items_sha256": ids_digest(images.ids),
        "proposer": o.proposer,
        "text": " | ".join(segmenter.templates) if o.text_embeddings is None else o.text_embeddings.name,
    }
    if o.crops is not None:
        settings["crops"] = o.crops
    if o.upper_bound:
        settings["upper_bound"] = True
    if steps is not None:
        settings |= {"protocol": o.protocol, **asdict(steps)}
        del settings["templates"]  # which may be others; the sentences stand under text
    elif o.refine is not None:
        settings["refine"] = o.refine
    if o.attention is not None:
        settings["attention"] = o.attention
    if o.quantize is not None:
        quantize_encoder(segmenter.model, o.quantize)  # after the digest, which is of the weights that were given
        settings["quantize"] = o.quantize
    return (_label_job if o.fold is None else _pair_job)(segmenter, images, rows, o, settings)


def _check(o: EvalOptions) -> None:
    """Raise for options that do not go together, before anything is opened."""
    folded = " and ".join(PAIR_DATASETS)
    if o.dataset in PAIR_DATASETS and o.fold is None:
        raise ValueError(f"fold: expected 0..3, as {o.dataset} is tested fold by fold, got None")
    if o.dataset not in PAIR_DATASETS and o.fold is not None:
        raise ValueError(f"fold: expected one of {folded}, which have folds, got {o.dataset}")
    for name, least in (("worst", 0), ("limit", 1)):
        value = getattr(o, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    one_of("denominator", o.denominator, DENOMINATORS)
    one_of("no_box", o.no_box, NO_BOX)
    if o.fold is None and o.boxes is not None:
        raise ValueError(f"boxes: expected a fold of {folded}, got {o.dataset}")
    one_of("eval_size", o.eval_size, EVAL_SIZES)
    if o.eval_size != "original" and (o.fold is None or o.boxes is not None):
        got = "no fold" if o.fold is None else "boxes"
        raise ValueError(f"eval_size: expected a fold without boxes for {o.eval_size}, got {got}")
    if o.fold is not None and o.setting is not None:
        raise ValueError(f"setting: expected none for a fold of {o.dataset}, which has its own, got {o.setting!r}")
    if o.episodes != "all" and not o.episodes.isdecimal():
        raise ValueError(f"episodes: expected all or a number, got {o.episodes!r}")
    if o.boxes_as_masks and (o.boxes is None or o.refine):
        raise ValueError("boxes_as_masks: goes with boxes and without refine, expected --boxes alone")
    if o.upper_bound and (o.proposer is None or o.crops is not None):
        raise ValueError("upper_bound: goes with a proposer and without crops, expected --proposer alone")
    if o.quantize is not None:
        one_of("quantize", o.quantize, KINDS)
    if o.weights is not None:
        for name in _OF_PLAIN_CLIP:
            if getattr(o, name) is not None:
                raise ValueError(
                    f"{name}: is for CLIP's weights alone, expected none beside weights, got {getattr(o, name)!r}"
                )
    elif o.pretrained is None:
        raise ValueError("weights: expected a weight file, or a method and pretrained weights of CLIP's own")


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
    if report.settings.get("upper_bound"):
        notes.append("upper bound: proposals are named by their IoU with the labels, no CLIP is asked")
    if GROUND_TRUTH in (report.settings.get("proposer"), report.settings.get("boxes")):
        notes.append("upper bound: the regions are the labels' own")
    elif "boxes" in report.settings:
        notes.append("boxes come from a detector: if it was trained on the asked classes, this is not zero-shot")
    return replace(report, notes=tuple(notes))


def _label_job(
    segmenter: Segmenter, images: SegmentationDataset, rows: Tensor | None, o: EvalOptions, settings: dict[str, Any]
) -> Job:
    model = segmenter.model
    setting = resolve_setting(o.setting, images, model.config.get("class_names"), learned_setting(model))
    if isinstance(model, TagCLIP) and model.trusty_token is not None and setting.name == "cross-dataset":
        said = "the trusty token is kept in the class list, unlike published"
        if not o.keep_trusty_token:
            model.trusty_token, said = None, "the trusty token is left out, as published"
        model.trusty_weighting = "off"  # which the argmax of one window would not notice: all classes are of one kind
        setting = replace(setting, notes=(*setting.notes, f"cross-dataset: {said}"))
    elif o.keep_trusty_token:
        raise ValueError(
            f"keep_trusty_token: expected a TagCLIP with its token, cross-dataset, got {model.method} {setting.name}"
        )
    if o.upper_bound:
        if not isinstance(model, MAFT):
            raise ValueError(f"upper_bound: expected weights of maft, got {model.method}'s")
        model.ensemble, model.ensemble_form, model.seen_offset = 1.0, "freeseg", 0.0
        setting = replace(setting, calibrated=tuple(range(images.num_classes)))
    label = labeller(segmenter, images.class_names, setting.calibrated, segmenter.classes)
    settings = {**settings, "text_sha256": tensor_digest(_text_rows(segmenter, rows))}
    settings |= {"setting": setting.name, "denominator": o.denominator}
    if o.keep_trusty_token:
        settings["keep_trusty_token"] = True
    how: dict[str, Any] = {"setting": setting, "denominator": o.denominator, "pass_paths": True, "settings": settings}
    return Job(
        dataset=images,
        run=bound(evaluate, label, images, **how, **_where(o)),
        shown=lambda image, item: label(image, images.image_path(item.image)),
        settings=settings,
        published=published_items(images.name) if images.split == "val" else None,
    )


def _where(o: EvalOptions) -> dict[str, Any]:
    """How much is scored, and where."""
    return {"limit": o.limit, "device": o.device, "workers": o.workers}


def _mask_proposer(spec: str, images: SegmentationDataset, o: EvalOptions, device: str) -> MaskProposer:
    found: MaskProposer = TrueRegions(images) if spec == GROUND_TRUTH else load_mask_proposer(spec, device)
    return TrueClasses(images, found) if o.upper_bound else found


def _pair_segmenter(
    model: ClsCLIP, classes: Sequence[ClassEntry], rows: Tensor, images: SegmentationDataset, o: EvalOptions
) -> PairSegmenter | ZoomingPairSegmenter | BoxPairSegmenter:
    """ClsCLIP, with boxes ClsCLIP+, or the boxes themselves."""
    if o.boxes is None:
        return PairSegmenter(model, rows, o.threshold, refine=o.refine or 0)
    names = [entry[0] for entry in classes]
    boxes = TrueBoxes(images) if o.boxes == GROUND_TRUTH else load_box_proposer(o.boxes, o.device or "cpu")
    if o.boxes_as_masks:
        return BoxPairSegmenter(names, boxes)
    return ZoomingPairSegmenter(model, rows, names, boxes, o.no_box, o.threshold, refine=o.refine or 0)


def _fold_notes(model: ZeroShotModel, images: SegmentationDataset) -> tuple[str, ...]:
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
    segmenter: Segmenter, images: SegmentationDataset, rows: Tensor | None, o: EvalOptions, settings: dict[str, Any]
) -> Job:
    model = segmenter.model
    if not isinstance(model, ClsCLIP):
        raise ValueError(f"weights: expected clsclip's for {o.dataset}, got {settings['method']}'s")
    rows = _text_rows(segmenter, rows)
    masks = _pair_segmenter(model, _classes(segmenter), rows, images, o)
    settings |= {"text_sha256": tensor_digest(rows), "fold": o.fold, "episodes": o.episodes, "threshold": o.threshold}
    if o.boxes is not None:
        settings |= {"method": "clsclip+", "boxes": o.boxes, "no_box": o.no_box}
    if o.boxes_as_masks:
        settings |= {"method": "boxes as masks", "no_box": "empty"}
    scored: PairSegmenter | ZoomingPairSegmenter | BoxPairSegmenter = masks
    label_size: tuple[int, int] | None = None
    if o.eval_size == "input":
        label_size = (model.image_size, model.image_size)
        settings["eval_size"] = o.eval_size
        scored = PairSegmenter(model, rows, o.threshold, label_size, refine=o.refine or 0)
    pairs = test_pairs(images, images.unseen, episodes="all" if o.episodes == "all" else int(o.episodes))

    def shown(image: np.ndarray, item: ItemScore) -> np.ndarray:
        assert item.class_index is not None  # a pair has one
        mask = masks(image, [item.class_index], images.image_path(item.image))[0].cpu().numpy()
        return np.where(mask, item.class_index, UNLABELLED)

    how: dict[str, Any] = {"pass_paths": True, "label_size": label_size, "settings": settings}
    how["notes"] = _fold_notes(model, images)
    return Job(
        dataset=images,
        run=bound(evaluate_pairs, scored, images, pairs, **how, **_where(o)),
        shown=shown,
        settings=settings,
        published=published_items(images.name, o.fold) if (images.split, o.episodes) == ("val", "all") else None,
    )


def _text_rows(segmenter: Segmenter, rows: Tensor | None) -> Tensor:
    """Embeddings of the segmenter's classes: those given, or the text tower's."""
    if rows is not None:
        return rows
    classes = _classes(segmenter)
    if segmenter.names_apart:
        classes = [(name,) for name in dict.fromkeys(name for entry in classes for name in entry)]
    out: Tensor = segmenter.text_encoder.encode(classes, segmenter.templates, text_token=segmenter.model.text_token)
    return out


def _classes(segmenter: Segmenter) -> Sequence[ClassEntry]:
    assert segmenter.classes is not None  # `_segmenter` is given them
    return segmenter.classes


def _weights_digest(model: ZeroShotModel) -> str:
    """A digest of a model: its configuration and its tensors."""
    config = json.dumps(model.config, sort_keys=True)
    return tensor_digest(torch.tensor(list(config.encode()), dtype=torch.uint8), *model.state_dict().values())


def _window_protocol(name: str, dataset: str, refine: int | None) -> WindowProtocol:
    changes = {} if refine is None else {"refine": refine}
    return window_protocol(name, dataset, **changes)


def _segmenter(path: Path | None, o: EvalOptions, **options: Any) -> Segmenter:
    """The segmenter of a weight file, or of a method that needs CLIP's weights alone, for a dataset's classes."""
    options["dtype"] = torch.float32  # published numbers are those of the weights as they are
    if path is None:
        given = {name: getattr(o, name) for name in _OF_PLAIN_CLIP if getattr(o, name) is not None}
        model = create_model(given.pop("method", "maskclip"), **{"clip": _CLIP, **given})
        if not model.training_free:
            raise ValueError(f"weights: expected a file for {model.method}, which is trained, got none")
        return Segmenter(model, **options)
    official = {}
    if is_converted(path):
        if o.trained_on is not None:
            raise ValueError(f"trained_on: expected an official checkpoint, got {path}, which knows its own vocabulary")
    elif o.trained_on is not None:
        official = training_vocabulary(o.trained_on)
    return Segmenter.from_pretrained(path, **options, official=official)
