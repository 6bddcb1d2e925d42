"""What the Triton kernels that multiply matrices share: sizes of blocks and the precision of a product."""

from __future__ import annotations

import torch


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact ("ieee") unless torch was allowed tf32; half types have one way only."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
