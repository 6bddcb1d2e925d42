"""region_bridge_attention in Triton: attention over [prefix | patches | regions] under the region-bridge mask.

Forward of half types: torch's flash attention of prefix and patch rows over prefix and patch keys, then one launch of
two kinds of programs:
  merge:  (b, head, block of prefix and patch rows) adds a patch's own region token by the log-sum-exp.
  region: (b, head, some regions) runs over the cells of their windows, gathered by index, starting at the token itself.

Forward of what torch's flash attention does not take, the same with another first kind:
  block:  (b, head, block of prefix and patch rows) runs over the prefix and patch keys with an online softmax. A
          patch's own region token is where that softmax starts: maximum s, sum 1, accumulator v_m.

Backward, from the saved log-sum-exp, two launches and no atomics, since every row has one writer:
  dq:     blocks of prefix and patch rows, with one more term for the region token; also delta = output . grad_output.
  dk, dv: blocks of prefix and patch keys, with one more term for the region row that sees a patch; and programs of
          some regions each, which sum dq of their rows, and dk, dv of their tokens over the patches of their windows.

Products with gathered region rows are sums of elementwise products in fp32: 2 N + M pairs have no matrix in them. A
region program holds ROWS = REGIONS x CELLS (region, cell) pairs at once, so one window of 1024 patches and 1024 windows
of one patch both fill it.

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


@triton.jit
def _pair_gradient(left, right, values, grad, log_sum, correction, inside, scale):
    """Probability and gradient of the score of one gathered (query, key) pair a row, zeros where `inside` is false."""
    p = tl.where(inside, tl.exp2(dot_rows(left, right) * (scale * _LOG2E) - log_sum), 0.0)
    return p, p * (dot_rows(grad, values) - correction)


@triton.jit
def _region_of(patch, h, w, rh, rw):
    """A patch's region, and whether it has one: not if it is a prefix row (negative), past the end or margin."""
    wh, ww = h // rh, w // rw
    y, x = patch // w // wh, patch % w // ww
    return y * rw + x, (patch >= 0) & (patch < h * w) & (y < rh) & (x < rw)


