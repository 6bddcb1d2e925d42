"""relationship_descriptor: class queries without the concatenation, against the official concat and linear layer.

    python bench/ops/relationship_descriptor.py                      # all shapes, results in bench/results/<device>/
    python bench/ops/relationship_descriptor.py coco171-512 --passes forward --rounds 20
    python bench/ops/relationship_descriptor.py --device cuda --dtype bfloat16

D = D' = 512, with ViT-L/14 768. At inference the text's half is cached per class list, as the models do ("cached"); in
training it is not. "addmm" is the best composition in torch: text * visual in memory, one addmm with the cached term.
Floor of a cached forward pass: 2 R C D D' FLOPs for R visual rows (90 MFLOP for coco171-512), half of the official
structure's. Training takes the gradients of visual, weight and bias; text embeddings are frozen.
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
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import relationship_descriptor  # noqa: E402
from zs3fast.ops.relationship_descriptor import reference, text_term  # noqa: E402

SHAPES = {  # visual rows (B,) or (B, M), C, D
    "voc20-512": ((1,), 20, 512),
    "voc20-512-b16": ((16,), 20, 512),
    "coco171-512": ((1,), 171, 512),
    "coco171-512-b4": ((4,), 171, 512),  # one of four workers
    "coco171-512-b16": ((16,), 171, 512),
    "ade847-640-l14": ((1,), 847, 768),
    "cliprc-m16-coco171": ((1, 16), 171, 512),
    "cliprc-m1024-voc20": ((1, 1024), 20, 512),
    "tiny": ((2,), 5, 512),  # exercises this script, measures nothing
}
PASSES = ("forward", "train")
Describe = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """text, visual, weight, bias and the gradient of the result, seeded."""
    rows, C, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    text, visual = F.normalize(tensor(C, width), dim=-1), F.normalize(tensor(*rows, width), dim=-1)
    return text, visual, tensor(width, 2 * width, scale=0.03), tensor(width), tensor(*rows, C, width)


def official(text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None) -> Tensor:
    return reference(text, visual, weight, bias)


def addmm(text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None) -> Tensor:
    if term is None:
        term = text_term(text, weight, bias)
    product = text * visual.unsqueeze(-2)
    rows = product.flatten(0, -2)
    return torch.addmm(term.expand_as(product).flatten(0, -2), rows, weight[:, : text.shape[1]].T).view_as(product)


def ours(text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None) -> Tensor:
    return relationship_descriptor(text, visual, weight, bias, term)


DESCRIBES: dict[str, Describe] = {
    "official eager": official,
    "official compiled": torch.compile(official),
    "addmm": addmm,
    "addmm compiled": torch.compile(addmm),
    "zs3fast": ours,
}


def call(describe: Describe, inputs: tuple[Tensor, ...], term: Tensor | None, pass_: str) -> tuple[Tensor, ...]:
    """The descriptors and, in training, the gradients of visual, weight and bias."""
    text, visual, weight, bias, grad = inputs
    if pass_ == "forward":
        with torch.no_grad():
            return (describe(text, visual, weight, bias, term),)
    leaves = [x.detach().requires_grad_() for x in (visual, weight, bias)]
    out = describe(text, *leaves, None)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


@functools.lru_cache(maxsize=1)
def expected(shape: str, pass_: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The definition in float64."""
    return call(official, tuple(x.double() for x in make_inputs(shape, device, dtype)), None, pass_)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    inputs = make_inputs(shape, args.device, dtype)
    term = text_term(inputs[0], *inputs[2:4])

    def check(got: tuple[Tensor, ...]) -> None:
        budget = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        wanted = expected(shape, pass_, args.device, dtype)
        for label, g, e in zip(("out", "dvisual", "dweight", "dbias"), got, wanted, strict=False):
            within_budget(f"{name}: {label}", g, e, budget)

    return Contender(name, partial(call, DESCRIBES[name], inputs, term, pass_), check)


SCRIPT = OpScript(
    op="relationship_descriptor",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("voc20-512-b16", "coco171-512-b16", "ade847-640-l14", "cliprc-m1024-voc20"),
    contenders=list(DESCRIBES),
    make=make,
    passes=PASSES,
    dtypes=list(DTYPES),
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
