"""Sub-images of the frozen-CLIP baseline: every proposal cut out as a small image of its own, one CLIP pass each.

Two published forms (MAFT's baselines), for P proposals that are not skipped:

    zegformer  in CLIP-normalised space on the padded frame: pixels outside the mask become 0, RoIAlign to 224 x 224.
               "mask" resizes image and mask logits to 224 x 224 and multiplies. A mask without a pixel: whole frame.
    zsseg      on the unpadded frame: pixels outside the mask become CLIP's mean colour (which is 0 after normalising),
    freeseg    the box is cut at pixel borders and resized by a bicubic filter (freeseg: align_corners). Masks without a
               pixel are skipped.

A pixel is inside where sigmoid(logit) > 0.5. Rows that are not `valid` are always skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.proposals.boxes import mask_boxes
from zs3fast.proposals.frames import CLIP_MEAN, CLIP_STD, Frame, generator_input
from zs3fast.proposals.masks import check_proposals, soft_masks
from zs3fast.types import Proposals

MERGES = ("mask", "crop", "mask_crop")
FORMS = ("zegformer", "zsseg", "freeseg")


@dataclass(frozen=True, eq=False)
class SubImages:
    """P proposals as images.

    images:  [P, 3, side, side] CLIP-normalised.
    rows:    int64 [P, 2], (image, proposal) of each.
    skipped: bool [B, Nq], the proposals without an image.
    """

    images: Tensor
    rows: Tensor
    skipped: Tensor


def sub_images(
    frames: Frame | Sequence[Frame],
    proposals: Proposals,
    merge: str = "mask_crop",
    form: str = "zegformer",
    side: int = 224,
) -> SubImages:
    """Cut every proposal out of its image, see the module's description.

    Args:
        frames: the B frames that the proposals were made on.
        merge: "mask", "crop" or "mask_crop" (the best of the three).
        form: "zegformer", "zsseg" or "freeseg".
    Raises:
        ValueError: an unknown merge or form; proposals of other frames.
    """
    for name, value, known in (("merge", merge, MERGES), ("form", form, FORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    frames = [frames] if isinstance(frames, Frame) else list(frames)
    check_proposals(proposals)
    _check_frames(frames, proposals)
    device = proposals.valid.device
    padded = generator_input(frames, CLIP_MEAN, CLIP_STD).to(device)
    kept = proposals.valid.clone()
    images = [padded.new_zeros(0, 3, side, side)]
    for index, frame in enumerate(frames):
        rows = kept[index].nonzero()[:, 0]
        inside = soft_masks(_only(proposals, index, rows))[0] > 0.5
        if form == "zegformer":
            logits = None if proposals.mask_logits is None else proposals.mask_logits[index, rows]
            images.append(_zegformer(padded[index], inside, logits, merge, side))
            continue
        height, width = frame.image_size
        inside = inside[:, :height, :width]
        boxes, filled = mask_boxes(inside)
        kept[index, rows] = filled
        images.append(_zsseg(padded[index, :, :height, :width], inside[filled], boxes[filled], merge, form, side))
    return SubImages(images=torch.cat(images), rows=kept.nonzero(), skipped=~kept)


def _zegformer(image: Tensor, inside: Tensor, logits: Tensor | None, merge: str, side: int) -> Tensor:
    """image [3, Hp, Wp], inside bool [n, Hp, Wp], logits [n, h4, w4] or None -> [n, 3, side, side]."""
    from torchvision.ops import roi_align

    if len(inside) == 0:
        return image.new_zeros(0, 3, side, side)
    if merge == "mask":
        small = F.interpolate(image[None], size=(side, side), mode="bilinear", align_corners=False)
        given = inside.float() if logits is None else logits.float()
        mask = F.interpolate(given[None], size=(side, side), mode="bilinear", align_corners=False)[0]
        return small * (mask > (0.5 if logits is None else 0.0))[:, None]
    boxes, filled = mask_boxes(inside)
    boxes[~filled] = boxes.new_tensor([0, 0, inside.shape[2], inside.shape[1]])
    pieces = []
    for mask, box in zip(inside, boxes.float()):  # one masked frame at a time: a hundred of them are gigabytes
        source = image * mask if merge == "mask_crop" else image
        pieces.append(roi_align(source[None], [box[None]], (side, side), aligned=True))
    return torch.cat(pieces)


def _zsseg(image: Tensor, inside: Tensor, boxes: Tensor, merge: str, form: str, side: int) -> Tensor:
    """image [3, Hi, Wi], inside bool [n, Hi, Wi], boxes [n, 4] -> [n, 3, side, side]."""
    pieces = [image.new_zeros(0, 3, side, side)]
    for mask, (x0, y0, x1, y1) in zip(inside, boxes.tolist()):
        source = image if merge == "crop" else image * mask
        if merge != "mask":
            source = source[:, y0:y1, x0:x1]
        pieces.append(F.interpolate(source[None], (side, side), mode="bicubic", align_corners=form == "freeseg"))
    return torch.cat(pieces)


def _only(proposals: Proposals, index: int, rows: Tensor) -> Proposals:
    """Some proposals of one image: the masks of a whole batch at full size would not fit."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index, rows][None]

    return Proposals(
        mask_logits=pick(proposals.mask_logits),
        masks=pick(proposals.masks),
        valid=proposals.valid[index, rows][None],
        padded_size=proposals.padded_size,
        image_sizes=proposals.image_sizes[index : index + 1],
        original_sizes=proposals.original_sizes[index : index + 1],
        align_corners=proposals.align_corners,
    )


def _check_frames(frames: list[Frame], proposals: Proposals) -> None:
    own = [(frame.padded_size, frame.image_size) for frame in frames]
    expected = [(tuple(proposals.padded_size), tuple(size)) for size in proposals.image_sizes]
    if own != expected:
        raise ValueError(f"frames: expected (padded, image) sizes {expected} as the proposals have them, got {own}")
