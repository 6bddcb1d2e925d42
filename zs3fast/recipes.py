"""How each kind of model meets a picture: sliding windows, the whole picture squashed, or proposals on their frame.

A recipe is called with the picture's pixels, the competing classes and what is known of them, and gives labels and the
winning scores at the picture's own size. It is what the published test pipelines do around their models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.labels.softmax import softmax_labels
from zs3fast.labels.windows import sliding_windows
from zs3fast.models.clsclip_plus import ClsCLIPPlus
from zs3fast.models.clsclip_plus import squash as squash_images
from zs3fast.proposals import BoxProposer, MaskProposer, clip_input, for_classes, resize_for_proposer, sub_images
from zs3fast.proposals.class_columns import scores_for_classes
from zs3fast.types import SegmentationOutput

# A bound on one picture's windows: 1000 of them at 512 pixels are a strip of more than 420 000 pixels.
MAX_WINDOWS = 1000


@dataclass(frozen=True)
class Question:
    """What is asked of one picture.

    pixels: uint8 [H, W, 3].  text: [C, D] of the competing classes.  names: the names of each, synonyms included.
    seen: indices of the seen among them, or None where nothing is known.  source: the picture's path, or None.
    """

    pixels: np.ndarray
    text: Tensor
    names: Sequence[Sequence[str]]
    seen: list[int] | None
    source: str | None = None


@dataclass(frozen=True)
class Answer:
    """labels: int32 [H, W], -1 = nothing was found there.  scores: float32 [H, W].  nan_pixels: scores that are NaN."""

    labels: np.ndarray
    scores: np.ndarray
    nan_pixels: int = 0


class Recipe(Protocol):
    """Answers questions about pictures with a model."""

    def __call__(self, question: Question) -> Answer: ...


class Windows:
    """ZegCLIP's, TagCLIP's and CLIP-RC's: short side to `image_size`, windows with a stride of 426/512 of it.

    Each window's calibrated scores are averaged, resized to the picture and compared, in one op: scores of all classes
    at picture size are never stored.

    Args:
        batch: windows the model sees at once.
    """

    stride = (426, 512)  # of `image_size`, as a fraction
    antialias = False

    def __init__(self, model: nn.Module, batch: int):
        self.model, self.batch = model, batch

    def __call__(self, question: Question) -> Answer:
        model, (part, whole) = self.model, self.stride
        crop = (model.image_size,) * 2
        canvas = prepare(question.pixels, model.image_size, model.pixel_mean, model.pixel_std, self.antialias)
        canvas = canvas.to(question.text.device)
        stride = max(part * model.image_size // whole, 1)
        windows = sliding_windows(canvas.shape[-2:], crop, (stride, stride))
        out = self._run(canvas, windows, question.text)
        return self._compare(out, question, crop_size=crop, canvas_size=tuple(canvas.shape[-2:]), windows=windows)

    def _compare(self, out: SegmentationOutput, question: Question, **frame: Any) -> Answer:
        """Labels and scores of the picture from the output for all windows, which lie in `frame`."""
        model, seen = self.model, question.seen
        mixed = seen is not None and 0 < len(seen) < len(question.text)
        result = ops.masks_to_labels(
            out.mask_logits,
            question.pixels.shape[:2],
            seen=seen or (),
            seen_offset=model.seen_offset,
            trusty_logits=out.trusty_logits if mixed else None,
            trusty_weighting=model.trusty_weighting if mixed else "off",
            dtype=torch.int32,
            return_details=True,
            **frame,
        )
        return _answer(result.labels[0], result.scores[0])

    def _run(self, canvas: Tensor, windows: list[tuple[int, int]], text: Tensor) -> SegmentationOutput:
        """The model's output for all windows, in batches."""
        side, like = self.model.image_size, next(self.model.parameters())
        parts = []
        for start in range(0, len(windows), self.batch):
            crops = torch.stack([canvas[:, y : y + side, x : x + side] for y, x in windows[start : start + self.batch]])
            parts.append(self.model(crops.to(like.dtype), text))
        trusty = [part.trusty_logits for part in parts]
        return SegmentationOutput(
            mask_logits=torch.cat([part.mask_logits for part in parts]),
            global_token=torch.cat([part.global_token for part in parts]),
            patch_tokens=torch.cat([part.patch_tokens for part in parts]),
            trusty_logits=None if trusty[0] is None else torch.cat(trusty),
        )


class AveragedWindows(Windows):
    """MaskCLIP's: short side to `image_size`, antialiased as CLIP was trained, windows with a stride of half of it.

    The windows' logits are averaged and resized to the picture, where the classes compete by a softmax, as is usual for
    methods without training.
    """

    stride = (1, 2)
    antialias = True

    def _compare(self, out: SegmentationOutput, question: Question, **frame: Any) -> Answer:
        return _answer(*softmax_labels(out.mask_logits, question.pixels.shape[:2], **frame))


