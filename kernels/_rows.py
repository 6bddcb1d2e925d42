"""What the Triton kernels of attention over chosen rows share: rows in, rows out, products of pairs of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_head(base, strides, b, a):
    """Where the matrix of image b and head a of [B, heads, rows, columns] starts."""
    return base + b * strides[0] + a * strides[1]


@triton.jit
def load_rows(base, rows, inside, d, strides, width):
    """[rows, width] of a matrix of [B, heads, rows, columns], zeros where `inside` is false."""
    at = rows.to(tl.int64)[:, None] * strides[2] + d[None, :] * strides[3]
    return tl.load(base + at, mask=inside[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, inside, d, b, a, length, heads, width, x):
    """Rows of [B, heads, length, width] that lie in memory as [B, length, heads, width]."""
    at = ((b * length + rows.to(tl.int64)) * heads + a)[:, None] * width + d[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=inside[:, None] & (d < width)[None, :])


@triton.jit
def dot_rows(x, y):
    """Row by row products of two matrices, fp32."""
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
