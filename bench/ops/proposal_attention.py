"""proposal_attention: proposals over the patches that they keep, against biased and against joint attention.

    python bench/ops/proposal_attention.py                       # all shapes, results in bench/results/<device>/
    python bench/ops/proposal_attention.py maft-100-keep10 --rounds 20
    python bench/ops/proposal_attention.py nq10 nq30 nq100 nq300 nq1000 --passes forward --no-peaks --update
    python bench/ops/proposal_attention.py --device cuda --dtype bfloat16

Shapes are MAFT's: 100 proposals over 30 x 30 patches, 300 over 32 x 32, 12 heads of width 64 (ViT-L/14: 16 heads over
45 x 45), and 10 to 1000 proposals over 30 x 30 (nq). Masks are ellipses that cover 1 or 10 % of the patches, as objects
do (keep1, keep10), 10 % of them drawn at random (random10), or all of them.

Two jobs are measured. The proposal rows alone: zs3fast, and a bias [B, 1, Nq, T] that heads share, with SDPA,
FlexAttention (its block mask) and xformers. And what a masked layer needs, patch rows too, named "layer: ...": the
official joint attention over T = Nq + N tokens with every score stored, SDPA under the same mask, and SDPA among the
patches beside zs3fast for the proposals. Masks, biases and block masks are made before the clock starts; zs3fast reads
bits. Joint attention turns its bool mask into an additive one at each call, as the official layer does.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from bench.baselines.proposal_attention import broadcast_bias, joint_attention, joint_mask  # noqa: E402
from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OpScript, Unsupported  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.ops import proposal_attention  # noqa: E402
from zs3fast.ops._bits import pack_bits  # noqa: E402
from zs3fast.ops.proposal_attention import reference  # noqa: E402

WIDTH = 64
SWEEP = {f"nq{Nq}": (Nq, 30, 0.1, False, 12) for Nq in (10, 30, 100, 300, 1000)}  # time against Nq
SHAPES = {  # proposals, side of the grid, share of patches kept, whether at random, heads
    f"maft-{Nq}-{name}": (Nq, side, share, name == "random10", 12)
    for Nq, side in ((100, 30), (300, 32))
    for name, share in (("keep1", 0.01), ("keep10", 0.1), ("random10", 0.1), ("keep100", 1.0))
} | {
    "ade847-640-l14": (100, 45, 0.1, False, 16),
    **SWEEP,
    "tiny": (5, 4, 0.3, True, 12),  # exercises this script, measures nothing
}
PASSES = ("forward", "backward", "forward+backward")
JOINT, JOINT_SDPA, SPLIT = "layer: joint official", "layer: joint sdpa", "layer: sdpa + zs3fast"
CONTENDERS = ("zs3fast", "sdpa bias", "flex compiled", "xformers bias", JOINT, JOINT_SDPA, SPLIT)
LAYERS = (JOINT, JOINT_SDPA, SPLIT)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_keep(shape: str) -> Tensor:
    """Which patches each proposal keeps, bool [1, Nq, N], seeded."""
    Nq, side, share, at_random, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    if share == 1.0 or at_random:
        return torch.rand(1, Nq, side * side, generator=generator) < share
    stretch = torch.empty(Nq, 1, 1).uniform_(0.6, 1.6, generator=generator)  # height over width, square root
    radius = side * math.sqrt(share / math.pi)
    center = radius + torch.rand(2, Nq, 1, 1, generator=generator) * (side - 2 * radius)
    y, x = torch.arange(side).view(-1, 1) + 0.5, torch.arange(side) + 0.5
    inside = ((y - center[0]) / stretch) ** 2 + ((x - center[1]) * stretch) ** 2 <= radius**2
    return inside.flatten(1).unsqueeze(0)


def make_inputs(shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed projection [B, T, 3, heads, dh] and a gradient [B, T, heads, dh], seeded."""
    Nq, side, _, _, heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, Nq + side * side, 4, heads, WIDTH, generator=generator).to(device, dtype)
    return packed[:, :, :3].contiguous(), packed[:, :, 3].contiguous()


