"""Real uses by name, and the shape that each op has in them: what `pytest bench/ops` runs."""

from __future__ import annotations

import importlib

from bench.op_script import OpScript

OPS = (
    "add_layer_norm",
    "encoder_attention",
    "fused_linear",
    "fused_linear_int8",
    "attention_to_mask",
    "relationship_descriptor",
    "region_bridge_attention",
    "proposal_attention",
    "self_similarity_attention",
    "refine_maps",
    "masks_to_bits",
    "masks_to_labels",
    "proposals_to_labels",
    "mask_loss",
)
NAMED = {
    # ZegCLIP, TagCLIP and CLIP-RC (M = 16) on VOC, the published batch of 16
    "voc-512-b16": {
        "add_layer_norm": "vit-b16-512-b16",
        "encoder_attention": "vit-b16-512-b16",
        "fused_linear": "block-b16-512-b4",
        "fused_linear_int8": "block-b16-512-b4",
        "attention_to_mask": "voc20-512-b16",
        "relationship_descriptor": "voc20-512-b16",
        "region_bridge_attention": "voc-M16-b16",
        "masks_to_labels": "voc20-512-b16",
        "mask_loss": "voc15-512-b16",
    },
    # the same on COCO-Stuff, 16 images on one device; the loss sees the seen classes
    "coco171-512-b16": {
        "attention_to_mask": "coco171-512-b16",
        "relationship_descriptor": "coco171-512-b16",
        "region_bridge_attention": "coco-M16-b16",
        "masks_to_labels": "coco171-512-b16",
        "mask_loss": "coco156-512-b16",
    },
    # one image of 640 x 640, the long list of ADE20K, ViT-L/14
    "ade847-640-l14": {
        "attention_to_mask": "ade847-640-l14",
        "relationship_descriptor": "ade847-640-l14",
        "proposal_attention": "ade847-640-l14",
        "masks_to_bits": "ade847-640-l14",
        "masks_to_labels": "ade847-640-l14",
        "proposals_to_labels": "ade847-640",
    },
    # MAFT: one image with 100 proposals, COCO-Stuff
    "maft-100prop": {
        "proposal_attention": "maft-100-keep10",
        "masks_to_bits": "freeseg-100",
        "proposals_to_labels": "coco171-640",
    },
    # CLIP-RC with a region token for every patch, VOC
    "clip-rc-m1024": {
        "fused_linear": "decoder-cliprc-16",
        "region_bridge_attention": "voc-M1024",
        "attention_to_mask": "cliprc-m1024-voc20",
        "relationship_descriptor": "cliprc-m1024-voc20",
    },
    # SCLIP on VOC with a background: a window of 224, the image refined
    "sclip-voc21": {
        "self_similarity_attention": "sclip-196",
        "refine_maps": "voc21-375x500",
    },
    # exercises the scripts, measures nothing
    "tiny": dict.fromkeys(OPS, "tiny"),
}


def script(op: str) -> OpScript:
    """The op's script in bench/ops."""
    return importlib.import_module(f"bench.ops.{op}").SCRIPT
