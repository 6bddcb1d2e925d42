"""Object detectors of the transformers library (DETR, RT-DETR, YOLOS, ...) as box proposers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from zs3fast.proposals.frames import check_image
from zs3fast.types import BoxProposals


class TransformersBoxProposer:
    """Boxes, scores and class words of any model of the AutoModelForObjectDetection family.

    The checkpoint's own processor resizes the image and reads the model's outputs (softmax or sigmoid, as the family
    needs); boxes above the threshold go through non-maximum suppression within each class, are clipped to the image,
    and come best first.

    Args:
        model: the detector, with class words in config.id2label ("N/A" is no word).
        processor: its image processor, with `post_process_object_detection`.
        threshold: least score.
        nms_iou: boxes of one class that overlap a better one by more are dropped.
    """

    def __init__(self, model: nn.Module, processor: Any, threshold: float = 0.25, nms_iou: float = 0.45) -> None:
        for name, value in (("threshold", threshold), ("nms_iou", nms_iou)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        if not hasattr(processor, "post_process_object_detection"):
            raise TypeError(f"processor: {type(processor).__name__} has no post_process_object_detection")
        self.model, self.processor = model.eval(), processor
        self.threshold, self.nms_iou = threshold, nms_iou
        config: Any = model.config  # the library's own
        self._words = {int(index): str(word) for index, word in config.id2label.items()}
        self.vocabulary = tuple(dict.fromkeys(word for word in self._words.values() if word != "N/A"))
        self._inputs = set(inspect.signature(model.forward).parameters)

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, name: str | None = None) -> BoxProposals:
        """The boxes of one image; `name` is not used."""
        from torchvision.ops import batched_nms

        check_image(picture)
        height, width = picture.shape[:2]
        weight = next(self.model.parameters())
        inputs = self.processor(images=[picture], return_tensors="pt")
        taken = {key: inputs[key].to(weight.device) for key in ("pixel_values", "pixel_mask") if key in inputs}
        taken["pixel_values"] = taken["pixel_values"].to(weight)
        out = self.model(**{key: value for key, value in taken.items() if key in self._inputs})
        if not bool(torch.isfinite(out.logits).all() & torch.isfinite(out.pred_boxes).all()):
            raise ValueError("the detector's output is not finite: its weights or their precision are broken")
        found = self.processor.post_process_object_detection(
            out, threshold=self.threshold, target_sizes=[(height, width)]
        )[0]
        boxes, scores, labels = found["boxes"].float(), found["scores"].float(), found["labels"]
        boxes = boxes.clamp_min(0).minimum(boxes.new_tensor([width, height, width, height]))
        named = torch.tensor([self._words[label] != "N/A" for label in labels.tolist()], dtype=torch.bool)
        keep = named.to(boxes.device) & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        best = batched_nms(boxes, scores, labels, self.nms_iou)
        return BoxProposals(
            boxes=boxes[best],
            scores=scores[best],
            names=tuple(self._words[label] for label in labels[best].tolist()),
            image_size=(height, width),
            vocabulary=self.vocabulary,
        )
