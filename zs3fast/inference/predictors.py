"""Each method's test protocol: sliding windows, the whole image squashed, or proposals on their frame.

A predictor is called with images' pixels, the competing classes and what is known of them, and gives labels and the
winning scores at the images' own sizes. It is what the published test pipelines do around their models. The part that
needs no model is `prepare`, which any thread may call ahead of time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from zs3fast import ops
from zs3fast.encoders.navigated import ImagePrefix
from zs3fast.inference.compiled import CompiledModel
from zs3fast.inference.repeated import Logits, RepeatedModel
from zs3fast.inference.window_protocols import WindowProtocol, window_protocol
from zs3fast.labels.refinement import Pamr, refined_labels
from zs3fast.labels.windows import sliding_windows
from zs3fast.models.base import FeatureModel, SegmentationModel, ZeroShotModel
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.models.clsclip_plus import ClsCLIPPlus
from zs3fast.models.clsclip_plus import squash as squash_images
from zs3fast.models.maft import MAFT, mask_bits
from zs3fast.ops.masks_to_labels import reference_scores
from zs3fast.proposals import BoxProposer, Frame, MaskProposer, clip_input, for_classes, resize_for_proposer, sub_images
from zs3fast.proposals.class_columns import scores_for_classes
from zs3fast.proposals.crops import MERGES
from zs3fast.types import BoxProposals, Details, ImageFeatures, Proposals, SegmentationOutput, WindowLogits
from zs3fast.utils.images import resize
from zs3fast.utils.options import one_of
from zs3fast.utils.resizing import bilinear, resizes_there
from zs3fast.utils.waiting import check

if TYPE_CHECKING:
    from zs3fast.models.maskclip import MaskCLIP

# A bound on one image's windows: 1000 of them at 512 pixels are a strip of more than 420 000 pixels.
MAX_WINDOWS = 1000


@dataclass(frozen=True)
class Request:
    """What is asked of one image.

    pixels: uint8 [H, W, 3].  text: [C, D] of the competing classes.  names: the names of each, synonyms included.
    seen: indices of the seen among them, or None where nothing is known.  source: the image's path, or None.
    prepared: what `Predictor.prepare` made of the pixels, on any device; None: not made yet.
    encoded: what `Predictor.encode` made of the image; None: not made yet.  details: whether the prediction keeps any.
    """

    pixels: np.ndarray
    text: Tensor
    names: Sequence[Sequence[str]]
    seen: list[int] | None
    source: str | None = None
    prepared: Tensor | None = None
    encoded: Any = None
    details: bool = False


@dataclass(frozen=True)
class Prediction:
    """labels: of the smallest signed integers that hold the classes, [H, W], -1 = nothing was found there.

    scores: float32 [H, W]. Both are on the model's device.  details: what they came from, on the host, where the
    request asked for it.
    """

    labels: Tensor
    scores: Tensor
    details: Details | None = None


class Predictor:
    """Answers requests about images with a model.

    together: whether images share the model's batches.
    refine: steps of refinement of the maps that labels come from, see `zs3fast.labels.refinement`; 0: none.
    """

    together = False
    refine = 0
    model: ZeroShotModel

    @property
    def templates(self) -> str | Sequence[str]:
        """The sentences class names are put in unless told: those the model was trained with."""
        return self.model.templates or ("single" if self.model.config.get("num_classes") == 20 else "multi")

    @property
    def names_apart(self) -> bool:
        """Whether it takes a text row for each name of a class."""
        return False

    def prepare(self, pixels: np.ndarray) -> Tensor | None:
        """The work on pixels [H, W, 3] that needs no model, on any thread; None: there is none."""
        return None

    def encode(self, pixels: np.ndarray, source: str | None) -> Any:
        """What the method does with an image before it hears of classes: `Request.encoded`."""
        raise NotImplementedError

    def predict(self, request: Request) -> Prediction:
        """The prediction for one image."""
        raise NotImplementedError

    def __call__(self, requests: Sequence[Request]) -> list[Prediction]:
        """A prediction an image; they all have the same classes."""
        return [self.predict(request) for request in requests]

    def refined(self, steps: int) -> None:
        """Refine maps by so many steps from now on."""
        self.refine = steps

    def compile(self) -> None:
        """Run the model through torch.compile from now on; a ValueError where its inputs have too many shapes."""
        raise ValueError(f"compile: expected a method that works in windows, got {self.model.method}")


class InWindows(Predictor):
    """What the protocols share whose model sees an image in windows: inputs of few shapes, so that it can be compiled.

    Args:
        batch: windows the model sees at once.

    Attributes:
        run: gives the logits of a batch of windows: `model`, its CUDA graphs, or a compiled one in its place.
    """

    together = True
    model: FeatureModel
    run: Callable[[Tensor, Tensor], SegmentationOutput | Logits]

    def __init__(self, model: FeatureModel, batch: int):
        self.model, self.batch = model, batch
        self.run = RepeatedModel(model)

    def compile(self) -> None:
        self.run = CompiledModel(self.model)

    def left_to_device(self, pixels: np.ndarray, size: tuple[int, int], antialias: bool) -> Tensor:
        """The image as it is where the model's device resizes it, else resized."""
        image = torch.from_numpy(pixels)
        if resizes_there(next(self.model.parameters()).device, pixels.shape[:2], size):
            return image
        return torch.from_numpy(resize(pixels, size, antialias))

    def resized(self, prepared: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
        """What `left_to_device` gave, uint8 [H', W', 3] of `size` on the model's device.

        On the host it is the library's bytes that the method was made with, see `zs3fast.utils.images.resize`; a GPU's
        exact resize differs from them by one grey level here and there.
        """
        levels = prepared.to(next(self.model.parameters()).device)
        if levels.shape[:2] == tuple(size):
            return levels
        if levels.device.type == "cuda":
            return bilinear(levels, size, antialias)
        return torch.from_numpy(resize(levels.numpy(), size, antialias))


class Windows(InWindows):
    """ZegCLIP's, TagCLIP's and CLIP-RC's: short side to `image_size`, windows with a stride of 426/512 of it.

    Each window's calibrated scores are averaged, resized to the image and compared, in one op: scores of all classes
    at image size are never stored.

    Args:
        batch: windows the model sees at once.
    """

    model: SegmentationModel
    stride = (426, 512)  # of `image_size`, as a fraction
    antialias = False

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """The image uint8 [H', W', 3], resized; or as it is, where the model's device resizes it."""
        size = fitted_size(pixels.shape[:2], self.model.image_size)
        return self.left_to_device(pixels, size, self.antialias)

    def __call__(self, requests: Sequence[Request]) -> list[Prediction]:
        crop, stride = self._crop_and_stride()
        sizes = [fitted_size(request.pixels.shape[:2], self.model.image_size) for request in requests]
        windows = [sliding_windows(size, crop, stride) for size in sizes]
        counts = [len(corners) for corners in windows]
        outputs = split_windows(self.outputs(requests, windows), counts)
        predictions = []
        for request, size, corners, out in zip(requests, sizes, windows, outputs, strict=True):
            frame: dict[str, Any] = {"crop_size": crop, "canvas_size": size, "windows": corners}
            predictions.append(self._compare(*out, request, **frame))
        return predictions

    def encode(self, pixels: np.ndarray, source: str | None) -> list[ImageFeatures]:
        """The features of the image's windows, as they are batched."""
        crop, stride = self._crop_and_stride()
        canvas = self._canvas(Request(pixels, torch.empty(0), (), None, source))
        corners = sliding_windows((canvas.shape[-2], canvas.shape[-1]), crop, stride)
        return [self.model.encode(batch) for batch in self._batches([(canvas, y, x) for y, x in corners])]

    def outputs(self, requests: Sequence[Request], windows: Sequence[list[tuple[int, int]]]) -> list[Any]:
        """The model's outputs, batch by batch. Its batches run on from image to image, but for those encoded before."""
        text, out, places = requests[0].text, [], []
        for request, corners in zip(requests, windows, strict=True):
            if request.encoded is None:
                canvas = self._canvas(request)
                places += [(canvas, y, x) for y, x in corners]
                continue
            out += [self.run(batch, text) for batch in self._batches(places)]
            out += [self.model.decode(features, text) for features in request.encoded]
            places = []
        return out + [self.run(batch, text) for batch in self._batches(places)]

    def _batches(self, places: Sequence[tuple[Tensor, int, int]]) -> Iterator[Tensor]:
        """Windows [n, 3, side, side] of canvases [3, H', W'], at their corners."""
        side = self.model.image_size
        for start in range(0, len(places), self.batch):
            some = places[start : start + self.batch]
            yield torch.stack([canvas[:, y : y + side, x : x + side] for canvas, y, x in some])

    def _crop_and_stride(self) -> tuple[tuple[int, int], tuple[int, int]]:
        side, (part, whole) = self.model.image_size, self.stride
        step = max(part * side // whole, 1)
        return (side, side), (step, step)

    def _canvas(self, request: Request) -> Tensor:
        """The normalised image [3, H', W'] on the model's device and in its type."""
        model, like = self.model, next(self.model.parameters())
        prepared = self.prepare(request.pixels) if request.prepared is None else request.prepared
        size = fitted_size(request.pixels.shape[:2], model.image_size)
        levels = self.resized(prepared, size, self.antialias)
        return _normalise(_channels_first(levels), model.pixel_mean, model.pixel_std).to(like.dtype)

    def _compare(self, masks: Tensor, trusty: Tensor | None, request: Request, **frame: Any) -> Prediction:
        """Labels and scores of the image from the logits of its windows, which lie in `frame`."""
        calibration = self.model.calibration(masks, trusty, request.seen or ())
        size, refine = request.pixels.shape[:2], None
        if self.refine:
            refine = Pamr(self._canvas(request).float(), self.refine)
        details = None
        if request.details:
            details = _window_details(masks, trusty, calibration, frame, refine)
        if refine is not None:
            maps, pixels = scores_of_windows(masks, calibration, frame), math.prod(frame["canvas_size"])
            return _prediction(*refined_labels(maps, masks.shape[1], pixels, size, refine), request, details)
        result = ops.masks_to_labels(
            masks, size, dtype=_label_type(request), return_details=True, **calibration, **frame
        )
        return _prediction(result.labels[0], result.scores[0], request, details)


def scores_of_windows(masks: Tensor, calibration: dict[str, Any], frame: dict[str, Any]) -> Callable[[slice], Tensor]:
    """Some classes' calibrated scores [q, H', W'] on the canvas, from the logits [n, C, h, w] of its windows."""

    def scores(classes: slice) -> Tensor:
        seen = [c - classes.start for c in calibration["seen"] if classes.start <= c < classes.stop]
        some = {**calibration, "seen": seen}
        return reference_scores(masks[:, classes], frame["canvas_size"], **some, **frame)[0]

    return scores


def _refined(scores: Tensor, refine: Pamr | None) -> Tensor:
    """Scores [C, H, W] on the host, refined if need be."""
    return scores if refine is None else Pamr(refine.image[0].cpu(), refine.steps)(scores)


def _window_details(
    masks: Tensor, trusty: Tensor | None, calibration: dict[str, Any], frame: dict[str, Any], refine: Pamr | None
) -> Details:
    """What an image's labels came from, by the definition of scores."""
    masks, trusty = masks.cpu(), None if trusty is None else trusty.cpu()
    weighing = None if calibration["trusty_logits"] is None else trusty
    settings = {**calibration, "trusty_logits": weighing}

    def unseen(size: tuple[int, int]) -> Tensor:
        assert trusty is not None
        return reference_scores(trusty, size, **frame)[0, 0]

    return Details(
        scores=lambda size: _refined(reference_scores(masks, size, **settings, **frame)[0], refine),
        windows=WindowLogits(
            masks, tuple((y, x) for y, x in frame["windows"]), frame["crop_size"], frame["canvas_size"], trusty
        ),
        trusty=None if trusty is None else unseen,
    )


def split_windows(outputs: Sequence[Any], counts: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Mask and trusty logits of every image's windows, out of batches that run on from image to image."""
    masks = torch.cat([out.mask_logits for out in outputs]).split(list(counts))
    if outputs[0].trusty_logits is None:
        return [(part, None) for part in masks]
    trusty = torch.cat([out.trusty_logits for out in outputs]).split(list(counts))
    return list(zip(masks, trusty, strict=True))


class Squash(Predictor):
    """ClsCLIP's: the whole image squashed to `image_size`, one mask a class, the best class a pixel."""

    model: ClsCLIP

    def __init__(self, model: ClsCLIP):
        self.model = model

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """The normalised image [3, image_size, image_size]; or uint8 [H, W, 3] where the model's device makes it."""
        device, side = next(self.model.parameters()).device, self.model.image_size
        if resizes_there(device, pixels.shape[:2], (side, side)):
            return torch.from_numpy(pixels)
        return self._squash(pixels)

    def _squash(self, pixels: np.ndarray | Tensor) -> Tensor:
        return squash(pixels, self.model.image_size, self.model.pixel_mean, self.model.pixel_std)

    def predict(self, request: Request) -> Prediction:
        prefix = self._prefix(request.pixels, request.prepared) if request.encoded is None else request.encoded
        out, size = self.model.decode(prefix, request.text), request.pixels.shape[:2]
        refine, details = None, None
        if self.refine:
            refine = Pamr(self._squash(request.pixels).to(request.text.device), self.refine)
        if request.details:
            masks = SegmentationOutput(out.mask_logits.cpu(), out.global_token, out.patch_tokens)
            details = Details(lambda size: _refined(self.model.class_scores(masks, size)[0], refine))
        if refine is not None:
            maps, pixels = out.mask_logits[0].float(), math.prod(out.mask_logits.shape[-2:])
            found = refined_labels(maps.__getitem__, len(maps), pixels, size, refine, torch.sigmoid)
            return _prediction(*found, request, details)
        result = ops.masks_to_labels(out.mask_logits, size, dtype=_label_type(request), return_details=True)
        return _prediction(result.labels[0], result.scores[0], request, details)

    def encode(self, pixels: np.ndarray, source: str | None) -> ImagePrefix:
        """The layers before the first that knows the class."""
        return self._prefix(pixels, None)

    def _prefix(self, pixels: np.ndarray, prepared: Tensor | None) -> ImagePrefix:
        like = next(self.model.parameters())
        image = (self.prepare(pixels) if prepared is None else prepared).to(like.device)
        image = self._squash(image) if image.dtype == torch.uint8 else image
        return self.model.encode(image.to(like.dtype)[None])


class Zooming(Predictor):
    """ClsCLIP+'s: the boxes a detector finds for each class, cut out and squashed; the best class a pixel.

    Pixels outside all boxes of a class score 0 for it; a class without boxes gets the whole image.

    Args:
        boxes: finds boxes.  no_box: see `ClsCLIPPlus`.
    """

    def __init__(self, model: ClsCLIP, boxes: BoxProposer, no_box: str = "whole_image"):
        self.model = model
        self.plus, self.boxes = ClsCLIPPlus(model, no_box=no_box), boxes

    def encode(self, pixels: np.ndarray, source: str | None) -> BoxProposals:
        """The detector's boxes; what is cut out depends on the classes."""
        return self.boxes(pixels, source)

    def predict(self, request: Request) -> Prediction:
        model = self.plus.model
        device = request.text.device
        image = normalise(torch.from_numpy(request.pixels).to(device), model.pixel_mean, model.pixel_std)
        found = self.boxes(request.pixels, request.source) if request.encoded is None else request.encoded
        if request.details:
            raise ValueError("details: expected False with boxes, as ClsCLIP+ keeps none, got True")
        boxes, size = found.to(device), request.pixels.shape[:2]
        if self.refine:

            def maps(classes: slice) -> Tensor:
                return self.plus.class_scores(image, request.text[classes], boxes, request.names[classes])

            refine = Pamr(image, self.refine)
            return _prediction(*refined_labels(maps, len(request.text), math.prod(size), size, refine), request)
        labels, scores = self.plus.predict_labels(image, request.text, boxes, request.names, threshold=None)
        return _prediction(labels, scores, request)


class Proposing(Predictor):
    """MAFT's: a proposer finds regions, the model says what they are, the masks vote.

    Args:
        proposer: finds mask proposals.
        crops: "mask", "crop" or "mask_crop": classify every proposal by a CLIP pass of its own instead, the baseline of
            the paper, in the form of `zs3fast.proposals.sub_images`.
    """

    model: MAFT

    def __init__(self, model: MAFT, proposer: MaskProposer, crops: str | None = None):
        if crops is not None:
            one_of("crops", crops, MERGES)
        self.model, self.proposer, self.crops = model, proposer, crops

    def predict(self, request: Request) -> Prediction:
        model, seen, size = self.model, request.seen or (), request.pixels.shape[:2]
        encoded: EncodedProposals = (
            self.encode(request.pixels, request.source) if request.encoded is None else request.encoded
        )
        if encoded.proposals is None:  # its proposer is led by the class list
            encoded = self._embedded(encoded, for_classes(self.proposer, request.text), request.pixels, request.source)
        assert encoded.proposals is not None and encoded.embeddings is not None
        proposals = scores_for_classes(encoded.proposals, request.names)
        out = model.decode(encoded.embeddings, request.text, proposals, encoded.grid, non_object=False)
        refine = Pamr(encoded.frame.pixels.to(request.text.device), self.refine) if self.refine else None
        details = None
        if request.details:
            details = Details(lambda size: _refined(model.class_scores(out, size, seen=seen)[0].cpu(), refine))
        if refine is None:
            labels, scores = (found[0] for found in model.label_details(out, size, seen=seen))
        else:
            maps, pixels = functools.partial(model.frame_scores, out, seen=seen), math.prod(encoded.frame.image_size)
            labels, scores = refined_labels(maps, len(request.text), pixels, size, refine)
        prediction = _prediction(labels, scores, request, details)
        # Pixels that no proposal covers, where all seen classes score -seen_offset and all others 0.
        nothing = 1e-6 - model.seen_offset if model.seen_offset and len(seen) == len(request.text) else 0.0
        labels = prediction.labels.masked_fill(prediction.scores <= nothing, -1)
        return Prediction(labels, prediction.scores, details)

    def encode(self, pixels: np.ndarray, source: str | None) -> EncodedProposals:
        """The proposals and their embeddings; the image's tokens alone for a proposer that needs the class list."""
        model, like = self.model, next(self.model.parameters())
        frame, tokens, grid = resize_for_proposer(pixels), None, (0, 0)
        if self.crops is None:
            tokens, grid = model.encoder.trunk(clip_input(frame, model.image_size).to(like))
        encoded = EncodedProposals(frame, tokens, grid)
        if hasattr(self.proposer, "for_vocabulary"):
            return encoded
        return self._embedded(encoded, self.proposer, pixels, source)

    def _embedded(
        self, encoded: EncodedProposals, propose: MaskProposer, pixels: np.ndarray, source: str | None
    ) -> EncodedProposals:
        model, like, frame = self.model, next(self.model.parameters()), encoded.frame
        proposals = propose([pixels], None if source is None else [source]).to(like.device)
        nothing = ValueError(f"proposer: it found no region in {source or 'the image'}")
        if not proposals.valid.shape[1]:
            raise nothing
        none = ~proposals.valid.any()
        check(none, none, lambda place, value: nothing)
        if (frame.padded_size, (frame.image_size,)) != (proposals.padded_size, proposals.image_sizes):
            raise ValueError(
                f"proposer: expected masks on the image's frame {frame.padded_size}, got {proposals.padded_size}"
            )
        if self.crops is None:
            embeddings = model.encoder.proposal_head(encoded.tokens, mask_bits(proposals, encoded.grid))
            return replace(encoded, proposals=proposals, embeddings=embeddings)
        cut = sub_images(frame, proposals, self.crops)
        embeddings, grid = model.crop_embeddings(cut.images.to(like), cut.rows, proposals)
        return replace(encoded, grid=grid, proposals=proposals, embeddings=embeddings)


@dataclass(frozen=True, eq=False)
class EncodedProposals:
    """What MAFT knows of an image before it hears of classes.

    frame: the resized image.  tokens: its trunk's, None with `crops`.  grid: (h, w) of the patches.
    proposals, embeddings: [1, Nq, D]; None where the proposer is led by the class list.
    """

    frame: Frame
    tokens: Any
    grid: tuple[int, int]
    proposals: Proposals | None = None
    embeddings: Tensor | None = None


def predictor_for(
    model: ZeroShotModel,
    window_batch: int,
    proposer: MaskProposer | None = None,
    crops: str | None = None,
    boxes: BoxProposer | None = None,
    protocol: str | WindowProtocol | None = None,
    refine: int | None = None,
) -> Predictor:
    """The predictor of a model's method.

    Args:
        protocol: of a training-free method, see `zs3fast.inference.window_protocols`; None: the model's own.
        refine: steps of refinement; None: as the protocol has it, none for trained methods.
    """
    predictor = _plain_predictor(model, window_batch, proposer, crops, boxes, protocol)
    if refine is not None:
        predictor.refined(refine)
    return predictor


def _plain_predictor(
    model: ZeroShotModel,
    window_batch: int,
    proposer: MaskProposer | None,
    crops: str | None,
    boxes: BoxProposer | None,
    protocol: str | WindowProtocol | None,
) -> Predictor:
    takes = {"proposals": ("proposer", "crops"), "squash": ("boxes",)}.get(model.protocol, ())
    for name, value in (("proposer", proposer), ("crops", crops), ("boxes", boxes)):
        if value is not None and name not in takes:
            raise ValueError(f"{name}: expected none for {model.method}, got {value!r}")
    if protocol is not None and model.protocol != "averaged_windows":
        raise ValueError(
            f"protocol: expected None for {model.method}, which is trained and has its own, got {protocol!r}"
        )
    if model.protocol == "proposals":
        if proposer is None:
            raise ValueError(f"proposer: {model.method} classifies regions and needs something that finds them")
        return Proposing(cast(MAFT, model), proposer, crops)
    if model.protocol == "squash":
        pairwise = cast(ClsCLIP, model)
        return Squash(pairwise) if boxes is None else Zooming(pairwise, boxes)
    if model.protocol == "averaged_windows":
        from zs3fast.inference.averaged_windows import AveragedWindows  # which is made of `Windows`

        dense = cast("MaskCLIP", model)
        protocol = dense.published_windows if protocol is None else protocol
        named = window_protocol(protocol) if isinstance(protocol, str) else protocol
        return AveragedWindows(dense, window_batch, named)
    return Windows(cast(SegmentationModel, model), window_batch)


def _prediction(labels: Tensor, scores: Tensor, request: Request, details: Details | None = None) -> Prediction:
    dtype = _label_type(request)
    if dtype == torch.uint8:  # whose upper half stays unused: there is room for -1
        return Prediction(
            (labels if labels.dtype == dtype else labels.to(torch.int8)).view(torch.int8), scores.float(), details
        )
    return Prediction(labels.to(dtype), scores.float(), details)


def _label_type(request: Request) -> torch.dtype:
    """What an op gives labels in, so that they take few bytes: of a photo of 36 megapixels each is 36 MB."""
    names = len(request.text)
    return torch.uint8 if names <= 1 << 7 else torch.int16 if names <= 1 << 15 else torch.int32


def prepare(
    pixels: np.ndarray, image_size: int, mean: Sequence[float], std: Sequence[float], antialias: bool = False
) -> Tensor:
    """The normalised image [3, H', W'] whose short side is `image_size`; see `fit`."""
    return _normalise(_channels_first(fit(pixels, image_size, antialias)), mean, std)


def fit(pixels: np.ndarray, image_size: int, antialias: bool = False) -> Tensor:
    """The image with a short side of `image_size`, uint8 [H', W', 3].

    Resized as the official code does it with OpenCV: bilinear without antialiasing, on 8 bits, rounded back to them.

    Args:
        antialias: average what lies between the samples of an image made smaller, as CLIP's own preprocessing does.
    """
    return torch.from_numpy(resize(pixels, fitted_size(pixels.shape[:2], image_size), antialias))


def fitted_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """(H', W') of an image whose short side becomes `image_size`, its long side int(x * image_size / short + 0.5).

    Raises:
        ValueError: so long a strip that more than `MAX_WINDOWS` windows would be needed.
    """
    height, width = size
    fitted = int(height * image_size / min(size) + 0.5), int(width * image_size / min(size) + 0.5)
    if max(fitted) > MAX_WINDOWS * 426 * image_size // 512:
        raise ValueError(
            f"image: {width} x {height} pixels are too long a strip: resized to a short side of {image_size}, it needs "
            f"more than {MAX_WINDOWS} windows. Cut it into pieces"
        )
    return fitted


def normalise(pixels: np.ndarray | Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W], (pixels / 255 - mean) / std, where the pixels are."""
    levels = torch.as_tensor(pixels).permute(2, 0, 1)
    out = torch.empty(levels.shape, device=levels.device)
    for c in range(len(levels)):  # one at a time: of a large image what lies between would be twice the result
        out[c : c + 1] = _normalise(levels[c : c + 1].float(), mean[c : c + 1], std[c : c + 1])
    return out


def squash(pixels: np.ndarray | Tensor, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The normalised image [3, image_size, image_size], its aspect ratio lost."""
    levels = torch.as_tensor(pixels).permute(2, 0, 1)
    channels = [  # one at a time: of a large image all in float are four times its bytes, and more
        squash_images(_normalise(levels[c : c + 1].float(), mean[c : c + 1], std[c : c + 1])[None], image_size)[0]
        for c in range(len(levels))
    ]
    return torch.cat(channels)


def _channels_first(levels: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W], contiguous."""
    return levels.permute(2, 0, 1).contiguous().float()


def _normalise(values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    white, centre, spread = _statistics(tuple(mean), tuple(std), values.device)
    return (values / white - centre) / spread


@functools.lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std on a device, copied there once.

    255 is a tensor there too: CUDA multiplies by the reciprocal of a Python number, which rounds otherwise than a CPU.
    """
    with torch.inference_mode(False):
        white, centre, spread = (torch.tensor(values).view(-1, 1, 1) for values in ((255.0,), mean, std))
        return white.to(device), centre.to(device), spread.to(device)
