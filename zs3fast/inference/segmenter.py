"""Picture in, labels out: reading, resizing, sliding windows, the model, and a result a person can look at."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zs3fast import weights
from zs3fast.encoders.quantize import KINDS, quantize_encoder
from zs3fast.inference.compiled import CompiledModel
from zs3fast.inference.predictors import Request, predictor_for
from zs3fast.inference.streaming import default_workers, overlapped
from zs3fast.inference.window_protocols import WindowProtocol
from zs3fast.proposals import BoxProposer, MaskProposer
from zs3fast.text import TextEncoder, cache_dir, parse_classes, resolve_templates, whole_names
from zs3fast.text.encoder import Tokenizer
from zs3fast.text.vocabulary import ClassEntry, same_name
from zs3fast.types import Segmentation
from zs3fast.utils.checkpoint_io import read_metadata, read_state_dict
from zs3fast.utils.images import read_image
from zs3fast.utils.options import one_of
from zs3fast.weights.files import METADATA_KEY, TEXT_PREFIX
from zs3fast.weights.official_maft import text_tower
from zs3fast.weights.packing import bundled, packed_models

logger = logging.getLogger("zs3fast")

TINY, TINY_DEFAULT = "zs3fast-tiny", "clip_rc"  # the small models in the package, and the best of them

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LISTS_KEPT = 16  # class lists whose embeddings stay at hand
_shared = threading.RLock()  # held while what threads share is built; a lock inside would make a Segmenter uncopyable

Classes = str | Iterable[str | Sequence[str]]
_Read = tuple[np.ndarray, str | None]  # a picture's pixels [H, W, 3] and its path


@dataclass(frozen=True)
class _Plan:
    """What a call comes to: the names to show, names and embeddings [C, D] of all that compete, and who is what.

    seen: indices, or None where nothing is known.  rejected: indices of the background.
    min_score: below it pixels stay unlabelled, or None.
    """

    class_names: tuple[str, ...]
    competing: tuple[ClassEntry, ...]
    text: Tensor
    seen: list[int] | None
    rejected: list[int]
    min_score: float | None


class Segmenter:
    """Segments pictures of any size into classes given by name.

    The protocol is the method's published one, see `zs3fast.inference.predictors`: sliding windows for ZegCLIP,
    TagCLIP, CLIP-RC and MaskCLIP, the squashed picture for ClsCLIP, proposals for MAFT. Scores of all classes at
    picture size are never stored.

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
        model: from `create_model`, `load_official` or `weights.load`; put in eval mode.
        tokenizer: list of sentences -> token ids, in place of the text encoder's own.
        text_encoder: the text tower of the CLIP the model grew from. None: built when first needed, from open_clip,
            with the model's own `pretrained` weights or, where the model names none, OpenAI's; random, with a warning,
            for a model whose own weights are the constructor's random ones.
        text_embeddings: [C, D] prepared rows for `class_names`, instead of a text encoder. Classes are then chosen
            from these by name.
        class_names: the rows' names, and the classes of a call that gives none. None: the model's training vocabulary.
        templates: "single", "multi" or sentences with one {}. None: what was published for training: "single" for a
            vocabulary of 20 (VOC), else "multi"; "multi" for MaskCLIP, which has no training.
        device: move the model there.
        dtype: torch.float32, bfloat16 or float16: convert the model to it. None: as it is. Half precision is for GPUs;
            labels differ where classes are close to each other.
        window_batch: windows the model sees at once.
        proposer: what finds mask proposals for MAFT, see `zs3fast.proposals`; it needs one.
        crops: classify MAFT's proposals by a CLIP pass each instead, see `zs3fast.inference.predictors.Proposing`.
        boxes: what finds boxes for ClsCLIP to zoom into (ClsCLIP+).
        compile: run ZegCLIP, TagCLIP, CLIP-RC or MaskCLIP through torch.compile, see `zs3fast.inference.compiled`; the
            first pictures then take a minute or more. The other methods' work has too many shapes.
        protocol: of a training-free method: "sclip", "naclip", "clearclip", "scclip", "rcs" or "maskclip" as published
            (sizes, windows, templates; see `zs3fast.inference.window_protocols`), or a `WindowProtocol`. None: short
            side and windows of the model's `image_size`.
        quantize: put the image tower of `model` into 8 bits, in place: "int8", "int8-weights" or "fp8", see
            `zs3fast.encoders.quantize`, which needs torchao.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        text_encoder: TextEncoder | None = None,
        text_embeddings: Tensor | np.ndarray | None = None,
        class_names: Classes | None = None,
        templates: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window_batch: int = 8,
        proposer: MaskProposer | None = None,
        crops: str | None = None,
        boxes: BoxProposer | None = None,
        compile: bool = False,
        quantize: str | None = None,
        protocol: str | WindowProtocol | None = None,
    ):
        if window_batch < 1:
            raise ValueError(f"window_batch: expected at least 1, got {window_batch}")
        if text_encoder is not None and text_embeddings is not None:
            raise ValueError("text_embeddings: give these or a text_encoder, not both")
        if dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
        if quantize is not None:
            one_of("quantize", quantize, KINDS)
        self.model = model.to(device=device, dtype=dtype).eval()
        self._predictor = predictor_for(model, window_batch, proposer, crops, boxes, protocol)
        if quantize is not None:
            quantize_encoder(self.model, quantize)
        if compile:
            if not self._predictor.compiles:
                raise ValueError(f"compile: expected a method that works in windows, got {model.method}")
            self._predictor.run = CompiledModel(self.model)
        published = model.templates or ("single" if model.config.get("num_classes") == 20 else "multi")
        published = getattr(self._predictor, "templates", published)
        self.templates = resolve_templates(published if templates is None else templates)
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        if text_encoder is not None and tokenizer is not None:
            text_encoder.tokenizer = tokenizer
        vocabulary = model.config.get("class_names")
        names = whole_names(vocabulary) if class_names is None and vocabulary is not None else class_names
        self.classes = None if names is None else parse_classes(names, "class_names")
        self._rows = None if text_embeddings is None else self._named_rows(text_embeddings)
        self._encoded: dict[tuple[ClassEntry, ...], Tensor] = {}
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
        templates: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window_batch: int = 8,
        proposer: MaskProposer | None = None,
        crops: str | None = None,
        boxes: BoxProposer | None = None,
        compile: bool = False,
        quantize: str | None = None,
        protocol: str | WindowProtocol | None = None,
        official: Mapping[str, Any] | None = None,
    ) -> Segmenter:
        """A segmenter from a weight file: one of ours, or an official checkpoint.

        A text tower inside the file is used unless a text encoder or embeddings are given.

        Args:
            name_or_path: a file; or the name of one in the cache, `weights/<name>.safetensors` under
                `zs3fast.text.cache_dir()`; or one of the small models in the package, "zs3fast-tiny" (the best of
                them) or "zs3fast-tiny-METHOD", see `zs3fast.data.world` for what they know.
            official: for official checkpoints, options of `load_official`: seen, num_classes, class_names, ...
        Raises:
            FileNotFoundError: neither a file nor a name in the cache.  ValueError: a file that is no such thing.
        """
        path = find_weights(name_or_path)
        if is_converted(path):
            if official:
                raise ValueError(
                    f"official: {path} carries its own settings, got {', '.join(sorted(official))} as well"
                )
            model, extra = weights.load(path)
        else:
            model, extra = read_official(path, **(official or {}))
        tower = {key: value for key, value in extra.items() if key.startswith(TEXT_PREFIX)}
        if tower and text_encoder is None and text_embeddings is None:
            text_encoder = TextEncoder.from_state_dict(tower, name=path.name)
            if device is not None:
                text_encoder.to(device)
        return cls(
            model,
            tokenizer,
            text_encoder=text_encoder,
            text_embeddings=text_embeddings,
            class_names=class_names,
            templates=templates,
            device=device,
            dtype=dtype,
            window_batch=window_batch,
            proposer=proposer,
            crops=crops,
            boxes=boxes,
            compile=compile,
            quantize=quantize,
            protocol=protocol,
        )

    @property
    def names_apart(self) -> bool:
        """Whether each name of a class competes on its own, in place of their mean."""
        return self._predictor.names_apart

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def text_encoder(self) -> TextEncoder:
        """The text tower; built from open_clip when first asked for, if none was given."""
        with _shared:
            if self._text_encoder is None:
                self._text_encoder = self._own_text_encoder().to(self.device)
            return self._text_encoder

    def _own_text_encoder(self) -> TextEncoder:
        config = self.model.config
        if not self.model.weights_loaded:
            logger.warning("the model's weights are untrained, so its text tower is too: labels mean nothing")
            return TextEncoder.from_open_clip(config["clip"], None, tokenizer=self._tokenizer)
        if not isinstance(config["clip"], str) and config.get("pretrained") is None:
            raise ValueError("text_encoder: expected one, since this model's CLIP has no name to find a tower by")
        return TextEncoder.from_open_clip(
            config["clip"], config.get("pretrained") or "openai", tokenizer=self._tokenizer
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
    ) -> Segmentation:
        """Segment one picture.

        Args:
            image: a path, PIL image, array or tensor; see `zs3fast.utils.images.read_image`.
            classes: the names that compete, as "cat, grass" or one item a class; an item may hold synonyms,
                "sofa, couch". None: `class_names` of the constructor.
            seen: which of them count as seen, as names or as indices into `classes`. None: see the class.
            min_score: pixels whose best score is lower (or not a number) stay unlabelled. None: the model's own, which
                is 0.5 for ClsCLIP, whose masks are binary, and none for the others.
            background: names whose pixels stay unlabelled. Those that are not in `classes` compete as well.
        Returns:
            labels and scores at the picture's own size, names in the order given.
        """
        plan = self._plan(classes, seen, min_score, background)
        pixels, source = read_image(image)
        (prediction,) = self._predictor([Request(pixels, plan.text, plan.competing, plan.seen, source)])
        return _segmentation(plan, pixels, source, prediction.labels.cpu().numpy(), prediction.scores.cpu().numpy())

    def stream(
        self,
        images: Iterable[Any],
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
        batch_size: int = 1,
        workers: int | None = None,
        failed: Callable[[Any, Exception], None] | None = None,
    ) -> Generator[tuple[Any, Segmentation], None, None]:
        """Segment many pictures: the next ones are read and resized on threads while the model works.

        A GPU resizes them itself, and the copies to and from it overlap with its work as well. At most `workers` +
        `batch_size` pictures are held beyond the one handed out (on a GPU twice `batch_size`). The arguments are
        checked at once.

        Args:
            images: any number, each as for a call; drawn from as pictures are asked for, some ahead.
            classes, seen, min_score, background: as for a call.
            batch_size: pictures whose windows share the model's batches of `window_batch`; they may differ in size. The
                numbers of a window depend a little on its batch, so that above 1 a pixel whose best classes are tied up
                to rounding may go to the other. Methods without windows take pictures one by one.
            workers: threads that read. None: see `zs3fast.inference.streaming.default_workers`. 0: no threads.
            failed: called with a picture that cannot be read or segmented and the error, and the rest goes on.
                None: the error is raised.
        Returns:
            Yields (image as it was given, Segmentation) in order; with one picture at a time and uncompiled, equal to a
            call's bit for bit. Leaving early ends the threads.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected 0 or more threads, got {workers}")
        if batch_size > 1 and not self._predictor.together:
            raise ValueError(f"batch_size: {self.model.method} takes pictures one by one, got {batch_size}")
        plan = self._plan(classes, seen, min_score, background)
        workers = default_workers(self.device) if workers is None else workers

        def prepare(image: Any) -> tuple[_Read, Tensor | None]:
            pixels, source = read_image(image)
            return (pixels, source), self._predictor.prepare(pixels)

        @torch.no_grad()
        def compute(pictures: list[tuple[_Read, Tensor | None]]) -> list[tuple[Tensor, Tensor]]:
            requests = [
                Request(pixels, plan.text, plan.competing, plan.seen, source, prepared)
                for (pixels, source), prepared in pictures
            ]
            return [(prediction.labels, prediction.scores) for prediction in self._predictor(requests)]

        def finish(read: _Read, labels: np.ndarray, scores: np.ndarray) -> Segmentation:
            return _segmentation(plan, *read, labels, scores)

        return overlapped(
            images, prepare, compute, finish, device=self.device, workers=workers, batch_size=batch_size, failed=failed
        )

    def check(
        self,
        classes: Classes | None = None,
        *,
        seen: Iterable[str | int] | None = None,
        min_score: float | None = None,
        background: str | Sequence[str] = (),
    ) -> None:
        """Raise now what a call with these arguments would, and encode its names, before any picture is read."""
        self._plan(classes, seen, min_score, background)

    @torch.no_grad()
    def _plan(
        self,
        classes: Classes | None,
        seen: Iterable[str | int] | None,
        min_score: float | None,
        background: str | Sequence[str],
    ) -> _Plan:
        if min_score is not None and not np.isfinite(min_score):
            raise ValueError(f"min_score: expected a finite number, got {min_score}")
        entries = self._entries(classes)
        rejected = parse_classes(background, "background") if background else []
        shown = {same_name(entry[0]) for entry in entries}
        competing = entries + [entry for entry in rejected if same_name(entry[0]) not in shown]
        names = {same_name(entry[0]) for entry in rejected}
        return _Plan(
            class_names=tuple(entry[0] for entry in entries),
            competing=tuple(competing),
            text=self._text_embeddings(tuple(competing)),
            seen=self._seen(entries, competing, seen),
            rejected=[i for i, entry in enumerate(competing) if same_name(entry[0]) in names],
            min_score=self.model.min_score if min_score is None else min_score,
        )

    def _entries(self, classes: Classes | None) -> list[ClassEntry]:
        if classes is not None:
            return parse_classes(classes)
        if self.classes is None:
            raise ValueError("classes: expected class names, since neither model nor segmenter has a list of its own")
        return list(self.classes)

    def _seen(
        self, given: list[ClassEntry], competing: list[ClassEntry], seen: Iterable[str | int] | None
    ) -> list[int] | None:
        """Indices of the seen among the competing classes; None where nothing is known."""
        model, vocabulary = self.model, self.model.config.get("class_names")
        if seen is not None:
            return _seen_argument(given, seen)
        if vocabulary is not None:
            names = {same_name(vocabulary[index]) for index in model.seen}
            return [i for i, entry in enumerate(competing) if any(same_name(name) in names for name in entry)]
        if len(given) == model.config.get("num_classes"):
            return list(model.seen)
        logger.info("the model's vocabulary is not known: none of the %d classes counts as seen", len(given))
        return None

    def _text_embeddings(self, entries: tuple[ClassEntry, ...]) -> Tensor:
        """[C, D] on the model's device; the same tensor for as long as the list is among the last few."""
        rows = self._encoded.get(entries)
        if rows is None or rows.device != self.device:
            rows = (self._chosen_rows(entries) if self._rows else self._encode(entries)).to(self.device)
            with _shared:
                self._encoded[entries] = rows
                while len(self._encoded) > _LISTS_KEPT:
                    self._encoded.pop(next(iter(self._encoded)))
        return rows

    def _encode(self, entries: tuple[ClassEntry, ...]) -> Tensor:
        if self._predictor.names_apart:
            names = [name for entry in entries for name in entry]
            once = list(dict.fromkeys(names))  # a name may stand for two classes: one row, twice
            rows = self.text_encoder.encode(whole_names(once), self.templates, text_token=self.model.text_token)
            return rows[[once.index(name) for name in names]]
        return self.text_encoder.encode(entries, self.templates, text_token=self.model.text_token)

    def _named_rows(self, text_embeddings: Tensor | np.ndarray) -> dict[str, Tensor]:
        rows = torch.as_tensor(text_embeddings).float()
        if self.classes is None:
            raise ValueError("class_names: expected the names of the rows of text_embeddings")
        if rows.dim() != 2 or len(rows) != len(self.classes):
            raise ValueError(
                f"text_embeddings: expected [C, D] with a row for each of {len(self.classes)} class_names, "
                f"got {list(rows.shape)}"
            )
        return {same_name(name): row for entry, row in zip(self.classes, rows, strict=True) for name in entry}

    def _chosen_rows(self, entries: Iterable[ClassEntry]) -> Tensor:
        missing = [entry[0] for entry in entries if same_name(entry[0]) not in self._rows]
        if missing:
            known = ", ".join(entry[0] for entry in self.classes[:10])
            raise ValueError(f"classes: no text_embeddings for {', '.join(missing)}; there are rows for {known}, ...")
        return torch.stack([self._rows[same_name(entry[0])] for entry in entries])


