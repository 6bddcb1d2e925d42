"""What the attentions share: checks of [B, heads, tokens, dh], the memory of their results, objections of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul
from zs3fast.ops._checks import check_float_tensor

MAX_TRITON_WIDTH = 128  # of a head: what a program holds in registers
_CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def check_heads(op: str, q: Tensor, **others: Tensor) -> None:
    """q and the others: floating point, [B, heads, tokens, dh], of q's dtype (unless autocast makes it so) and device.

    Raises:
        TypeError, ValueError: one is not; q has no head or no column.
    """
    for label, x in {"q": q, **others}.items():
        check_float_tensor(op, label, x)
        if x.ndim != 4:
            raise ValueError(f"{op}: {label}: expected [B, heads, tokens, dh], got shape {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{op}: {label}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {label}: expected q's device {q.device}, got {x.device}")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"{op}: q: expected at least one head of at least one column, got shape {list(q.shape)}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over a row are kept in: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh]: joining the heads is a view."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def as_heads(x: Tensor) -> Tensor:
    """A copy of x that lies in memory as `empty_heads` does."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)  # nothing is mutated: exports


def empty_lse(q: Tensor) -> Tensor:
    """The log-sum-exp of every row of scores, [B, heads, queries], unwritten."""
    return q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def masked_product(p: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    """p @ v, but what is not finite in v reaches only the rows that `keep` lets see it, where 0 * NaN is NaN."""
    finite = v.isfinite()
    output = p @ torch.where(finite, v, 0)
    seen = keep.to(v.dtype) @ (~finite).to(v.dtype) > 0
    return torch.where(seen, float("nan"), output)


def cpp_objections(first: Tensor, *_args: object) -> list[str]:
    """The CPU kernels' objections to a request led by `first`."""
    return _dispatch.cpp_objections(first, _CPP_DTYPES)


def triton_objections(first: Tensor, *_args: object) -> list[str]:
    """The Triton kernels' objections to a request led by `first`."""
    reasons = _matmul.triton_objections(first)
    if first.shape[-1] > MAX_TRITON_WIDTH:
        reasons.append(f"heads of width dh = {first.shape[-1]}, at most {MAX_TRITON_WIDTH}")
    return reasons
