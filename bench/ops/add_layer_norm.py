"""add_layer_norm: a residual connection and the LayerNorm after it in a ViT block, against torch's two steps.

    python bench/ops/add_layer_norm.py --device cuda --dtype bfloat16
    python bench/ops/add_layer_norm.py --device cuda --dtype bfloat16 --backend triton vit-b16-512

"steps" is x + residual, then F.layer_norm; "compiled" the same by torch.compile. On a GPU `auto` takes the kernel for
many rows or while a CUDA graph is recorded: --backend triton asks for it at any size. On the CPU it is the two steps.
The floor, in bytes, is in the op's docstring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import add_layer_norm  # noqa: E402
from zs3fast.ops.add_layer_norm import reference  # noqa: E402

SHAPES = {  # B, T, width
    "vit-b16-512": (1, 1025, 768),
    "vit-b16-512-b2": (2, 1025, 768),
    "vit-b16-512-b16": (16, 1025, 768),
    "vit-l14-336": (1, 577, 1024),
    "tiny": (2, 9, 32),  # exercises this script, measures nothing
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Run = Callable[..., tuple[Tensor, Tensor]]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> Inputs:
    """x, residual, weight and bias; seeded."""
    *rows, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *rows, width, generator=generator).to(device, dtype).unbind(0)
    weight, bias = torch.randn(2, width, generator=generator).to(device, dtype).unbind(0)
    return x, residual, weight, bias


def contender(name: str) -> Run:
    if name == "compiled":
        return torch.compile(reference, dynamic=False)
    return reference if name == "steps" else add_layer_norm


def call(run: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return run(*inputs)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    inputs = make_inputs(shape, args.device, dtype)

    def check(got: tuple[Tensor, Tensor]) -> None:
        wide = reference(*(t.double() for t in inputs))
        for i, (out, want) in enumerate(zip(got, wide, strict=True)):
            budget = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            within_budget(f"{name}[{i}]", out, want, budget)

    return Contender(name, partial(call, contender(name), inputs), check)


SCRIPT = OpScript(
    op="add_layer_norm",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("vit-b16-512-b2", "vit-l14-336"),
    contenders=("steps", "compiled", "zs3fast"),
    make=make,
    dtypes=list(DTYPES),
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
