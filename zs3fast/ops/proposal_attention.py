"""proposal_attention: each proposal token attends to itself and to the patches its mask keeps (MAFT eq. 2).

    out_n = softmax(scale * [q_n . k_self_n | q_n . k_j for every kept patch j]) [v_self_n | v_j]

Of the four blocks of the joint mask over T = Nq + N tokens one is an identity, one is zero, one is dense (patches among
themselves: plain attention) and only proposals x patches is sparse. This op is the first and the last of them. The self
term is where the softmax starts: maximum q . k_self, sum 1, accumulator v_self; a row that keeps no patch ends there.

With K kept pairs (at most B Nq N): 4 heads dh (K + B Nq) FLOPs forward, 10 instead of 4 backward since the scores are
recomputed from the saved log-sum-exp, and B heads dh (4 Nq + 2 N) elements moved. Masks are 32 patches a word, shared
by all heads and layers: 11.6 KB an image at Nq = 100, N = 900, where the joint mask takes 48 MB in fp32. At B = 1,
heads = 12, dh = 64, Nq = 100, N = 900: 0.28 GFLOP if every patch is kept, 28 MFLOP at 10 %; joint attention takes 3.07.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul, _mma
from zs3fast.ops._bits import num_words, pack_bits, unpack_bits

OP = "proposal_attention"


def _scores(q: Tensor, k_self: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    """[B, heads, Nq, 1 + N]: the token itself, then the patches, -inf where they are not kept."""
    own = (q * k_self).sum(-1, keepdim=True) * scale
    patches = ((q @ k.mT) * scale).masked_fill(~keep.unsqueeze(1), float("-inf"))
    return torch.cat([own, patches], dim=-1)


def reference(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax over every score, stored, -inf where a patch is not kept: see `proposal_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = masks if masks.dtype == torch.bool else unpack_bits(masks, k.shape[2])
    p = _scores(q, k_self, k, keep, scale).softmax(-1)
    return p[..., :1] * v_self + p[..., 1:] @ v


def proposal_attention(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of proposal tokens, each over itself and the patches that its mask keeps.

    out[n] = softmax(scale * [q[n] . k_self[n] | q[n] . k[j] for j with masks[n, j]]) [v_self[n] | v[j]]

    Args:
        q, k_self, v_self: [B, heads, Nq, dh] of the proposal tokens. B = 0 and Nq = 0 give an empty result. Views of
              packed projections, expanded tokens included, are read where they lie.
        k, v: [B, heads, N, dh] of the patches.
        masks: [B, Nq, N] bool, the same for every head, or those masks as bits: [B, Nq, ceil(N / 32)] int32 as
              `masks_to_bits` gives them. Pass bits where several layers use the same masks: bools are packed at each
              call.
        scale: factor on the scores, dh ** -0.5 if None.
    Returns:
        [B, heads, Nq, dh], lying in memory as [B, Nq, heads, dh] so that joining the heads is free. A proposal that
        keeps no patch gets v_self exactly. Differentiable in all but the masks, once.
    Source: MAFT (NeurIPS 2023) eq. 2; its code runs one joint attention over proposals and patches.
    """
    _check(q, k_self, v_self, k, v, masks, scale)
    q, k_self, v_self, k, v = _matmul.autocast(q, k_self, v_self, k, v)
    bits = pack_bits(masks) if masks.dtype == torch.bool else masks
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.zs3fast.proposal_attention(q, k_self, v_self, k, v, bits, scale)[0]


def _check(q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float | None) -> None:
    for label, x in (("q", q), ("k_self", k_self), ("v_self", v_self), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {label} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {label} must be floating point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{OP}: {label} must be [B, heads, tokens, dh], got shape {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{OP}: {label} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {label} must be on q's device {q.device}, got {x.device}")
    if not isinstance(masks, Tensor):
        raise TypeError(f"{OP}: masks must be a tensor, got {type(masks).__name__}")
    if masks.dtype not in (torch.bool, torch.int32):
        raise TypeError(f"{OP}: masks must be bool, or int32 bits, got {masks.dtype}")
    if masks.device != q.device:
        raise ValueError(f"{OP}: masks must be on q's device {q.device}, got {masks.device}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{OP}: scale must be a number or None, got {type(scale).__name__}")

    B, heads, Nq, dh = q.shape
    if heads < 1 or dh < 1:
        raise ValueError(f"{OP}: q must have at least one head of at least one column, got shape {list(q.shape)}")
    for label, x in (("k_self", k_self), ("v_self", v_self)):
        if x.shape != q.shape:
            raise ValueError(f"{OP}: {label} must have q's shape {list(q.shape)}, got {list(x.shape)}")
    N = k.shape[2]
    if k.shape != (B, heads, N, dh):
        raise ValueError(f"{OP}: k must be [{B}, {heads}, N, {dh}] to go with q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    last = N if masks.dtype == torch.bool else num_words(N)
    if masks.shape != (B, Nq, last):
        what = f"N = {N}" if masks.dtype == torch.bool else f"ceil({N} / 32) words"
        raise ValueError(f"{OP}: masks must be [{B}, {Nq}, {last}], {what}, got {list(masks.shape)}")


# --- torch.library ---------------------------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k_self, Tensor v_self, Tensor k, Tensor v, Tensor bits"
for _namespace in ("zs3fast", "zs3fast_cpp"):
    torch.library.define(
        f"{_namespace}::proposal_attention", f"({_INPUTS}, float scale) -> (Tensor output, Tensor lse)"
    )
    torch.library.define(
        f"{_namespace}::proposal_attention_backward",
        f"(Tensor grad_output, {_INPUTS}, Tensor output, Tensor lse, float scale)"
        " -> (Tensor dq, Tensor dk_self, Tensor dv_self, Tensor dk, Tensor dv)",
    )
torch.library.define(
    "zs3fast_cpp::proposal_attention_wgmma", f"({_INPUTS}, float scale) -> (Tensor output, Tensor lse)"
)


@torch.library.impl("zs3fast::proposal_attention", "default")
def _run(*args):
    return _dispatch.call("proposal_attention", *args)


@torch.library.impl("zs3fast::proposal_attention_backward", "default")
def _run_backward(*args):
    return _dispatch.call("proposal_attention_backward", *args)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh]: joining the heads is a view."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.register_fake("zs3fast::proposal_attention")
def _fake(q, k_self, v_self, k, v, bits, scale):
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype))


