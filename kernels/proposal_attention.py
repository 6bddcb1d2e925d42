"""proposal_attention in Triton: rows of proposals against the patches that a word of bits keeps, and themselves.

Forward, one launch: a program is (b, head, block of rows). Its online softmax starts at the token itself (maximum q .
k_self, sum 1, accumulator v_self), so a row that keeps nothing needs no case of its own. A block of patches that no row
of the program keeps costs its words and nothing else: neither keys nor values are read.

Backward, from the saved log-sum-exp, two launches and no atomics, since every row has one writer:
  dq:     blocks of rows; also dk_self, dv_self and delta = output . grad_output.
  dk, dv: blocks of patches, over the rows, with the same skip.

Floor of the forward pass: B heads dh (4 Nq + 2 N) elements and 4 B Nq ceil(N / 32) bytes of bits; 4 FLOPs a kept pair
and column. Rows are few (100 to 300) and programs B heads ceil(Nq / BLOCK_Q), so a block has only 16 rows, the least
that a matrix product takes, until there are programs enough to fill a GPU with larger ones. Small blocks skip more.

Block sizes below come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._rows import dot_rows, load_rows, of_head, store_rows
from zs3fast.kernels._tuning import cdiv, dot_precision, next_power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FULL = 4 * 132  # programs that fill a large GPU several times over


@triton.jit
def _words(bits, row, inside, first, words, WORDS: tl.constexpr):
    """[rows, WORDS] of the bits, from the word of patch `first` on; zeros outside."""
    word = first // 32 + tl.arange(0, WORDS)
    at = row.to(tl.int64)[:, None] * words + word[None, :]
    return tl.load(bits + at, mask=inside[:, None] & (word < words)[None, :], other=0)


@triton.jit
def _keep(words, patch, N, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """[ROWS, 32 * WORDS] which row keeps which patch; bits behind the last patch are ignored."""
    spread = tl.broadcast_to(words[:, :, None], [ROWS, WORDS, 32]).reshape(ROWS, WORDS * 32)
    return (((spread >> (patch % 32)[None, :]) & 1) != 0) & (patch < N)[None, :]


@triton.jit
def proposal_attention_fwd_kernel(
    q, k_self, v_self, k, v, bits, output, lse,
    q_strides, ks_strides, vs_strides, k_strides, v_strides,
    heads, Nq, N, words, dh, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Nq, BLOCK_Q)
    head = tl.program_id(0) // blocks  # b * heads + a
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < Nq
    d = tl.arange(0, BLOCK_D)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    bits += b * Nq * words
    q = of_head(q, q_strides, b, a)
    left = load_rows(q, row, inside, d, q_strides, dh)  # [BLOCK_Q, BLOCK_D]
    own = load_rows(of_head(k_self, ks_strides, b, a), row, inside, d, ks_strides, dh)
    largest = dot_rows(left, own) * (scale * _LOG2E)  # in units of log2
    total = tl.full([BLOCK_Q], 1.0, tl.float32)
    sums = load_rows(of_head(v_self, vs_strides, b, a), row, inside, d, vs_strides, dh).to(tl.float32)
    for first in range(0, N, 32 * WORDS):
        block = _words(bits, row, inside, first, words, WORDS)  # [BLOCK_Q, WORDS]
        if tl.max(tl.max((block != 0).to(tl.int32), 1), 0) > 0:
            patch = first + tl.arange(0, 32 * WORDS)
            keep = _keep(block, patch, N, BLOCK_Q, WORDS)
            right = load_rows(k, patch, patch < N, d, k_strides, dh)
            # again, and from L1: kept over the branch, an fp32 operand is spread over 128 registers of every thread
            left = load_rows(q, row, inside, d, q_strides, dh)
            s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * _LOG2E)  # [BLOCK_Q, 32 * WORDS]
            s = tl.where(keep, s, float("-inf"))
            now = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s - now[:, None])
            shrink = tl.exp2(largest - now)
            total = total * shrink + tl.sum(p, 1)
            values = load_rows(v, patch, patch < N, d, v_strides, dh)
            sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
            largest = now
    store_rows(output, row, inside, d, b, a, Nq, heads, dh, sums / total[:, None])
    tl.store(lse + head.to(tl.int64) * Nq + row, (largest + tl.log2(total)) * _LN2, mask=inside)


@triton.jit
def proposal_attention_bwd_kernel_dq(
    q, k_self, v_self, k, v, bits, output, grad_output, lse, delta, dq, dk_self, dv_self,
    q_strides, ks_strides, vs_strides, k_strides, v_strides,
    o_strides, g_strides,
    heads, Nq, N, words, dh, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Nq, BLOCK_Q)
    head = tl.program_id(0) // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < Nq
    d = tl.arange(0, BLOCK_D)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    bits += b * Nq * words
    left = load_rows(of_head(q, q_strides, b, a), row, inside, d, q_strides, dh)  # [BLOCK_Q, BLOCK_D]
    grad = load_rows(of_head(grad_output, g_strides, b, a), row, inside, d, g_strides, dh)
    correction = dot_rows(
        grad, load_rows(of_head(output, o_strides, b, a), row, inside, d, o_strides, dh)
    )  # sum over keys of p dp
    tl.store(delta + head.to(tl.int64) * Nq + row, correction, mask=inside)
    log_sum = tl.load(lse + head.to(tl.int64) * Nq + row, mask=inside, other=0.0) * _LOG2E

    own = load_rows(of_head(k_self, ks_strides, b, a), row, inside, d, ks_strides, dh)
    own_values = load_rows(of_head(v_self, vs_strides, b, a), row, inside, d, vs_strides, dh)
    own_p = tl.exp2(dot_rows(left, own) * (scale * _LOG2E) - log_sum)
    own_ds = own_p * (dot_rows(grad, own_values) - correction)
    store_rows(dk_self, row, inside, d, b, a, Nq, heads, dh, (own_ds * scale)[:, None] * left.to(tl.float32))
    store_rows(dv_self, row, inside, d, b, a, Nq, heads, dh, own_p[:, None] * grad.to(tl.float32))
    sums = own_ds[:, None] * own.to(tl.float32)
    for first in range(0, N, 32 * WORDS):
        block = _words(bits, row, inside, first, words, WORDS)
        if tl.max(tl.max((block != 0).to(tl.int32), 1), 0) > 0:
            patch = first + tl.arange(0, 32 * WORDS)
            keep = _keep(block, patch, N, BLOCK_Q, WORDS)
            right = load_rows(k, patch, patch < N, d, k_strides, dh)
            values = load_rows(v, patch, patch < N, d, v_strides, dh)
            if q.dtype.element_ty == tl.float32:  # as in the forward pass: an fp32 operand kept is 128 registers
                left = load_rows(of_head(q, q_strides, b, a), row, inside, d, q_strides, dh)
                grad = load_rows(of_head(grad_output, g_strides, b, a), row, inside, d, g_strides, dh)
            s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * _LOG2E)
            p = tl.where(keep, tl.exp2(s - log_sum[:, None]), 0.0)
            dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
            ds = p * (dp - correction[:, None])
            sums = tl.dot(ds.to(right.dtype), right, sums, input_precision=PRECISION)
    store_rows(dq, row, inside, d, b, a, Nq, heads, dh, sums * scale)


@triton.jit
def proposal_attention_bwd_kernel_dkdv(
    q, k, v, bits, grad_output, lse, delta, dk, dv,
    q_strides, k_strides, v_strides, g_strides,
    heads, Nq, N, words, dh, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, 32 * WORDS)
    head = tl.program_id(0) // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    start = tl.program_id(0) % blocks * (32 * WORDS)
    patch = start + tl.arange(0, 32 * WORDS)
    d = tl.arange(0, BLOCK_D)
    q = of_head(q, q_strides, b, a)
    grad_output = of_head(grad_output, g_strides, b, a)
    bits += b * Nq * words
    lse += head.to(tl.int64) * Nq
    delta += head.to(tl.int64) * Nq
    right = load_rows(of_head(k, k_strides, b, a), patch, patch < N, d, k_strides, dh)  # [32 * WORDS, BLOCK_D]
    values = load_rows(of_head(v, v_strides, b, a), patch, patch < N, d, v_strides, dh)
    sums_k = tl.zeros([32 * WORDS, BLOCK_D], tl.float32)
    sums_v = tl.zeros([32 * WORDS, BLOCK_D], tl.float32)
    for first in range(0, Nq, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        block = _words(bits, row, row < Nq, start, words, WORDS)
        if tl.max(tl.max((block != 0).to(tl.int32), 1), 0) > 0:
            keep = tl.trans(_keep(block, patch, N, BLOCK_Q, WORDS))  # [32 * WORDS, BLOCK_Q]
            left = load_rows(q, row, row < Nq, d, q_strides, dh)
            grad = load_rows(grad_output, row, row < Nq, d, g_strides, dh)
            log_sum = tl.load(lse + row, mask=row < Nq, other=0.0) * _LOG2E
            correction = tl.load(delta + row, mask=row < Nq, other=0.0)
            # scores as [patch, row]: they are the left operand of both sums, where a transpose would cost registers
            s = tl.dot(right, tl.trans(left), input_precision=PRECISION) * (scale * _LOG2E)
            p = tl.where(keep, tl.exp2(s - log_sum[None, :]), 0.0)
            dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
            sums_v = tl.dot(p.to(grad.dtype), grad, sums_v, input_precision=PRECISION)
            ds = p * (dp - correction[None, :])
            sums_k = tl.dot(ds.to(left.dtype), left, sums_k, input_precision=PRECISION)
    store_rows(dk, patch, patch < N, d, b, a, N, heads, dh, sums_k * scale)
    store_rows(dv, patch, patch < N, d, b, a, N, heads, dh, sums_v)


def _blocks(dtype: torch.dtype, dh: int, backward: bool, heads: int = 0, Nq: int = 0) -> dict[str, int]:
    """Tile sizes and warps that spill nowhere; 32 rows where `heads` (of all images) and Nq make programs enough."""
    block_d = max(32, next_power_of_2(dh))  # 16 columns take more registers, not fewer
    small = dtype == torch.float32
    many = heads * cdiv(Nq, 32) >= _FULL
    return {
        "BLOCK_Q": 32 if many and not small else 16,
        "WORDS": 1 if small or backward or block_d > 64 else 2,
        "BLOCK_D": block_d,
        "num_warps": 8 if small and block_d > 64 and not backward else 4,
        "num_stages": 2,
    }


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh], the layout the kernels write."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _sizes(q: Tensor, k: Tensor, bits: Tensor, scale: float) -> dict:
    return {
        "heads": q.shape[1],
        "Nq": q.shape[2],
        "N": k.shape[2],
        "words": bits.shape[2],
        "dh": q.shape[3],
        "scale": scale,
        "PRECISION": dot_precision(q.dtype),
    }


def forward(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    B, heads, Nq, dh = q.shape
    output, lse = _empty_heads(q), q.new_empty(B, heads, Nq, dtype=torch.float32)
    if B * Nq == 0:
        return output, lse
    blocks = _blocks(q.dtype, dh, False, B * heads, Nq)
    proposal_attention_fwd_kernel[(B * heads * cdiv(Nq, blocks["BLOCK_Q"]),)](
        q, k_self, v_self, k, v, bits.contiguous(), output, lse,
        q.stride(), k_self.stride(), v_self.stride(), k.stride(), v.stride(),
        **_sizes(q, k, bits, scale),
        **blocks,
    )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor,
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, heads, Nq, dh = q.shape
    dq, dk_self, dv_self, dk, dv = map(_empty_heads, (q, k_self, v_self, k, v))
    bits, lse = bits.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    common = _sizes(q, k, bits, scale) | _blocks(q.dtype, dh, True, B * heads, Nq)
    if B * Nq > 0:
        proposal_attention_bwd_kernel_dq[(B * heads * cdiv(Nq, common["BLOCK_Q"]),)](
            q, k_self, v_self, k, v, bits, output, grad_output, lse, delta, dq, dk_self, dv_self,
            q.stride(), k_self.stride(), v_self.stride(), k.stride(), v.stride(),
            output.stride(), grad_output.stride(),
            **common,
        )  # fmt: skip
    if dk.numel() > 0:
        proposal_attention_bwd_kernel_dkdv[(B * heads * cdiv(k.shape[2], 32 * common["WORDS"]),)](
            q, k, v, bits, grad_output, lse, delta, dk, dv,
            q.stride(), k.stride(), v.stride(), grad_output.stride(),
            **common,
        )  # fmt: skip
    return dq, dk_self, dv_self, dk, dv
