"""masks_to_bits: bits of the patches that masks keep, against the two resizes one after the other.

    python bench/ops/masks_to_bits.py                    # all shapes, results in bench/results/<device>/
    python bench/ops/masks_to_bits.py freeseg-100 --rounds 20
    python bench/ops/masks_to_bits.py --device cuda

"freeseg" is logits at a quarter of 640 x 864, brought to that size with align_corners, sigmoid, then to 30 x 30
patches: what is stored there is 221 MB for 100 masks; the kernel reads 13.8 MB of logits and writes 11.6 KB. "soft"
starts from soft masks at 640 x 864, where both read four pixels a patch. The official structure stops at a bool mask
[B, Nq, N] and does this again in each of four layers; it is timed once, and its bools are packed for the check alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, OverBudget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import masks_to_bits, unpack_bits  # noqa: E402

SHAPES = {  # proposals, padded size, grid, whether from logits
    "freeseg-100": (100, (640, 864), (30, 30), True),
    "freeseg-300": (300, (640, 864), (32, 32), True),
    "ade847-640-l14": (100, (640, 864), (45, 45), True),
    "soft-100": (100, (640, 864), (30, 30), False),
    "soft-300": (300, (640, 864), (32, 32), False),
    "tiny": (3, (24, 32), (4, 5), True),  # exercises this script, measures nothing
}


def make_inputs(shape: str, device: str) -> Tensor:
    """Smooth seeded logits [1, Nq, Hp / 4, Wp / 4], or the soft masks [1, Nq, Hp, Wp] they stand for."""
    Nq, (height, width), _, logits = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    coarse = 6 * torch.randn(1, Nq, height // 24 + 1, width // 24 + 1, generator=generator) - 3
    maps = F.interpolate(coarse, size=(height // 4, width // 4), mode="bicubic").to(device)
    return maps if logits else F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=True).sigmoid()


def official_soft(maps: Tensor, shape: str) -> Tensor:
    """m [1, Nq, h, w], every pixel of the padded size stored."""
    _, padded, grid, logits = SHAPES[shape]
    if logits:
        maps = F.interpolate(maps, size=padded, mode="bilinear", align_corners=True).sigmoid()
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


def official(maps: Tensor, shape: str) -> Tensor:
    return official_soft(maps, shape).flatten(2) >= 0.5


def zs3fast(maps: Tensor, shape: str) -> Tensor:
    _, padded, grid, logits = SHAPES[shape]
    upsampling = {"padded_size": padded, "align_corners": True, "logits": True} if logits else {}
    return masks_to_bits(maps, grid, **upsampling)


CONTENDERS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "official eager": official,
    "official compiled": torch.compile(official),
    "zs3fast": zs3fast,
}


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    maps = make_inputs(shape, args.device)

    @torch.no_grad()
    def call() -> Tensor:
        return CONTENDERS[name](maps, shape)

    def check(got: Tensor) -> None:
        """Every bit is that of the two steps, but within 1e-6 of 0.5."""
        m = official_soft(maps, shape).flatten(2)
        keep = unpack_bits(got, m.shape[-1]) if got.dtype == torch.int32 else got
        wrong = int(((keep != (m >= 0.5)) & ((m - 0.5).abs() >= 1e-6)).sum())
        if wrong:
            raise OverBudget(f"{name}: {wrong} of {m.numel()} bits wrong")

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="masks_to_bits",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("ade847-640-l14",),
    contenders=list(CONTENDERS),
    make=make,
)


if __name__ == "__main__":
    run_script(SCRIPT)
