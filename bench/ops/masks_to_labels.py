"""masks_to_labels: labels from patch-grid logits, against the official structure, eager and compiled.

    python bench/ops/masks_to_labels.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/masks_to_labels.py coco171-512 --rounds 21
    python bench/ops/masks_to_labels.py --device cuda

The structure stores B C H W floats several times over: 180 MB each for coco171-512. The input of the kernel is 0.7 MB,
its output 2.1 MB of int64 labels. `-random` has independent normal logits in every patch, where few classes can be
ruled out; the others are smooth, as logits of a network are.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.baselines import official  # noqa: E402
from bench.harness import Contender, OverBudget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import masks_to_labels  # noqa: E402

SEEN_OFFSET = 0.1


@dataclass(frozen=True)
class Shape:
    """C classes, the first `seen` of them seen; a square patch grid and crop, and offsets of the crops on a canvas."""

    classes: int
    seen: int
    grid: int
    crop: int
    size: tuple[int, int]
    canvas: tuple[int, int] | None = None
    windows: tuple[tuple[int, int], ...] = ((0, 0),)
    smooth: bool = True
    batch: int = 1  # images of one window each

    @property
    def geometry(self) -> dict[str, Any]:
        if self.canvas is None:
            return {}
        return {"crop_size": (self.crop, self.crop), "canvas_size": self.canvas, "windows": self.windows}


SHAPES = {
    "voc20-512": Shape(20, 15, 32, 512, (512, 512)),
    "coco171-512": Shape(171, 156, 32, 512, (512, 512)),
    "coco171-512-random": Shape(171, 156, 32, 512, (512, 512), smooth=False),
    "voc20-512-b16": Shape(20, 15, 32, 512, (512, 512), batch=16),
    "coco171-512-b16": Shape(171, 156, 32, 512, (512, 512), batch=16),
    "ade847-640": Shape(847, 700, 40, 640, (640, 640)),
    "ade847-640-l14": Shape(847, 700, 45, 640, (640, 640)),
    "voc20-sliding": Shape(20, 15, 32, 512, (375, 500), (512, 683), ((0, 0), (0, 171))),
    "coco171-sliding": Shape(171, 156, 32, 512, (480, 640), (512, 683), ((0, 0), (0, 171))),
    "tiny": Shape(5, 3, 4, 32, (20, 30), (32, 40), ((0, 0), (0, 8))),  # exercises this script, measures nothing
}
LARGE = ("coco171-512-b16", "ade847-640-l14")
OPTIONAL = ("voc20-512-b16", *LARGE)
Label = Callable[[Tensor, Shape], Tensor]


def make_inputs(name: str, device: str) -> Tensor:
    """Seeded logits, one row a window: what windows share of the canvas, they agree about."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    side, patch = shape.grid, shape.crop // shape.grid
    if not shape.smooth:
        return (3 * torch.randn(len(shape.windows), shape.classes, side, side, generator=generator) - 3).to(device)
    canvas = shape.canvas or (shape.crop, shape.crop)
    h, w = -(-canvas[0] // patch), -(-canvas[1] // patch)
    coarse = 4 * torch.randn(shape.batch, shape.classes, h // 4 + 1, w // 4 + 1, generator=generator) - 3
    logits = F.interpolate(coarse, size=(h, w), mode="bicubic")
    starts = [(min(y // patch, h - side), min(x // patch, w - side)) for y, x in shape.windows]
    return torch.cat([logits[:, :, y : y + side, x : x + side] for y, x in starts]).to(device)


def official_scores(logits: Tensor, shape: Shape) -> Tensor:
    """[1, C, H, W] calibrated scores as the official test code computes them, without its final softmax."""
    crop = (shape.crop, shape.crop)
    scores = F.interpolate(logits, size=crop, mode="bilinear", align_corners=False).sigmoid()
    scores = official.offset_seen(scores, range(shape.seen), SEEN_OFFSET)
    if shape.canvas is None:
        return scores
    total = scores.new_zeros(1, shape.classes, *shape.canvas)
    count = scores.new_zeros(1, 1, *shape.canvas)
    for window, (y, x) in zip(scores, shape.windows, strict=True):
        total[0, :, y : y + shape.crop, x : x + shape.crop] += window
        count[:, :, y : y + shape.crop, x : x + shape.crop] += 1
    return F.interpolate(total / count, size=shape.size, mode="bilinear", align_corners=False)


def official_labels(logits: Tensor, shape: Shape) -> Tensor:
    return official_scores(logits, shape).argmax(1)


def zs3fast_labels(logits: Tensor, shape: Shape) -> Tensor:
    return masks_to_labels(logits, shape.size, range(shape.seen), SEEN_OFFSET, **shape.geometry)


LABELS: dict[str, Label] = {
    "official eager": official_labels,
    "official compiled": torch.compile(official_labels),
    "zs3fast": zs3fast_labels,
}


@functools.lru_cache(maxsize=1)
def expected(shape: str, device: str) -> Tensor:
    """Official scores in float64."""
    return official_scores(make_inputs(shape, device).double(), SHAPES[shape])


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    logits = make_inputs(shape, args.device)

    @torch.no_grad()
    def call() -> Tensor:
        return LABELS[name](logits, SHAPES[shape])

    def check(labels: Tensor) -> None:
        """Every label names a best class; between scores a rounding apart, either is."""
        scores = expected(shape, args.device)
        regret = (scores.max(1).values - scores.gather(1, labels.unsqueeze(1)).squeeze(1)).max().item()
        if not regret <= 1e-6:
            raise OverBudget(f"{name}: a label's score is {regret:.1e} below the best")

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="masks_to_labels",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=OPTIONAL,
    large=LARGE,
    contenders=list(LABELS),
    make=make,
    rounds=9,
)


if __name__ == "__main__":
    run_script(SCRIPT)
