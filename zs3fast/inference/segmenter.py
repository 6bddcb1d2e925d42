"""Image in, labels out: reading, the method's test protocol, and a result a person can look at."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zs3fast.inference.compiled import CompiledModel
from zs3fast.inference.dtypes import auto_dtype
from zs3fast.inference.loading import (
    TINY,
    TINY_DEFAULT,
    find_weights,
    from_clip,
    is_converted,
    read_official,
    read_weights,
)
from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.plan import Classes, Plan, check_min_score, competitors, seen_of
from zs3fast.inference.predictors import InWindows, Prediction, Request, predictor_for
from zs3fast.inference.streaming import default_workers, overlapped
from zs3fast.inference.text_rows import TextRows
from zs3fast.models.base import ZeroShotModel
from zs3fast.text import parse_classes, resolve_templates, whole_names
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.types import Segmentation
from zs3fast.utils.images import read_image

if TYPE_CHECKING:
    from zs3fast.text import TextEncoder
    from zs3fast.text.encoder import Tokenizer

__all__ = ["TINY", "TINY_DEFAULT", "EncodedImage", "Segmenter", "find_weights", "is_converted", "read_official"]
logger = logging.getLogger("zs3fast")

_LARGE = 10_000_000  # parameters from which half the bytes are worth their rounding
_Read = tuple[np.ndarray, str | None, Any]  # an image's pixels [H, W, 3], its path, what a model knows of it


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that a Segmenter has run its encoder on, to be asked about any number of class lists.

    image: uint8 [H, W, 3].  source: its path, or None.  features: what the method keeps of it.  segmenter: its maker.
    """

    image: np.ndarray
    source: str | None
    features: Any
    segmenter: Segmenter


