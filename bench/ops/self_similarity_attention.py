"""self_similarity_attention: the last block of training-free methods, against official form, SDPA, FlexAttention.

    python bench/ops/self_similarity_attention.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/self_similarity_attention.py sclip-1024 naclip-1024 --rounds 20
    python bench/ops/self_similarity_attention.py --device cuda --dtype bfloat16

Shapes are CLIP ViT-B/16 (12 heads of 64) on windows of 224, 512 and 1024 pixels, one class token: `sclip` is qq+kk,
`clearclip` qq, `naclip` kk with the neighbourhood prior of std 5. "official" stores the scores of every head, and the
prior in full; "sdpa" is one call a pair, with the prior as a dense mask, which is made before the clock starts. All
contenders give the patch rows alone. Peak memory is a call's, inputs and the dense mask not counted.
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
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from bench.setting import DTYPES  # noqa: E402
from zs3fast.ops import self_similarity_attention  # noqa: E402
from zs3fast.ops.self_similarity_attention import distance_prior, reference  # noqa: E402

HEADS, WIDTH = 12, 64
METHODS = {"sclip": ("qq+kk", None), "clearclip": ("qq", None), "naclip": ("kk", 5.0)}
SHAPES = {  # method, side of the patch grid
    **{f"{method}-{side * side}": (method, side) for side in (14, 32, 64) for method in METHODS},
    "tiny": ("naclip", 3),  # exercises this script, measures nothing
}
LARGE = tuple(name for name in SHAPES if name.endswith("-4096"))
CONTENDERS = ("official", "zs3fast", "sdpa", "flex compiled")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [1, heads, 1 + N, dh] of a packed projection, seeded."""
    tokens = 1 + SHAPES[shape][1] ** 2
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, tokens, 3, HEADS, WIDTH, generator=generator).to(device, dtype)
    return tuple(x.transpose(1, 2) for x in packed.unbind(2))


def attention(contender: str, shape: str, device: str, dtype: torch.dtype) -> Attend:
    """q, k, v -> [1, heads, N, dh]."""
    method, side = SHAPES[shape]
    similarity, std = METHODS[method]
    scale, grid = WIDTH**-0.5, (side, side)
    if contender == "zs3fast":
        return functools.partial(self_similarity_attention, similarity=similarity, scale=scale, grid=grid, std=std)
    prior = None if std is None else distance_prior(grid, std).to(device, dtype)
    if contender == "official":

        def scores(x: Tensor) -> Tensor:
            s = x @ x.mT * scale
            return (s if prior is None else s + prior).softmax(-1)

        if similarity == "qq+kk":
            return lambda q, k, v: ((scores(q) + scores(k)) @ v)[:, :, 1:]
        return lambda q, k, v: (scores(q if similarity == "qq" else k) @ v)[:, :, 1:]
    if contender == "sdpa":
        mask = None if prior is None else prior[1:]

        def one(x: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x[:, :, 1:], x, v, attn_mask=mask)
    else:
        flex = torch.compile(flex_attention, dynamic=False)
        modify = None
        if std is not None:
            decay = 1 / (2 * std * std)

            def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                dy, dx = i // side - (j - 1) // side, i % side - (j - 1) % side
                return score + torch.where(j > 0, torch.exp(-(dy * dy + dx * dx) * decay), 0.0)

        def one(x: Tensor, v: Tensor) -> Tensor:
            return flex(x[:, :, 1:], x, v, score_mod=modify)

    if similarity == "qq+kk":
        return lambda q, k, v: one(q, v) + one(k, v)
    return lambda q, k, v: one(q if similarity == "qq" else k, v)


@functools.cache
def expected(shape: str, device: str, dtype: torch.dtype) -> Tensor:
    """The definition in float64, a head at a time."""
    method, side = SHAPES[shape]
    similarity, std = METHODS[method]
    options = {"similarity": similarity, "scale": WIDTH**-0.5, "grid": (side, side), "std": std}
    heads = zip(*(x.double().split(1, 1) for x in make_inputs(shape, device, dtype)), strict=True)
    return torch.cat([reference(*head, **options) for head in heads], 1)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    inputs = make_inputs(shape, args.device, DTYPES[args.dtype])
    attend = attention(name, shape, args.device, DTYPES[args.dtype])

    def call() -> Tensor:
        with torch.no_grad():
            return attend(*inputs)

    def check(got: Tensor) -> None:
        budget = 1e-5 if args.dtype == "float32" else 2e-2
        within_budget(name, got, expected(shape, args.device, DTYPES[args.dtype]), budget)

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="self_similarity_attention",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=LARGE,
    large=LARGE,
    contenders=CONTENDERS,
    make=make,
    dtypes=list(DTYPES),
    rounds=7,
)


if __name__ == "__main__":
    run_script(SCRIPT)
