"""What the Triton kernels of attention over chosen rows share: rows in, rows out, products of pairs of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, inside, d, row_stride, column_stride, width):
    """[rows, width] of a matrix, zeros where `inside` is false."""
    at = rows.to(tl.int64)[:, None] * row_stride + d[None, :] * column_stride
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
