"""proposals_to_labels: labels from 100 classified mask proposals, against the published structure, eager and compiled.

    python bench/ops/proposals_to_labels.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/proposals_to_labels.py ade847-640 --rounds 11
    python bench/ops/proposals_to_labels.py --device cuda

The structure upsamples mask logits to the padded 640 x 864, stores C scores a pixel there (1.9 GB for ade847-640),
resizes them to 480 x 640 and takes the argmax. "masks first" is the same with the resize before the sum, at half the
FLOPs. Proposals are soft-edged blobs of all sizes, saturated inside and outside, as a network's are; `-random` has
independent normal logits and dense weights, where nothing can be ruled out; `-binary` has 0/1 masks on the frame.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, OverBudget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import proposals_to_labels  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """C classes and Nq proposals; kind: blobs, random or binary masks."""

    classes: int
    kind: str = "blobs"
    proposals: int = 100
    grid: tuple[int, int] = (160, 216)
    padded: tuple[int, int] = (640, 864)
    image: tuple[int, int] = (640, 853)
    size: tuple[int, int] = (480, 640)


SHAPES = {
    "coco171-640": Shape(171),
    "coco171-640-random": Shape(171, "random"),
    "ade847-640": Shape(847),
    "ade847-640-random": Shape(847, "random"),
    "ade847-640-binary": Shape(847, "binary"),
    "tiny": Shape(5, "blobs", 3, (4, 6), (16, 24), (15, 24), (20, 30)),  # exercises this script, measures nothing
}
Label = Callable[[Tensor, Tensor, Shape], Tensor]


@functools.lru_cache(maxsize=2)
def make_inputs(name: str, device: str) -> tuple[Tensor, Tensor]:
    """Seeded class weights [1, Nq, C] and masks: logits on the grid, or 0/1 on the padded frame."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    count, (h, w) = shape.proposals, shape.grid
    if shape.kind == "random":
        weights = torch.rand(1, count, shape.classes, generator=generator)
        return weights.to(device), (3 * torch.randn(1, count, h, w, generator=generator)).to(device)
    weights = (4 * torch.randn(1, count, shape.classes, generator=generator)).softmax(-1)
    centre = torch.rand(2, 1, count, 1, 1, generator=generator)
    radius = 0.03 + 0.25 * torch.rand(1, count, 1, 1, generator=generator) ** 2
    y, x = torch.arange(h).view(h, 1) / h, torch.arange(w) / w
    noise = torch.randn(1, count, max(h // 8, 1), max(w // 8, 1), generator=generator)
    masks = (100 * (radius - ((y - centre[0]) ** 2 + (x - centre[1]) ** 2).sqrt())).clamp(-9, 7)
    masks += 0.3 * F.interpolate(noise, size=(h, w), mode="bicubic")
    if shape.kind == "binary":
        masks = (F.interpolate(masks, size=shape.padded, mode="bilinear") > 0).float()
    return weights.to(device), masks.to(device)


def soft_masks(masks: Tensor, shape: Shape) -> Tensor:
    """[1, Nq, Hi, Wi] on the image's part of the padded frame."""
    if shape.kind != "binary":
        masks = F.interpolate(masks, size=shape.padded, mode="bilinear", align_corners=True).sigmoid()
    return masks[:, :, : shape.image[0], : shape.image[1]]


def resized(x: Tensor, shape: Shape) -> Tensor:
    return F.interpolate(x, size=shape.size, mode="bilinear", align_corners=False)


def official_labels(weights: Tensor, masks: Tensor, shape: Shape) -> Tensor:
    return resized(torch.einsum("bqc,bqhw->bchw", weights, soft_masks(masks, shape)), shape).argmax(1)


def masks_first_labels(weights: Tensor, masks: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("bqc,bqhw->bchw", weights, resized(soft_masks(masks, shape), shape)).argmax(1)


def zs3fast_labels(weights: Tensor, masks: Tensor, shape: Shape) -> Tensor:
    frame = {"padded_size": shape.padded, "image_size": shape.image, "align_corners": shape.kind != "binary"}
    return proposals_to_labels(weights, masks, shape.size, logits=shape.kind != "binary", **frame)


LABELS: dict[str, Label] = {
    "official eager": official_labels,
    "official compiled": torch.compile(official_labels),
    "masks first": masks_first_labels,
    "zs3fast": zs3fast_labels,
}


@functools.lru_cache(maxsize=1)
def expected_masks(name: str, device: str) -> Tensor:
    """[Nq, H, W] in float64."""
    return resized(soft_masks(make_inputs(name, device)[1].double(), SHAPES[name]), SHAPES[name])[0]


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    weights, masks = make_inputs(shape, args.device)

    @torch.no_grad()
    def call() -> Tensor:
        return LABELS[name](weights, masks, SHAPES[shape])

    def check(labels: Tensor) -> None:
        """Every label names a best class; between scores a rounding of the sum apart, either is."""
        regret = 0.0
        for rows, chosen in zip(expected_masks(shape, args.device).split(16, 1), labels[0].split(16, 0), strict=True):
            scores = torch.einsum("qc,qhw->chw", weights[0].double(), rows)
            lost = scores.amax(0) - scores.gather(0, chosen[None])[0]
            regret = max(regret, (lost / scores.amax(0)).max().item())
        if not regret <= 2e-5:  # torch's coordinates in float32 are off by as much
            raise OverBudget(f"{name}: a label's score is {regret:.1e} below the best")

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="proposals_to_labels",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    contenders=list(LABELS),
    make=make,
    rounds=5,
)


if __name__ == "__main__":
    run_script(SCRIPT)
