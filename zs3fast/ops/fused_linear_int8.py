"""fused_linear_int8: a linear layer on 8-bit weights and activations, with activation and residual, in one pass.

    s_r = (max(x_r, 0) - min(x_r, 0)) / 255,   z_r = round(-min(x_r, 0) / s_r),   q_r = round(x_r / s_r) + z_r in 0..255
    out = residual + activation(s_r t_o sum_i (q_ri - z_r) w_oi + bias_o)

for row r of x and output o. Sums of products are whole numbers and exact; what 8 bits cost is the rounding of x and w.

Floor: 2 R in out operations for R rows. As in fused_linear the product is out^T = W x^T: a row of W is read where it
lies, one byte a weight, by `vpdpbusd` (AVX-512-VNNI) or AMX's tiles, 4 multiply-adds a lane; x is quantised while its
rows are turned over, 64 at a time; z comes off by the sums of W's rows. AMX's tiles have not run on hardware.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zs3fast.ops import _dispatch
from zs3fast.ops._checks import check_strided
from zs3fast.ops._register import register_op
from zs3fast.ops.fused_linear import ACTIVATIONS, FUNCTIONS, count

OP = "fused_linear_int8"
MAX_DEPTH = 65536  # sums of more products may leave 32 bits


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8 [out, in] in -127..127 and a scale float32 [out]: one a row, by its largest element.

    A row of zeros stays one. Raises ValueError for NaN or infinities.
    """
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ValueError("weight: expected finite numbers to quantise, got NaN or infinity")
    scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., in] as whole numbers q - z, float64, and their scale float32 [..., 1]; rounding is that of float32.

    A row with NaN, infinities or a spread that float32 cannot hold has the scale NaN.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) * (1 / 255)).clamp(min=torch.finfo(torch.float32).tiny)
    inverse = scale.reciprocal()
    zero = (-low * inverse).round()
    codes = ((wide * inverse).round() + zero).clamp(max=255)
    return (codes - zero).double(), scale + 0 * scale


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Step by step in float64, rounded once: see `fused_linear_int8`."""
    codes, row_scale = quantize_rows(x)
    out = codes @ weight.double().mT * (row_scale * scale)  # whole numbers under 2^53: exact
    out = FUNCTIONS[activation](out if bias is None else out + bias.double())
    result: Tensor = out if residual is None else residual.double() + out
    return result.to(x.dtype)


def fused_linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weights are int8 and whose input is rounded to 8 bits, a scale a row of each.

    out = residual + activation(x' (scale weight)^T + bias)

    where x' is x in 256 steps between the smallest and the largest element of a row, and 0.

    Args:
        x:          [..., in], floating point; in >= 1. No rows give an empty result.
        weight:     int8 [out, in].  scale: [out], floating point: see `quantize_weight`.
        bias:       [out] or None.
        activation: "none", "quick_gelu", "gelu" or "relu", see `fused_linear`.
        residual:   [..., out] to add, or None.
    Returns:
        [..., out] of x's dtype, not differentiable. A row of x with NaN or infinities is NaN; NaN in bias or scale
        makes its column NaN.
    """
    _check(x, weight, scale, bias, activation, residual)
    out: Tensor = torch.ops.zs3fast.fused_linear_int8(x, weight, scale, bias, residual, ACTIVATIONS.index(activation))
    return out


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> None:
    for label, t in (("x", x), ("weight", weight), ("scale", scale), ("bias", bias), ("residual", residual)):
        if t is None and label in ("bias", "residual"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {label}: expected a tensor, got {type(t).__name__}")
        check_strided(OP, label, t)
        if label == "weight":
            if t.dtype != torch.int8:
                raise TypeError(f"{OP}: weight: expected int8, got {t.dtype}")
        elif not t.is_floating_point():
            raise TypeError(f"{OP}: {label}: expected floating point, got {t.dtype}")
        elif label in ("bias", "residual") and t.dtype != x.dtype:
            raise TypeError(f"{OP}: {label}: expected x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{OP}: {label}: expected x's device {x.device}, got {t.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weight.ndim != 2 or not 1 <= weight.shape[1] <= MAX_DEPTH:
        raise ValueError(f"{OP}: weight: expected [out, in] with in from 1 to {MAX_DEPTH}, got {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{OP}: x: expected [..., {weight.shape[1]}] by the weight, got {list(x.shape)}")
    for label, t in (("scale", scale), ("bias", bias)):
        if t is not None and t.shape != weight.shape[:1]:
            raise ValueError(f"{OP}: {label}: expected [{weight.shape[0]}], got {list(t.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        expected = [*x.shape[:-1], weight.shape[0]]
        raise ValueError(f"{OP}: residual: expected {expected}, got {list(residual.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, *_args: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference_run(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    return reference(x, weight, scale, bias, activation=ACTIVATIONS[activation], residual=residual).contiguous()


def _cpp_objections(x: Tensor, weight: Tensor | None = None, scale: Tensor | None = None, *_args: object) -> list[str]:
    reasons = _dispatch.cpp_objections(x, (torch.float32, torch.bfloat16))
    if weight is None or scale is None:  # `zs3fast info` asks in general
        return reasons
    if scale.dtype != torch.float32:
        reasons.append(f"a scale of {str(scale.dtype)[6:]}, built for float32")
    reasons += kernel_objections(weight.shape[0], weight.shape[1])
    if not reasons and not kernels():
        reasons.append("no kernel on this CPU: AVX-512-VNNI or AMX's int8")
    return reasons


def kernel_objections(out: int, depth: int) -> list[str]:
    """Why the kernels cannot take a weight [out, depth]; empty if they can."""
    built = not out % 32 and not depth % 64
    return [] if built else [f"a weight of {[out, depth]}, built for multiples of 32 and 64"]


@cache
def kernels() -> list[str]:
    """The C++ kernels that this machine runs, the one that is taken first; none without the extension."""
    from zs3fast.ops import _extension

    if _extension.objections():
        return []
    _extension.module()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("zs3fast_cpp::fused_linear_int8", "CPU"):
        return []  # built before this op was written
    return list(torch.ops.zs3fast_cpp.fused_linear_int8_kernels())


_ARGUMENTS = "Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int activation"
torch.library.define("zs3fast_cpp::fused_linear_int8_by", f"({_ARGUMENTS}, str kernel) -> Tensor")
torch.library.define("zs3fast_cpp::fused_linear_int8_kernels", "() -> str[]")
register_op(
    OP,
    schema=f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=count,
    backends={"cpp": _cpp_objections},
)
