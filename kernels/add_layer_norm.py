"""add_layer_norm in Triton: a program adds a row to its residual, keeps the sum in registers and normalises it.

Floor: two elements read and two written for each of x; weight and bias come from the L2. Mean and variance are two
reductions over registers, in fp32, of the sum as it is stored: torch's two kernels round it there as well.

Warps come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._tuning import next_power_of_2


@triton.jit
def add_layer_norm_kernel(
    x, residual, weight, bias, total, normed,
    x_row, x_column, residual_row, residual_column, weight_step, bias_step,
    width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = column.to(tl.int64)
    a = tl.load(x + row * x_row + place * x_column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(residual + row * residual_row + place * residual_column, mask=inside, other=0.0).to(tl.float32)
    stored = (a + b).to(total.dtype.element_ty)
    tl.store(total + row * width + column, stored, mask=inside)
    s = stored.to(tl.float32)
    centred = tl.where(inside, s - tl.sum(s, 0) / width, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    out *= tl.load(weight + place * weight_step, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + place * bias_step, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + column, out.to(normed.dtype.element_ty), mask=inside)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(sum, normed), each [..., width] and contiguous. Rows that are no matrix in memory are copied into one first."""
    width = weight.shape[0]
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return total, normed
    rows, others = x.reshape(-1, width), residual.reshape(-1, width)
    block = max(128, next_power_of_2(width))
    add_layer_norm_kernel[(rows.shape[0],)](
        rows, others, weight, bias, total, normed,
        rows.stride(0), rows.stride(1), others.stride(0), others.stride(1),
        weight.stride(0), 1 if bias is None else bias.stride(0),
        width=width,
        eps=eps,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    return total, normed