def _segmentation(
    plan: _Plan, pixels: np.ndarray, source: str | None, labels: np.ndarray, scores: np.ndarray
) -> Segmentation:
    """The result from the winners' labels and scores, without what the plan leaves unlabelled."""
    labels = labels.astype(np.int32)
    if plan.rejected:
        labels[np.isin(labels, plan.rejected)] = -1
    if plan.min_score is not None:
        labels[~(scores >= plan.min_score)] = -1
    nan_pixels = int(np.isnan(scores).sum())
    if nan_pixels:
        what = source or "the image"
        warnings.warn(f"{nan_pixels} pixels of {what} have no score (nan): check the weights", stacklevel=3)
    return Segmentation(labels, plan.class_names, scores, pixels, nan_pixels, source)


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """The weight file of a path, of a name in the cache folder, or of a name in the package."""
    path, kept = Path(name_or_path), cache_dir() / "weights"
    if path.is_file():
        return path
    named = kept / f"{os.fspath(name_or_path)}.safetensors"
    if named.is_file():
        return named
    own = {f"{TINY}-{method}": file for method, file in packed_models(bundled()).items()}
    chosen = f"{TINY}-{TINY_DEFAULT}" if os.fspath(name_or_path) == TINY else os.fspath(name_or_path)
    if chosen in own:
        return own[chosen]
    names = ", ".join(sorted(file.stem for file in kept.glob("*.safetensors"))) or "none"
    raise FileNotFoundError(
        f"name_or_path: no file {path}, no such name among the weights in {kept} ({names}), nor in the package "
        f"({', '.join([TINY, *own])}). `zs3fast convert` writes such files from official checkpoints"
    )


