"""Mask and box proposers: where the regions come from that MAFT classifies and ClsCLIP+ zooms into."""

from zs3fast.proposals.box_files import FileBoxProposer, box_file
from zs3fast.proposals.box_transformers import TransformersBoxProposer
from zs3fast.proposals.boxes import (
    ALIASES,
    BoxProposer,
    boxes_for_class,
    boxes_from_labels,
    boxes_from_masks,
    make_boxes,
    unknown_words,
)
from zs3fast.proposals.components import connected_components, label_masks
from zs3fast.proposals.crops import SubImages, sub_images
from zs3fast.proposals.frames import Frame, clip_input, generator_input, resize_batch, resize_for_proposer
from zs3fast.proposals.loading import load_box_proposer, load_mask_proposer
from zs3fast.proposals.mask_files import FileMaskProposer, mask_files
from zs3fast.proposals.mask_transformers import TransformersMaskProposer
from zs3fast.proposals.masks import MaskProposer, check_proposals, for_classes, from_labels, from_masks, soft_masks
from zs3fast.proposals.sam import SamProposer

__all__ = [
    "ALIASES",
    "BoxProposer",
    "FileBoxProposer",
    "FileMaskProposer",
    "Frame",
    "MaskProposer",
    "SamProposer",
    "SubImages",
    "TransformersBoxProposer",
    "TransformersMaskProposer",
    "box_file",
    "boxes_for_class",
    "boxes_from_labels",
    "boxes_from_masks",
    "check_proposals",
    "clip_input",
    "connected_components",
    "for_classes",
    "from_labels",
    "from_masks",
    "generator_input",
    "label_masks",
    "load_box_proposer",
    "load_mask_proposer",
    "make_boxes",
    "mask_files",
    "resize_batch",
    "resize_for_proposer",
    "soft_masks",
    "sub_images",
    "unknown_words",
]
