"""Arithmetic that kernels share, where Triton's own spends instructions on what cannot happen there."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # as Triton reads it, on import


@triton.jit
def reciprocal(x):
    """1 / x of x >= 1 in fp32, relative error 2^-23; 0 where it is below 2^-126. A division takes three more."""
    if _INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