def attention(contender: str, shape: str, device: str, dtype: torch.dtype) -> Attend:
    """q, k, v [B, heads, T, dh] -> [B, heads, Nq, dh], or [B, heads, T, dh] of the layers."""
    Nq, heads = SHAPES[shape][0], SHAPES[shape][-1]
    keep = make_keep(shape).to(device)
    bits = pack_bits(keep)

    def proposals(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return proposal_attention(q[:, :, :Nq], k[:, :, :Nq], v[:, :, :Nq], k[:, :, Nq:], v[:, :, Nq:], bits)

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        patches = F.scaled_dot_product_attention(q[:, :, Nq:], k[:, :, Nq:], v[:, :, Nq:])
        return torch.cat([proposals(q, k, v), patches], dim=2)

    if contender == "zs3fast":
        return proposals
    if contender == SPLIT:
        return split
    if contender == JOINT:
        every_head = joint_mask(keep).repeat_interleave(heads, dim=0)
        return lambda q, k, v: joint_attention(q, k, v, every_head)
    if contender == JOINT_SDPA:
        mask = joint_mask(keep).unsqueeze(1)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    bias = broadcast_bias(keep, dtype)
    if contender == "sdpa bias":
        return lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :Nq], k, v, attn_mask=bias)
    if contender == "flex compiled":
        seen = joint_mask(keep)[:, :Nq]
        block_mask = create_block_mask(lambda b, h, i, j: seen[b, i, j], 1, None, Nq, seen.shape[2], device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q[:, :, :Nq], k, v, block_mask=block_mask)
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Unsupported(str(error)) from error
    T = bias.shape[-1]
    padded = F.pad(bias, (0, -T % 8))[..., :T].expand(-1, heads, -1, -1)  # rows must start on a multiple of 8

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q[:, :, :Nq], k, v))
        return memory_efficient_attention(q, k, v, attn_bias=padded).transpose(1, 2)

    return xformers


def make_call(contender: str, shape: str, pass_: str, args: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    """The timed call: -> (output,), (dq, dk, dv) of all tokens, or both."""
    packed, grad = make_inputs(shape, args.device, DTYPES[args.dtype])
    attend = attention(contender, shape, args.device, DTYPES[args.dtype])
    grad = (grad if contender in LAYERS else grad[:, : SHAPES[shape][0]]).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(q, k, v),)

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        output = attend(*inputs)
        return (output.detach(), *torch.autograd.grad(output, inputs, grad))

    try:
        if pass_ == "forward":
            forward()
            return forward
        if pass_ == "forward+backward":
            both()
            return both
        output = attend(*inputs)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, inputs, grad, retain_graph=True)

        backward()
        return backward
    except NotImplementedError as error:  # FlexAttention's backward and xformers on a CPU
        raise Unsupported(str(error).splitlines()[0]) from error


@functools.cache
def expected(shape: str, pass_: str, layer: bool, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What every contender must give, by the definition in float64; of a layer with the patch rows."""
    packed, grad = make_inputs(shape, device, dtype)
    Nq = SHAPES[shape][0]
    q, k, v = tensors = [x.transpose(1, 2).double().detach().requires_grad_() for x in packed.unbind(2)]
    keep = make_keep(shape).to(device)
    output = reference(q[:, :, :Nq], k[:, :, :Nq], v[:, :, :Nq], k[:, :, Nq:], v[:, :, Nq:], keep)
    if layer:
        patches = F.scaled_dot_product_attention(q[:, :, Nq:], k[:, :, Nq:], v[:, :, Nq:])
        output = torch.cat([output, patches], dim=2)
    grad = grad[:, : output.shape[2]].transpose(1, 2).double()
    grads = () if pass_ == "forward" else torch.autograd.grad(output, tensors, grad)
    return grads if pass_ == "backward" else (output.detach(), *grads)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    call = make_call(name, shape, pass_, args)

    def check(got: tuple[Tensor, ...]) -> None:
        wanted = expected(shape, pass_, name in LAYERS, args.device, DTYPES[args.dtype])
        budget = 1e-5 if args.dtype == "float32" else 2e-2
        labels = ("dq", "dk", "dv") if pass_ == "backward" else ("output", "dq", "dk", "dv")
        for label, g, w in zip(labels, got, wanted, strict=False):
            within_budget(f"{name}: {label}", g, w, budget)

    return Contender(name, call, check)


SCRIPT = OpScript(
    op="proposal_attention",
    file=__file__,
    doc=__doc__,
    shapes=SHAPES,
    optional=("ade847-640-l14", *SWEEP),
    contenders=CONTENDERS,
    make=make,
    passes=PASSES,
    default_passes=("forward", "backward"),
    dtypes=list(DTYPES),
)


if __name__ == "__main__":
    run_script(SCRIPT)