class Segmenter:
    """Segments images of any size into classes given by name.

    The protocol is the method's published one, see `zs3fast.inference.predictors`: sliding windows for ZegCLIP,
    TagCLIP, CLIP-RC and MaskCLIP, the squashed image for ClsCLIP, proposals for MAFT. Scores of all classes at
    image size are never stored.

    Which classes count as seen (and lose `model.seen_offset`, which offsets what training favours):
        - `seen=` of a call, if given;
        - else, where `model.config["class_names"]` holds the training vocabulary: a class is seen if any of its names
          is a seen name there; a name that training never had is unseen;
        - else, where the list is as long as the model's vocabulary: `model.seen`, as indices into the list;
        - else nothing is known and nothing is offset.
    TagCLIP's trusty map weighs seen against unseen; where only one of both kinds is on the list, it is left out.

    Threads: any number may call one Segmenter at once, each with its own classes, and get the very bits that one thread
    would; calls change nothing in the model. Changing it (`to`, weights, `model.seen`) while calls run is not safe, and
    nor is a `tokenizer`, `proposer` or `boxes` of one's own that is not.

    Args:
        model: from `create_model`, `load_official` or `weights.load`; put in eval mode. It is shared, not copied, but
            where it has to move or change its type. None: a method without training on OpenAI's CLIP ViT-B/16, which
            is fetched if it is not on the machine.
        tokenizer: list of sentences -> token ids, in place of the text encoder's own.
        text_encoder: the text tower of the CLIP the model grew from. None: built when first needed, from open_clip,
            with the model's own `pretrained` weights or, where the model names none, OpenAI's; random, with a warning,
            for a model whose own weights are the constructor's random ones.
        text_embeddings: [C, D] prepared rows for `class_names`, instead of a text encoder. Classes are then chosen
            from these by name.
        class_names: the rows' names, and the classes of a call that gives none. None: the model's training vocabulary.
        options: see `SegmenterOptions`.  keywords: single ones of these, such as device="cuda".
    """

    def __init__(
        self,
        model: ZeroShotModel | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        text_encoder: TextEncoder | None = None,
        text_embeddings: Tensor | np.ndarray | None = None,
        class_names: Classes | None = None,
        options: SegmenterOptions | None = None,
        **keywords: Any,
    ):
        options = (options or SegmenterOptions()).with_(keywords)
        if text_encoder is not None and text_embeddings is not None:
            raise ValueError("text_embeddings: give these or a text_encoder, not both")
        self.options = options
        self.model = _suited(from_clip(seen=[]), options, own=True) if model is None else _suited(model, options)
        self._predictor = predictor_for(
            self.model, options.window_batch, options.proposer, options.crops, options.boxes, options.protocol
        )
        if options.quantize is not None:
            from zs3fast.encoders.quantize import quantize_encoder

            quantize_encoder(self.model, options.quantize)
        if options.compile:
            self._compile()
        published = self.model.templates or ("single" if self.model.config.get("num_classes") == 20 else "multi")
        published = getattr(self._predictor, "templates", published)
        self.templates = resolve_templates(published if options.templates is None else options.templates)
        vocabulary = self.model.config.get("class_names")
        names = whole_names(vocabulary) if class_names is None and vocabulary is not None else class_names
        self.classes = None if names is None else parse_classes(names, "class_names")
        self._texts = TextRows(
            self.model,
            self.templates,
            self._predictor.names_apart,
            tokenizer,
            text_encoder,
            text_embeddings,
            self.classes,
        )
        Image.init()  # Pillow's formats, which two threads that find them unregistered could miss

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        text_encoder: TextEncoder | None = None,
        text_embeddings: Tensor | np.ndarray | None = None,
        class_names: Classes | None = None,
        official: Mapping[str, Any] | None = None,
        options: SegmenterOptions | None = None,
        **keywords: Any,
    ) -> Segmenter:
        """A segmenter from a weight file: one of ours, or an official checkpoint.

        A text tower inside the file is used unless a text encoder or embeddings are given.

        Args:
            name_or_path: a file; or the name of one in the cache, `weights/<name>.safetensors` under
                `zs3fast.text.cache_dir()`; or one of the small models in the package, "zs3fast-tiny" (the best of
                them) or "zs3fast-tiny-METHOD", see `zs3fast.data.world` for what they know.
            official: for official checkpoints, options of `load_official`: seen, num_classes, class_names, ...
            others: as for the class.
        Raises:
            FileNotFoundError: neither a file nor a name in the cache.  ValueError: a file that is no such thing.
        """
        options = (options or SegmenterOptions()).with_(keywords)
        with_text = text_encoder is None and text_embeddings is None
        model, tower = read_weights(find_weights(name_or_path), dict(official or {}), with_text, options.device)
        return cls(
            _suited(model, options, own=True),
            tokenizer,
            text_encoder=tower or text_encoder,
            text_embeddings=text_embeddings,
            class_names=class_names,
            options=options,
        )

    @property
    def names_apart(self) -> bool:
        """Whether each name of a class competes on its own, in place of their mean."""
        return self._predictor.names_apart

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type the model runs in."""
        return next(self.model.parameters()).dtype

    @property
    def text_encoder(self) -> TextEncoder:
        """The text tower; built from open_clip when first asked for, if none was given."""
        return self._texts.encoder

    def to(self, device: str | torch.device) -> Segmenter:
        """Move the model (which may be shared) and its text tower to a device; proposers stay where they are."""
        self.model.to(device)
        self._texts.moved(device)
        if self.options.compile:
            self._compile()
        return self

    def encode(self, image: Any) -> EncodedImage:
        """Run what no class list changes, once: `seg(encoded, classes)` then costs the rest.

        The image encoder of the methods that work in windows; ClsCLIP's layers before the first that knows the class;
        MAFT's encoder and its proposals, but for a proposer that is led by the class list (FreeSeg).
        """
        pixels, source, _ = self._read(image)
        with torch.no_grad():
            return EncodedImage(pixels, source, self._predictor.encode(pixels, source), self)

    @overload
    def __call__(
        self,
        image: list[Any] | tuple[Any, ...],
        classes: Classes | None = ...,
        *,
        seen: Iterable[str | int] | None = ...,
        min_score: float | None = ...,
        background: str | Sequence[str] = ...,
        details: bool = ...,
        source: None = ...,
    ) -> list[Segmentation]: ...
    @overload
    def __call__(
        self,
        image: Any,
        classes: Classes | None = ...,
        *,
        seen: Iterable[str | int] | None = ...,
        min_score: float | None = ...,
        background: str | Sequence[str] = ...,
        details: bool = ...,
        source: str | os.PathLike[str] | None = ...,
    ) -> Segmentation: ...

    def __call__(
        self,
        image: Any,
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
        details: bool = False,
        source: str | os.PathLike[str] | None = None,
    ) -> Segmentation | list[Segmentation]:
        """Segment an image, or several.

        Args:
            image: a path, bytes, file, PIL image, array or tensor, see `zs3fast.utils.images.read_image`; what `encode`
                gave; or a list of these, for a list of results.
            classes: the names that compete, as "cat, grass" or one item a class; an item may hold synonyms,
                "sofa, couch". None: `class_names` of the constructor.
            seen: which of them count as seen, as names or as indices into `classes`. None: see the class.
            min_score: pixels whose best score is lower (or not a number) stay unlabelled. None: the model's own, which
                is 0.5 for ClsCLIP, whose masks are binary, and none for the others.
            background: names whose pixels stay unlabelled. Those that are not in `classes` compete as well. "auto": a
                built-in list of what photos show, see `zs3fast.text.background`, without what `classes` names.
            details: keep what the labels came from, see `Segmentation.class_scores`, `trusty_map` and `windows`.
            source: the path of an image that is handed in decoded, by which proposers find their files; None: its own.
        Returns:
            labels and scores at the image's own size, names in the order given.
        """
        plan = self._plan(classes, seen, min_score, background, details)
        if isinstance(image, (list, tuple)):
            if source is not None:
                raise ValueError("source: is for one image, expected None with several")
            return [result for _, result in self._stream(image, plan)]
        pixels, own, features = self._read(image)
        read = (pixels, own if source is None else os.fspath(source), features)
        with torch.no_grad():
            (prediction,) = self._predictor([_request(plan, read)])
        return _segmentation(plan, read, prediction.labels.cpu().numpy(), prediction.scores.cpu().numpy(), prediction)

    def stream(
        self,
        images: Iterable[Any],
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
        details: bool = False,
        batch_size: int = 1,
        workers: int | None = None,
        failed: Callable[[Any, Exception], None] | None = None,
    ) -> Generator[tuple[Any, Segmentation], None, None]:
        """Segment many images: the next ones are read and resized on threads while the model works.

        A GPU resizes them itself, and the copies to and from it overlap with its work as well. At most `workers` +
        `batch_size` images are held beyond the one handed out (on a GPU twice `batch_size`). The arguments are
        checked at once.

        Args:
            images: any number, each as for a call; drawn from as images are asked for, some ahead.
            classes, seen, min_score, background, details: as for a call.
            batch_size: images whose windows share the model's batches of `window_batch`; they may differ in size. The
                numbers of a window depend a little on its batch, so that above 1 a pixel whose best classes are tied up
                to rounding may go to the other. Methods without windows take images one by one.
            workers: threads that read. None: see `zs3fast.inference.streaming.default_workers`. 0: no threads.
            failed: called with an image that cannot be read or segmented and the error, and the rest goes on.
                None: the error is raised.
        Returns:
            Yields (image as it was given, Segmentation) in order; with one image at a time and uncompiled, equal to a
            call's bit for bit. Leaving early ends the threads.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected 0 or more threads, got {workers}")
        if batch_size > 1 and not self._predictor.together:
            raise ValueError(f"batch_size: {self.model.method} takes pictures one by one, got {batch_size}")
        plan = self._plan(classes, seen, min_score, background, details)
        return self._stream(images, plan, batch_size, workers, failed)

    def _stream(
        self,
        images: Iterable[Any],
        plan: Plan,
        batch_size: int = 1,
        workers: int | None = None,
        failed: Callable[[Any, Exception], None] | None = None,
    ) -> Generator[tuple[Any, Segmentation], None, None]:
        kept: dict[int, Prediction] = {}  # details stay on this side of the copies

        def prepare(image: Any) -> tuple[_Read, Tensor | None]:
            read = self._read(image)
            return read, self._predictor.prepare(read[0]) if read[2] is None else None

        @torch.no_grad()
        def compute(items: list[tuple[_Read, Tensor | None]]) -> list[tuple[Tensor, ...]]:
            predictions = self._predictor([_request(plan, read, prepared) for read, prepared in items])
            if plan.details:
                kept.update((id(read[0]), prediction) for (read, _), prediction in zip(items, predictions, strict=True))
            return [(prediction.labels, prediction.scores) for prediction in predictions]

        def finish(read: _Read, labels: np.ndarray, scores: np.ndarray) -> Segmentation:
            return _segmentation(plan, read, labels, scores, kept.pop(id(read[0]), None))

        workers = default_workers(self.device) if workers is None else workers
        return overlapped(
            images, prepare, compute, finish, device=self.device, workers=workers, batch_size=batch_size, failed=failed
        )

    @torch.no_grad()
    def embed(self, classes: Classes | None = None) -> Tensor:
        """Text embeddings [C, D] of class names, in order, on the model's device: what the model calls `text`.

        Args:
            classes: as for a call.
        Returns:
            a row a class, or where names compete apart (`names_apart`) a row a name.
        """
        return self._texts.embeddings(tuple(self._entries(classes))).clone()  # the kept rows are shared

    def check(
        self,
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
    ) -> None:
        """Raise now what a call with these arguments would, and encode its names, before any image is read."""
        self._plan(classes, seen, min_score, background)

    @torch.no_grad()
    def _plan(
        self,
        classes: Classes | None,
        seen: Iterable[str | int] | None,
        min_score: float | None,
        background: str | Sequence[str],
        details: bool = False,
    ) -> Plan:
        check_min_score(min_score)
        entries = self._entries(classes)
        competing, rejected = competitors(entries, background)
        text, is_seen = self._texts.embeddings(competing), self._seen(entries, competing, seen)
        lowest = self.model.min_score if min_score is None else min_score
        return Plan(tuple(entry[0] for entry in entries), competing, text, is_seen, rejected, lowest, details)

    def _entries(self, classes: Classes | None) -> list[ClassEntry]:
        if classes is not None:
            return parse_classes(classes)
        if self.classes is None:
            raise ValueError("classes: expected class names, since neither model nor segmenter has a list of its own")
        return list(self.classes)

    def _seen(
        self, given: list[ClassEntry], competing: Sequence[ClassEntry], seen: Iterable[str | int] | None
    ) -> list[int] | None:
        return seen_of(self.model, given, competing, seen)

    def _read(self, image: Any) -> _Read:
        if not isinstance(image, EncodedImage):
            return *read_image(image), None
        if image.segmenter is not self:
            raise ValueError("image: it was encoded by another Segmenter, expected one that this one's `encode` gave")
        return image.image, image.source, image.features

    def _compile(self) -> None:
        if not isinstance(self._predictor, InWindows):
            raise ValueError(f"compile: expected a method that works in windows, got {self.model.method}")
        self._predictor.run = CompiledModel(self.model)


