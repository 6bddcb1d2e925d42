"""What the tensor-core kernels of csrc/*/cuda*.cu take: half types, a few head widths, rows read 16 bytes at a time.

An op may have two: by mma.sync, for sm_80 and later, and a variant by wgmma for sm_90a, backend "cuda:wgmma". Backend
"cuda" is the first, or the second where _measured.py says that it won. Neither has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _measured

HEAD_WIDTHS = (32, 64, 128)
WGMMA_HEAD_WIDTHS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16)


def objections(op: str, *tensors: Tensor) -> list[str]:
    """Objections to attention over `tensors`, all [B, heads, tokens, dh]."""
    return _dispatch.cuda_objections(op, tensors[0], _DTYPES) or shape_objections(*tensors)


def wgmma_objections(op: str, k: Tensor, v: Tensor, *tensors: Tensor) -> list[str]:
    """Objections of the variant by wgmma; k and v are what the copy engine reads."""
    reasons = _dispatch.cuda_objections(f"{op}_wgmma", tensors[0], _DTYPES, only="90a")
    reasons = reasons or shape_objections(*tensors, k, v, widths=WGMMA_HEAD_WIDTHS)
    if not reasons and any(x.stride(2) == 0 and x.shape[2] > 1 for x in (k, v)):
        reasons.append("needs the tokens of k and v to lie apart")
    return reasons


def shape_objections(*tensors: Tensor, widths: tuple[int, ...] = HEAD_WIDTHS) -> list[str]:
    """What of the objections has nothing to do with the device."""
    reasons = []
    dh = tensors[0].shape[-1]
    if dh not in widths:
        reasons.append(f"heads of width dh = {dh}, built for {', '.join(map(str, widths))}")
    if not all(map(_rows_of_vectors, tensors)):
        reasons.append("needs neighbouring columns and rows at multiples of 16 bytes")
    return reasons


def run(op: str, *args: Any) -> Any:
    """Backend "cuda" of an op that has both kernels."""
    if op in _measured.SPEEDUP_OF_WGMMA and _measured.wgmma_is_faster(op, _dispatch.architecture_of(args[0].device)):
        wgmma = _dispatch.registered(op)["cuda:wgmma"]
        if not wgmma.objections(*args):
            return wgmma.run(*args)
    return getattr(torch.ops.zs3fast_cpp, op)(*args)


def run_wgmma(op: str, *args: Any) -> Any:
    """Backend "cuda:wgmma"."""
    return getattr(torch.ops.zs3fast_cpp, f"{op}_wgmma")(*args)


def _rows_of_vectors(x: Tensor) -> bool:
    if x.numel() == 0:
        return True
    steps = [stride * x.element_size() for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return x.stride(-1) == 1 and all(at % 16 == 0 for at in (x.data_ptr(), *steps))
