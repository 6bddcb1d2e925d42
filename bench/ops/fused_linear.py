"""fused_linear: the linear layers of a ViT block and of a decoder, with activation and residual, against torch's steps.

    python bench/ops/fused_linear.py                                     # float32
    python bench/ops/fused_linear.py --dtype bfloat16 block-b16-512
    python bench/ops/fused_linear.py --backend cpp

One call is every layer of the shape, one after the other: "block" has the packed projection, the output projection with
its residual, and the MLP with QuickGELU and its residual; "decoder" three projections and the MLP with ReLU of CLIP-RC.
"steps" is F.linear, the activation and the sum as plain modules run them; the floor is in the op's docstring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import fused_linear  # noqa: E402
from zs3fast.ops.fused_linear import reference  # noqa: E402

Layer = tuple[int, int, str, bool]  # columns in and out, activation, whether a residual is added


def block(width: int) -> list[Layer]:
    return [
        (width, 3 * width, "none", False),
        (width, width, "none", True),
        (width, 4 * width, "quick_gelu", False),
        (4 * width, width, "none", True),
    ]


def decoder(width: int) -> list[Layer]:
    return [
        *(3 * [(width, width, "none", False)]),
        (width, 4 * width, "relu", False),
        (4 * width, width, "none", False),
    ]


SHAPES = {  # rows, layers
    "block-b16-512": (1025, block(768)),
    "block-b16-512-b4": (4100, block(768)),
    "block-l14-336": (577, block(1024)),
    "decoder-cliprc-16": (1024, decoder(512)),
    "tiny": (9, block(32)),  # exercises this script, measures nothing
}
Inputs = list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]
Run = Callable[..., Tensor]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> Inputs:
    """(x, weight, bias) and the keywords of every layer; seeded."""
    rows, layers = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    return [
        (
            (draw(1, rows, depth), draw(out, depth, scale=depth**-0.5), draw(out)),
            {"activation": activation, "residual": draw(1, rows, out) if residual else None},
        )
        for depth, out, activation, residual in layers
    ]


CONTENDERS: dict[str, Run] = {"steps": reference, "zs3fast": fused_linear}


def call(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(run(*tensors, **keywords) for tensors, keywords in inputs)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    inputs = make_inputs(shape, args.device, dtype)

    def check(got: tuple[Tensor, ...]) -> None:
        for i, (out, (tensors, keywords)) in enumerate(zip(got, inputs, strict=True)):
            residual = keywords["residual"]
            wide = reference(
                *(t.double() for t in tensors),
                activation=keywords["activation"],
                residual=None if residual is None else residual.double(),
            )
            within_budget(f"{name}[{i}]", out, wide, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)

    return Contender(name, partial(call, CONTENDERS[name], inputs), check)


SCRIPT = OpScript(
    op="fused_linear",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("block-b16-512-b4", "block-l14-336", "decoder-cliprc-16"),
    contenders=list(CONTENDERS),
    make=make,
    dtypes=["float32", "bfloat16"],
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