class Squash:
    """ClsCLIP's: the whole picture squashed to `image_size`, one mask a class, the best class a pixel."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, question: Question) -> Answer:
        model, like = self.model, next(self.model.parameters())
        image = squash(question.pixels, model.image_size, model.pixel_mean, model.pixel_std).to(like)
        out = model(image[None], question.text)
        size = question.pixels.shape[:2]
        result = ops.masks_to_labels(out.mask_logits, size, dtype=torch.int32, return_details=True)
        return _answer(result.labels[0], result.scores[0])


class Zooming:
    """ClsCLIP+'s: the boxes a detector finds for each class, cut out and squashed; the best class a pixel.

    Pixels outside all boxes of a class score 0 for it; a class without boxes gets the whole picture.

    Args:
        boxes: finds boxes.  no_box: see `ClsCLIPPlus`.
    """

    def __init__(self, model: nn.Module, boxes: BoxProposer, no_box: str = "whole_image"):
        self.plus, self.boxes = ClsCLIPPlus(model, no_box=no_box), boxes

    def __call__(self, question: Question) -> Answer:
        model = self.plus.model
        image = normalise(question.pixels, model.pixel_mean, model.pixel_std).to(question.text.device)
        found = self.boxes(question.pixels, question.source).to(question.text.device)
        labels, scores = self.plus.predict_labels(image, question.text, found, question.names, threshold=None)
        return _answer(labels.int(), scores)


class Proposing:
    """MAFT's: a proposer finds regions, the model says what they are, the masks vote.

    Args:
        proposer: finds mask proposals.
        crops: "mask", "crop" or "mask_crop": classify every proposal by a CLIP pass of its own instead, the baseline of
            the paper.  crop_form: see `zs3fast.proposals.sub_images`.
    """

    def __init__(
        self, model: nn.Module, proposer: MaskProposer, crops: str | None = None, crop_form: str = "zegformer"
    ):
        self.model, self.proposer, self.crops, self.crop_form = model, proposer, crops, crop_form

    def __call__(self, question: Question) -> Answer:
        model, like = self.model, next(self.model.parameters())
        names = None if question.source is None else [question.source]
        propose = for_classes(self.proposer, question.text)
        proposals = propose([question.pixels], names).to(like.device)
        if not bool(proposals.valid.any()):
            raise ValueError(f"proposer: it found no region in {question.source or 'the picture'}")
        proposals = scores_for_classes(proposals, question.names)
        frame = resize_for_proposer(question.pixels)
        if (frame.padded_size, (frame.image_size,)) != (proposals.padded_size, proposals.image_sizes):
            raise ValueError(
                f"proposer: its masks lie on a frame of {proposals.padded_size}, the picture's is {frame.padded_size}"
            )
        if self.crops is None:
            out = model(clip_input(frame, model.image_size).to(like), question.text, proposals, non_object=False)
        else:
            pictures = sub_images(frame, proposals, self.crops, self.crop_form)
            out = model.classify_crops(
                pictures.images.to(like), pictures.rows, question.text, proposals, non_object=False
            )
        seen = question.seen or ()
        labels, scores = model.label_details(out, question.pixels.shape[:2], seen=seen)
        answer = _answer(labels[0], scores[0])
        # Pixels that no proposal covers, where all seen classes score -seen_offset and all others 0.
        nothing = 1e-6 - model.seen_offset if model.seen_offset and len(seen) == len(question.text) else 0.0
        answer.labels[answer.scores <= nothing] = -1
        return answer


def recipe_for(
    model: nn.Module,
    window_batch: int,
    proposer: MaskProposer | None = None,
    crops: str | None = None,
    boxes: BoxProposer | None = None,
) -> Recipe:
    """The recipe of a model's method."""
    takes = {"proposals": ("proposer", "crops"), "squash": ("boxes",)}.get(model.test_recipe, ())
    for name, value in (("proposer", proposer), ("crops", crops), ("boxes", boxes)):
        if value is not None and name not in takes:
            raise ValueError(f"{name}: {model.method} takes none, got {value!r}")
    if model.test_recipe == "proposals":
        if proposer is None:
            raise ValueError(f"proposer: {model.method} classifies regions and needs something that finds them")
        return Proposing(model, proposer, crops)
    if model.test_recipe == "squash":
        return Squash(model) if boxes is None else Zooming(model, boxes)
    windows = AveragedWindows if model.test_recipe == "averaged_windows" else Windows
    return windows(model, window_batch)


def _answer(labels: Tensor, scores: Tensor) -> Answer:
    scores = scores.float().cpu().numpy()
    return Answer(labels.cpu().numpy(), scores, int(np.isnan(scores).sum()))


def prepare(
    pixels: np.ndarray, image_size: int, mean: Sequence[float], std: Sequence[float], antialias: bool = False
) -> Tensor:
    """The normalised picture [3, H', W'] whose short side is `image_size`.

    Resized as the official code does it with OpenCV: bilinear without antialiasing, on 8 bits, rounded back to them.
    The long side becomes int(x * image_size / short + 0.5).

    Args:
        antialias: average what lies between the samples of a picture made smaller, as CLIP's own preprocessing does.

    Raises:
        ValueError: so long a strip that more than `MAX_WINDOWS` windows would be needed.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = tuple(int(side * image_size / short + 0.5) for side in (height, width))
    if max(size) > MAX_WINDOWS * 426 * image_size // 512:
        raise ValueError(
            f"image: {width} x {height} pixels are too long a strip: resized to a short side of {image_size}, it needs "
            f"more than {MAX_WINDOWS} windows. Cut it into pieces"
        )
    values = torch.from_numpy(pixels).permute(2, 0, 1).float()
    if size != (height, width):
        values = F.interpolate(values[None], size, mode="bilinear", align_corners=False, antialias=antialias)
        values = values[0].round()
    return _normalise(values, mean, std)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W], (pixels / 255 - mean) / std."""
    return _normalise(torch.from_numpy(pixels).permute(2, 0, 1).float(), mean, std)


def squash(pixels: np.ndarray, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The normalised picture [3, image_size, image_size], its aspect ratio lost."""
    return squash_images(normalise(pixels, mean, std)[None], image_size)[0]


def _normalise(values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean, std = (torch.tensor(list(values_)).view(3, 1, 1) for values_ in (mean, std))
    return (values / 255 - mean) / std
