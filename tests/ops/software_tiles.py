"""The CPU kernels that need AMX, on software tiles (emulated/amx.cpp): built for tests, called past the extension."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tests.ops.cxx import shared_library

NAME = "amx_emulated"  # beside the names of kernels that the extension knows
FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni -mfma -mf16c".split()
FLAGS += [
    "-mprefer-vector-width=512",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # gcc 12 warns of its own header
ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "emulated" / "amx.cpp"


@functools.cache
def library() -> ctypes.CDLL:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is gone
        folders = (f"-I{ROOT / 'csrc'}", f"-I{here}")
        return shared_library(
            Path(folder) / "amx.so", [SOURCE, ROOT / "csrc" / "workspace.cpp"], "-O2", *FLAGS, *folders
        )


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int) -> Tensor:
    """As torch.ops.zs3fast_cpp.fused_linear_by."""
    rows, (outputs, depth) = x.numel() // x.shape[-1], weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    packed = torch.empty(-(-rows // 64) * 64 * depth, dtype=x.dtype)
    held = [None if t is None else t.contiguous() for t in (x, weight, bias, residual, out, packed)]
    tensors = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in held))
    library().fused_linear_amx((ctypes.c_int64 * 3)(rows, outputs, depth), tensors, ctypes.c_int64(activation))
    return out


def fused_linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """As torch.ops.zs3fast_cpp.fused_linear_int8_by."""
    rows, (outputs, depth) = x.numel() // x.shape[-1], weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    packed = torch.empty(-(-rows // 64) * 64 * (depth + 8) + 64, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :]  # aligned to a cache line
    held = [None if t is None else t.contiguous() for t in (x, weight, scale, bias, residual, out)] + [packed]
    tensors = (ctypes.c_void_p * 7)(*(None if t is None else t.data_ptr() for t in held))
    sizes = (ctypes.c_int64 * 3)(rows, outputs, depth)
    library().fused_linear_int8_amx(
        sizes, tensors, ctypes.c_int64(activation), ctypes.c_bool(x.dtype == torch.bfloat16)
    )
    return out


def encoder_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, scale: float
) -> Tensor:
    """As torch.ops.zs3fast_cpp.encoder_attention_by."""
    output = torch.empty(q.shape, dtype=q.dtype)
    operands = ((ctypes.c_int64 * 5) * 6)()
    for place, x in enumerate((q, output, context_k, k, context_v, v)):
        if x is not None:
            assert x.stride(3) == 1 or x.shape[3] <= 1
            image = 0 if x.shape[0] == 1 else x.stride(0)
            operands[place][:] = (x.data_ptr(), image, x.stride(1), x.stride(2), x.shape[1])
    sizes = (ctypes.c_int64 * 3)(q.shape[0], q.shape[2], q.shape[3])
    library().encoder_attention_amx(sizes, operands, ctypes.c_float(scale))
    return output
