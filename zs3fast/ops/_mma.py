"""What the tensor-core kernels of csrc/*/cuda.cu take: half types, a few head widths, rows read 16 bytes at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from zs3fast.ops import _dispatch

HEAD_WIDTHS = (32, 64, 128)


def objections(op: str, *tensors: Tensor) -> list[str]:
    """Objections to attention over `tensors`, all [B, heads, tokens, dh]."""
    reasons = _dispatch.cuda_objections(op, tensors[0], (torch.float16, torch.bfloat16))
    if not reasons:
        reasons = shape_objections(*tensors)
    return reasons


def shape_objections(*tensors: Tensor) -> list[str]:
    """What of `objections` has nothing to do with the device."""
    reasons = []
    dh = tensors[0].shape[-1]
    if dh not in HEAD_WIDTHS:
        reasons.append(f"heads of width dh = {dh}, built for {', '.join(map(str, HEAD_WIDTHS))}")
    if not all(map(_rows_of_vectors, tensors)):
        reasons.append("needs neighbouring columns and rows at multiples of 16 bytes")
    return reasons


def _rows_of_vectors(x: Tensor) -> bool:
    if x.numel() == 0:
        return True
    steps = [stride * x.element_size() for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return x.stride(-1) == 1 and all(at % 16 == 0 for at in (x.data_ptr(), *steps))