def _suited(model: ZeroShotModel, options: SegmenterOptions, own: bool = False) -> ZeroShotModel:
    """The model on the device and in the type of the options, in eval mode; a copy where it must change, if not `own`.

    The automatic type is for large float32 models: whoever has chosen a type keeps it, and small ones gain nothing.
    """
    like = next(model.parameters())
    device = like.device if options.device is None else torch.device(options.device)
    dtype = options.torch_dtype
    if dtype is None and like.dtype == torch.float32 and options.quantize is None:
        if sum(parameter.numel() for parameter in model.parameters()) >= _LARGE:
            dtype = auto_dtype(device)
    changes = dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point())
    moves = like.device != torch.empty(0, device=device).device
    if (changes or moves) and not own:
        model = copy.deepcopy(model)
    if changes or moves:
        model = model.to(device=device, dtype=dtype)
    return model.eval()


def _request(plan: Plan, read: _Read, prepared: Tensor | None = None) -> Request:
    pixels, source, features = read
    return Request(pixels, plan.text, plan.competing, plan.seen, source, prepared, features, plan.details)


def _segmentation(
    plan: Plan, read: _Read, labels: np.ndarray, scores: np.ndarray, prediction: Prediction | None
) -> Segmentation:
    """The result from the winners' labels and scores, without what the plan leaves unlabelled."""
    pixels, source, _ = read
    labels = labels.astype(np.int32)
    if plan.rejected:
        labels[np.isin(labels, plan.rejected)] = -1
    if plan.min_score is not None:
        labels[~(scores >= plan.min_score)] = -1
    nan_pixels = int(np.isnan(scores).sum())
    if nan_pixels:
        what = source or "the image"
        warnings.warn(f"{nan_pixels} pixels of {what} have no score (nan): check the weights", stacklevel=3)
    details = None if prediction is None else prediction.details
    return Segmentation(labels, plan.class_names, scores, pixels, nan_pixels, source, details)
