"""mask_loss in Triton: focal and dice sums of bilinearly upsampled logits against a label map, and their gradient.

    z = (1-u)(1-v) a00 + (1-u) v a01 + u (1-v) a10 + u v a11        s = label == c ? -z : z
    focal = (label == c ? alpha : 1 - alpha) sigmoid(s)^gamma softplus(s)

Between four neighbouring grid points lies one cell of pixels, (h + 1)(w + 1) cells in all, those at the border with
their outer corners clamped. A program takes one tile of a cell, at most 16 x 16 pixels, for BLOCK_C channels of one
image: the label of a pixel is read once for all of them and a corner once for all pixels. It leaves one number a sum
(forward) or a corner (backward); a plain torch sum in fixed order does the rest, so nothing is atomic and equal inputs
give equal bits. What is left between the stages is 4 numbers a tile and channel, 1/64 of a full-size tensor at the 16
pixels a grid point this is made for; at few pixels a grid point it is right but saves nothing.

Floor, each direction: B C H W pixels of one ex2, one division and about 35 other fp32 instructions; the logarithm is a
polynomial on the FMA units, as log(1 + e) would lose small e. At B = 4, C = 156, 32 x 32 -> 512 x 512 that is 6e9
instructions, 0.2 ms at the 30e12 a second of an H100, against 11 MB in (int64 labels) and 11 MB of tile sums, written
and read: 0.01 ms. Arithmetic bounds it, so the tile sums cost nothing that shows. One program a channel, looping over
tiles, would need no second stage but read the labels of an image C times (1.3 GB from L2).

Ladder: this is the first version, checked in the interpreter and compiled ahead of time; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16  # side of a tile of pixels
MAX_BLOCK_C = 8


@triton.jit
def _first_pixel(k, points, pixels):
    """First pixel at or behind grid point k - 1: ceil of ((2k - 1) pixels - points) / (2 points), within 0..pixels."""
    numerator = tl.maximum((2 * k - 1) * pixels - points, 0)  # the quotient of a negative would be rounded towards zero
    return tl.minimum((numerator + 2 * points - 1) // (2 * points), pixels)


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1, relative error 2e-7: a minimax polynomial of log(1 + e) / e."""
    p = e * 5.23269411e-3 - 2.95052373e-2
    p = p * e + 7.82259478e-2
    p = p * e - 1.36632453e-1
    p = p * e + 1.91060064e-1
    p = p * e - 2.48429821e-1
    p = p * e + 3.33190968e-1
    p = p * e - 4.99994931e-1
    p = p * e + 9.9999997e-1
    return p * e


