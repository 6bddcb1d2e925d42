"""attention_to_mask in Triton: o = dropout(softmax(s q k^T)) v and masks = mean over heads of s q k^T; s is the scale.

Forward, one launch of two kinds of programs:
  attention: (b, head, block of c) runs over n with an online softmax; scores live in registers.
  masks:     (b, block of c, block of n) is one full-width product, mean_a(q_a . k_a) s = (q . k) s / heads.
Summing the attention programs' own scores instead would save 2 of 6 B heads C N dh FLOPs, but then either the heads of
a block run one after the other (8 times fewer programs: 3 to 11 at C = 171, on 100 and more SMs), or they add into
global memory with atomics, 8 times the traffic of the masks (5.6 MB against 0.7 MB at C = 171, N = 1024 in fp32) and in
no fixed order. Recomputing is 0.18 GFLOP on tensor cores, reads 1.4 MB that attention reads too, and needs neither.

Backward, from the saved log-sum-exp, two launches and no atomics: dq by blocks of c (it also makes delta = output .
grad_output), then dk and dv by blocks of n. Scores and dropout are recomputed: 7 products of C x N x dh a head instead
of the 5 of a single pass, which would need atomics on dq.

Dropout: element (b, a, c, n) is kept iff word n % 4 of Philox4x32-10((n / 4, c, b * heads + a, 0), seed) >= threshold.

Block sizes below come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._rows import load_rows, of_head
from zs3fast.kernels._tuning import cdiv, dot_precision, next_power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _keep(seed, threshold, head, c, n0, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of the elements c x [n0, n0 + BLOCK_N) stay; n0 and BLOCK_N are multiples of 4, so no word is wasted."""
    zero = tl.zeros([BLOCK_C, BLOCK_N // 4], tl.int32)
    group = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(seed, zero + group[None, :], zero + c[:, None], zero + head, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_C, BLOCK_N)  # word n % 4 of group n / 4
    return words.to(tl.uint32, bitcast=True) >= tl.full([], threshold, tl.uint32)


@triton.jit
def _attend(
    program, q, k, v, output, lse, seed,
    q_strides, k_strides, v_strides,
    heads, C, N, dh, scale, keep_scale, threshold,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(C, BLOCK_C)
    head = program // blocks_c  # b * heads + a
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    left = load_rows(of_head(q, q_strides, b, a), c, c < C, d, q_strides, dh)  # [BLOCK_C, BLOCK_D]
    largest = tl.full([BLOCK_C], float("-inf"), tl.float32)  # in units of log2
    total = tl.zeros([BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, n < N, d, k_strides, dh)
        s = tl.dot(left, tl.trans(keys), input_precision=PRECISION) * (scale * _LOG2E)
        s = tl.where((n < N)[None, :], s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_keep(tl.load(seed), threshold, head, c, n0, BLOCK_C, BLOCK_N), p, 0.0)
        values = load_rows(v, n, n < N, d, v_strides, dh)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        largest = now
    if DROPOUT:
        sums *= keep_scale
    sums = sums / total[:, None]
    at = (b * C + c.to(tl.int64)) * heads + a  # output lies as [B, C, heads, dh]
    inside = (c < C)[:, None] & (d < dh)[None, :]
    tl.store(output + at[:, None] * dh + d[None, :], sums.to(output.dtype.element_ty), mask=inside)
    tl.store(lse + head.to(tl.int64) * C + c, (largest + tl.log2(total)) * _LN2, mask=c < C)


@triton.jit
def _mask_tile(
    program, q, k, masks,
    q_strides, k_strides,
    heads, C, N, dh, scale,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_c, blocks_n = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    n = program % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program // blocks_n % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // blocks_n // blocks_c).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    scores = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    q += b * q_strides[0]
    k += b * k_strides[0]
    for _ in range(0, heads):
        left = load_rows(q, c, c < C, d, q_strides, dh)
        keys = load_rows(k, n, n < N, d, k_strides, dh)
        scores = tl.dot(left, tl.trans(keys), scores, input_precision=PRECISION)
        q += q_strides[1]
        k += k_strides[1]
    at = (b * C + c.to(tl.int64)) * N
    inside = (c < C)[:, None] & (n < N)[None, :]
    tl.store(masks + at[:, None] + n[None, :], (scores * (scale / heads)).to(masks.dtype.element_ty), mask=inside)


@triton.jit
def attention_to_mask_fwd_kernel(
    q, k, v, output, masks, lse, seed,
    q_strides, k_strides, v_strides,
    heads, C, N, dh, scale, keep_scale, threshold, attention_programs,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < attention_programs:
        _attend(
            program, q, k, v, output, lse, seed, q_strides, k_strides, v_strides,
            heads, C, N, dh, scale, keep_scale, threshold, DROPOUT, PRECISION, BLOCK_C, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _mask_tile(
            program - attention_programs, q, k, masks, q_strides, k_strides,
            heads, C, N, dh, scale, PRECISION, BLOCK_C, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def attention_to_mask_bwd_kernel_dq(
    q, k, v, output, grad_output, grad_masks, lse, delta, dq, seed,
    q_strides, k_strides, v_strides, o_strides, g_strides, m_strides,
    heads, C, N, dh, scale, keep_scale, threshold,
    HAS_MASKS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(C, BLOCK_C)
    head = tl.program_id(0) // blocks_c
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    left = load_rows(of_head(q, q_strides, b, a), c, c < C, d, q_strides, dh)  # [BLOCK_C, BLOCK_D]
    grad = load_rows(of_head(grad_output, g_strides, b, a), c, c < C, d, g_strides, dh)
    out = load_rows(of_head(output, o_strides, b, a), c, c < C, d, o_strides, dh)
    correction = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # sum over n of p dp
    tl.store(delta + head.to(tl.int64) * C + c, correction, mask=c < C)
    log_sum = tl.load(lse + head.to(tl.int64) * C + c, mask=c < C, other=0.0) * _LOG2E
    sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, n < N, d, k_strides, dh)
        values = load_rows(v, n, n < N, d, v_strides, dh)
        s = tl.dot(left, tl.trans(keys), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.where((n < N)[None, :], tl.exp2(s - log_sum[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            keep = _keep(tl.load(seed), threshold, head, c, n0, BLOCK_C, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - correction[:, None])
        if HAS_MASKS:
            inside = (c < C)[:, None] & (n < N)[None, :]
            at = c.to(tl.int64)[:, None] * m_strides[1] + n.to(tl.int64)[None, :] * m_strides[2]
            ds += tl.load(grad_masks + b * m_strides[0] + at, mask=inside, other=0.0).to(tl.float32) / heads
        sums = tl.dot(ds.to(keys.dtype), keys, sums, input_precision=PRECISION)
    at = (b * C + c.to(tl.int64)) * heads + a
    inside = (c < C)[:, None] & (d < dh)[None, :]
    tl.store(dq + at[:, None] * dh + d[None, :], (sums * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def attention_to_mask_bwd_kernel_dkdv(
    q, k, v, grad_output, grad_masks, lse, delta, dk, dv, seed,
    q_strides, k_strides, v_strides, g_strides, m_strides,
    heads, C, N, dh, scale, keep_scale, threshold,
    HAS_MASKS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(0) // blocks_n
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = load_rows(of_head(k, k_strides, b, a), n, n < N, d, k_strides, dh)  # [BLOCK_N, BLOCK_D]
    values = load_rows(of_head(v, v_strides, b, a), n, n < N, d, v_strides, dh)
    sums_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q = of_head(q, q_strides, b, a)
    grad_output = of_head(grad_output, g_strides, b, a)
    for c0 in range(0, C, BLOCK_C):
        # rows past C add nothing: their q, grad_output, delta and grad_masks are zero and their p is exp(0)
        c = c0 + tl.arange(0, BLOCK_C)
        left = load_rows(q, c, c < C, d, q_strides, dh)
        grad = load_rows(grad_output, c, c < C, d, g_strides, dh)
        log_sum = tl.load(lse + head.to(tl.int64) * C + c, mask=c < C, other=0.0) * _LOG2E
        correction = tl.load(delta + head.to(tl.int64) * C + c, mask=c < C, other=0.0)
        # scores as [BLOCK_N, BLOCK_C]: they are the left operand of both sums, where a transpose would cost registers
        s = tl.dot(keys, tl.trans(left), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.exp2(s - log_sum[None, :])
        dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            keep = tl.trans(_keep(tl.load(seed), threshold, head, c, n0, BLOCK_C, BLOCK_N))
            dp = tl.where(keep, dp * keep_scale, 0.0)
            dropped = tl.where(keep, p * keep_scale, 0.0)
        sums_v = tl.dot(dropped.to(grad.dtype), grad, sums_v, input_precision=PRECISION)
        ds = p * (dp - correction[None, :])
        if HAS_MASKS:
            inside = (n < N)[:, None] & (c < C)[None, :]
            at = n.to(tl.int64)[:, None] * m_strides[2] + c.to(tl.int64)[None, :] * m_strides[1]
            ds += tl.load(grad_masks + b * m_strides[0] + at, mask=inside, other=0.0).to(tl.float32) / heads
        sums_k = tl.dot(ds.to(left.dtype), left, sums_k, input_precision=PRECISION)
    at = ((b * N + n.to(tl.int64)) * heads + a)[:, None] * dh + d[None, :]
    inside = (n < N)[:, None] & (d < dh)[None, :]
    tl.store(dk + at, (sums_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, sums_v.to(dv.dtype.element_ty), mask=inside)


# (BLOCK_C, BLOCK_N, num_warps) by kernel, fp32 or half types, heads wider than 64 or not. fp32 products run without
# tensor cores and hold both operands in registers, hence the smaller tiles.
_BLOCKS = {
    ("fwd", False, False): (32, 64, 4),
    ("fwd", False, True): (32, 64, 4),
    ("fwd", True, False): (16, 32, 4),
    ("fwd", True, True): (16, 16, 4),
    ("dq", False, False): (32, 64, 4),
    ("dq", False, True): (32, 64, 8),
    ("dq", True, False): (32, 32, 4),
    ("dq", True, True): (16, 64, 8),
    ("dkdv", False, False): (32, 32, 4),
    ("dkdv", False, True): (32, 32, 8),
    ("dkdv", True, False): (32, 32, 8),
    ("dkdv", True, True): (16, 32, 8),
}


def blocks(kernel: str, dtype: torch.dtype, C: int, dh: int) -> dict[str, int]:
    """Tile sizes and launch options of one of the kernels fwd, dq, dkdv."""
    block_c, block_n, warps = _BLOCKS[kernel, dtype == torch.float32, dh > 64]
    if kernel == "fwd" and dtype != torch.float32 and dh <= 64 and C > 32:
        # rows enough for sm_90's wgmma, and a quarter fewer instructions an element (with dropout 37 for 48 on Triton
        # 3.8); dq so turned holds 255 registers on sm_80, dkdv 207 for 128 on sm_90
        block_c, block_n = 64, 32
    block_c = min(block_c, max(16, next_power_of_2(C)))  # 16: the least rows a product has
    block_d = max(16, next_power_of_2(dh))
    return {"BLOCK_C": block_c, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh], the layout the kernels write."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _dropout(dropout_p: float) -> dict[str, object]:
    return {
        "keep_scale": 1 / (1 - dropout_p),
        "threshold": int(dropout_p * 2**32),
        "DROPOUT": dropout_p > 0,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None, need_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, heads, C, dh), N = q.shape, k.shape[2]
    output = _empty_heads(q)
    masks = q.new_empty(B, C, N) if need_masks else q.new_empty(0)
    lse = q.new_empty(B, heads, C, dtype=torch.float32)
    if B == 0 or C == 0:
        return output, masks, lse
    sizes = blocks("fwd", q.dtype, C, dh)
    blocks_c, blocks_n = cdiv(C, sizes["BLOCK_C"]), cdiv(N, sizes["BLOCK_N"])
    attention_programs = B * heads * blocks_c
    attention_to_mask_fwd_kernel[(attention_programs + (B * blocks_c * blocks_n if need_masks else 0),)](
        q, k, v, output, masks, lse, seed,
        q.stride(), k.stride(), v.stride(),
        heads=heads,
        C=C,
        N=N,
        dh=dh,
        scale=scale,
        attention_programs=attention_programs,
        PRECISION=dot_precision(q.dtype),
        **_dropout(dropout_p),
        **sizes,
    )  # fmt: skip
    return output, masks, lse


def backward(
    grad_output: Tensor,
    grad_masks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, heads, C, dh), N = q.shape, k.shape[2]
    dq, dk, dv = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    if B == 0 or C == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    for_dq, for_dkdv = blocks("dq", q.dtype, C, dh), blocks("dkdv", q.dtype, C, dh)
    strides_m = grad_masks.stride() if grad_masks is not None else (0, 0, 0)
    common = dict(
        heads=heads,
        C=C,
        N=N,
        dh=dh,
        scale=scale,
        HAS_MASKS=grad_masks is not None,
        PRECISION=dot_precision(q.dtype),
        **_dropout(dropout_p),
    )
    attention_to_mask_bwd_kernel_dq[(B * heads * cdiv(C, for_dq["BLOCK_C"]),)](
        q, k, v, output, grad_output, grad_masks, lse, delta, dq, seed,
        q.stride(), k.stride(), v.stride(), output.stride(), grad_output.stride(), strides_m,
        **common,
        **for_dq,
    )  # fmt: skip
    attention_to_mask_bwd_kernel_dkdv[(B * heads * cdiv(N, for_dkdv["BLOCK_N"]),)](
        q, k, v, grad_output, grad_masks, lse, delta, dk, dv, seed,
        q.stride(), k.stride(), v.stride(), grad_output.stride(), strides_m,
        **common,
        **for_dkdv,
    )  # fmt: skip
    return dq, dk, dv
