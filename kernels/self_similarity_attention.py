"""self_similarity_attention in Triton: sum over pairs (l, r) of softmax(scale l r^T + omega) v, patch queries alone.

One program is a block of patches of a head and runs over all keys with an online softmax, two of them for qq+kk, which
then share each tile of v: 6 B heads N T dh multiply-adds are 4 products of a tile, and v is read once, not twice. The
prior omega = exp(-(dy^2 + dx^2) / (2 std^2)) is made from indices where it is added, one exp2 an element: a look-up in
the two tables of its factors would be two gathers from shared memory in place of that. Nothing of size T x T exists.

Block sizes below come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._rows import load_rows, of_head, store_rows
from zs3fast.kernels._tuning import cdiv, dot_precision, next_power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(left, right, values, inside, omega, largest, total, sums, scale, PRECISION: tl.constexpr):
    """One tile of keys: the running maximum (in units of log2), sum and weighted values of each row."""
    s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * _LOG2E) + omega
    s = tl.where(inside[None, :], s, float("-inf"))
    now = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s - now[:, None])
    shrink = tl.exp2(largest - now)
    total = total * shrink + tl.sum(p, 1)
    sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    return now, total, sums


@triton.jit
def self_similarity_attention_fwd_kernel(
    left, right, other, v, output,
    l_strides, r_strides, o_strides, v_strides,
    heads, tokens, dh, prefix, w, scale, decay,
    TWO: tl.constexpr, PRIOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    patches = tokens - prefix
    blocks = tl.cdiv(patches, BLOCK_Q)
    head = tl.program_id(0) // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here = row < patches
    d = tl.arange(0, BLOCK_D)
    left = of_head(left, l_strides, b, a)
    right = of_head(right, r_strides, b, a)
    other = of_head(other, o_strides, b, a)
    v = of_head(v, v_strides, b, a)
    one = load_rows(left, prefix + row, here, d, l_strides, dh)  # [BLOCK_Q, BLOCK_D]
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if TWO:
        two = load_rows(other, prefix + row, here, d, o_strides, dh)
        largest_two = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total_two = tl.zeros([BLOCK_Q], tl.float32)
        sums_two = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_y, row_x = (row // w).to(tl.float32), (row % w).to(tl.float32)
    for first in range(0, tokens, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        inside = key < tokens
        omega = 0.0
        if PRIOR:
            patch = key - prefix
            dy = row_y[:, None] - (patch // w).to(tl.float32)[None, :]
            dx = row_x[:, None] - (patch % w).to(tl.float32)[None, :]
            omega = tl.where((patch >= 0)[None, :], tl.exp2((dy * dy + dx * dx) * decay), 0.0) * _LOG2E
        values = load_rows(v, key, inside, d, v_strides, dh)  # [BLOCK_K, BLOCK_D]
        keys = load_rows(right, key, inside, d, r_strides, dh)
        largest, total, sums = _attend(one, keys, values, inside, omega, largest, total, sums, scale, PRECISION)
        if TWO:
            keys = load_rows(other, key, inside, d, o_strides, dh)
            largest_two, total_two, sums_two = _attend(
                two, keys, values, inside, omega, largest_two, total_two, sums_two, scale, PRECISION
            )
    result = sums / total[:, None]
    if TWO:
        result += sums_two / total_two[:, None]
    store_rows(output, row, here, d, b, a, patches, heads, dh, result)


def _blocks(dtype: torch.dtype, dh: int, two: bool) -> dict[str, int]:
    """Tile sizes and warps: the largest that spill nowhere (fp32 products without tensor cores are hungry)."""
    block_d = max(16, next_power_of_2(dh))
    small = dtype == torch.float32
    return {
        "BLOCK_Q": 32 if small else 64,
        "BLOCK_K": max(64 >> (small + two + (block_d > 64)), 16),
        "BLOCK_D": block_d,
        "num_warps": 8 if (two or small) and block_d > 32 else 4,
        "num_stages": 2,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> Tensor:
    """[B, heads, N, dh], lying in memory as [B, N, heads, dh]."""
    B, heads, tokens, dh = v.shape
    patches = tokens - num_prefix
    output = v.new_empty(B, patches, heads, dh).transpose(1, 2)
    if B == 0:
        return output
    left, right = (q if similarity[0] == "q" else k), (q if similarity[1] == "q" else k)
    two = similarity == "qq+kk"
    blocks = _blocks(q.dtype, dh, two)
    self_similarity_attention_fwd_kernel[(B * heads * cdiv(patches, blocks["BLOCK_Q"]),)](
        left, right, k, v, output,
        left.stride(), right.stride(), k.stride(), v.stride(),
        heads=heads,
        tokens=tokens,
        dh=dh,
        prefix=num_prefix,
        w=grid[1],
        scale=scale,
        decay=0.0 if std is None else -math.log2(math.e) / (2 * std * std),
        TWO=two,
        PRIOR=std is not None,
        PRECISION=dot_precision(q.dtype),
        **blocks,
    )  # fmt: skip
    return output
