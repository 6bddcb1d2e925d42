"""What the ops that multiply matrices share: autocast as torch's own matmul has it, and Triton's objections."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from zs3fast.ops import _dispatch

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_AUTOCAST = (
    "cpu",
    "cuda",
    "mps",
    "xpu",
    "hpu",
    "xla",
    "mtia",
    "privateuseone",
)  # torch.amp's own list is not traceable


def autocast(*tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """The tensors in the dtype of the autocast region they are in, if any; None and float64 stay as they are."""
    first = next(t for t in tensors if t is not None)
    if not autocasting(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocasting(tensor: Tensor) -> bool:
    """Whether `autocast` will make one dtype of tensors on this device."""
    device = tensor.device.type
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def triton_objections(tensor: Tensor) -> list[str]:
    """`_dispatch.triton_objections`, and what Triton's interpreter gets wrong in a product."""
    reasons = _dispatch.triton_objections(tensor)
    if not reasons and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices as integers")
    return reasons
