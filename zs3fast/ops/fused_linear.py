"""fused_linear: a linear layer with its activation and the residual connection after it, in one pass on the CPU.

    out = residual + activation(x weight^T + bias)

Floor: 2 R in out FLOPs for R rows. The CPU's product is computed as out^T = W x^T: a row of W is read where it lies, so
that nothing of the weights is copied, packed or kept twice, where oneDNN packs a bfloat16 weight again in every call;
x is turned over once a call, 64 rows at a time. Sums stay in float32 until the last step; plain torch rounds after
each. float32 by AVX-512's multiply-adds, bfloat16 by `vdpbf16ps` or AMX's tiles.

Two cores of a Zen 5, R = 1025, GFLOP/s over the four layers of a ViT-B/16 block: this kernel alone float32 480 to 515,
bfloat16 988 to 1043; in another run oneDNN on weights packed before about 510 and 1035, torch's F.linear (MKL) 220 to
230 and 955 to 973. Activation and residual are part of the pass; as steps of their own they are passes over memory.

`auto` takes the kernel on Zen 5, where it was measured, and for bfloat16 with AMX, where it has not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.ops import _dispatch, _flops, _matmul
from zs3fast.ops._register import Gradients, register_op

OP = "fused_linear"
ACTIVATIONS = ("none", "quick_gelu", "gelu", "relu")
QUICK_GELU_SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's activation, as silu(1.702 x) / 1.702: one tensor is kept for its gradient."""
    return F.silu(QUICK_GELU_SLOPE * x) / QUICK_GELU_SLOPE


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Step by step: see `fused_linear`."""
    out = FUNCTIONS[activation](F.linear(x, weight, bias))
    result: Tensor = out if residual is None else residual + out
    return result


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """A linear layer, its activation and the residual after it.

    out = residual + activation(x weight^T + bias)

    Args:
        x:          [..., in]. No rows give an empty result.
        weight:     [out, in].  bias: [out] or None.
        activation: "none", "quick_gelu": x sigmoid(1.702 x), "gelu": x (1 + erf(x / sqrt 2)) / 2, or
                    "relu".
        residual:   [..., out] to add, or None.
    Returns:
        [..., out]. Differentiable in all tensors. NaN in x makes its row NaN; in weight or bias, the column.

    On GPUs, where a gradient is recorded, and for what the kernel objects to, these are torch's own steps.
    """
    _check(x, weight, bias, activation, residual)
    tensors = (x, weight, bias, residual)
    if not _matmul.autocasting(x) and (_dispatch.requested_backend() == "reference" or _by_kernel(*tensors)):
        out: Tensor = torch.ops.zs3fast.fused_linear(*tensors, ACTIVATIONS.index(activation))
        return out
    return reference(x, weight, bias, activation=activation, residual=residual)


def linear(layer: nn.Linear, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """residual + activation(layer(x)): `fused_linear` of a plain layer, the layer itself where it is more than that.

    A layer of another kind may do all of it by a method `fused(x, activation, residual)`.
    """
    if not (layer._forward_hooks or layer._forward_pre_hooks):
        if type(layer) is nn.Linear:
            return fused_linear(x, layer.weight, layer.bias, activation=activation, residual=residual)
        fused: Callable[..., Tensor] | None = getattr(layer, "fused", None)
        if fused is not None:
            return fused(x, activation, residual)
    out = FUNCTIONS[activation](layer(x))
    return out if residual is None else residual + out


def runs_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused_linear` of these would be one pass of ours where no gradient is recorded, not torch's steps."""
    with torch.no_grad():
        return not _matmul.autocasting(x) and _by_kernel(x, weight, None, None)


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    backend = _dispatch.requested_backend()
    if x.device.type != "cpu" or backend not in ("auto", "cpp"):
        return False
    if torch.compiler.is_compiling():  # inductor fuses what comes after by itself, and freezes weights packed
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        return False
    return not _cpp_objections(x, weight) and (backend == "cpp" or _measured_faster(x.dtype))


@cache
def _measured_faster(dtype: torch.dtype) -> bool:
    from zs3fast.ops import _extension

    _extension.module()
    return bool(torch.ops.zs3fast_cpp.fused_linear_faster(dtype == torch.bfloat16))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    for label, t in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if t is None and label in ("bias", "residual"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {label}: expected a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{OP}: {label}: expected a floating-point tensor, got {t.dtype}")
        if t.dtype != x.dtype and not _matmul.autocasting(x):
            raise TypeError(f"{OP}: {label}: expected x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{OP}: {label}: expected x's device {x.device}, got {t.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weight.ndim != 2:
        raise ValueError(f"{OP}: weight: expected [out, in], got {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{OP}: x: expected [..., {weight.shape[1]}] by the weight, got {list(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        expected = [*x.shape[:-1], weight.shape[0]]
        raise ValueError(f"{OP}: residual: expected {expected}, got {list(residual.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, *_args: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference_run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int) -> Tensor:
    out = reference(x, weight, bias, activation=ACTIVATIONS[activation], residual=residual)
    return out.clone() if out is residual else out.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.residual = residual is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    rows, flat = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    if ctx.activation:
        z = F.linear(flat, weight, bias)
        if ACTIVATIONS[ctx.activation] == "quick_gelu":
            s = torch.sigmoid(QUICK_GELU_SLOPE * z)
            slope = s * (1 + QUICK_GELU_SLOPE * z * (1 - s))
        elif ACTIVATIONS[ctx.activation] == "relu":
            slope = (z > 0).to(z.dtype)
        else:
            slope = 0.5 * (1 + torch.erf(z * 2**-0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
        rows = rows * slope
    dbias = None if bias is None else rows.sum(0)
    return (rows @ weight).view(x.shape), rows.mT @ flat, dbias, grad if ctx.residual else None, None


def count(x: _flops.Shape, weight: _flops.Shape, *_args: object) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _cpp_objections(x: Tensor, weight: Tensor | None = None, *_args: object) -> list[str]:
    reasons = _dispatch.cpp_objections(x, (torch.float32, torch.bfloat16))
    if weight is None:  # `zs3fast info` asks in general
        return reasons
    if type(weight) not in (Tensor, torch.nn.Parameter):
        reasons.append(f"reads the memory of a plain weight, not of {type(weight).__name__}")
    if weight.shape[0] % 32 or weight.shape[1] % 32 or not weight.shape[1]:
        reasons.append(f"a weight of {list(weight.shape)}, built for sides of multiples of 32")
    if not reasons and not kernels(x.dtype):
        reasons.append(f"no kernel for {str(x.dtype)[6:]} on this CPU: AVX-512, and AVX-512-BF16 for bfloat16")
    return reasons


@cache
def kernels(dtype: torch.dtype) -> list[str]:
    """The C++ kernels that this machine runs for inputs of this dtype, the one that is taken first."""
    from zs3fast.ops import _extension

    _extension.module()
    return list(torch.ops.zs3fast_cpp.fused_linear_kernels(dtype == torch.bfloat16))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation"
torch.library.define("zs3fast_cpp::fused_linear_by", f"({_ARGUMENTS}, str kernel) -> Tensor")
torch.library.define("zs3fast_cpp::fused_linear_kernels", "(bool bf16) -> str[]")
torch.library.define("zs3fast_cpp::fused_linear_faster", "(bool bf16) -> bool")
register_op(
    OP,
    schema=f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=count,
    backends={"cpp": _cpp_objections},
    backward=Gradients(_setup_context, _gradients),
)
