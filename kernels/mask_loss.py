"""mask_loss in Triton: focal and dice sums of bilinearly upsampled logits against a label map, and their gradient.

    z = (1-u)(1-v) a00 + (1-u) v a01 + u (1-v) a10 + u v a11        s = label == c ? -z : z
    focal = (label == c ? alpha : 1 - alpha) sigmoid(s)^gamma softplus(s)

Between four neighbouring grid points lies one cell of pixels, (h + 1)(w + 1) cells in all, those at the border with
their outer corners clamped. A program is one warp: at most 16 columns of one cell for 32 channels of one image, a
thread a channel. It walks down the cell's rows: of a row only the weight u is new, and what a row adds stays in the
thread, so no sum goes over threads. Most cells hold labels of one or two classes: a program looks through them first,
and where none of its channels is among them it does without targets. The program leaves one number a sum (forward) or
a corner (backward); a plain torch sum in fixed order does the rest, so nothing is atomic and equal inputs give equal
bits. What is left between the stages is 4 numbers a cell and channel, 1/64 of a full-size tensor at the 16 pixels a
grid point this is made for; at few pixels a grid point it is right but saves nothing.

Floor, each direction: B C H W pixels of one ex2, one reciprocal and 16 (forward) or 23 other fp32 instructions; the
logarithm is a polynomial on the FMA units, as log(1 + e) would lose small e. Arithmetic bounds it, so the sums of
cells, written and read, cost nothing that shows. One program a channel, looping over cells, would need no second stage
but read the labels of an image C times (1.3 GB from L2).

Ladder (instructions a pixel and channel, sm_90, forward and backward): tiles of 16 x 16 whose sums go over all threads
of a channel, 112 and 119; rows that stay in their thread, four warps and 64 channels a program, 42 and 43; a thread a
channel, no targets where there are none, a reciprocal that knows its range, 19 and 26 (36 and 38 with targets):
bench/results/sass. Not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from zs3fast.kernels._math import reciprocal

MAX_BLOCK_X = 16  # columns of a cell in one program, all in the registers of one thread
MAX_BLOCK_C = 32  # channels in one program, a thread each
ROWS = 16  # of labels, looked through at once

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _first_pixel(k, points, pixels):
    """First pixel at or behind grid point k - 1: ceil of ((2k - 1) pixels - points) / (2 points), within 0..pixels."""
    numerator = tl.maximum((2 * k - 1) * pixels - points, 0)  # the quotient of a negative would be rounded towards zero
    return tl.minimum((numerator + 2 * points - 1) // (2 * points), pixels)


@triton.jit
def _log2_of_1_plus(e):
    """log2(1 + e) for 0 <= e <= 1, relative error 1.5e-6: a minimax polynomial of log(1 + e) / e."""
    p = e * (1.414102e-2 * _LOG2E) - 6.64018e-2 * _LOG2E
    p = p * e + 1.4922388e-1 * _LOG2E
    p = p * e - 2.350386e-1 * _LOG2E
    p = p * e + 3.3109449e-1 * _LOG2E
    p = p * e - 4.9986966e-1 * _LOG2E
    p = p * e + 9.9999873e-1 * _LOG2E
    return p * e


@triton.jit
def _cell(
    logits, labels, C, h, w, H, W, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's columns of a cell: what does not change from row to row.

    cell_y, first and last row; [BLOCK_C] channels c; [BLOCK_X, 1] v in 0..1; [BLOCK_X] whether the column exists, where
    its labels begin; whether any label there is a channel here; [BLOCK_X, BLOCK_C] logits on the edges above and below
    in units of log 2.
    """
    tile = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    tile_x = tile % tiles_x
    cell_x = (tile // tiles_x) % (w + 1)
    cell_y = tile // tiles_x // (w + 1)
    first, last = _first_pixel(cell_y, h, H), _first_pixel(cell_y + 1, h, H)

    x_0 = _first_pixel(cell_x, w, W) + tile_x * BLOCK_X
    x = x_0 + tl.arange(0, BLOCK_X)
    valid = x < _first_pixel(cell_x + 1, w, W)
    v = (((2 * x + 1) * w + W - cell_x * 2 * W).to(tl.float32) / (2 * W))[:, None]
    column = labels + b * stride_yb + tl.minimum(x, W - 1).to(tl.int64) * stride_yw

    # labels of the columns that do not exist are their last neighbour's, at the edge of the image or in the next cell
    c_0 = tl.program_id(1) * BLOCK_C
    found = 0
    for y_0 in range(first, last, ROWS):
        y = tl.minimum(y_0 + tl.arange(0, ROWS), last - 1).to(tl.int64)
        label = tl.load(column[None, :] + y[:, None] * stride_yh)
        inside = (label >= c_0) & (label < tl.minimum(c_0 + BLOCK_C, C))
        found += tl.max(tl.max(inside.to(tl.int32), 1), 0)

    # the four corners of the cell, clamped to the grid
    c = c_0 + tl.arange(0, BLOCK_C)
    plane = logits + b * stride_lb + c.to(tl.int64) * stride_lc
    above = tl.maximum(cell_y - 1, 0).to(tl.int64) * stride_lh
    below = tl.minimum(cell_y, h - 1).to(tl.int64) * stride_lh
    left_column = tl.maximum(cell_x - 1, 0).to(tl.int64) * stride_lw
    right_column = tl.minimum(cell_x, w - 1).to(tl.int64) * stride_lw
    a00 = tl.load(plane + above + left_column, mask=c < C, other=0.0).to(tl.float32) * _LOG2E
    a01 = tl.load(plane + above + right_column, mask=c < C, other=0.0).to(tl.float32) * _LOG2E
    a10 = tl.load(plane + below + left_column, mask=c < C, other=0.0).to(tl.float32) * _LOG2E
    a11 = tl.load(plane + below + right_column, mask=c < C, other=0.0).to(tl.float32) * _LOG2E
    upper = a00[None, :] * (1 - v) + a01[None, :] * v
    lower = a10[None, :] * (1 - v) + a11[None, :] * v
    return cell_y, first, last, c, v, valid, column, found > 0, upper, lower


@triton.jit
def _row(y, cell_y, column, upper, lower, c, h, H, stride_yh, gamma, GAMMA_IS_2: tl.constexpr, TARGETS: tl.constexpr):
    """What the sums and gradients of row y are made of: its distance u from the edge above and [BLOCK_X, BLOCK_C],
    with s = target ? -z : z: target, wrong = sigmoid(s), right = sigmoid(-s), softplus(s) / log 2, wrong^gamma.
    Without TARGETS none of the channels is a label here."""
    u = ((2 * y + 1) * h + H - cell_y * 2 * H).to(tl.float32) / (2 * H)
    z = upper * (1 - u) + lower * u
    if TARGETS:
        label = tl.load(column + tl.cast(y, tl.int64) * stride_yh)  # C and beyond are no channels that are stored
        target = label[:, None] == c[None, :]
        s = tl.where(target, -z, z)
    else:
        target = tl.full([1, 1], 0, tl.int1)
        s = z
    e = tl.exp2(-tl.abs(z))
    r = reciprocal(1 + e)
    er = e * r
    wrong = tl.where(s >= 0, r, er)
    right = tl.where(s >= 0, er, r)
    log_term = _log2_of_1_plus(e)
    softplus = tl.maximum(s, 0.0) + log_term  # NaN comes by log_term
    if GAMMA_IS_2:
        power = wrong * wrong
    else:
        power = tl.exp2(-gamma * (tl.maximum(-s, 0.0) + log_term))
    return u, target, wrong, right, softplus, power


@triton.jit
def _store(out, which, values, c, C):
    """out [4, B, tiles, C]: values [BLOCK_C] at out[which]."""
    row = (which * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + row * C + c, values, mask=c < C)


@triton.jit
def _sum_columns(values, valid):
    """[BLOCK_X, BLOCK_C] -> [BLOCK_C], over the columns there are."""
    return tl.sum(tl.where(valid[:, None], values, 0.0), 0)


@triton.jit
def mask_loss_fwd_kernel(
    logits, labels, sums,
    C, h, w, H, W, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    alpha, gamma,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """sums [4, B, tiles, C]: focal, intersection, prob and target of each tile."""
    cell_y, first, last, c, v, valid, column, found, upper, lower = _cell(
        logits, labels, C, h, w, H, W, tiles_x,
        stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw, BLOCK_C, BLOCK_X, ROWS,
    )  # fmt: skip
    focal = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    hit, miss, count = focal, focal, focal
    if found:
        for y in range(first, last):
            _u, target, wrong, right, softplus, power = _row(
                y, cell_y, column, upper, lower, c, h, H, stride_yh, gamma, GAMMA_IS_2, True
            )
            focal += tl.where(target, alpha, 1 - alpha) * (power * softplus)
            hit = tl.where(target, hit + right, hit)
            miss = tl.where(target, miss, miss + wrong)
            count = tl.where(target, count + 1.0, count)
        _store(sums, 1, _sum_columns(hit, valid), c, C)
        _store(sums, 2, _sum_columns(hit + miss, valid), c, C)
        _store(sums, 3, _sum_columns(count, valid), c, C)
    else:
        for y in range(first, last):
            _u, target, wrong, right, softplus, power = _row(
                y, cell_y, column, upper, lower, c, h, H, stride_yh, gamma, GAMMA_IS_2, False
            )
            focal += power * softplus
            miss += wrong
        focal *= 1 - alpha
        _store(sums, 1, tl.zeros([BLOCK_C], tl.float32), c, C)
        _store(sums, 2, _sum_columns(miss, valid), c, C)
        _store(sums, 3, tl.zeros([BLOCK_C], tl.float32), c, C)
    _store(sums, 0, _sum_columns(focal, valid) * _LN2, c, C)


@triton.jit
def mask_loss_bwd_kernel(
    logits, labels, grad_focal, grad_intersection, grad_prob, corners,
    C, h, w, H, W, tiles_x,
    stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw,
    alpha, gamma,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """corners [4, B, tiles, C]: what each tile gives to its cell's corners 00, 01, 10, 11; grad_* [B, C] contiguous."""
    cell_y, first, last, c, v, valid, column, found, upper, lower = _cell(
        logits, labels, C, h, w, H, W, tiles_x,
        stride_lb, stride_lc, stride_lh, stride_lw, stride_yb, stride_yh, stride_yw, BLOCK_C, BLOCK_X, ROWS,
    )  # fmt: skip
    place = tl.program_id(2).to(tl.int64) * C + c
    of_focal = tl.load(grad_focal + place, mask=c < C, other=0.0)
    of_prob = tl.load(grad_prob + place, mask=c < C, other=0.0)
    of_both = of_prob + tl.load(grad_intersection + place, mask=c < C, other=0.0)
    focal_hit, focal_miss = (-alpha * of_focal)[None, :], ((1 - alpha) * of_focal)[None, :]
    slope_of_softplus = gamma * _LN2
    whole = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    below = whole
    if found:
        for y in range(first, last):
            u, target, wrong, right, softplus, power = _row(
                y, cell_y, column, upper, lower, c, h, H, stride_yh, gamma, GAMMA_IS_2, True
            )
            slope = power * (slope_of_softplus * (right * softplus) + wrong)
            dz = tl.where(target, focal_hit, focal_miss) * slope
            dz += tl.where(target, of_both[None, :], of_prob[None, :]) * (wrong * right)
            whole += dz
            below += dz * u
    else:
        for y in range(first, last):
            u, target, wrong, right, softplus, power = _row(
                y, cell_y, column, upper, lower, c, h, H, stride_yh, gamma, GAMMA_IS_2, False
            )
            slope = slope_of_softplus * (right * softplus) + wrong
            if GAMMA_IS_2:
                dz = wrong * ((focal_miss * wrong) * slope + of_prob[None, :] * right)
            else:
                dz = focal_miss * (power * slope) + of_prob[None, :] * (wrong * right)
            whole += dz
            below += dz * u
    whole, below = tl.where(valid[:, None], whole, 0.0), tl.where(valid[:, None], below, 0.0)
    right_of_whole, right_of_below = tl.sum(whole * v, 0), tl.sum(below * v, 0)
    left_of_whole, left_of_below = tl.sum(whole, 0) - right_of_whole, tl.sum(below, 0) - right_of_below
    _store(corners, 0, left_of_whole - left_of_below, c, C)
    _store(corners, 1, right_of_whole - right_of_below, c, C)
    _store(corners, 2, left_of_below, c, C)
    _store(corners, 3, right_of_below, c, C)


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
    corners = corners.view(2, 2, B, h + 1, w + 1, plan.tiles_x, C).sum(5)
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
    block_x: int
    tiles_x: int


def _plan(mask_logits: Tensor, labels: Tensor) -> _Plan:
    """Tiles that cover the longest run of pixels between two grid points, ceil(W / w)."""
    C, w = mask_logits.shape[1], mask_logits.shape[3]
    longest = triton.cdiv(labels.shape[2], w)
    block_x = min(triton.next_power_of_2(longest), MAX_BLOCK_X)
    block_c = min(triton.next_power_of_2(C), MAX_BLOCK_C)
    return _Plan(block_c, block_x, triton.cdiv(longest, block_x))


def _launch(
    kernel, plan: _Plan, mask_logits: Tensor, labels: Tensor, grads: tuple[Tensor, ...], alpha: float, gamma: float
) -> Tensor:
    """Run a kernel over all tiles; what they leave, [4, B, tiles, C]."""
    B, C, h, w = mask_logits.shape
    tiles = (h + 1) * (w + 1) * plan.tiles_x
    left = mask_logits.new_empty(4, B, tiles, C, dtype=torch.float32)
    if B == 0:
        return left
    kernel[(tiles, triton.cdiv(C, plan.block_c), B)](
        mask_logits, labels, *grads, left,
        C=C,
        h=h,
        w=w,
        H=labels.shape[1],
        W=labels.shape[2],
        tiles_x=plan.tiles_x,
        stride_lb=mask_logits.stride(0),
        stride_lc=mask_logits.stride(1),
        stride_lh=mask_logits.stride(2),
        stride_lw=mask_logits.stride(3),
        stride_yb=labels.stride(0),
        stride_yh=labels.stride(1),
        stride_yw=labels.stride(2),
        alpha=alpha,
        gamma=gamma,
        BLOCK_C=plan.block_c,
        BLOCK_X=plan.block_x,
        ROWS=ROWS,
        GAMMA_IS_2=gamma == 2,
        num_warps=1,
    )  # fmt: skip
    return left
