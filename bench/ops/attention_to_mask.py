"""attention_to_mask: cross-attention and mask logits against stored scores, SDPA and FlexAttention.

    python bench/ops/attention_to_mask.py                      # all shapes, results in bench/results/<device>/
    python bench/ops/attention_to_mask.py coco171-512 --passes forward train --rounds 20
    python bench/ops/attention_to_mask.py --device cuda --dtype bfloat16

8 heads of width 64 over 32 x 32 patches (ViT-L/14 at 640: width 96, 45 x 45 patches), scale 1/8, heads split off a
[B, tokens, heads * width] projection as the decoder does. "train" is forward and backward with dropout 0.1 on the
probabilities. No baseline returns scores: the masks beside SDPA, FlexAttention and xformers are one full-width matmul,
as good as it gets. Floor of a forward pass: 4 B heads C N dh FLOPs (0.36 GFLOP for coco171-512), 2.5 times that
backward. A contender that cannot run here is named with its own message: FlexAttention has neither dropout nor, on a
CPU, a backward pass, and xformers may not be there.
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
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript, Unsupported  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import attention_to_mask  # noqa: E402
from zs3fast.ops.attention_to_mask import reference  # noqa: E402

HEADS, SCALE, SEED = 8, 0.125, 7
SHAPES = {  # B, C, N, dh
    "voc20-512": (1, 20, 1024, 64),
    "voc20-512-b16": (16, 20, 1024, 64),
    "coco171-512": (1, 171, 1024, 64),
    "coco171-512-b4": (4, 171, 1024, 64),  # one of four workers
    "coco171-512-b16": (16, 171, 1024, 64),
    "ade847-640-l14": (1, 847, 45 * 45, 96),
    "cliprc-m16-coco171": (1, 16 * 171, 1024, 64),  # a query for every class and region token
    "cliprc-m1024-voc20": (1, 1024 * 20, 1024, 64),
    "tiny": (2, 5, 30, 64),  # exercises this script, measures nothing
}
LARGE = ("coco171-512-b16", "cliprc-m1024-voc20")
OPTIONAL = ("voc20-512-b16", "ade847-640-l14", *LARGE)
PASSES = ("forward", "forward+backward", "train")
Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [B, heads, tokens, dh] and the gradients of output and masks, seeded."""
    B, C, N, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def heads(tokens: int) -> Tensor:
        joined = torch.randn(B, tokens, HEADS, width, generator=generator).to(device, dtype)
        return joined.transpose(1, 2)

    return heads(C), heads(N), heads(N), heads(C), torch.randn(B, C, N, generator=generator).to(device, dtype)


def official(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The structure ZegCLIP and TagCLIP have: every head's scores in memory, a copy of them kept for the masks."""
    scores = (q @ k.transpose(-2, -1)) * SCALE
    kept = scores.clone()
    probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
    return probabilities @ v, kept.sum(dim=1) / q.shape[1]


def full_width_masks(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
    return (q * (SCALE / HEADS)) @ k.transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=SCALE), full_width_masks(q, k)


def flex(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    if dropout_p:
        raise NotImplementedError("FlexAttention has no dropout")
    return flex_attention(q, k, v, scale=SCALE), full_width_masks(q, k)


def xformers(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import memory_efficient_attention

    rows = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(*rows, p=dropout_p, scale=SCALE).transpose(1, 2), full_width_masks(q, k)


def ours(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    return attention_to_mask(q, k, v, SCALE, dropout_p=dropout_p, seed=SEED if dropout_p else None)


ATTENDS: dict[str, Attend] = {
    "official eager": official,
    "official compiled": torch.compile(official),
    "sdpa + matmul": sdpa,
    "flex compiled + matmul": torch.compile(flex),
    "xformers + matmul": xformers,
    "zs3fast": ours,
}


def call(attend: Attend, inputs: tuple[Tensor, ...], pass_: str) -> tuple[Tensor, ...]:
    """Output and masks and, with backward, dq, dk, dv."""
    q, k, v, *grads = inputs
    dropout_p = 0.1 if pass_ == "train" else 0.0
    if pass_ == "forward":
        with torch.no_grad():
            return attend(q, k, v, dropout_p)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = attend(*leaves, dropout_p)
    return (*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads))


@functools.lru_cache(maxsize=1)
def expected(shape: str, pass_: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The definition in float64."""
    wide = tuple(x.double() for x in make_inputs(shape, device, dtype))
    return call(lambda q, k, v, p: reference(q, k, v, SCALE, dropout_p=p, seed=SEED), wide, pass_)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    dtype = DTYPES[args.dtype]
    run = partial(call, ATTENDS[name], make_inputs(shape, args.device, dtype), pass_)
    try:
        run()
    except (NotImplementedError, ImportError, RuntimeError, ValueError) as error:
        raise Unsupported(" ".join(str(error).split())) from error
    random = pass_ == "train" and name != "zs3fast"

    def check(got: tuple[Tensor, ...]) -> None:
        """Against fp64. Dropout drops other elements for others, so in training only their masks are compared."""
        budget = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        wanted = expected(shape, pass_, args.device, dtype)
        for label, g, e in zip(("output", "mask_logits", "dq", "dk", "dv"), got, wanted, strict=False):
            if not random or label == "mask_logits":
                within_budget(f"{name}: {label}", g, e, budget)

    return Contender(name, run, check)


SCRIPT = OpScript(
    op="attention_to_mask",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=OPTIONAL,
    large=LARGE,
    contenders=list(ATTENDS),
    make=make,
    passes=PASSES,
    dtypes=list(DTYPES),
    rounds=20,
)


if __name__ == "__main__":
    run_script(SCRIPT)
