"""region_bridge_attention: structured attention against dense-mask attention, over the number of region tokens.

    python bench/ops/region_bridge_attention.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/region_bridge_attention.py voc-M16 voc-M1024 --rounds 20
    python bench/ops/region_bridge_attention.py --device cuda --dtype bfloat16

Shapes are CLIP ViT-B/16 at 512 x 512: 12 heads of width 64, 32 x 32 patches, a global token and K = 10 (voc) or 100
(coco) prompts, M region tokens. "sdpa no regions" is unmasked attention over prefix and patches alone: the floor, less
work than was asked for; "cudnn no regions" is the same by cuDNN. Dense masks and FlexAttention's block masks are made
before the clock starts. All contenders and shapes of a pass take turns in one process, so their ratios hold on a busy
machine too. Peak memory is a call's, inputs and the dense mask (4 E^2 bytes: 17 MB at M = 1024) not counted.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript, Unsupported  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import region_bridge_attention  # noqa: E402
from zs3fast.ops.region_bridge_attention import reference, region_bridge_mask  # noqa: E402

HEADS, WIDTH = 12, 64
SHAPES = {  # num_prefix, grid, regions, B
    **{f"voc-M{side * side}": (11, (32, 32), (side, side), 1) for side in (1, 4, 8, 16, 32)},
    "coco-M16": (101, (32, 32), (4, 4), 1),
    "voc-M16-b16": (11, (32, 32), (4, 4), 16),
    "coco-M16-b16": (101, (32, 32), (4, 4), 16),
    "tiny": (3, (5, 4), (2, 2), 1),  # exercises this script, measures nothing
}
LARGE = ("voc-M16-b16", "coco-M16-b16")
PASSES = ("forward", "backward", "forward+backward")
FLOOR = "sdpa no regions"
CUDNN_FLOOR = "cudnn no regions"  # by wgmma on sm_90, where torch would not choose it
CONTENDERS = ("zs3fast", "sdpa dense mask", "flex compiled", "xformers bias", FLOOR, CUDNN_FLOOR)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed projection [B, E, 3, heads, dh] and a gradient [B, E, heads, dh], seeded."""
    num_prefix, grid, regions, B = SHAPES[shape]
    E = num_prefix + math.prod(grid) + math.prod(regions)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(B, E, 4, HEADS, WIDTH, generator=generator).to(device, dtype)
    return packed[:, :, :3].contiguous(), packed[:, :, 3].contiguous()


def attention(contender: str, shape: str, device: str, dtype: torch.dtype) -> Attend:
    """q, k, v [B, heads, E, dh] -> [B, heads, E, dh]; the floor has no region rows."""
    num_prefix, grid, regions, _ = SHAPES[shape]
    E = num_prefix + math.prod(grid) + math.prod(regions)
    if contender == "zs3fast":
        return partial(region_bridge_attention, num_prefix=num_prefix, grid=grid, regions=regions)
    if contender == FLOOR:
        return F.scaled_dot_product_attention
    if contender == CUDNN_FLOOR:
        if device == "cpu":
            raise Unsupported("cuDNN is for GPUs")

        def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v)

        return cudnn
    mask = region_bridge_mask(num_prefix, grid, regions, torch.device(device))
    bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))
    if contender == "sdpa dense mask":
        return partial(F.scaled_dot_product_attention, attn_mask=bias)
    if contender == "flex compiled":
        block_mask = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, E, E, device=device)
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Unsupported(str(error)) from error

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        padded = F.pad(bias, (0, -E % 8))[:, :E]  # rows must start on a multiple of 8
        return memory_efficient_attention(q, k, v, attn_bias=padded.expand(len(q), HEADS, E, E)).transpose(1, 2)

    return xformers


def make_call(contender: str, shape: str, pass_: str, args: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    """The timed call: -> (output,), (gradient of the packed projection,) or both."""
    packed, grad = make_inputs(shape, args.device, DTYPES[args.dtype])
    attend = attention(contender, shape, args.device, DTYPES[args.dtype])
    if contender in (FLOOR, CUDNN_FLOOR):
        without = packed.shape[1] - math.prod(SHAPES[shape][2])
        packed, grad = packed[:, :without], grad[:, :without]
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(q, k, v),)

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        output = attend(*inputs)
        return (output.detach(), *torch.autograd.grad(output, inputs, grad.transpose(1, 2)))

    try:
        if pass_ == "forward":
            forward()
            return forward
        if pass_ == "forward+backward":
            both()
            return both
        output = attend(*inputs)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, inputs, grad.transpose(1, 2), retain_graph=True)

        backward()
        return backward
    except NotImplementedError as error:  # FlexAttention's backward and xformers on a CPU
        raise Unsupported(str(error).splitlines()[0]) from error


@functools.cache
def expected(shape: str, pass_: str, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What every contender but the floor must give, by the definition in float64."""
    packed, grad = make_inputs(shape, device, dtype)
    num_prefix, grid, regions, _ = SHAPES[shape]
    tensors = [x.transpose(1, 2).double().detach().requires_grad_() for x in packed.unbind(2)]
    output = reference(*tensors, num_prefix=num_prefix, grid=grid, regions=regions)
    grads = () if pass_ == "forward" else torch.autograd.grad(output, tensors, grad.transpose(1, 2).double())
    return grads if pass_ == "backward" else (output.detach(), *grads)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    call = make_call(name, shape, pass_, args)

    def check(got: tuple[Tensor, ...]) -> None:
        wanted = expected(shape, pass_, args.device, DTYPES[args.dtype])
        budget = 1e-5 if args.dtype == "float32" else 2e-2
        labels = ("dq", "dk", "dv") if pass_ == "backward" else ("output", "dq", "dk", "dv")
        for label, g, w in zip(labels, got, wanted, strict=False):
            within_budget(f"{name}: {label}", g, w, budget)

    return Contender(name, call, None if name in (FLOOR, CUDNN_FLOOR) else check)


SCRIPT = OpScript(
    op="region_bridge_attention",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=LARGE,
    large=LARGE,
    contenders=CONTENDERS,
    make=make,
    passes=PASSES,
    default_passes=("forward", "backward"),
    dtypes=list(DTYPES),
    together=True,
)


if __name__ == "__main__":
    run_script(SCRIPT)
