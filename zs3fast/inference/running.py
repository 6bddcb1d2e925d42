"""A predictor run over images under one plan: a single image, or a stream that reads ahead."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zs3fast.inference.plan import Plan
from zs3fast.inference.predictors import Prediction, Predictor, Request
from zs3fast.inference.streaming import default_workers, overlapped
from zs3fast.types import Segmentation
from zs3fast.utils.images import read_image, strips
from zs3fast.utils.waiting import Checks, collecting

if TYPE_CHECKING:
    from zs3fast.inference.segmenter import Segmenter


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that a Segmenter has run its encoder on, to be asked about any number of class lists.

    image: uint8 [H, W, 3].  source: its path, or None.  features: what the method keeps of it.  segmenter: its maker.
    """

    image: np.ndarray
    source: str | None
    features: Any
    segmenter: Segmenter


class ReadImage(NamedTuple):
    """pixels: uint8 [H, W, 3].  source: the image's path, or None.  features: what the model knows of it, or None."""

    pixels: np.ndarray
    source: str | None
    features: Any


def read(image: Any, segmenter: Segmenter, source: str | os.PathLike[str] | None = None) -> ReadImage:
    """An image from whatever a segmenter's call takes; a source that is given stands in place of its own."""
    if not isinstance(image, EncodedImage):
        found = ReadImage(*read_image(image), None)
    elif image.segmenter is segmenter:
        found = ReadImage(image.image, image.source, image.features)
    else:
        raise ValueError("image: expected one that this Segmenter's `encode` gave, got another Segmenter's")
    return found if source is None else found._replace(source=os.fspath(source))


class Runner:
    """A predictor, run on images once there is a plan."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    @torch.no_grad()
    def one(self, plan: Plan, read: ReadImage) -> Segmentation:
        """The segmentation of an image."""
        with collecting() as checks:
            (prediction,) = self.predictor([_request(plan, read)])
        labels, scores = prediction.labels.cpu().numpy(), prediction.scores.cpu().numpy()
        checks.settle()
        return _segmentation(plan, read, labels, scores, prediction)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray, source: str | None) -> Any:
        """What the predictor keeps of an image."""
        with collecting() as checks:
            features = self.predictor.encode(pixels, source)
        checks.settle()
        return features

    def stream(
        self,
        plan: Plan,
        images: Iterable[Any],
        read: Callable[[Any], ReadImage],
        batch_size: int = 1,
        workers: int | None = None,
        failed: Callable[[Any, Exception], None] | None = None,
        compact: bool = False,
    ) -> Generator[tuple[Any, Segmentation], None, None]:
        """Every image, which `read` reads, with its segmentation, in order; else as `Segmenter.stream`."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected 0 or more threads, got {workers}")
        if batch_size > 1 and not self.predictor.together:
            method = self.predictor.model.method
            raise ValueError(f"batch_size: expected 1, as {method} takes images one by one, got {batch_size}")
        # Details stay on this side of the copies, and so do checks, which are settled when those are through.
        kept: dict[int, tuple[Prediction | None, Checks]] = {}

        def prepare(image: Any) -> tuple[ReadImage, Tensor | None]:
            found = read(image)
            return found, self.predictor.prepare(found.pixels) if found.features is None else None

        @torch.no_grad()
        def compute(items: list[tuple[ReadImage, Tensor | None]]) -> list[tuple[Tensor, ...]]:
            with collecting() as checks:
                predictions = self.predictor([_request(plan, found, prepared) for found, prepared in items])
            for (found, _), prediction in zip(items, predictions, strict=True):
                kept[id(found)] = (prediction if plan.details else None, checks)
            return [(prediction.labels, prediction.scores) for prediction in predictions]

        def finish(found: ReadImage, labels: np.ndarray, scores: np.ndarray) -> Segmentation:
            prediction, checks = kept.pop(id(found))
            checks.settle()
            return _segmentation(plan, found, labels, scores, prediction, compact)

        device = plan.text.device  # the model's
        workers = default_workers(device) if workers is None else workers
        return overlapped(
            images, prepare, compute, finish, device=device, workers=workers, batch_size=batch_size, failed=failed
        )


def _request(plan: Plan, read: ReadImage, prepared: Tensor | None = None) -> Request:
    pixels, source, features = read
    return Request(pixels, plan.text, plan.competing, plan.seen, source, prepared, features, plan.details)


def _segmentation(
    plan: Plan,
    read: ReadImage,
    labels: np.ndarray,
    scores: np.ndarray,
    prediction: Prediction | None,
    compact: bool = False,
) -> Segmentation:
    """The result from the winners' labels and scores, without what the plan leaves unlabelled."""
    labels, nan_pixels = labels if compact and labels.flags.writeable else labels.astype(np.int32), 0
    for rows in strips(*labels.shape):
        few, best = labels[rows], scores[rows]
        if plan.rejected:
            few[np.isin(few, plan.rejected)] = -1
        if plan.min_score is not None:
            few[~(best >= plan.min_score)] = -1
        nan_pixels += int(np.isnan(best).sum())
    if nan_pixels:
        what = read.source or "the image"
        warnings.warn(f"{nan_pixels} pixels of {what} have no score (nan): check the weights", stacklevel=5)
    details = None if prediction is None else prediction.details
    return Segmentation(labels, plan.class_names, scores, read.pixels, nan_pixels, read.source, details)
