"""Scores in the procedural world: any model of ours on scenes it has not seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from zs3fast.data.world import WorldDataset
from zs3fast.evaluation.evaluate import Report, evaluate
from zs3fast.evaluation.ground_truth import TrueRegions
from zs3fast.evaluation.protocols import labeller, resolve_setting
from zs3fast.inference.segmenter import Segmenter, find_weights

Label = Callable[..., np.ndarray]  # image uint8 [H, W, 3] and its path -> labels [H, W]


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
