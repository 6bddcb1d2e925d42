"""Image in, labels out: reading, the method's test protocol, and a result a person can look at."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zs3fast.inference.dtypes import suited
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
from zs3fast.inference.plan import CallOptions, Classes, Planner, class_list
from zs3fast.inference.predictors import predictor_for
from zs3fast.inference.running import EncodedImage, ReadImage, Runner, read
from zs3fast.inference.text_rows import TextRows
from zs3fast.models.base import ZeroShotModel
from zs3fast.text import resolve_templates
from zs3fast.types import Segmentation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zs3fast.text import TextEncoder
    from zs3fast.text.tower import Tokenizer

__all__ = ["TINY", "TINY_DEFAULT", "EncodedImage", "Segmenter", "find_weights", "is_converted", "read_official"]
logger = logging.getLogger("zs3fast")


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
            raise ValueError("text_embeddings: expected these or a text_encoder, got both")
        self.options = options
        self.model = suited(from_clip(seen=[]), options, own=True) if model is None else suited(model, options)
        self._predictor = predictor_for(
            self.model,
            options.window_batch,
            options.proposer,
            options.crops,
            options.boxes,
            options.protocol,
            options.refine_steps,
        )
        if options.compile:
            self._predictor.compile()
        published = self._predictor.templates
        self.templates = resolve_templates(published if options.templates is None else options.templates)
        self.classes = class_list(self.model, class_names)
        apart = self._predictor.names_apart
        self._texts = TextRows(
            self.model, self.templates, apart, tokenizer, text_encoder, text_embeddings, self.classes
        )
        self._plan, self._runner = Planner(self._texts), Runner(self._predictor)
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
            suited(model, options, own=True),
            tokenizer,
            text_encoder=tower or text_encoder,
            text_embeddings=text_embeddings,
            class_names=class_names,
            options=options,
        )

    @property
    def together(self) -> bool:
        """Whether images share the model's batches: `stream` takes a `batch_size` above 1."""
        return self._predictor.together

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
            self._predictor.compile()
        return self

    def encode(self, image: Any) -> EncodedImage:
        """Run what no class list changes, once: `seg(encoded, classes)` then costs the rest.

        The image encoder of the methods that work in windows; ClsCLIP's layers before the first that knows the class;
        MAFT's encoder and its proposals, but for a proposer that is led by the class list (FreeSeg).
        """
        pixels, source, _ = self._read(image)
        return EncodedImage(pixels, source, self._runner.encode(pixels, source), self)

    @overload
    def __call__(
        self,
        image: list[Any] | tuple[Any, ...],
        classes: Classes | None = ...,
        *,
        source: None = ...,
        **how: Unpack[CallOptions],
    ) -> list[Segmentation]: ...
    @overload
    def __call__(
        self,
        image: Any,
        classes: Classes | None = ...,
        *,
        source: str | os.PathLike[str] | None = ...,
        **how: Unpack[CallOptions],
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
        if not isinstance(image, (list, tuple)):
            return self._runner.one(plan, self._read(image, source))
        if source is not None:
            raise ValueError(f"source: is for one image, expected None with several, got {source}")
        return [result for _, result in self._runner.stream(plan, image, self._read)]

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
        compact: bool = False,
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
            compact: labels of int8 (up to 128 classes) or int16 in place of int32: of large photos a lot of memory.
        Returns:
            Yields (image as it was given, Segmentation) in order; with one image at a time and uncompiled, equal to a
            call's bit for bit. Leaving early ends the threads.
        """
        plan = self._plan(classes, seen, min_score, background, details)
        return self._runner.stream(plan, images, self._read, batch_size, workers, failed, compact)

    @torch.no_grad()
    def embed(self, classes: Classes | None = None) -> Tensor:
        """Text embeddings [C, D] of class names, in order, on the model's device: what the model calls `text`.

        Args:
            classes: as for a call.
        Returns:
            a row a class, or where names compete apart (`names_apart`) a row a name.
        """
        return self._texts.embeddings(tuple(self._plan.entries(classes))).clone()  # the kept rows are shared

    def release_text_encoder(self) -> None:
        """Let go of the text tower, and its memory: the class lists asked for last go on, others have it built anew.

        One that was given, or lay in a weight file, is not built anew: other lists are refused then.
        """
        self._texts.release()

    def warmup(
        self, classes: Classes | None = None, sizes: Iterable[tuple[int, int]] = ((512, 512),), *, batch_size: int = 1
    ) -> None:
        """Do now what first calls would: encode names, compile kernels and graphs, record what small batches replay.

        An image of noise of each size is segmented, on a GPU three times (first call, recording, replay).

        Args:
            classes: as for a call. With `compile=True` any other list of several classes runs the same code.
            sizes: (height, width) of the images to come; images whose windows are as many cost nothing more.
            batch_size: as for `stream`.
        """
        plan = self._plan(classes, None, None, (), False)
        sizes = list(sizes)
        for size in sizes:
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"sizes: expected (height, width) of at least 1 x 1, got {size}")
        noise = np.random.default_rng(0)
        for height, width in sizes:
            pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
            for _ in range(3 if self.device.type == "cuda" else 1):
                for _ in self._runner.stream(plan, [pixels] * batch_size, self._read, batch_size, 0):
                    pass

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

    def _read(self, image: Any, source: str | os.PathLike[str] | None = None) -> ReadImage:
        return read(image, self, source)
