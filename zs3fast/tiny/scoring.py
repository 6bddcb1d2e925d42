"""Scores in the procedural world: any model of ours on scenes it has not seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zs3fast.data.world import WorldDataset
from zs3fast.evaluation.evaluate import Report, evaluate
from zs3fast.evaluation.protocols import labeller, resolve_setting
from zs3fast.inference.segmenter import Segmenter, find_weights
from zs3fast.proposals import from_labels
from zs3fast.types import Proposals

Label = Callable[..., np.ndarray]  # image uint8 [H, W, 3] and its path -> labels [H, W]


class TrueRegions:
    """A `MaskProposer` that knows the answer: the connected regions of a dataset's own labels, by the picture's name.

    What MAFT says of them is an upper bound on what it would say of a proposer's regions.
    """

    def __init__(self, dataset: WorldDataset):
        self.dataset = dataset
        self._index = {dataset.image_path(i).name: i for i in range(len(dataset))}

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        known = [] if names is None else [self._index.get(os.path.basename(name)) for name in names]
        if len(known) != len(images) or None in known:
            raise ValueError(f"names: expected a picture of {self.dataset.name} {self.dataset.split} each, got {names}")
        return from_labels([self.dataset.read_labels(i) for i in known if i is not None], connected=True)


def world_segmenter(weights: str | os.PathLike[str], scenes: WorldDataset) -> Segmenter:
    """The segmenter of a weight file for the world's classes.

    MAFT is given the true regions of `scenes`. Of ClsCLIP's binary masks the best takes the pixel, however low it
    scores: every pixel of the world has a class.
    """
    from zs3fast.weights import load

    proposing = load(find_weights(weights))[0].protocol == "proposals"
    segmenter = Segmenter.from_pretrained(
        weights, class_names=scenes.class_names, proposer=TrueRegions(scenes) if proposing else None
    )
    segmenter.model.min_score = None
    return segmenter


def world_labeller(segmenter: Segmenter, scenes: WorldDataset, setting: str = "inductive") -> Label:
    """`segmenter` as `evaluate` calls it with `pass_paths`."""
    vocabulary = segmenter.model.config.get("class_names")
    return labeller(segmenter, scenes.class_names, resolve_setting(setting, scenes, vocabulary).calibrated)


def score(label: Label, scenes: WorldDataset, *, limit: int | None = None, **options: Any) -> Report:
    """Scores on the zero-shot split of the world, whatever the setting was."""
    return evaluate(label, scenes, pass_paths=True, limit=limit, **options)
