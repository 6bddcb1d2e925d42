"""add_layer_norm: the residual connection and the LayerNorm after it, in one pass on GPUs.

    sum = residual + x,   normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias        of each row

A block of a ViT needs both: `normed` goes into the MLP, `sum` is its residual. Floor: 4 elements moved for each of x
(two read, two written) where two kernels move 5; for a ViT-B/16 at 512 in bfloat16 6.3 MB a block in the place of 7.9.
**The kernel has not run on a GPU.**

`auto` takes it where launches are replayed (`zs3fast/utils/recording.py`) or where rows are many, so that the host is
ahead of the GPU; elsewhere two kernels of torch's cost the host less than one of Triton's behind an op of ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.ops import _dispatch, _matmul
from zs3fast.ops._checks import check_float_tensor, check_number
from zs3fast.ops._register import register_op
from zs3fast.utils.recording import is_recording

OP = "add_layer_norm"
MAX_WIDTH = 8192  # a row lies in the registers of one program
MANY = 2**22  # elements: 6 images of 512 x 512 with ViT-B/16, 0.13 ms a block on an H100 by its FLOPs


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Step by step: see `add_layer_norm`."""
    total = residual + x
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A residual connection and the LayerNorm of its sum.

    sum = residual + x,  normed = (sum - mean) / sqrt(variance + eps) * weight + bias

    Args:
        x, residual: [..., width]. No rows give empty results.
        weight:      [width].  bias: [width] or None.
        eps:         added to the variance.
    Returns:
        (sum, normed), each [..., width]. Half types round the sum first, as two steps do; mean and variance are float32
        or wider. Differentiable in all tensors. NaN in x or residual makes its row of `normed` NaN, and of `sum` the
        element; in weight or bias, the column of `normed`.

    Where a gradient is recorded, under torch.compile, on the CPU and in small calls outside a CUDA graph these are
    torch's own steps.
    """
    _check(x, residual, weight, bias, eps)
    tensors = (x, residual, weight, bias)
    if _by_op(*tensors):
        total, normed = torch.ops.zs3fast.add_layer_norm(*tensors, float(eps))
        return total, normed
    return reference(*tensors, eps=eps)


def runs_kernel(x: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a residual onto x and then `norm` would be one pass of ours: not where `norm` has hooks or is another."""
    if _dispatch.requested_backend() not in ("auto", "triton") or not _by_op(x, x, norm.weight, norm.bias):
        return False
    plain = type(norm) is nn.LayerNorm and not (norm._forward_hooks or norm._forward_pre_hooks)
    return plain and norm.weight is not None and norm.weight.dtype == x.dtype and not _triton_objections(x)


def _by_op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    if recorded or torch.compiler.is_compiling() or _matmul.autocasting(x):  # inductor fuses both steps by itself
        return False
    backend = _dispatch.requested_backend()
    if backend == "auto":
        return x.device.type == "cuda" and (is_recording() or x.numel() >= MANY) and not _triton_objections(x)
    return backend in ("reference", "triton")


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    check_float_tensor(OP, "x", x)
    others: dict[str, object] = {"residual": residual, "weight": weight}
    for label, other in (others if bias is None else others | {"bias": bias}).items():
        t = check_float_tensor(OP, label, other)
        if t.dtype != x.dtype and not _matmul.autocasting(x):
            raise TypeError(f"{OP}: {label}: expected x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{OP}: {label}: expected x's device {x.device}, got {t.device}")
    check_number(OP, "eps", eps)
    if weight.ndim != 1 or weight.shape[0] < 1:
        raise ValueError(f"{OP}: weight: expected [width] of at least one column, got {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{OP}: x: expected [..., {weight.shape[0]}] by the weight, got {list(x.shape)}")
    if residual.shape != x.shape:
        raise ValueError(f"{OP}: residual: expected x's shape {list(x.shape)}, got {list(residual.shape)}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{OP}: bias: expected {list(weight.shape)}, got {list(bias.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(x: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _reference_run(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total, normed = reference(x, residual, weight, bias, eps)
    return total.contiguous(), normed.contiguous()


def _count(*_args: object) -> int:
    return 0  # neither products nor interpolations


def _triton_objections(x: Tensor, *_args: object) -> list[str]:
    reasons = _dispatch.triton_objections(x)
    if x.ndim and x.shape[-1] > MAX_WIDTH:
        reasons.append(f"rows of {x.shape[-1]}, built for up to {MAX_WIDTH}")
    return reasons


register_op(
    OP,
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor sum, Tensor normed)",
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"triton": _triton_objections},
)
