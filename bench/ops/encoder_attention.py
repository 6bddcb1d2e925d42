"""encoder_attention: a packed projection's heads and a cached context, against torch's attention with both joined.

    python bench/ops/encoder_attention.py                                     # float32
    python bench/ops/encoder_attention.py --dtype bfloat16 vit-b16-512
    python bench/ops/encoder_attention.py --backend cpp

"SDPA" joins context and keys, attends and joins the heads, as a plain encoder does; the floor is in the op's docstring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import encoder_attention  # noqa: E402
from zs3fast.ops.encoder_attention import reference  # noqa: E402

SHAPES = {  # B, T, K, heads, dh
    "vit-b16-512": (1, 1025, 10, 12, 64),
    "vit-b16-512-coco": (1, 1025, 100, 12, 64),
    "vit-b16-512-b4": (4, 1025, 10, 12, 64),
    "vit-b16-512-b16": (16, 1025, 10, 12, 64),
    "vit-l14-336": (1, 577, 10, 16, 64),
    "tiny": (2, 9, 3, 2, 16),  # exercises this script, measures nothing
}
Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> Inputs:
    """q, k, v of one packed projection, and a context that serves all images; seeded."""
    B, T, K, heads, dh = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(B, T, 3, heads, dh, generator=generator).to(device, dtype).unbind(2)
    context_k, context_v = torch.randn(2, 1, K, heads, dh, generator=generator).to(device, dtype).unbind(0)
    return q, k, v, (context_k, context_v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
    k, v = (torch.cat([c.expand(x.shape[0], -1, -1, -1), x], 1) for c, x in zip(context, (k, v), strict=True))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def ours(q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
    return encoder_attention(q, k, v, context).flatten(2)


ATTENDS: dict[str, Attend] = {"SDPA": sdpa, "zs3fast": ours}


def call(attend: Attend, inputs: Inputs) -> tuple[Tensor]:
    with torch.no_grad():
        return (attend(*inputs),)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    inputs = make_inputs(shape, args.device, dtype)

    def check(got: tuple[Tensor]) -> None:
        q, k, v, context = inputs
        wide = reference(q.double(), k.double(), v.double(), (context[0].double(), context[1].double())).flatten(2)
        within_budget(name, got[0], wide, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)

    return Contender(name, partial(call, ATTENDS[name], inputs), check)


SCRIPT = OpScript(
    op="encoder_attention",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("vit-b16-512-b4", "vit-b16-512-b16", "vit-l14-336"),
    contenders=list(ATTENDS),
    make=make,
    dtypes=list(DTYPES),
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
