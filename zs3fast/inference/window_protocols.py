"""How training-free methods go over an image, and the settings of their published rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zs3fast.utils.options import one_of

MERGES = ("mean", "max")
MAX_LONG = 2048


@dataclass(frozen=True)
class WindowProtocol:
    """How an image is resized, cut into windows and labelled.

    short_side:  pixels of the resized image's short side; its long side has `max_long` at most, if that is smaller.
    window, stride: of the sliding windows, in pixels; a window is no larger than the image. window None: the image.
    logit_scale: of the softmax.
    antialias:   average what lies between the samples of an image made smaller; False: OpenCV's linear resize.
    templates:   see `zs3fast.text.resolve_templates`.
    merge:       "max": each name of a class competes, the class takes its best; "mean": their embeddings are averaged.
    synonyms:    False: a dataset's classes have one name each, see `zs3fast.text.competing_names`.
    over_classes, area_thd, prob_thd: see `zs3fast.labels.softmax.Rule`.
    pad:         put zeros around a window, half on each side, up to whole patches; False: pixels past the last whole
                 patch are not looked at.
    refine:      steps of pixel-adaptive refinement (PAMR) of the similarities; 0: none.
    """

    short_side: int = 336
    window: int | None = 224
    stride: int = 112
    logit_scale: float = 40.0
    antialias: bool = False
    templates: str = "imagenet"
    merge: str = "max"
    synonyms: bool = True
    over_classes: bool = False
    area_thd: float | None = None
    prob_thd: float = 0.0
    pad: bool = False
    refine: int = 0
    max_long: int | None = MAX_LONG

    def __post_init__(self) -> None:
        one_of("merge", self.merge, MERGES)
        for name in ("short_side", "window", "stride", "max_long"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.window is not None and self.stride > self.window:
            raise ValueError(f"stride: expected {self.window}, the window, at most, got {self.stride}")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale: expected a positive number, got {self.logit_scale}")
        for name in ("area_thd", "prob_thd"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share in 0..1, got {value}")
        if self.refine < 0:
            raise ValueError(f"refine: expected 0 or more steps, got {self.refine}")

    def fitted(self, size: tuple[int, int], least: int = 1) -> tuple[int, int]:
        """(H', W') of an image of `size` = (H, W); no side is below `least` pixels."""
        factor = self.short_side / min(size)
        if self.max_long is not None:
            factor = min(self.max_long / max(size), factor)
        height, width = (max(int(side * factor + 0.5), least) for side in size)
        return height, width

    def crop(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the windows on a resized image."""
        return canvas if self.window is None else (min(self.window, canvas[0]), min(self.window, canvas[1]))


@dataclass(frozen=True)
class _Preset:
    """A method's protocol, and what differs on a dataset."""

    base: WindowProtocol
    datasets: Mapping[str, dict[str, Any]] = field(default_factory=dict)


_CLEARCLIP = _Preset(
    WindowProtocol(short_side=448, window=448, stride=224, logit_scale=50.0, synonyms=False, pad=True),
    {
        "voc21": {"prob_thd": 0.5},
        "context60": {"prob_thd": 0.15},
        "coco_object": {"prob_thd": 0.4},
        "cityscapes": {"window": 224, "stride": 224},
    },
)
_NACLIP = _Preset(
    WindowProtocol(over_classes=True, refine=10),
    {
        "voc20": {"window": None},
        "voc21": {"window": None, "prob_thd": 0.1},
        "context60": {"prob_thd": 0.1},
        "coco_object": {"prob_thd": 0.1},
        "cityscapes": {"short_side": 560},
    },
)
# MaskCLIP's numbers in these papers come from ClearCLIP's code, or from runs whose settings are not described.
_PRESETS = {
    "clearclip": _CLEARCLIP,
    "maskclip": _CLEARCLIP,
    "naclip": _NACLIP,
    "rcs": _Preset(replace(_NACLIP.base, refine=0), _NACLIP.datasets),
    "sclip": _Preset(
        WindowProtocol(),
        {
            "voc21": {"logit_scale": 65.0, "prob_thd": 0.1, "area_thd": 0.1},
            "context60": {"logit_scale": 50.0, "prob_thd": 0.1},
            "coco_object": {"logit_scale": 50.0, "prob_thd": 0.1},
            "coco171": {"short_side": 448},
            "cityscapes": {"short_side": 560},
        },
    ),
    "scclip": _Preset(
        WindowProtocol(),
        {
            "voc21": {"logit_scale": 50.0, "prob_thd": 0.15, "area_thd": 0.1},
            "context60": {"prob_thd": 0.15},
            "coco_object": {"logit_scale": 55.0, "prob_thd": 0.35},
            "cityscapes": {"short_side": 560},
        },
    ),
}
PROTOCOLS = tuple(_PRESETS)


def window_protocol(name: str, dataset: str | None = None, **changes: Any) -> WindowProtocol:
    """The protocol of a method's published rows.

    Args:
        name: one of `PROTOCOLS`.
        dataset: adds what the method's code sets for it (scale, sizes, thresholds); None or another: the base.
        changes: fields to set otherwise, such as refine=0.
    Raises:
        ValueError: an unknown name, or a field out of range.
    """
    preset = _PRESETS[one_of("protocol", name, PROTOCOLS)]
    return replace(preset.base, **{**preset.datasets.get(dataset or "", {}), **changes})
