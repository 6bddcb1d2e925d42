"""Readers of the known datasets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zs3fast.data import ade, cityscapes, coco, context, voc
from zs3fast.data.layouts import Source

SPLITS = ("train", "val")
PAINTED = "world"  # `zs3fast.data.world`: the one dataset that lies in no folder
FOLDED = ("coco20i", "voc5i")
SOURCES: dict[str, Callable[[Path, str], Source]] = {
    "ade150": ade.ade150,
    "ade847": ade.ade847,
    "cityscapes": cityscapes.cityscapes,
    "coco171": coco.coco171,
    "coco20i": coco.coco20i,
    "coco_object": coco.coco_object,
    "context59": context.context59,
    "context60": context.context60,
    "pc459": context.pc459,
    "voc20": voc.voc20,
    "voc21": voc.voc21,
    "voc5i": voc.voc5i,
}