def read_official(path: Path, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of an official checkpoint, and the text tower in it (empty if it has none); the file is read once."""
    state = read_state_dict(path)
    try:
        model = weights.load_official(state, **options)
    except weights.CheckpointError as error:
        raise weights.CheckpointError(f"{path}: {str(error).removeprefix('checkpoint: ')}") from None
    tower = {key: value for key, value in state.items() if key.startswith(TEXT_PREFIX)}
    return model, tower or text_tower(state, TEXT_PREFIX)


def is_converted(path: Path) -> bool:
    """Whether a weight file is one of ours, with its configuration inside."""
    if path.suffix != ".safetensors":
        return False
    return METADATA_KEY in read_metadata(path)


def _seen_argument(given: list[ClassEntry], seen: Iterable[str | int]) -> list[int]:
    if isinstance(seen, str):
        raise TypeError(f"seen: expected a list of names or indices, got the string {seen!r}")
    position = {same_name(name): index for index, entry in enumerate(given) for name in entry}
    indices = []
    for item in seen:
        index = position.get(same_name(item)) if isinstance(item, str) else item
        if not isinstance(index, int) or not 0 <= index < len(given):
            raise ValueError(f"seen: expected names or indices of the {len(given)} classes, got {item!r}")
        indices.append(index)
    return sorted(set(indices))
