"""How a Segmenter runs a model: declared once, handed on whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zs3fast.encoders.quantize import KINDS
from zs3fast.ops.refine_maps import STEPS
from zs3fast.utils.options import did_you_mean, one_of

if TYPE_CHECKING:
    from zs3fast.inference.window_protocols import WindowProtocol
    from zs3fast.proposals import BoxProposer, MaskProposer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


@dataclass(frozen=True)
class SegmenterOptions:
    """Options of a `Segmenter`, checked.

    templates: "single", "multi" or sentences with one {}. None: what was published for training: "single" for a
        vocabulary of 20 (VOC), else "multi"; "multi" for methods without training.
    device: where the model runs; None: where it is.
    dtype: torch.float32, bfloat16 or float16, or their names: the model's type. "auto" or None: bfloat16 where that is
        faster on the device, see `zs3fast.inference.dtypes`, for large models in float32; else as it is.
    window_batch: windows the model sees at once.
    proposer: what finds mask proposals for MAFT, see `zs3fast.proposals`; it needs one.
    crops: classify MAFT's proposals by a CLIP pass each instead, see `zs3fast.inference.predictors.Proposing`.
    boxes: what finds boxes for ClsCLIP to zoom into (ClsCLIP+).
    compile: run a method that works in windows through torch.compile, see `zs3fast.inference.compiled`; the first
        images then take a minute or more. The other methods' work has too many shapes.
    quantize: put the image tower of the model, or of a copy of the caller's, into 8 bits: "int8", "int8-weights" or
        "fp8", see `zs3fast.encoders.quantize`. "int8" on a CPU with AVX-512-VNNI is ours; the others need torchao.
    protocol: of a training-free method: "sclip", "naclip", "clearclip", "scclip", "rcs" or "maskclip" as published
        (sizes, windows, templates; see `zs3fast.inference.window_protocols`), or a `WindowProtocol`. None: short
        side and windows of the model's `image_size`.
    refine: steps of pixel-adaptive refinement (PAMR, see `zs3fast.ops.refine_maps`) of every class's map at the image's
        size; True: 10, the published ones; 0 or False: none. What is refined is the similarity before the softmax of
        methods without training, and the calibrated score of all others, beside the image as the model sees it. None:
        as the protocol has it (NACLIP's: 10), and none for trained methods.
    """

    templates: str | Sequence[str] | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = AUTO
    window_batch: int = 8
    proposer: MaskProposer | None = None
    crops: str | None = None
    boxes: BoxProposer | None = None
    compile: bool = False
    quantize: str | None = None
    protocol: str | WindowProtocol | None = None
    refine: int | None = None

    def __post_init__(self) -> None:
        if self.window_batch < 1:
            raise ValueError(f"window_batch: expected at least 1, got {self.window_batch}")
        known = (*DTYPES, *DTYPES.values(), AUTO, None)
        if not isinstance(self.dtype, (str, torch.dtype, type(None))) or self.dtype not in known:
            names = ", ".join((*DTYPES, AUTO))
            raise ValueError(f"dtype: expected one of {names}, got {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}")
        if self.quantize is not None:
            one_of("quantize", self.quantize, KINDS)
        if self.refine is not None and not isinstance(self.refine, int):
            raise TypeError(f"refine: expected a number of steps, got {self.refine!r}")
        if self.refine is not None and self.refine < 0:
            raise ValueError(f"refine: expected 0 or more steps, got {self.refine}")

    @property
    def refine_steps(self) -> int | None:
        """Steps of refinement; None: as the protocol has it."""
        return STEPS if self.refine is True else None if self.refine is None else int(self.refine)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type asked for; None: automatic."""
        if self.dtype is None or isinstance(self.dtype, torch.dtype):
            return self.dtype
        return DTYPES.get(self.dtype)

    def with_(self, keywords: dict[str, Any]) -> SegmenterOptions:
        """These options with others in their place; an unknown name is a TypeError that says what was meant."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in keywords:
            if name not in names:
                raise TypeError(f"Segmenter has no option {name!r}{did_you_mean(name, names)}")
        return dataclasses.replace(self, **keywords)
