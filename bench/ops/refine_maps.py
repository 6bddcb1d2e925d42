"""refine_maps: ten steps of pixel-adaptive refinement (PAMR) and the labels after it, against the official form.

    python bench/ops/refine_maps.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/refine_maps.py voc21-375x500 --rounds 9
    python bench/ops/refine_maps.py --device cuda

Maps come at the image's size, as the official form wants them. It stacks the sixteen neighbours of every map in each
step, [Q, 16, H, W] floats: 240 MiB for voc21, 1.9 GiB for coco171. "labels" ends in the best name of each pixel and its
probability; "maps" in the refined maps. "official, 4 names a turn" is the same form, with the weights kept.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, OverBudget, within_budget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import refine_maps, refine_maps_to_labels  # noqa: E402

SCALE, STEPS, DILATIONS = 40.0, 10, (8, 16)
SHAPES = {  # names, height, width
    "voc21-375x500": (21, 375, 500),
    "coco171-375x500": (171, 375, 500),
    "tiny": (3, 20, 24),  # exercises this script, measures nothing
}
LARGE = ("coco171-375x500",)


def make_inputs(shape: str, device: str) -> tuple[Tensor, Tensor]:
    """A smooth image [1, 3, H, W] and cosines [1, Q, H, W] as patches give them, seeded."""
    names, height, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(
        torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator), (height, width), mode="bicubic"
    )
    maps = 0.2 + 0.03 * torch.randn(1, names, height // 16 + 1, width // 16 + 1, generator=generator)
    return image.to(device), F.interpolate(maps, (height, width), mode="bilinear").to(device)


def _around(z: Tensor, centre: bool) -> Tensor:
    """z [1, C, H, W] at all neighbours, stacked: [1, C, K, H, W]."""
    height, width = z.shape[-2:]
    found = []
    for d in DILATIONS:
        padded = F.pad(z, [d] * 4, mode="replicate")
        for y in (-d, 0, d):
            for x in (-d, 0, d):
                if centre or (y, x) != (0, 0):
                    found.append(padded[..., d + y : d + y + height, d + x : d + x + width])
    return torch.stack(found, 2)


def _weights(image: Tensor) -> Tensor:
    spread = _around(image, True).std(2, keepdim=True)
    unlike = (image.unsqueeze(2) - _around(image, False)).abs() / (1e-8 + 0.1 * spread)
    return (-unlike.mean(1, keepdim=True)).softmax(2)


def official(image: Tensor, maps: Tensor, group: int | None = None) -> Tensor:
    """The published form, `group` names at a time."""
    weights = _weights(image)
    done = []
    for part in maps.split(group or maps.shape[1], 1):
        for _ in range(STEPS):
            part = (_around(part, False) * weights).sum(2)
        done.append(part)
    return torch.cat(done, 1)


def _labels(refined: Tensor) -> Tensor:
    best = (SCALE * refined).softmax(1).max(1)
    return torch.stack([best.indices.float(), best.values])


CALLS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "maps": {
        "official": official,
        "official, 4 names a turn": functools.partial(official, group=4),
        "official compiled": torch.compile(official, dynamic=False),
        "zs3fast": refine_maps,
    },
    "labels": {
        "official": lambda image, maps: _labels(official(image, maps)),
        "official, 4 names a turn": lambda image, maps: _labels(official(image, maps, 4)),
        "official compiled": torch.compile(lambda image, maps: _labels(official(image, maps)), dynamic=False),
        "zs3fast": lambda image, maps: torch.stack(refine_maps_to_labels(image, maps, logit_scale=SCALE)),
    },
}


@functools.lru_cache(maxsize=1)
def expected(shape: str, device: str) -> Tensor:
    image, maps = make_inputs(shape, device)
    return official(image.double(), maps.double(), 1)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    inputs = make_inputs(shape, args.device)

    def call() -> Tensor:
        with torch.no_grad():
            return CALLS[pass_][name](*inputs)

    def check(got: Tensor) -> None:
        refined = expected(shape, args.device)
        if pass_ == "maps":
            within_budget(name, got, refined)
            return
        chosen = refined.gather(1, got[0].long().unsqueeze(1)).squeeze(1)
        regret = (refined.amax(1) - chosen).max().item()
        if not regret <= 1e-6:
            raise OverBudget(f"{name}: a label's similarity is {regret:.1e} below the best")
        within_budget(name, got[1], (SCALE * refined).softmax(1).amax(1))

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="refine_maps",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=LARGE,
    large=LARGE,
    contenders=list(CALLS["maps"]),
    make=make,
    passes=("maps", "labels"),
    rounds=5,
)


if __name__ == "__main__":
    run_script(SCRIPT)
