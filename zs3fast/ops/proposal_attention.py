"""proposal_attention: each proposal token attends to itself and to the patches its mask keeps (MAFT eq. 2).

    out_n = softmax(scale * [q_n . k_self_n | q_n . k_j for every kept patch j]) [v_self_n | v_j]

Of the four blocks of the joint mask over T = Nq + N tokens one is an identity, one is zero, one is dense (patches among
themselves: plain attention) and only proposals x patches is sparse. This op is the first and the last of them. The self
term is where the softmax starts: maximum q . k_self, sum 1, accumulator v_self; a row that keeps no patch ends there.

With K kept pairs (at most B Nq N): 4 heads dh (K + B Nq) FLOPs forward, 10 instead of 4 backward since the scores are
recomputed from the saved log-sum-exp, and B heads dh (4 Nq + 2 N) elements moved. Masks are 32 patches a word, shared
by all heads and layers: 11.6 KB an image at Nq = 100, N = 900, where the joint mask takes 48 MB in fp32. At B = 1,
heads = 12, dh = 64, Nq = 100, N = 900: 0.28 GFLOP if every patch is kept, 28 MFLOP at 10 %; joint attention takes 3.07.

On the CPU rows are tiles of 16: blocked products over the union of their patches where they keep mostly the same ones,
else row by row over a list, in float32 by AVX-512 or AVX2; half types are widened before. bfloat16's products and
tiles were left out: all of this is 1 to 2 % of MAFT's tower in bfloat16 (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs3fast.ops import _flops, _matmul
from zs3fast.ops._attention import (
    accumulator,
    as_heads,
    check_heads,
    cpp_objections,
    empty_heads,
    empty_lse,
    masked_product,
    triton_objections,
)
from zs3fast.ops._bits import num_words, pack_bits, unpack_bits
from zs3fast.ops._checks import check_number, check_strided
from zs3fast.ops._register import Backward, register_op

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
    return p[..., :1] * v_self + masked_product(p[..., 1:], keep.unsqueeze(1), v)


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
        keeps no patch gets v_self exactly. Differentiable in all but the masks, once. A NaN reaches at least the
        proposals that see it, from a value in its column alone, and no other head; masked out, it reaches nobody on the
        CPU.
    Source: MAFT (NeurIPS 2023) eq. 2; its code runs one joint attention over proposals and patches.
    """
    _check(q, k_self, v_self, k, v, masks, scale)
    q, k_self, v_self, k, v = _matmul.autocast(q, k_self, v_self, k, v)
    bits = pack_bits(masks) if masks.dtype == torch.bool else masks
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor
    output, _ = torch.ops.zs3fast.proposal_attention(q, k_self, v_self, k, v, bits, scale)
    return output


def _check(q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float | None) -> None:
    check_heads(OP, q, k_self=k_self, v_self=v_self, k=k, v=v)
    if not isinstance(masks, Tensor):
        raise TypeError(f"{OP}: masks: expected a tensor, got {type(masks).__name__}")
    check_strided(OP, "masks", masks)
    if masks.dtype not in (torch.bool, torch.int32):
        raise TypeError(f"{OP}: masks: expected bool, or int32 bits, got {masks.dtype}")
    if masks.device != q.device:
        raise ValueError(f"{OP}: masks: expected q's device {q.device}, got {masks.device}")
    check_number(OP, "scale", scale, optional=True)

    B, heads, Nq, dh = q.shape
    for label, x in (("k_self", k_self), ("v_self", v_self)):
        if x.shape != q.shape:
            raise ValueError(f"{OP}: {label}: expected q's shape {list(q.shape)}, got {list(x.shape)}")
    N = k.shape[2]
    if k.shape != (B, heads, N, dh):
        raise ValueError(f"{OP}: k: expected [{B}, {heads}, N, {dh}] to go with q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    last = N if masks.dtype == torch.bool else num_words(N)
    if masks.shape != (B, Nq, last):
        what = f"N = {N}" if masks.dtype == torch.bool else f"ceil({N} / 32) words"
        raise ValueError(f"{OP}: masks: expected [{B}, {Nq}, {last}], {what}, got {list(masks.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _fake_backward(grad_output: Tensor, *tensors_and_rest: Any) -> tuple[Tensor, ...]:
    return tuple(map(empty_heads, tensors_and_rest[:5]))


def _reference_run(
    q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    keep = unpack_bits(bits, k.shape[2])
    scores = _scores(q, k_self, k, keep, scale)
    lse = scores.to(accumulator(q.dtype)).logsumexp(-1)
    return as_heads(reference(q, k_self, v_self, k, v, keep, scale)), lse


def _reference_backward_run(
    grad_output: Tensor,
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
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
    return tuple(as_heads(x.to(dtype)) for x in grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_output: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.zs3fast.proposal_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


def _flops_of(products: int, q: _flops.Shape, k: _flops.Shape) -> int:
    """As torch counts attention under a mask: every patch kept."""
    B, heads, Nq, dh = q
    return _flops.attention(Nq, k[2] + 1, B * heads, dh, products)


_INPUTS = "Tensor q, Tensor k_self, Tensor v_self, Tensor k, Tensor v, Tensor bits"
register_op(
    OP,
    schema=f"({_INPUTS}, float scale) -> (Tensor output, Tensor lse)",
    fake=_fake,
    reference=_reference_run,
    flops=lambda q, _k_self, _v_self, k, *_: _flops_of(2, q, k),
    backends={"cpp": cpp_objections, "triton": triton_objections},
    backward=Backward(
        schema=(
            f"(Tensor grad_output, {_INPUTS}, Tensor output, Tensor lse, float scale)"
            " -> (Tensor dq, Tensor dk_self, Tensor dv_self, Tensor dk, Tensor dv)"
        ),
        fake=_fake_backward,
        reference=_reference_backward_run,
        flops=lambda _grad, q, _k_self, _v_self, k, *_: _flops_of(5, q, k),
        backends={"cpp": cpp_objections, "triton": triton_objections},
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
