"""The kernel that `tests.interpreter` tries."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_up_kernel(x, total, blocks, BLOCK: tl.constexpr):
    found = 0.0
    for block in range(blocks):
        values = tl.load(x + block * BLOCK + tl.arange(0, BLOCK))
        if tl.max(values, 0) > 0:
            found += tl.sum(values, 0)
    tl.store(total, found)
