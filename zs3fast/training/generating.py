"""Training of a mask generator: regions of the classes that take part as targets, all of one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.data.datasets import SegmentationDataset
from zs3fast.labels import targets
from zs3fast.proposals.generator import ProposalGenerator
from zs3fast.proposals.masks import soft_masks
from zs3fast.training.steps import Batch, Step, Terms
from zs3fast.utils.distributed import DistEnv

METRICS = ("iou", "iou_seen", "iou_unseen", "recall", "recall_seen", "recall_unseen")
FOUND = 0.5  # IoU from which a region counts as found


class GeneratorStep(Step):
    """MaskFormer, Mask2Former: images in, the library's matching and losses out, summed over its layers.

    One binary mask a class present, all of the label "object"; pixels of other classes belong to no mask, as those
    without a label do. Mask losses are means over masks, the class loss over queries, weighted: `count` holds both
    numbers, so that the split into micro-batches does not matter.

    Args:
        classes: those that have targets.
    """

    model: ProposalGenerator

    def __init__(self, model: ProposalGenerator, text_embeddings: Tensor, *, classes: Sequence[int], **options: Any):
        super().__init__(model, text_embeddings, **options)
        self.classes = list(classes)
        config = model.network.config
        self._queries = int(getattr(config, "num_queries", None) or config.decoder_config.num_queries)
        self._no_object = float(config.no_object_weight)

    def masks(self, labels: Tensor) -> list[Tensor]:
        """Labels [B, H, W] -> float masks [k, H, W] of each image, in the order of `classes`."""
        present = targets.present_classes(labels, max(self.classes) + 1).cpu()
        held = ([c for c in self.classes if row[c]] for row in present)
        return [
            torch.stack([image == c for c in found]).float() if found else image.new_zeros(0, *image.shape).float()
            for image, found in zip(labels, held)
        ]

    def count(self, batch: Batch) -> Tensor:
        """[2]: masks, and what the class loss is divided by: 1 a query with a mask, `no_object_weight` any other."""
        return self._numbers(self.masks(batch["labels"])).to(batch["labels"].device)

    def _numbers(self, masks: list[Tensor]) -> Tensor:
        matched = sum(min(len(some), self._queries) for some in masks)
        others = self._queries * len(masks) - matched
        return torch.tensor([float(sum(map(len, masks))), matched + self._no_object * others])

    def forward(self, batch: Batch, average: Tensor | None = None) -> Terms:
        with self.autocast():
            out = self.model(batch["images"])
        masks = self.masks(batch["labels"])
        classes = [torch.zeros(len(some), dtype=torch.int64, device=some.device) for some in masks]
        layers = [{name: value.float() for name, value in layer.items()} for layer in out.auxiliary_logits or ()]
        losses = self.model.network.get_loss_dict(
            out.masks_queries_logits.float(), out.class_queries_logits.float(), masks, classes, layers
        )
        numbers = self._numbers(masks).to(batch["labels"].device)
        share = torch.ones_like(numbers) if average is None else numbers.clamp_min(1) / average
        kinds = {"loss_mask": share[0], "loss_dice": share[0], "loss_cross_entropy": share[1]}
        terms = {
            kind: part * torch.stack([value for name, value in losses.items() if name.startswith(kind)]).sum()
            for kind, part in kinds.items()
        }
        return {**terms, "loss": torch.stack(list(terms.values())).sum()}


def region_iou(masks: Tensor, labels: Tensor, ignore_index: int) -> dict[int, float]:
    """The best IoU that any of the masks has with each class's region of an image.

    Args:
        masks: bool [Nq, H, W].  labels: [H, W]; pixels of `ignore_index` count for neither side.
    Returns:
        {class: IoU}, of the classes present.
    """
    valid = labels != ignore_index
    classes = labels[valid].unique()
    regions = (labels[valid] == classes[:, None]).float()  # [k, pixels]
    proposed = masks[:, valid].float()
    both = regions @ proposed.t()
    union = regions.sum(1, keepdim=True) + proposed.sum(1) - both
    best = (both / union).amax(1)
    return dict(zip(classes.tolist(), best.tolist()))


@torch.no_grad()
def score_regions(
    model: ProposalGenerator, dataset: SegmentationDataset, limit: int | None, env: DistEnv
) -> dict[str, float]:
    """How well the generator's masks cover true regions, in percent; each image in one of the processes.

    "iou" is the mean over the regions of the set (a class in an image) of the best IoU among an image's masks,
    "recall" how many of them have one of at least 0.5; "_seen" and "_unseen" those of such classes, if there are any.
    """
    side = model.image_size
    propose = model.proposer(short_side=side, long_side=4 * side)
    seen, found = set(dataset.seen), []
    images = len(dataset) if limit is None else min(limit, len(dataset))
    for index in range(env.rank, images, env.world):
        sample = dataset[index]
        proposals = propose([sample.image])
        height, width = proposals.image_sizes[0]
        masks = soft_masks(proposals)[:, :, :height, :width]
        masks = F.interpolate(masks, size=sample.labels.shape, mode="bilinear")[0] >= 0.5
        labels = torch.from_numpy(sample.labels).to(masks.device)
        found += [(c in seen, iou) for c, iou in region_iou(masks, labels, dataset.ignore_index).items()]
    regions = [region for some in env.gathered(found) for region in some]
    groups = {"": regions, "_seen": [r for r in regions if r[0]], "_unseen": [r for r in regions if not r[0]]}
    values = {name: np.array([iou for _, iou in some]) for name, some in groups.items() if some}
    scores = {f"iou{name}": float(100 * np.mean(ious)) for name, ious in values.items()}
    return {**scores, **{f"recall{name}": float(100 * np.mean(ious >= FOUND)) for name, ious in values.items()}}
