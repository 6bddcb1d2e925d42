"""One forward pass of each kind of method, from a batch to its loss terms, as modules: DDP, FSDP and compile wrap them.

A batch is {"images": [B, 3, S, S], "labels": [B, S, S], ...}. Where a loss is a mean over things that differ in number
from batch to batch, `count` says how many this batch holds; `forward` is then given the average over all micro-batches
of the iteration, on all processes (the total at least 1), so that any split of the same images gives the same gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.labels import targets
from zs3fast.labels.proposal_targets import class_masks
from zs3fast.types import Proposals
from zs3fast.utils.waiting import constant

if TYPE_CHECKING:
    from zs3fast.models.base import SegmentationModel
    from zs3fast.models.clsclip import ClsCLIP
    from zs3fast.models.maft import MAFT
    from zs3fast.training.trained import Trained

Batch = dict[str, Tensor]
Terms = dict[str, Tensor]


class Step(nn.Module):
    """Base: the model, the text embeddings its recipe trains on, and the precision.

    Args:
        text_embeddings: [C, D] of the classes that take part in training.
        precision: "fp32", or "bf16": autocast around the model; losses are computed in float32 either way.
    """

    model: Trained
    text_embeddings: Tensor

    def __init__(self, model: Trained, text_embeddings: Tensor, *, ignore_index: int, precision: str = "fp32"):
        super().__init__()
        self.model = model
        self.register_buffer("text_embeddings", text_embeddings, persistent=False)
        self.ignore_index = ignore_index
        self.precision = precision

    def autocast(self) -> AbstractContextManager[None]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.text_embeddings.device.type, torch.bfloat16)

    def count(self, batch: Batch) -> Tensor | None:
        """How many things the loss of this batch is a mean over; None: nothing to share between batches."""
        return None

    def forward(self, batch: Batch, average: Tensor | None = None) -> Terms:
        """Loss terms, "loss" their sum; `average` is the mean of `count` over the micro-batches of the iteration."""
        raise NotImplementedError


class OneStageStep(Step):
    """ZegCLIP, TagCLIP, CLIP-RC: images and names in, mask losses out.

    The mask losses are divided by n = max(1, masks in all) / micro-batches, a mask being a class present in an image
    (ZegCLIP section 3.4: averaged over workers). In self-training masks depend on the pseudo labels, which each
    micro-batch makes from its own output: there n is averaged over the workers alone.
    """

    model: SegmentationModel

    def __init__(self, model: SegmentationModel, text_embeddings: Tensor, *, setting: str, **options: Any):
        rows = text_embeddings[model.seen] if setting == "inductive" else text_embeddings
        super().__init__(model, rows, **options)
        self.setting = setting
        everything = setting == "supervised"
        self._counted = list(range(len(text_embeddings))) if everything else list(model.seen)

    def count(self, batch: Batch) -> Tensor | None:
        if self.setting == "transductive":
            return None
        present = targets.present_classes(batch["labels"], max(self._counted) + 1)
        return present[:, constant(self._counted, present.device)].sum().float()

    def forward(self, batch: Batch, average: Tensor | None = None) -> Terms:
        with self.autocast():
            out = self.model(batch["images"], self.text_embeddings)
        result: Terms = self.model.loss(
            out, batch["labels"], self.setting, ignore_index=self.ignore_index, num_masks=average
        )
        return result


class PairStep(Step):
    """ClsCLIP: (image, class) pairs in, binary mask losses out; the loss is a mean over valid pixels.

    Args:
        prompts: [T, C, D], text tokens of T templates; each pair takes those of one at random, in place of
            `text_embeddings`. None: these.
    """

    model: ClsCLIP
    prompts: Tensor | None

    def __init__(self, model: ClsCLIP, text_embeddings: Tensor, *, prompts: Tensor | None = None, **options: Any):
        super().__init__(model, text_embeddings, **options)
        self.register_buffer("prompts", prompts, persistent=False)

    def count(self, batch: Batch) -> Tensor | None:
        return self._valid(batch)

    def _valid(self, batch: Batch) -> Tensor:
        return (batch["labels"] != self.ignore_index).sum().float()

    def forward(self, batch: Batch, average: Tensor | None = None) -> Terms:
        images = batch["images"]
        pairs = torch.stack([torch.arange(len(images), device=images.device), batch["class_index"]], dim=1)
        text, asked = self.text_embeddings, pairs
        if self.prompts is not None:
            text, (templates, classes) = self.prompts.flatten(0, 1), self.prompts.shape[:2]
            drawn = torch.randint(templates, (len(images),), device=images.device)
            asked = torch.stack([pairs[:, 0], drawn * classes + pairs[:, 1]], dim=1)
        with self.autocast():
            out = self.model(images, text, asked)
        terms = self.model.loss(out, batch["labels"], pairs=pairs, ignore_index=self.ignore_index)
        if average is None:
            result: Terms = terms
            return result
        share = self._valid(batch) / average
        return {name: term * share for name, term in terms.items()}


class ProposalStep(Step):
    """MAFT: images and mask proposals in; mask-aware loss and distillation from the untouched CLIP out.

    Both losses are means over what a micro-batch holds, and micro-batches are averaged, as published (2 images each).

    Args:
        setting: "inductive" trains on the seen classes alone, unseen pixels count as ignored; "transductive" knows all
            names, and where unseen pixels are, and gives them pseudo labels, see `MAFT.pseudo_labels`.
        propose: images [B, 3, H, W] as the batch has them, and channel labels [B, H, W] -> Proposals.
        clip_size: side the images are resized to for CLIP.
        distillation: compare the class scores of whole images with those of a frozen copy of the model as it is now.
    """

    model: MAFT

    def __init__(
        self,
        model: MAFT,
        text_embeddings: Tensor,
        *,
        setting: str,
        propose: Callable[[Tensor, Tensor], Proposals],
        clip_size: int,
        distillation: bool = True,
        **options: Any,
    ):
        rows = text_embeddings[model.seen] if setting == "inductive" else text_embeddings
        super().__init__(model, rows, **options)
        self.setting = setting
        self._classes = len(text_embeddings)
        self.propose = propose
        self.clip_size = clip_size
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if distillation else None
        self._teacher = [teacher]  # in a list: neither trained, nor saved, nor exchanged between processes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProposalStep:
        if self._teacher[0] is not None:
            self._teacher[0]._apply(fn, recurse)
        out: ProposalStep = super()._apply(fn, recurse)
        return out

    def forward(self, batch: Batch, average: Tensor | None = None) -> Terms:
        labels = batch["labels"]
        if self.setting == "inductive":
            labels = targets.inductive_labels(labels, self.model.seen, self._classes, self.ignore_index)
        with torch.no_grad():
            proposals = self.propose(batch["images"], self._told(labels))
        size = (self.clip_size, self.clip_size)
        images = F.interpolate(batch["images"], size=size, mode="bilinear", align_corners=False)
        teacher = self._teacher[0]
        with self.autocast():
            out = self.model(images, self.text_embeddings, proposals)
            if teacher is not None:
                with torch.no_grad():
                    embedding = teacher.image_embedding(images)
        if self.setting == "transductive":
            labels = self.model.pseudo_labels(out, labels, ignore_index=self.ignore_index)
        masks, classes = class_masks(labels, len(self.text_embeddings))
        result: Terms = self.model.loss(out, masks, classes, teacher_embedding=None if teacher is None else embedding)
        return result

    def _told(self, labels: Tensor) -> Tensor:
        """What proposals made from the labels may know of them: in self-training not which unseen class a pixel is."""
        if self.setting != "transductive":
            return labels
        hidden = targets.unseen_pixels(labels, self.model.seen, self._classes, self.ignore_index)
        one = next((c for c in range(self._classes) if c not in self.model.seen), 0)
        return labels.masked_fill(hidden, one)
