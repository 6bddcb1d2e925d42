"""The training-free methods' test protocol: windows averaged by similarity, names that compete by a softmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.inference.predictors import (
    InWindows,
    Prediction,
    Request,
    _channels_first,
    _normalise,
    _prediction,
    fitted_size,
)
from zs3fast.inference.window_protocols import WindowProtocol
from zs3fast.labels.refinement import Pamr
from zs3fast.labels.softmax import Frame, Rule, softmax_labels, softmax_scores
from zs3fast.labels.windows import sliding_windows
from zs3fast.models.maskclip import MaskCLIP
from zs3fast.types import Details, ImageFeatures, WindowLogits
from zs3fast.utils.images import resize


class AveragedWindows(InWindows):
    """Sliding windows; their similarities are averaged and resized to the image, where names compete by a softmax.

    Args:
        batch: windows the model sees at once.
        protocol: see `WindowProtocol`. None: short side and windows of `image_size`, a stride of half of it,
            antialiased by Pillow, as CLIP's own images were; a class's names are averaged.
    """

    model: MaskCLIP

    def __init__(self, model: MaskCLIP, batch: int, protocol: WindowProtocol | None = None):
        super().__init__(model, batch)
        side = model.image_size
        self.protocol = protocol or WindowProtocol(
            short_side=side,
            window=side,
            stride=max(side // 2, 1),
            logit_scale=model.logit_scale,
            antialias=True,
            templates=model.templates,
            merge="mean",
            max_long=None,
        )

    @property
    def templates(self) -> str:
        """The templates of the protocol."""
        return self.protocol.templates

    def refined(self, steps: int) -> None:
        """Refine similarities by so many steps from now on, whatever the protocol has."""
        self.protocol = replace(self.protocol, refine=steps)

    @property
    def names_apart(self) -> bool:
        """Whether requests carry a text row a name, in place of one a class."""
        return self.protocol.merge == "max"

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H', W') of the resized image: never too small for the encoder."""
        protocol, encoder = self.protocol, self.model.encoder
        if protocol.max_long is None:
            return fitted_size(size, protocol.short_side)
        patch = encoder.config.patch_size
        long = (protocol.window or protocol.short_side) // patch
        return protocol.fitted(size, patch * max(-(-encoder.least_patches // max(long, 1)), 1))

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """The image uint8 [H', W', 3], resized; or as it is, where the model's device resizes it."""
        size = self.canvas_size(pixels.shape[:2])
        if not self.protocol.antialias:
            return torch.from_numpy(resize(pixels, size, antialias=False))
        return self.left_to_device(pixels, size, antialias=True)

    def __call__(self, requests: Sequence[Request]) -> list[Prediction]:
        if any(request.encoded is not None for request in requests):
            return [self._predict_alone(request) for request in requests]
        canvases = [self._canvas(request) for request in requests]
        masks, frames = self.similarities(canvases, requests[0].text)
        return [self.predict_from(*given) for given in zip(masks, frames, canvases, requests, strict=True)]

    def encode(self, pixels: np.ndarray, source: str | None) -> tuple[Tensor, list[ImageFeatures]]:
        """The normalised image, and the features of its windows as they are batched."""
        canvas = self._canvas(Request(pixels, torch.empty(0), (), None, source))
        frame = self._frame((canvas.shape[-2], canvas.shape[-1]))
        return canvas, [self.model.encode(batch) for batch in self._crop_batches([canvas], [frame])]

    def _predict_alone(self, request: Request) -> Prediction:
        encoded = self.encode(request.pixels, request.source) if request.encoded is None else request.encoded
        canvas, features = encoded
        masks = torch.cat([self.model.decode(batch, request.text).mask_logits for batch in features])
        return self.predict_from(masks, self._frame((canvas.shape[-2], canvas.shape[-1])), canvas, request)

    def similarities(self, canvases: Sequence[Tensor], text: Tensor) -> tuple[list[Tensor], list[Frame]]:
        """Logits [n, Q, h, w] of the windows of each normalised image [3, H', W'], and where they lie."""
        frames = [self._frame((canvas.shape[-2], canvas.shape[-1])) for canvas in canvases]
        logits: list[Tensor] = []
        for batch in self._crop_batches(canvases, frames):
            logits += self.run(batch, text).mask_logits
        counts, start, masks = [len(frame.windows) for frame in frames], 0, []
        for count in counts:
            masks.append(torch.stack(logits[start : start + count]))
            start += count
        return masks, frames

    def _crop_batches(self, canvases: Sequence[Tensor], frames: Sequence[Frame]) -> Iterator[Tensor]:
        """Windows [n, 3, height, width], in batches of one size."""
        crops = [
            F.pad(canvas[:, y : y + frame.crop_size[0], x : x + frame.crop_size[1]], _around(frame))
            for canvas, frame in zip(canvases, frames, strict=True)
            for y, x in frame.windows
        ]
        for _, alike in groupby(crops, key=lambda crop: crop.shape):
            group = list(alike)
            for start in range(0, len(group), self.batch):
                yield torch.stack(group[start : start + self.batch])

    def predict_from(self, masks: Tensor, frame: Frame, canvas: Tensor, request: Request) -> Prediction:
        """Labels and scores of an image from the logits of its windows."""
        size = request.pixels.shape[:2]
        rule, refine = self.rule(request.names, len(request.text)), self.refinement(canvas)
        labels, scores = softmax_labels(
            masks,
            size,
            crop_size=frame.crop_size,
            canvas_size=frame.canvas_size,
            windows=frame.windows,
            margin=frame.margin,
            padded_size=frame.padded_size,
            rule=rule,
            refine=refine,
        )
        details = None
        if request.details:
            kept, image = masks.cpu(), canvas.cpu()
            corners = tuple(frame.windows)
            details = Details(
                scores=lambda size: softmax_scores(kept, size, frame, rule, self.refinement(image)),
                windows=WindowLogits(kept, corners, frame.padded_size or frame.crop_size, frame.canvas_size),
            )
        return _prediction(labels, scores, request, details)

    def rule(self, names: Sequence[Sequence[str]], rows: int) -> Rule:
        """How `rows` text rows compete: one a name, or one a class."""
        protocol = self.protocol
        apart = self.names_apart and rows != len(names)
        name_class = [c for c, entry in enumerate(names) for _ in entry] if apart else None
        scale = protocol.logit_scale / self.model.logit_scale
        return Rule(name_class, scale, protocol.over_classes, protocol.area_thd, protocol.prob_thd)

    def refinement(self, canvas: Tensor) -> Pamr | None:
        """What refines similarities at the image's size, if the protocol says so."""
        if not self.protocol.refine:
            return None
        return Pamr(canvas.float(), self.protocol.refine)

    def _frame(self, canvas: tuple[int, int]) -> Frame:
        crop, stride = self.protocol.crop(canvas), self.protocol.stride
        windows = sliding_windows(canvas, crop, (min(stride, crop[0]), min(stride, crop[1])))
        if not self.protocol.pad:
            return Frame(crop, canvas, windows)
        patch = self.model.encoder.config.patch_size
        rows, columns = -crop[0] % patch, -crop[1] % patch
        padded = crop[0] + rows, crop[1] + columns
        return Frame(crop, canvas, windows, (rows // 2, columns // 2), padded)

    def _canvas(self, request: Request) -> Tensor:
        """The normalised image [3, H', W'] on the model's device and in its type."""
        model, like = self.model, next(self.model.parameters())
        prepared = self.prepare(request.pixels) if request.prepared is None else request.prepared
        levels = self.resized(prepared, self.canvas_size(request.pixels.shape[:2]), self.protocol.antialias)
        return _normalise(_channels_first(levels), model.pixel_mean, model.pixel_std).to(like.dtype)


def _around(frame: Frame) -> tuple[int, int, int, int]:
    """left, right, top, bottom of what is put around a window."""
    padded = frame.padded_size or frame.crop_size
    (top, left), (more_rows, more_columns) = frame.margin, (p - c for p, c in zip(padded, frame.crop_size, strict=True))
    return left, more_columns - left, top, more_rows - top
