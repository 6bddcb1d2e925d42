"""relationship_descriptor in Triton: out[r, c] = W1 (text[c] * visual[r]) + term[c], rows r = (b, m), i = r C + c.

Forward: one matrix product of [R C, D] by [D, D'] whose left operand is made while it is loaded: a tile of text rows
times a tile of visual rows, in registers, so neither the product nor the 2D-wide concatenation is ever in memory. The
epilogue adds term. Floor: 2 R C D D' FLOPs, (C + R + D') D + C D' elements read and R C D' written.

Backward: H = grad W1 [R C, D] is the same kind of product, and what is wanted of it are its sums against text and
visual. The kernel makes a tile of H for one r and a block of classes and sums it over those classes into dvisual (in a
fixed order, blocks of classes one after the other); dtext is the same kernel with the roles of r and c exchanged. H
itself never exists. W1's gradient, grad^T (text * visual), is made with torch by chunks of rows: a large product that
cuBLAS does best, whose right operand is the only temporary. No 2D-wide concatenation is stored in either direction.

Block sizes come from compiling for sm_80, sm_90 and sm_100 (registers, no spills), not yet from a clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._tuning import cdiv, dot_precision, next_power_of_2

_CHUNK_ROWS = 16384  # rows of text * visual that dweight holds at a time


@triton.jit
def relationship_descriptor_fwd_kernel(
    text, visual, weight, term, out,
    t_c, t_d, v_r, v_d, w_o, w_d, m_c, m_o,
    rows, C, D, wide,
    PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_o = tl.cdiv(wide, BLOCK_O)
    i = (tl.program_id(0) // blocks_o).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)  # r * C + c
    o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    r, c = i // C, i % C
    inside_i, inside_o = i < rows, o < wide
    sums = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside_d = d < D
        inside = inside_i[:, None] & inside_d[None, :]
        left = tl.load(text + c[:, None] * t_c + d[None, :] * t_d, mask=inside, other=0.0)
        left *= tl.load(visual + r[:, None] * v_r + d[None, :] * v_d, mask=inside, other=0.0)
        right = tl.load(
            weight + o[None, :].to(tl.int64) * w_o + d[:, None] * w_d,
            mask=inside_d[:, None] & inside_o[None, :],
            other=0.0,
        )  # [BLOCK_D, BLOCK_O]
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    inside = inside_i[:, None] & inside_o[None, :]
    sums += tl.load(term + c[:, None] * m_c + o[None, :] * m_o, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i[:, None] * wide + o[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def relationship_descriptor_bwd_kernel(
    grad, weight, factor, out,
    g_x, g_y, g_o, w_o, w_d, f_y, f_d,
    X, Y, D, wide,
    PRECISION: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[x, d] = sum_y factor[y, d] sum_o grad[x, y, o] W1[o, d]: dvisual with x, y = r, c; dtext with x, y = c, r."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    x = (tl.program_id(0) // blocks_d).to(tl.int64)
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = d < D
    sums = tl.zeros([BLOCK_D], tl.float32)
    grad += x * g_x
    for y0 in range(0, Y, BLOCK_Y):
        y = y0 + tl.arange(0, BLOCK_Y).to(tl.int64)
        inside_y = y < Y
        product = tl.zeros([BLOCK_Y, BLOCK_D], tl.float32)  # a tile of grad W1
        for o0 in range(0, wide, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O).to(tl.int64)
            inside_o = o < wide
            left = tl.load(
                grad + y[:, None] * g_y + o[None, :] * g_o, mask=inside_y[:, None] & inside_o[None, :], other=0.0
            )
            right = tl.load(
                weight + o[:, None] * w_o + d[None, :] * w_d, mask=inside_o[:, None] & inside_d[None, :], other=0.0
            )
            product = tl.dot(left, right, product, input_precision=PRECISION)
        factors = tl.load(
            factor + y[:, None] * f_y + d[None, :] * f_d, mask=inside_y[:, None] & inside_d[None, :], other=0.0
        )
        sums += tl.sum(product * factors.to(tl.float32), 0)
    tl.store(out + x * D + d, sums.to(out.dtype.element_ty), mask=inside_d)


def _block(size: int, largest: int) -> int:
    return max(16, min(largest, next_power_of_2(size)))


def blocks(kernel: str, dtype: torch.dtype, rows: int, D: int, wide: int) -> dict[str, int]:
    """Tile sizes and launch options; `rows` is R C in fwd, the classes or visual rows summed over in bwd."""
    exact = dtype == torch.float32  # without tensor cores both operands lie in registers
    if kernel == "fwd":
        sizes = {"BLOCK_I": _block(rows, 64), "BLOCK_O": _block(wide, 64), "BLOCK_D": _block(D, 32 if exact else 64)}
    else:
        rows_at_most = 32 if exact else 64
        sizes = {"BLOCK_Y": _block(rows, rows_at_most), "BLOCK_O": _block(wide, rows_at_most), "BLOCK_D": _block(D, 64)}
    return sizes | {"num_warps": 4, "num_stages": 2}


def forward(text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor | None, text_term: Tensor | None) -> Tensor:
    (C, D), wide = text.shape, weight.shape[0]
    out = visual.new_empty(*visual.shape[:-1], C, wide)
    if out.numel() == 0:
        return out
    if text_term is None:
        text_term = torch.nn.functional.linear(text, weight[:, D:], bias)
    flat = visual.reshape(-1, D)  # [R, D]
    rows = flat.shape[0] * C
    sizes = blocks("fwd", text.dtype, rows, D, wide)
    relationship_descriptor_fwd_kernel[(cdiv(rows, sizes["BLOCK_I"]) * cdiv(wide, sizes["BLOCK_O"]),)](
        text, flat, weight, text_term, out,
        *text.stride(), *flat.stride(), *weight.stride(), *text_term.stride(),
        rows=rows,
        C=C,
        D=D,
        wide=wide,
        PRECISION=dot_precision(text.dtype),
        **sizes,
    )  # fmt: skip
    return out


def _contract(grad: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """[X, D] from grad [X, Y, D'], weight [D', >= D] and factor [Y, D]."""
    (X, Y, wide), D = grad.shape, factor.shape[1]
    out = factor.new_empty(X, D)
    sizes = blocks("bwd", grad.dtype, Y, D, wide)
    relationship_descriptor_bwd_kernel[(X * cdiv(D, sizes["BLOCK_D"]),)](
        grad, weight, factor, out,
        *grad.stride(), *weight.stride(), *factor.stride(),
        X=X,
        Y=Y,
        D=D,
        wide=wide,
        PRECISION=dot_precision(grad.dtype),
        **sizes,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    text: Tensor,
    visual: Tensor,
    weight: Tensor,
    has_text_term: bool,
    need_text: bool,
    need_visual: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (C, D), wide = text.shape, weight.shape[0]
    flat = visual.reshape(-1, D)
    R = flat.shape[0]
    grad = grad.reshape(R, C, wide)
    empty = R * C * wide == 0
    dterm = grad.new_zeros(C, wide) if empty else grad.sum(0)
    dtext, dvisual, dweight = (text.new_empty(0) for _ in range(3))  # outputs may not share memory
    if need_text:
        dtext = text.new_zeros(text.shape) if empty else _contract(grad.transpose(0, 1), weight, flat)
        if not has_text_term:
            dtext = dtext + dterm @ weight[:, D:]
    if need_visual:
        dvisual = visual.new_zeros(visual.shape) if empty else _contract(grad, weight, text).reshape(visual.shape)
    if need_weight:
        dweight = weight.new_zeros(weight.shape)
        chunk = max(1, _CHUNK_ROWS // max(C, 1))
        for r in range(0, 0 if empty else R, chunk):
            product = (flat[r : r + chunk, None] * text).flatten(0, 1)
            dweight[:, :D].addmm_(grad[r : r + chunk].flatten(0, 1).T, product)
        if not has_text_term:
            dweight[:, D:] = dterm.T @ text
    return dtext, dvisual, dweight, dterm
