"""encoder_attention: plain softmax attention of an encoder's tokens, and of keys and values that are only looked at.

    out_i = sum_j p_ij v_j,   p_ij = softmax_j(scale q_i . k_j)   over the keys of the context and the tokens' own

q, k and v are views of one packed projection, read where they lie; the result lies where the output projection reads
it. The context (deep prompts: a function of the weights alone) is never joined to the keys.

Floor: 4 B heads dh T (K + T) FLOPs and 4 B heads dh T elements moved; at T = 1025, K = 10, 12 heads of 64: 3.26 GFLOP.

CPU ladder, T = 1025, K = 10, 12 heads of 64, two cores of a Zen 5, one run: torch's flash attention 18.8 ms in float32
and 19.5 in bfloat16; scores transposed, so that the softmax runs down the registers, with multiply-adds of 8 lanes
16.0, of 16 lanes 8.0 (bfloat16 widened: 7.7); bfloat16 by `vdpbf16ps` 4.7. AMX's tiles have not run on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops, _matmul
from zs3fast.ops._checks import check_strided
from zs3fast.ops._register import Gradients, register_op

OP = "encoder_attention"


def reference(
    q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor] | None = None, scale: float | None = None
) -> Tensor:
    """Attention with every score stored: see `encoder_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = _joined(k, v, *(context or (None, None)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, dh]
    return (((q @ k.mT) * scale).softmax(-1) @ v).transpose(1, 2)


def encoder_attention(
    q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor] | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention, heads side by side as a packed projection gives them.

    out = softmax(scale * q [context k, k]^T) [context v, v]

    Args:
        q:       [B, T, heads, dh]. B = 0 or T = 0 gives an empty result.
        k, v:    [B, S, heads, dh] with S >= 1. Any strides; those of a packed projection cost nothing.
        context: keys and values [B or 1, K, heads, dh] that come before k and v; 1 serves all images.
        scale:   factor on the scores, dh ** -0.5 if None.
    Returns:
        [B, T, heads, dh], contiguous on the CPU: joining the heads is a view. Differentiable in all tensors. NaN in a
        query or in a key makes the rows that see it NaN; in a value, the column.

    On GPUs, where a gradient is recorded, and for backends that have no kernel of it, it is torch's own attention.
    """
    _check(q, k, v, context, scale)
    q, k, v = _matmul.autocast(q, k, v)
    context_k, context_v = _matmul.autocast(*context) if context else (None, None)
    tensors = (q, k, v, context_k, context_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = _dispatch.requested_backend()
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if backend != "reference" and (recorded or q.device.type != "cpu" or backend not in ("auto", "cpp")):
        return _torch_attention(*tensors, scale)
    output: Tensor = torch.ops.zs3fast.encoder_attention(*tensors, scale)
    return output


def _check(q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor] | None, scale: float | None) -> None:
    tensors = {"q": q, "k": k, "v": v}
    if context is not None:
        if not isinstance(context, (tuple, list)) or len(context) != 2:
            raise TypeError(f"{OP}: context: expected keys and values, got {type(context).__name__}")
        tensors |= {"context[0]": context[0], "context[1]": context[1]}
    for label, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {label}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {label}: expected a floating-point tensor, got {x.dtype}")
        check_strided(OP, label, x)
        if x.ndim != 4:
            raise ValueError(f"{OP}: {label}: expected [B, tokens, heads, dh], got {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{OP}: {label}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {label}: expected q's device {q.device}, got {x.device}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{OP}: scale: expected a number or None, got {type(scale).__name__}")
    B, _, heads, dh = q.shape
    if heads < 1 or dh < 1:
        raise ValueError(f"{OP}: q: expected at least one head of at least one column, got {list(q.shape)}")
    if k.shape[1] < 1:
        raise ValueError(f"{OP}: k: expected at least one key, got {list(k.shape)}")
    _check_pair("k", k, "v", v, (B,), heads, dh)
    if context is not None:
        _check_pair("context[0]", context[0], "context[1]", context[1], (B, 1), heads, dh)


def _check_pair(label: str, k: Tensor, v_label: str, v: Tensor, batches: tuple[int, ...], heads: int, dh: int) -> None:
    tokens = k.shape[1]
    for name, x in ((label, k), (v_label, v)):
        if x.shape[0] not in batches or x.shape[1:] != (tokens, heads, dh):
            allowed = " or ".join(f"[{batch}, {tokens}, {heads}, {dh}]" for batch in batches)
            raise ValueError(f"{OP}: {name}: expected {allowed}, got {list(x.shape)}")


def _joined(k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the context and of the tokens, one after the other."""
    if context_k is None or context_v is None:
        return k, v
    batch = k.shape[0]
    return (
        torch.cat([context_k.expand(batch, -1, -1, -1), k], 1),
        torch.cat([context_v.expand(batch, -1, -1, -1), v], 1),
    )


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, scale: float
) -> Tensor:
    k, v = _joined(k, v, context_k, context_v)
    if context_k is not None and torch.is_grad_enabled():
        q = q.contiguous()  # a view would keep all of a packed projection for the backward pass
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dS = P (dP - sum P dP), every score stored again: who trains takes torch's own attention."""
    q, k, v, context_k, context_v = ctx.saved_tensors
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = _joined(k, v, context_k, context_v)
    g, qh, kh, vh = (x.to(wide).transpose(1, 2) for x in (grad, q, keys, values))
    p = ((qh @ kh.mT) * ctx.scale).softmax(-1)
    dp = g @ vh.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * ctx.scale
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype) for x in (ds @ kh, ds.mT @ qh, p.mT @ g))
    if context_k is None:
        return dq, dk, dv, None, None, None
    K = context_k.shape[1]
    of_context = (x[:, :K] if context_k.shape[0] == q.shape[0] else x[:, :K].sum(0, keepdim=True) for x in (dk, dv))
    return dq, dk[:, K:], dv[:, K:], *of_context, None


def _reference_run(q: Tensor, k: Tensor, v: Tensor, context_k: Any, context_v: Any, scale: float) -> Tensor:
    """The definition where it is asked for by name; `auto` without the extension takes torch's flash attention."""
    if _dispatch.requested_backend() == "auto":
        return _torch_attention(q, k, v, context_k, context_v, scale).contiguous()
    context = None if context_k is None else (context_k, context_v)
    return reference(q, k, v, context, scale).contiguous()


def kernels(dtype: torch.dtype) -> list[str]:
    """The C++ kernels that this machine runs for inputs of this dtype, the one that `auto` takes first."""
    from zs3fast.ops import _extension

    _extension.module()
    return list(torch.ops.zs3fast_cpp.encoder_attention_kernels(dtype == torch.bfloat16))


_CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float16 is computed in float32


def _cpp_objections(first: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(first, _CPP_DTYPES)


def _count(q: _flops.Shape, k: _flops.Shape, _v: _flops.Shape, context: _flops.Shape | None = None, *_args: Any) -> int:
    B, queries, heads, dh = q
    return _flops.attention(queries, k[1] + (0 if context is None else context[1]), B * heads, dh, 2)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, float scale"
torch.library.define("zs3fast_cpp::encoder_attention_by", f"({_ARGUMENTS}, str kernel) -> Tensor")
torch.library.define("zs3fast_cpp::encoder_attention_kernels", "(bool bf16) -> str[]")
register_op(
    OP,
    schema=f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _cpp_objections},
    backward=Gradients(_setup_context, _gradients),
)


def _count_torchs(q: _flops.Shape, k: _flops.Shape, *_args: Any) -> int:
    return _flops.attention(q[2], k[2], q[0] * q[1], q[3], 2)


def _count_torchs_backward(_grad: _flops.Shape, q: _flops.Shape, k: _flops.Shape, *_args: Any) -> int:
    return _flops.attention(q[2], k[2], q[0] * q[1], q[3], 5)  # the scores anew, and two products for each of the two


# torch's own attention on the CPU, where gradients are recorded: its counter knows the GPUs' alone.
_flops.register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _count_torchs)
_flops.register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _count_torchs_backward)