@torch.library.register_fake("zs3fast::proposal_attention_backward")
def _fake_backward(grad_output, q, k_self, v_self, k, v, bits, output, lse, scale):
    return tuple(map(_empty_heads, (q, k_self, v_self, k, v)))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_output, _grad_lse):
    grads = torch.ops.zs3fast.proposal_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


torch.library.register_autograd("zs3fast::proposal_attention", _autograd, setup_context=_setup_context)


# --- backends --------------------------------------------------------------------------------------------------------


def _as_heads(x: Tensor) -> Tensor:
    return _empty_heads(x).copy_(x)


def _reference_run(q, k_self, v_self, k, v, bits, scale):
    keep = unpack_bits(bits, k.shape[2])
    scores = _scores(q, k_self, k, keep, scale)
    lse = scores.to(_accumulator(q.dtype)).logsumexp(-1)
    return _as_heads(reference(q, k_self, v_self, k, v, keep, scale)), lse


def _reference_backward_run(grad_output, q, k_self, v_self, k, v, bits, output, lse, scale):
    """dS = P (dP - sum P dP), with sum P dP = output . grad_output; half types accumulate in fp32."""
    dtype, keep = q.dtype, unpack_bits(bits, k.shape[2])
    wide = (x.to(lse.dtype) for x in (grad_output, q, k_self, v_self, k, v, output))
    grad_output, q, k_self, v_self, k, v, output = wide
    p = (_scores(q, k_self, k, keep, scale) - lse.unsqueeze(-1)).exp()
    own_p, p = p[..., :1], p[..., 1:]
    delta = (output * grad_output).sum(-1, keepdim=True)
    own_ds = own_p * ((grad_output * v_self).sum(-1, keepdim=True) - delta) * scale
    ds = p * (grad_output @ v.mT - delta) * scale
    grads = (ds @ k + own_ds * k_self, own_ds * q, own_p * grad_output, ds.mT @ q, p.mT @ grad_output)
    return tuple(_as_heads(x.to(dtype)) for x in grads)


def _cpp_run(*args):
    return torch.ops.zs3fast_cpp.proposal_attention(*args)


def _cpp_backward_run(*args):
    return torch.ops.zs3fast_cpp.proposal_attention_backward(*args)


def _triton_run(*args):
    from zs3fast.kernels import proposal_attention as kernels

    return kernels.forward(*args)


def _triton_backward_run(*args):
    from zs3fast.kernels import proposal_attention as kernels

    return kernels.backward(*args)


_CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def _cpp_objections(first: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(first, _CPP_DTYPES)


def _triton_objections(first: Tensor, *_args: object) -> list[str]:
    reasons = _matmul.triton_objections(first)
    return reasons + ([f"heads of width dh = {first.shape[-1]}, at most 128"] if first.shape[-1] > 128 else [])


# forward alone: its log-sum-exp is what the other backends' backward passes need
def _cuda_objections(q: Tensor, *args: object) -> list[str]:
    return _mma.objections(OP, q, *args[:4])  # k_self, v_self, k, v


def _wgmma_objections(q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, *_args: object) -> list[str]:
    return _mma.wgmma_objections(OP, k, v, q, k_self, v_self)


_dispatch.register("proposal_attention", "reference", _reference_run, _dispatch.never)
_dispatch.register("proposal_attention", "cpp", _cpp_run, _cpp_objections)
_dispatch.register("proposal_attention", "triton", _triton_run, _triton_objections)
_dispatch.register("proposal_attention", "cuda", partial(_mma.run, OP), _cuda_objections)
_dispatch.register("proposal_attention", "cuda:wgmma", partial(_mma.run_wgmma, OP), _wgmma_objections)
_dispatch.register("proposal_attention_backward", "reference", _reference_backward_run, _dispatch.never)
_dispatch.register("proposal_attention_backward", "cpp", _cpp_backward_run, _cpp_objections)
_dispatch.register("proposal_attention_backward", "triton", _triton_backward_run, _triton_objections)