@triton.jit
def _pairs(block, cell, w, rh, rw, wh, ww, REGIONS: tl.constexpr, CELLS: tl.constexpr):
    """Region and patch of REGIONS x CELLS (region, cell) pairs, and whether they exist; cells vary fastest."""
    i = tl.arange(0, REGIONS * CELLS)
    region, cell = block * REGIONS + i // CELLS, cell + i % CELLS
    patch = (region // rw * wh + cell // ww) * w + region % rw * ww + cell % ww
    return region, patch, (region < rh * rw) & (cell < wh * ww)


@triton.jit
def _block_rows(
    program, q, k, v, output, lse,
    q_strides, k_strides, v_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    queries, keys = prefix_q + h * w, prefix_k + h * w
    blocks = tl.cdiv(queries, BLOCK_Q)
    head = program // blocks  # b * heads + a
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    left = load_rows(of_head(q, q_strides, b, a), row, row < queries, d, q_strides, dh)  # [BLOCK_Q, BLOCK_D]
    region, owned = _region_of(row - prefix_q, h, w, rh, rw)
    start = dot_rows(left, load_rows(k, keys + region, owned, d, k_strides, dh)) * (scale * _LOG2E)
    largest = tl.where(owned, start, float("-inf"))  # in units of log2
    total = tl.where(owned, 1.0, 0.0)
    sums = load_rows(v, keys + region, owned, d, v_strides, dh).to(tl.float32)  # [BLOCK_Q, BLOCK_D]
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        right = load_rows(k, key, key < keys, d, k_strides, dh)
        s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * _LOG2E)  # [BLOCK_Q, BLOCK_K]
        s = tl.where((key < keys)[None, :], s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v, key, key < keys, d, v_strides, dh)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        largest = now
    length = queries + rh * rw
    store_rows(output, row, row < queries, d, b, a, length, heads, dh, sums / total[:, None])
    tl.store(lse + head.to(tl.int64) * length + row, (largest + tl.log2(total)) * _LN2, mask=row < queries)


@triton.jit
def _region_rows(
    program, q, k, v, output, lse,
    q_strides, k_strides, v_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale,
    BLOCK_D: tl.constexpr, REGIONS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    queries, keys, M = prefix_q + h * w, prefix_k + h * w, rh * rw
    blocks = tl.cdiv(M, REGIONS)
    head = program // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = of_head(q, q_strides, b, a)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    wh, ww = h // rh, w // rw
    own = program % blocks * REGIONS + tl.arange(0, REGIONS)
    sums = load_rows(v, keys + own, own < M, d, v_strides, dh).to(tl.float32)  # [REGIONS, BLOCK_D]
    largest = dot_rows(
        load_rows(q, queries + own, own < M, d, q_strides, dh), load_rows(k, keys + own, own < M, d, k_strides, dh)
    ) * (scale * _LOG2E)
    total = tl.full([REGIONS], 1.0, tl.float32)
    for cell in range(0, wh * ww, CELLS):
        region, patch, inside = _pairs(program % blocks, cell, w, rh, rw, wh, ww, REGIONS, CELLS)
        left = load_rows(q, queries + region, inside, d, q_strides, dh)  # [REGIONS * CELLS, BLOCK_D]
        right = load_rows(k, prefix_k + patch, inside, d, k_strides, dh)
        s = tl.where(inside, dot_rows(left, right) * (scale * _LOG2E), float("-inf")).reshape(REGIONS, CELLS)
        now = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v, prefix_k + patch, inside, d, v_strides, dh).to(tl.float32)
        weighted = (p.reshape(REGIONS * CELLS)[:, None] * values).reshape(REGIONS, CELLS, BLOCK_D)
        sums = sums * shrink[:, None] + tl.sum(weighted, 1)
        largest = now
    length = queries + M
    store_rows(output, queries + own, own < M, d, b, a, length, heads, dh, sums / total[:, None])
    tl.store(lse + head.to(tl.int64) * length + queries + own, (largest + tl.log2(total)) * _LN2, mask=own < M)


@triton.jit
def region_bridge_attention_fwd_kernel(
    q, k, v, output, lse,
    q_strides, k_strides, v_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, block_programs,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    REGIONS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < block_programs:
        _block_rows(
            program, q, k, v, output, lse, q_strides, k_strides, v_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        _region_rows(
            program - block_programs, q, k, v, output, lse, q_strides, k_strides, v_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, BLOCK_D, REGIONS, CELLS,
        )  # fmt: skip


@triton.jit
def _merged_rows(
    program, q, k, v, context, context_lse, output, lse,
    q_strides, k_strides, v_strides, c_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    queries, keys = prefix_q + h * w, prefix_k + h * w
    length = queries + rh * rw
    blocks = tl.cdiv(queries, ROWS)
    head = program // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    d = tl.arange(0, BLOCK_D)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    region, owned = _region_of(row - prefix_q, h, w, rh, rw)
    left = load_rows(of_head(q, q_strides, b, a), row, owned, d, q_strides, dh)
    s = dot_rows(left, load_rows(k, keys + region, owned, d, k_strides, dh)) * (scale * _LOG2E)
    s = tl.where(owned, s, float("-inf"))  # in units of log2
    log_sum = tl.load(context_lse + head.to(tl.int64) * queries + row, mask=inside, other=0.0) * _LOG2E
    largest = tl.maximum(log_sum, s)
    of_context, of_token = tl.exp2(log_sum - largest), tl.exp2(s - largest)
    total = of_context + of_token
    sums = (
        load_rows(of_head(context, c_strides, b, a), row, inside, d, c_strides, dh).to(tl.float32) * of_context[:, None]
    )
    sums += load_rows(v, keys + region, owned, d, v_strides, dh).to(tl.float32) * of_token[:, None]
    store_rows(output, row, inside, d, b, a, length, heads, dh, sums / total[:, None])
    tl.store(lse + head.to(tl.int64) * length + row, (largest + tl.log2(total)) * _LN2, mask=inside)


@triton.jit
def region_bridge_attention_merge_kernel(
    q, k, v, context, context_lse, output, lse,
    q_strides, k_strides, v_strides, c_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, merge_programs,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, REGIONS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < merge_programs:
        _merged_rows(
            program, q, k, v, context, context_lse, output, lse,
            q_strides, k_strides, v_strides, c_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        _region_rows(
            program - merge_programs, q, k, v, output, lse, q_strides, k_strides, v_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, BLOCK_D, REGIONS, CELLS,
        )  # fmt: skip


@triton.jit
def region_bridge_attention_bwd_kernel_dq(
    q, k, v, output, grad_output, lse, delta, dq,
    q_strides, k_strides, v_strides, o_strides, g_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    queries, keys = prefix_q + h * w, prefix_k + h * w
    length = queries + rh * rw
    blocks = tl.cdiv(queries, BLOCK_Q)
    head = tl.program_id(0) // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < queries
    d = tl.arange(0, BLOCK_D)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    left = load_rows(of_head(q, q_strides, b, a), row, inside, d, q_strides, dh)  # [BLOCK_Q, BLOCK_D]
    grad = load_rows(of_head(grad_output, g_strides, b, a), row, inside, d, g_strides, dh)
    correction = dot_rows(
        grad, load_rows(of_head(output, o_strides, b, a), row, inside, d, o_strides, dh)
    )  # sum over keys of p dp
    tl.store(delta + head.to(tl.int64) * length + row, correction, mask=inside)
    log_sum = tl.load(lse + head.to(tl.int64) * length + row, mask=inside, other=0.0) * _LOG2E

    region, owned = _region_of(row - prefix_q, h, w, rh, rw)
    token = load_rows(k, keys + region, owned, d, k_strides, dh)  # the region each patch sees
    token_v = load_rows(v, keys + region, owned, d, v_strides, dh)
    _, token_ds = _pair_gradient(left, token, token_v, grad, log_sum, correction, owned, scale)
    sums = token_ds[:, None] * token.to(tl.float32)  # [BLOCK_Q, BLOCK_D]
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        right = load_rows(k, key, key < keys, d, k_strides, dh)
        values = load_rows(v, key, key < keys, d, v_strides, dh)
        s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.where((key < keys)[None, :], tl.exp2(s - log_sum[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - correction[:, None])
        sums = tl.dot(ds.to(right.dtype), right, sums, input_precision=PRECISION)
    store_rows(dq, row, inside, d, b, a, length, heads, dh, sums * scale)


@triton.jit
def _block_keys(
    program, q, k, v, output, grad_output, lse, delta, dk, dv,
    q_strides, k_strides, v_strides, o_strides, g_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    queries, keys = prefix_q + h * w, prefix_k + h * w
    length = queries + rh * rw
    blocks = tl.cdiv(keys, BLOCK_K)
    head = program // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    key = program % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    q = of_head(q, q_strides, b, a)
    grad_output = of_head(grad_output, g_strides, b, a)
    lse += head.to(tl.int64) * length
    delta += head.to(tl.int64) * length
    right = load_rows(of_head(k, k_strides, b, a), key, key < keys, d, k_strides, dh)  # [BLOCK_K, BLOCK_D]
    values = load_rows(of_head(v, v_strides, b, a), key, key < keys, d, v_strides, dh)

    region, owned = _region_of(key - prefix_k, h, w, rh, rw)
    token = load_rows(q, queries + region, owned, d, q_strides, dh)  # the region row that sees each patch
    token_grad = load_rows(grad_output, queries + region, owned, d, g_strides, dh)
    token_delta = dot_rows(
        token_grad, load_rows(of_head(output, o_strides, b, a), queries + region, owned, d, o_strides, dh)
    )
    token_lse = tl.load(lse + queries + region, mask=owned, other=0.0) * _LOG2E
    token_p, token_ds = _pair_gradient(token, right, values, token_grad, token_lse, token_delta, owned, scale)
    sums_k = token_ds[:, None] * token.to(tl.float32)  # [BLOCK_K, BLOCK_D]
    sums_v = token_p[:, None] * token_grad.to(tl.float32)
    for first in range(0, queries, BLOCK_Q):
        # rows past the end add nothing: their q, grad_output and delta are zero and their p is exp(0)
        row = first + tl.arange(0, BLOCK_Q)
        left = load_rows(q, row, row < queries, d, q_strides, dh)
        grad = load_rows(grad_output, row, row < queries, d, g_strides, dh)
        log_sum = tl.load(lse + row, mask=row < queries, other=0.0) * _LOG2E
        correction = tl.load(delta + row, mask=row < queries, other=0.0)
        # scores as [BLOCK_K, BLOCK_Q]: they are the left operand of both sums, where a transpose would cost registers
        s = tl.dot(right, tl.trans(left), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.exp2(s - log_sum[None, :])
        dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        sums_v = tl.dot(p.to(grad.dtype), grad, sums_v, input_precision=PRECISION)
        ds = p * (dp - correction[None, :])
        sums_k = tl.dot(ds.to(left.dtype), left, sums_k, input_precision=PRECISION)
    store_rows(dk, key, key < keys, d, b, a, keys + rh * rw, heads, dh, sums_k * scale)
    store_rows(dv, key, key < keys, d, b, a, keys + rh * rw, heads, dh, sums_v)


@triton.jit
def _region_gradients(
    program, q, k, v, output, grad_output, lse, delta, dq, dk, dv,
    q_strides, k_strides, v_strides, o_strides, g_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale,
    BLOCK_D: tl.constexpr, REGIONS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    queries, keys, M = prefix_q + h * w, prefix_k + h * w, rh * rw
    length = queries + M
    blocks = tl.cdiv(M, REGIONS)
    head = program // blocks
    b, a = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = of_head(q, q_strides, b, a)
    k = of_head(k, k_strides, b, a)
    v = of_head(v, v_strides, b, a)
    grad_output = of_head(grad_output, g_strides, b, a)
    lse += head.to(tl.int64) * length
    delta += head.to(tl.int64) * length
    wh, ww = h // rh, w // rw

    own = program % blocks * REGIONS + tl.arange(0, REGIONS)
    here = own < M
    own_q = load_rows(q, queries + own, here, d, q_strides, dh)  # [REGIONS, BLOCK_D]
    own_k = load_rows(k, keys + own, here, d, k_strides, dh)
    own_v = load_rows(v, keys + own, here, d, v_strides, dh)
    own_grad = load_rows(grad_output, queries + own, here, d, g_strides, dh)
    own_delta = dot_rows(own_grad, load_rows(of_head(output, o_strides, b, a), queries + own, here, d, o_strides, dh))
    own_lse = tl.load(lse + queries + own, mask=here, other=0.0) * _LOG2E
    own_p, own_ds = _pair_gradient(own_q, own_k, own_v, own_grad, own_lse, own_delta, here, scale)
    sums_q = own_ds[:, None] * own_k.to(tl.float32)
    sums_k = own_ds[:, None] * own_q.to(tl.float32)
    sums_v = own_p[:, None] * own_grad.to(tl.float32)

    region_lse = tl.broadcast_to(own_lse[:, None], [REGIONS, CELLS]).reshape(REGIONS * CELLS)
    region_delta = tl.broadcast_to(own_delta[:, None], [REGIONS, CELLS]).reshape(REGIONS * CELLS)
    for cell in range(0, wh * ww, CELLS):
        region, patch, inside = _pairs(program % blocks, cell, w, rh, rw, wh, ww, REGIONS, CELLS)
        # the region's view of its patches, [REGIONS * CELLS, BLOCK_D]
        left = load_rows(q, queries + region, inside, d, q_strides, dh)
        right = load_rows(k, prefix_k + patch, inside, d, k_strides, dh)
        values = load_rows(v, prefix_k + patch, inside, d, v_strides, dh)
        grad = load_rows(grad_output, queries + region, inside, d, g_strides, dh)
        p, ds = _pair_gradient(left, right, values, grad, region_lse, region_delta, inside, scale)
        sums_q += tl.sum((ds[:, None] * right.to(tl.float32)).reshape(REGIONS, CELLS, BLOCK_D), 1)
        # the patches' view of their region
        left = load_rows(q, prefix_q + patch, inside, d, q_strides, dh)
        right = load_rows(k, keys + region, inside, d, k_strides, dh)
        values = load_rows(v, keys + region, inside, d, v_strides, dh)
        grad = load_rows(grad_output, prefix_q + patch, inside, d, g_strides, dh)
        log_sum = tl.load(lse + prefix_q + patch, mask=inside, other=0.0) * _LOG2E
        correction = tl.load(delta + prefix_q + patch, mask=inside, other=0.0)
        p, ds = _pair_gradient(left, right, values, grad, log_sum, correction, inside, scale)
        sums_k += tl.sum((ds[:, None] * left.to(tl.float32)).reshape(REGIONS, CELLS, BLOCK_D), 1)
        sums_v += tl.sum((p[:, None] * grad.to(tl.float32)).reshape(REGIONS, CELLS, BLOCK_D), 1)
    store_rows(dq, queries + own, here, d, b, a, length, heads, dh, sums_q * scale)
    store_rows(dk, keys + own, here, d, b, a, keys + M, heads, dh, sums_k * scale)
    store_rows(dv, keys + own, here, d, b, a, keys + M, heads, dh, sums_v)


@triton.jit
def region_bridge_attention_bwd_kernel_dkdv(
    q, k, v, output, grad_output, lse, delta, dq, dk, dv,
    q_strides, k_strides, v_strides, o_strides, g_strides,
    heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, block_programs,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    REGIONS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < block_programs:
        _block_keys(
            program, q, k, v, output, grad_output, lse, delta, dk, dv,
            q_strides, k_strides, v_strides, o_strides, g_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        _region_gradients(
            program - block_programs, q, k, v, output, grad_output, lse, delta, dq, dk, dv,
            q_strides, k_strides, v_strides, o_strides, g_strides,
            heads, dh, prefix_q, prefix_k, h, w, rh, rw, scale, BLOCK_D, REGIONS, CELLS,
        )  # fmt: skip


def _blocks(dtype: torch.dtype, dh: int, backward: bool) -> dict[str, int]:
    """Tile sizes and warps: the largest that spill nowhere (fp32 products without tensor cores are hungry)."""
    block_d = max(16, next_power_of_2(dh))
    small = dtype == torch.float32
    return {
        "BLOCK_Q": 32 if small or backward else 64,
        "BLOCK_K": 64 >> (small + (block_d > 64)),
        "BLOCK_D": block_d,
        "num_warps": 8 if small and (backward or block_d > 64) else 4,
        "num_stages": 2,
    }


def _region_blocks(window: int, dh: int) -> dict[str, int]:
    """REGIONS x CELLS pairs a program holds: as many cells of a window as fit, then as many regions."""
    rows = 32 if dh <= 64 else 16
    cells = min(rows, next_power_of_2(window))
    return {"REGIONS": rows // cells, "CELLS": cells}


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh], the layout the kernels write."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _sizes(q: Tensor, num_prefix: int, grid: tuple[int, int], regions: tuple[int, int], scale: float) -> dict:
    (h, w), (rh, rw) = grid, regions
    return {
        "heads": q.shape[1],
        "dh": q.shape[3],
        "prefix_q": q.shape[2] - h * w - rh * rw,
        "prefix_k": num_prefix,
        "h": h,
        "w": w,
        "rh": rh,
        "rw": rw,
        "scale": scale,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, num_prefix: int, grid: tuple[int, int], regions: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    B, heads, Eq, dh = q.shape
    M = regions[0] * regions[1]
    output, lse = _empty_heads(q), q.new_empty(B, heads, Eq, dtype=torch.float32)
    if B == 0:
        return output, lse
    if q.dtype != torch.float32 and dh % 8 == 0 and q.device.type != "cpu":
        _split(q, k, v, output, lse, num_prefix, grid, regions, scale)
        return output, lse
    blocks = _blocks(q.dtype, dh, backward=False)
    pairs = _region_blocks((grid[0] // regions[0]) * (grid[1] // regions[1]), dh)
    block_programs = B * heads * cdiv(Eq - M, blocks["BLOCK_Q"])
    region_bridge_attention_fwd_kernel[(block_programs + B * heads * cdiv(M, pairs["REGIONS"]),)](
        q, k, v, output, lse,
        q.stride(), k.stride(), v.stride(),
        block_programs=block_programs,
        PRECISION=dot_precision(q.dtype),
        **_sizes(q, num_prefix, grid, regions, scale),
        **blocks,
        **pairs,
    )  # fmt: skip
    return output, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's flash attention and its log-sum-exp; the CPU's, where the interpreter runs."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    q, k, v = (x if _aligned(x) else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _aligned(x: Tensor) -> bool:
    """Whether every row of a half type starts at 16 bytes and is whole, as flash attention reads it."""
    return x.stride(-1) == 1 and not any(stride % 8 for stride in (x.storage_offset(), *x.stride()[:-1]))


def _split(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    num_prefix: int, grid: tuple[int, int], regions: tuple[int, int], scale: float,
) -> None:  # fmt: skip
    """Fill `output` and `lse`: flash attention of prefix and patches, then the merge of every patch's region.

    Beside flash attention it moves 4 rows of dh a patch (query, result, token's value; result again): 100 MB at B = 16,
    12 heads, N = 1024 in half types, where the products are 53 GFLOP.
    """
    (B, heads, _, dh), M = q.shape, regions[0] * regions[1]
    rows, keys = q.shape[2] - M, k.shape[2] - M
    context, context_lse = _flash(q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], scale)
    pairs = _region_blocks((grid[0] // regions[0]) * (grid[1] // regions[1]), dh)
    block_d = max(16, next_power_of_2(dh))
    merge_programs = B * heads * cdiv(rows, 2048 // block_d)
    region_bridge_attention_merge_kernel[(merge_programs + B * heads * cdiv(M, pairs["REGIONS"]),)](
        q, k, v, context, context_lse.contiguous(), output, lse,
        q.stride(), k.stride(), v.stride(), context.stride(),
        merge_programs=merge_programs,
        ROWS=2048 // block_d,
        BLOCK_D=block_d,
        **_sizes(q, num_prefix, grid, regions, scale),
        **pairs,
    )  # fmt: skip


def backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    num_prefix: int,
    grid: tuple[int, int],
    regions: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, heads, Eq, dh = q.shape
    M = regions[0] * regions[1]
    dq, dk, dv = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    if B == 0:
        return dq, dk, dv
    lse = lse.contiguous()
    delta = torch.empty_like(lse)  # of prefix and patch rows
    blocks = _blocks(q.dtype, dh, backward=True)
    pairs = _region_blocks((grid[0] // regions[0]) * (grid[1] // regions[1]), dh)
    strides = (q.stride(), k.stride(), v.stride(), output.stride(), grad_output.stride())
    common = _sizes(q, num_prefix, grid, regions, scale) | {"PRECISION": dot_precision(q.dtype)} | blocks
    region_bridge_attention_bwd_kernel_dq[(B * heads * cdiv(Eq - M, blocks["BLOCK_Q"]),)](
        q, k, v, output, grad_output, lse, delta, dq,
        *strides,
        **common,
    )  # fmt: skip
    block_programs = B * heads * cdiv(k.shape[2] - M, blocks["BLOCK_K"])
    region_bridge_attention_bwd_kernel_dkdv[(block_programs + B * heads * cdiv(M, pairs["REGIONS"]),)](
        q, k, v, output, grad_output, lse, delta, dq, dk, dv,
        *strides,
        block_programs=block_programs,
        **common,
        **pairs,
    )  # fmt: skip
    return dq, dk, dv
