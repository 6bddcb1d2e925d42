"""Proposers that know the answer: a dataset's own labels as regions, as their classes and as boxes (upper bounds)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zs3fast.evaluation.protocols import LabelledImages
from zs3fast.labels.proposal_targets import class_masks, soft_iou
from zs3fast.proposals import MaskProposer, boxes_from_labels, for_classes, from_labels, soft_masks
from zs3fast.types import BoxProposals, Proposals

GROUND_TRUTH = "ground_truth"  # as a proposer's name


class Labelled(LabelledImages, Protocol):
    """A dataset that gives its labels as they are stored."""

    @property
    def background(self) -> int | None: ...

    def read_labels(self, index: int) -> np.ndarray: ...


class _ByPath:
    """The labels of a dataset's images, found by the image's path."""

    def __init__(self, dataset: Labelled):
        self.dataset = dataset
        self._index = {os.fspath(dataset.image_path(i)): i for i in range(len(dataset))}

    def labels(self, name: str | None) -> np.ndarray:
        """Int32 [H, W]; ValueError for an image that is none of the dataset's."""
        index = None if name is None else self._index.get(os.fspath(name))
        if index is None:
            raise ValueError(f"names: expected an image of {self.dataset.name} {self.dataset.split} each, got {name}")
        return self.dataset.read_labels(index)


class TrueRegions(_ByPath):
    """A `MaskProposer`: the connected regions of the labels, by the image's path.

    What MAFT says of them is an upper bound on what it would say of a proposer's regions. An image without a labelled
    pixel has one region, all of it.
    """

    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        known = [self.labels(None if names is None else names[i]) for i in range(len(pictures))]
        ignored = self.dataset.ignore_index
        known = [np.zeros_like(labels) if (labels == ignored).all() else labels for labels in known]
        return from_labels(known, ignore_index=ignored, connected=True)


class TrueClasses(_ByPath):
    """A `MaskProposer`: another one's regions, each with its IoU with every class of the labels as `class_scores`.

    The upper bound of MAFT's table 7, S_IoU as the classifier, comes of a model that asks nobody else: `ensemble` = 1,
    with all classes seen. IoU is of binary masks, sigmoid > 0.5, with the class's pixels on the image's frame; an
    ignored pixel is in no class's mask.
    """

    def __init__(self, dataset: Labelled, proposer: MaskProposer):
        super().__init__(dataset)
        self.proposer = proposer
        if hasattr(proposer, "for_vocabulary"):  # only then: it is asked for by `hasattr`
            self.for_vocabulary = self._for_vocabulary

    def _for_vocabulary(self, text_embeddings: Tensor) -> TrueClasses:
        return TrueClasses(self.dataset, for_classes(self.proposer, text_embeddings))

    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        proposals = self.proposer(pictures, names)
        classes, masks = len(self.dataset.class_names), soft_masks(proposals) > 0.5
        scores = torch.zeros(*masks.shape[:2], classes + 1, device=masks.device)
        for row, (height, width) in enumerate(proposals.image_sizes):
            labels = torch.from_numpy(self.labels(None if names is None else names[row]))[None, None].float()
            small = torch.nn.functional.interpolate(labels, size=(height, width), mode="nearest-exact")[0].long()
            truth, present = class_masks(small, classes)
            iou = soft_iou(masks[row, :, :height, :width], truth[0].to(masks.device))
            scores[row, :, present[0].to(masks.device)] = iou.t()
        return replace(proposals, class_scores=scores, class_names=None)


class TrueBoxes(_ByPath):
    """A `BoxProposer`: the tight box of every connected region of a class, by the image's path."""

    def __call__(self, picture: np.ndarray, name: str | None = None) -> BoxProposals:
        dataset = self.dataset
        labels = self.labels(name)
        if dataset.background is not None:  # what is no class of its own has no box
            labels = np.where(labels == dataset.background, dataset.ignore_index, labels)
        return boxes_from_labels(labels, dataset.class_names, ignore_index=dataset.ignore_index)
