"""fused_linear_int8: the linear layers of a ViT block in 8 bits, against x's own type and torch's int8 steps.

    python bench/ops/fused_linear_int8.py --dtype bfloat16
    python bench/ops/fused_linear_int8.py --dtype bfloat16 block-b16-512-b4

One call is every layer of the shape, see bench/ops/fused_linear.py. "plain" is `fused_linear` on weights of x's type.
"int_mm" quantises rows and multiplies by torch._int_mm, as torchao does, then scale, bias, activation and sum, step by
step. Outputs in 8 bits must be within 2 % of the exact product, ours within its own budget of its definition too.
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
from bench.ops import fused_linear as plain  # noqa: E402
from zs3fast.ops import fused_linear, fused_linear_int8  # noqa: E402
from zs3fast.ops.fused_linear import FUNCTIONS  # noqa: E402
from zs3fast.ops.fused_linear import reference as exact  # noqa: E402
from zs3fast.ops.fused_linear_int8 import quantize_weight, reference  # noqa: E402

SHAPES = {name: plain.SHAPES[name] for name in ("block-b16-512", "block-b16-512-b4", "block-l14-336", "tiny")}
PRICE = 0.02  # of 8 bits, relative, for random numbers


def int_mm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, activation: str, residual: Tensor | None
) -> Tensor:
    rows = x.flatten(0, -2)
    row_scale = rows.abs().amax(-1, keepdim=True).float() / 127
    whole = torch._int_mm((rows / row_scale).round().to(torch.int8), weight.t())
    out = (whole * (row_scale * scale)).to(x.dtype).view(*x.shape[:-1], -1) + bias
    out = FUNCTIONS[activation](out)
    return out if residual is None else residual + out


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "plain": fused_linear,
    "int_mm": int_mm,
    "zs3fast": fused_linear_int8,
}


def call(run: Callable[..., Tensor], inputs: list[tuple[tuple[Tensor, ...], dict[str, Any]]]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(run(*tensors, **keywords) for tensors, keywords in inputs)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    given = plain.make_inputs(shape, args.device, dtype)
    inputs: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((x, weight, bias) if name == "plain" else (x, *quantize_weight(weight), bias), keywords)
        for (x, weight, bias), keywords in given
    ]

    def check(got: tuple[Tensor, ...]) -> None:
        rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        for i, (out, (tensors, keywords)) in enumerate(zip(got, given, strict=True)):
            residual = keywords["residual"]
            wide = keywords | {"residual": None if residual is None else residual.double()}
            label, doubles = f"{name}[{i}]", [t.double() for t in tensors]
            within_budget(label, out, exact(*doubles, **wide), rounding if name == "plain" else PRICE)
            if name == "zs3fast":
                x, weight, scale, bias = inputs[i][0]
                within_budget(label, out, reference(x.double(), weight, scale, bias, **wide), rounding)

    return Contender(name, partial(call, CONTENDERS[name], inputs), check)


SCRIPT = OpScript(
    op="fused_linear_int8",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("block-b16-512-b4", "block-l14-336"),
    contenders=list(CONTENDERS),
    make=make,
    dtypes=["bfloat16", "float32"],
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
