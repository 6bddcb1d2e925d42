"""mask_loss: focal + dice from patch-grid logits, against the official structure, eager and compiled.

    python bench/ops/mask_loss.py                    # all shapes, results in bench/results/<device>/mask_loss.json
    python bench/ops/mask_loss.py voc15-512-b16 --rounds 9
    python bench/ops/mask_loss.py --device cuda

Floor of one pass: B C H W times an exponential, a logarithm, a division and about 20 other FLOPs; bytes hardly count
(mask_logits, labels and one gradient: 14 MB for coco156-512-b4). On a CPU with 512-bit vectors that is about 32
instructions for 16 pixels, so at best 16 cycles on two vector units: 0.3 s * GHz / cores for the 164 million pixels of
coco156-512-b4, forward, and a little more backward. The eager structure moves 30 to 40 full-size tensors of 654 MB.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.baselines import official  # noqa: E402
from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import mask_loss  # noqa: E402
from zs3fast.ops.mask_loss import reference  # noqa: E402

SHAPES = {  # B, C, h, w, H, W
    "voc15-512-b16": (16, 15, 32, 32, 512, 512),  # the published batch, seen classes of VOC
    "coco156-512-b4": (4, 156, 32, 32, 512, 512),  # one of four workers, seen classes of COCO-Stuff
    "coco156-512-b16": (16, 156, 32, 32, 512, 512),
    "trusty-512-b16": (16, 1, 32, 32, 512, 512),  # the map of the trusty token
    "tiny": (2, 5, 4, 4, 32, 32),  # exercises this script, measures nothing
}
LARGE = ("coco156-512-b16",)
PASSES = ("forward", "forward+backward")
FOCAL_WEIGHT = 100.0
Loss = Callable[[Tensor, Tensor], Tensor]


def make_inputs(shape: str, device: str) -> tuple[Tensor, Tensor]:
    """Seeded logits and labels with about ten segments an image, a tenth of them ignored."""
    B, C, h, w, H, W = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, C, h, w, generator=generator) - 3
    segments = torch.randint(0, C, (B, 3, 3), generator=generator)
    segments[torch.rand(B, 3, 3, generator=generator) < 0.1] = 255
    rows, columns = torch.arange(H) * 3 // H, torch.arange(W) * 3 // W
    return logits.to(device), segments[:, rows[:, None], columns].to(device)


def official_loss(logits: Tensor, labels: Tensor) -> Tensor:
    focal, dice, _ = official.mask_losses(logits, labels)
    return FOCAL_WEIGHT * focal + dice


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition without the official code's loops over classes: all of it can be one graph."""
    focal_sum, intersection, prob_sum, target_count = reference(logits, labels)
    present = target_count > 0
    num_masks = present.sum().clamp_min(1)
    dice = torch.where(present, 1 - (2 * intersection + 1) / (prob_sum + target_count + 1), 0).sum()
    return (FOCAL_WEIGHT * focal_sum.sum() / labels[0].numel() + dice) / num_masks


def zs3fast_loss(logits: Tensor, labels: Tensor) -> Tensor:
    terms = mask_loss(logits, labels, validate=False)
    return FOCAL_WEIGHT * terms.focal + terms.dice


LOSSES: dict[str, Loss] = {
    "official eager": official_loss,
    "official compiled": torch.compile(official_loss),
    "dense compiled": torch.compile(dense_loss, fullgraph=True),
    "zs3fast": zs3fast_loss,
}


def call(loss: Loss, logits: Tensor, labels: Tensor, pass_: str) -> tuple[Tensor, Tensor | None]:
    """The loss and, with backward, the gradient of the logits."""
    if pass_ == "forward":
        with torch.no_grad():
            return loss(logits, labels), None
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@functools.lru_cache(maxsize=1)
def expected(shape: str, pass_: str, device: str) -> tuple[Tensor, Tensor | None]:
    """The official structure's answer; in float64 it would take twice its memory."""
    return call(official_loss, *make_inputs(shape, device), pass_)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    def check(got: tuple[Tensor, Tensor | None]) -> None:
        wanted = expected(shape, pass_, args.device)
        within_budget(f"{name}: loss", got[0], wanted[0])
        if wanted[1] is not None:
            within_budget(f"{name}: gradient", got[1], wanted[1])

    return Contender(name, partial(call, LOSSES[name], *make_inputs(shape, args.device), pass_), check)


SCRIPT = OpScript(
    op="mask_loss",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=LARGE,
    large=LARGE,
    contenders=list(LOSSES),
    make=make,
    passes=PASSES,
    rounds=3,
)


if __name__ == "__main__":
    run_script(SCRIPT)