@triton.jit
def _tile(
    logits, labels, C, h, w, H, W, tiles_y, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    gamma,
    BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """What the sums and gradients of this program's tile are made of; P = BLOCK_Y * BLOCK_X.

    valid, u, v [P]: which pixels exist and their distance from the upper left corner, 0..1.
    The rest is [BLOCK_C, P], with s = target ? -z : z: target, prob = sigmoid(z), wrong = sigmoid(s),
    right = sigmoid(-s), softplus(s), power = wrong^gamma.
    """
    tile = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    tile_x = tile % tiles_x
    cell_x = (tile // tiles_x) % (w + 1)
    tile_y = (tile // tiles_x // (w + 1)) % tiles_y
    cell_y = tile // tiles_x // (w + 1) // tiles_y

    # [P] pixels, row-major in the tile
    pixel = tl.arange(0, BLOCK_Y * BLOCK_X)
    y = _first_pixel(cell_y, h, H) + tile_y * BLOCK_Y + pixel // BLOCK_X
    x = _first_pixel(cell_x, w, W) + tile_x * BLOCK_X + pixel % BLOCK_X
    valid = (y < _first_pixel(cell_y + 1, h, H)) & (x < _first_pixel(cell_x + 1, w, W))
    u = ((2 * y + 1) * h + H - cell_y * 2 * H).to(tl.float32) / (2 * H)
    v = ((2 * x + 1) * w + W - cell_x * 2 * W).to(tl.float32) / (2 * W)
    place = labels + b * stride_yb + y.to(tl.int64) * stride_yh + x.to(tl.int64) * stride_yw
    label = tl.load(place, mask=valid, other=0).to(tl.int64)
    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)

    # [BLOCK_C] the four corners of the cell, clamped to the grid
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    plane = logits + b * stride_lb + c.to(tl.int64) * stride_lc
    above = tl.maximum(cell_y - 1, 0).to(tl.int64) * stride_lh
    below = tl.minimum(cell_y, h - 1).to(tl.int64) * stride_lh
    left_column = tl.maximum(cell_x - 1, 0).to(tl.int64) * stride_lw
    right_column = tl.minimum(cell_x, w - 1).to(tl.int64) * stride_lw
    a00 = tl.load(plane + above + left_column, mask=c < C, other=0.0).to(tl.float32)
    a01 = tl.load(plane + above + right_column, mask=c < C, other=0.0).to(tl.float32)
    a10 = tl.load(plane + below + left_column, mask=c < C, other=0.0).to(tl.float32)
    a11 = tl.load(plane + below + right_column, mask=c < C, other=0.0).to(tl.float32)

    # [BLOCK_C, P]
    upper = a00[:, None] * (1 - v)[None, :] + a01[:, None] * v[None, :]
    lower = a10[:, None] * (1 - v)[None, :] + a11[:, None] * v[None, :]
    z = upper * (1 - u)[None, :] + lower * u[None, :]
    target = label[None, :] == c[:, None]
    e = tl.exp(-tl.abs(z))
    r = 1 / (1 + e)
    prob = tl.where(z >= 0, r, e * r)
    rest = tl.where(z >= 0, e * r, r)
    wrong = tl.where(target, rest, prob)
    right = tl.where(target, prob, rest)
    log_term = _log1p(e)
    softplus = tl.maximum(tl.where(target, -z, z), 0.0) + log_term
    if GAMMA_IS_2:
        power = wrong * wrong
    else:
        power = tl.exp(-gamma * (tl.maximum(tl.where(target, z, -z), 0.0) + log_term))
    return valid, u, v, target, prob, wrong, right, softplus, power


@triton.jit
def _store(out, which, values, C, BLOCK_C: tl.constexpr):
    """out [4, B, tiles, C]: values [BLOCK_C] of this program at out[which]."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (which * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + row * C + c, values, mask=c < C)


@triton.jit
def mask_loss_fwd_kernel(
    logits, labels, sums,
    C, h, w, H, W, tiles_y, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    alpha, gamma,
    BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """sums [4, B, tiles, C]: focal, intersection, prob and target of each tile."""
    valid, _u, _v, target, prob, _wrong, _right, softplus, power = _tile(
        logits, labels, C, h, w, H, W, tiles_y, tiles_x,
        stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
        gamma, BLOCK_C, BLOCK_Y, BLOCK_X, GAMMA_IS_2,
    )  # fmt: skip
    exists = valid[None, :]
    target = target & exists
    focal = tl.where(target, alpha, 1 - alpha) * power * softplus
    _store(sums, 0, tl.sum(tl.where(exists, focal, 0.0), axis=1), C, BLOCK_C)
    _store(sums, 1, tl.sum(tl.where(target, prob, 0.0), axis=1), C, BLOCK_C)
    _store(sums, 2, tl.sum(tl.where(exists, prob, 0.0), axis=1), C, BLOCK_C)
    _store(sums, 3, tl.sum(target.to(tl.float32), axis=1), C, BLOCK_C)


@triton.jit
def mask_loss_bwd_kernel(
    logits, labels, grad_focal, grad_intersection, grad_prob, corners,
    C, h, w, H, W, tiles_y, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    alpha, gamma,
    BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """corners [4, B, tiles, C]: what each tile gives to its cell's corners 00, 01, 10, 11; grad_* [B, C] contiguous."""
    valid, u, v, target, _prob, wrong, right, softplus, power = _tile(
        logits, labels, C, h, w, H, W, tiles_y, tiles_x,
        stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
        gamma, BLOCK_C, BLOCK_Y, BLOCK_X, GAMMA_IS_2,
    )  # fmt: skip
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.program_id(2).to(tl.int64) * C + c
    of_focal = tl.load(grad_focal + place, mask=c < C, other=0.0)[:, None]
    of_intersection = tl.load(grad_intersection + place, mask=c < C, other=0.0)[:, None]
    of_prob = tl.load(grad_prob + place, mask=c < C, other=0.0)[:, None]
    slope = tl.where(target, -alpha, 1 - alpha) * power * (gamma * right * softplus + wrong)
    dz = of_focal * slope + (of_prob + tl.where(target, of_intersection, 0.0)) * (wrong * right)
    dz = tl.where(valid[None, :], dz, 0.0)
    dz_above = dz * (1 - u)[None, :]
    dz_below = dz * u[None, :]
    _store(corners, 0, tl.sum(dz_above * (1 - v)[None, :], axis=1), C, BLOCK_C)
    _store(corners, 1, tl.sum(dz_above * v[None, :], axis=1), C, BLOCK_C)
    _store(corners, 2, tl.sum(dz_below * (1 - v)[None, :], axis=1), C, BLOCK_C)
    _store(corners, 3, tl.sum(dz_below * v[None, :], axis=1), C, BLOCK_C)


def forward(mask_logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """focal_sum, intersection, prob_sum, target_count: each [B, C] float32."""
    plan = _plan(mask_logits, labels)
    sums = _launch(mask_loss_fwd_kernel, plan, mask_logits, labels, (), alpha, gamma)
    return tuple(sums.sum(2).unbind())


def backward(
    grad_focal_sum: Tensor,
    grad_intersection: Tensor,
    grad_prob_sum: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Gradient of mask_logits [B, C, h, w]."""
    plan = _plan(mask_logits, labels)
    grads = tuple(g.contiguous() for g in (grad_focal_sum, grad_intersection, grad_prob_sum))
    corners = _launch(mask_loss_bwd_kernel, plan, mask_logits, labels, grads, alpha, gamma)
    B, C, h, w = mask_logits.shape
    corners = corners.view(2, 2, B, h + 1, plan.tiles_y, w + 1, plan.tiles_x, C).sum((4, 6))
    rows = _fold(corners[0], corners[1], 2)  # [2, B, h, w + 1, C]
    grid = _fold(rows[0], rows[1], 2)  # [B, h, w, C]
    return grid.permute(0, 3, 1, 2).to(mask_logits.dtype, memory_format=torch.contiguous_format)


def _fold(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Cells to grid points along `dim`: cell k gives to points k - 1 and k, both clamped to the grid."""
    cells = before.shape[dim]
    points = before.narrow(dim, 1, cells - 1) + after.narrow(dim, 0, cells - 1)
    points.narrow(dim, 0, 1).add_(before.narrow(dim, 0, 1))
    points.narrow(dim, cells - 2, 1).add_(after.narrow(dim, cells - 1, 1))
    return points


class _Plan(NamedTuple):
    block_c: int
    block_y: int
    block_x: int
    tiles_y: int
    tiles_x: int


def _plan(mask_logits: Tensor, labels: Tensor) -> _Plan:
    """Tiles that cover the longest run of pixels between two grid points, ceil(H / h) x ceil(W / w)."""
    _, C, h, w = mask_logits.shape
    long_y, long_x = triton.cdiv(labels.shape[1], h), triton.cdiv(labels.shape[2], w)
    block_y, block_x = (min(triton.next_power_of_2(n), MAX_BLOCK) for n in (long_y, long_x))
    block_c = min(triton.next_power_of_2(C), MAX_BLOCK_C)
    return _Plan(block_c, block_y, block_x, triton.cdiv(long_y, block_y), triton.cdiv(long_x, block_x))


def _launch(
    kernel, plan: _Plan, mask_logits: Tensor, labels: Tensor, grads: tuple[Tensor, ...], alpha: float, gamma: float
) -> Tensor:
    """Run a kernel over all tiles; what they leave, [4, B, tiles, C]."""
    B, C, h, w = mask_logits.shape
    tiles = (h + 1) * plan.tiles_y * (w + 1) * plan.tiles_x
    left = mask_logits.new_empty(4, B, tiles, C, dtype=torch.float32)
    if B == 0:
        return left
    kernel[(tiles, triton.cdiv(C, plan.block_c), B)](
        mask_logits,
        labels,
        *grads,
        left,
        C,
        h,
        w,
        labels.shape[1],
        labels.shape[2],
        plan.tiles_y,
        plan.tiles_x,
        *mask_logits.stride(),
        *labels.stride(),
        alpha,
        gamma,
        BLOCK_C=plan.block_c,
        BLOCK_Y=plan.block_y,
        BLOCK_X=plan.block_x,
        GAMMA_IS_2=gamma == 2,
        num_warps=4,
    )
    return left
