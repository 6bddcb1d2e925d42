"""attention_to_mask: cross-attention of classes over patches, and the mask logits its scores are (ZegCLIP section 3.2).

    S[b, a, c, n] = scale * q[b, a, c] . k[b, a, n]                    scores of head a
    output        = dropout(softmax_n(S)) v                            [B, heads, C, dh]
    mask_logits   = mean_a S, before softmax and dropout               [B, C, N]

Nothing of size [B, heads, C, N] is stored. Floor of the forward pass: 4 B heads C N dh FLOPs (the masks are a sum of
scores that exist anyway; made alone they are 2 B heads C N dh), and B (2 C + 2 N) heads dh + B C N elements moved. At
B = 1, heads = 8, dh = 64, C = 171, N = 1024 that is 0.36 GFLOP and 5.6 MB in fp32; the eager structure moves another
6 x 5.6 MB of scores. The backward pass recomputes the scores from the saved log-sum-exp: 10 B heads C N dh FLOPs.

Masks alone need no heads: mean_a(q_a . k_a) * scale = (q . k) * scale / heads over the full width, one plain matmul.

On a GPU, without dropout, the attention is torch's own and the masks, where both are asked for (the models never do),
are that matmul: nothing of ours would be faster. The kernels are for training, where dropout needs them.

On the CPU attention alone, without dropout, is `encoder_attention`'s kernel, in bfloat16 by AMX's tiles or `vdpbf16ps`,
in float32 from 64 classes on. Fewer of them, masks and dropout are one pass in float32 by AVX-512 or AVX2, blocks of
classes by the widest vectors; half types are widened before it.

Dropout is defined by a formula, so every backend drops the same elements and the backward pass regenerates them: see
`dropout_keep`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops, _matmul
from zs3fast.ops._attention import (
    accumulator,
    as_heads,
    check_heads,
    cpp_objections,
    empty_heads,
    empty_lse,
    triton_objections,
)
from zs3fast.ops._checks import check_bool, check_number, is_int
from zs3fast.ops._register import Backward, register_op

OP = "attention_to_mask"

_U32 = 0xFFFFFFFF


def _multiply_u32(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a * factor, in int64 arithmetic that cannot overflow."""
    upper, lower = (a >> 16) * factor, (a & 0xFFFF) * factor
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _U32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter of four words, keyed by the two words of `seed`.

    Words are int64 tensors holding 0 .. 2^32 - 1. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        high0, low0 = _multiply_u32(c0, 0xD2511F53)
        high1, low1 = _multiply_u32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """A word below this is dropped: floor(p * 2^32)."""
    return int(dropout_p * 2**32)


def dropout_keep(shape: tuple[int, int, int, int], dropout_p: float, seed: Tensor) -> Tensor:
    """Which probabilities dropout keeps, bool [B, heads, C, N]: the definition every backend follows.

    Element (b, a, c, n) is kept iff word n % 4 of philox4x32((n // 4, c, b * heads + a, 0), seed) >= floor(p * 2^32).
    """
    B, heads, C, N = shape

    def axis(size: int, dim: int) -> Tensor:
        return torch.arange(size, device=seed.device).view([-1 if i == dim else 1 for i in range(3)])

    counter = torch.broadcast_tensors(axis((N + 3) // 4, 2), axis(C, 1), axis(B * heads, 0), axis(1, 0) * 0)
    words = torch.stack(philox4x32(counter, seed), dim=-1)  # [B * heads, C, N / 4, 4]
    return torch.ge(words.flatten(2)[..., :N].unflatten(0, (B, heads)), dropout_threshold(dropout_p))


def _reference_with_lse(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, need_masks: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    scores = (q @ k.mT) * scale  # [B, heads, C, N]
    masks = scores.mean(1) if need_masks else None
    output = None
    if v is not None:
        probabilities = scores.softmax(-1)
        if dropout_p > 0:
            assert seed is not None
            keep = dropout_keep(_four(scores), dropout_p, seed)
            probabilities = probabilities / (1 - dropout_p) * keep  # what is dropped keeps its NaN
        output = probabilities @ v
    return output, masks, scores.to(accumulator(q.dtype)).logsumexp(-1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    *,
    dropout_p: float = 0.0,
    need_masks: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Cross-attention and mean pre-softmax scores, with every head's scores stored: see `attention_to_mask`."""
    drawn = _seed_tensor(seed, q.device) if dropout_p > 0 else None
    return _reference_with_lse(q, k, v, scale, dropout_p, drawn, need_masks)[:2]


def attention_to_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    *,
    dropout_p: float = 0.0,
    need_masks: bool = True,
    seed: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Cross-attention output and mask logits, the mean over heads of the scaled pre-softmax scores, in one pass.

    output = dropout(softmax(scale * q k^T)) v,    mask_logits = mean over heads of scale * q k^T

    Args:
        q:          [B, heads, C, dh] class queries. B = 0 and C = 0 give empty results.
        k, v:       [B, heads, N, dh] patch keys and values, N >= 1. v = None: masks only, one full-width matmul with
                    torch whatever the backend.
        scale:      factor on the scores, usually dh ** -0.5.
        dropout_p:  0 <= p < 1, dropped from the probabilities after softmax; the rest is divided by 1 - p. Masks are
                    made without dropout.
        need_masks: False returns None for the masks.
        seed:       0 <= seed < 2^63: the same seed drops the same elements on every backend (`dropout_keep`). None
                    draws one from torch's default generator of q's device.
    Returns:
        output [B, heads, C, dh] (None if v is None), lying in memory as [B, C, heads, dh] so that joining the heads is
        free, and mask_logits [B, C, N] (None unless need_masks). Differentiable in q, k and v, once. NaN in a query
        makes its row NaN, in a key every row of its head, in a value the column of its head.
    Source: ZegCLIP (CVPR 2023) section 3.2; the mean over heads of scores, not probabilities, is what its code does.
    """
    _check(q, k, v, scale, dropout_p, need_masks, seed)
    if v is None:
        q, k = _matmul.autocast(q, k)
        return None, _masks_only(q, k, scale)
    q, k, v = _matmul.autocast(q, k, v)
    if _leaves_to_torch(q, dropout_p):
        return _torch_attention(q, k, v, scale, need_masks)
    seed_tensor = _seed_tensor(seed, q.device) if dropout_p > 0 else None
    output, masks, _ = torch.ops.zs3fast.attention_to_mask(q, k, v, scale, dropout_p, seed_tensor, need_masks)
    return output, masks if need_masks else None


def _leaves_to_torch(q: Tensor, dropout_p: float) -> bool:
    """Heads that are no multiple of 8 wide would make torch store the scores."""
    on_gpu = q.device.type == "cuda" and _dispatch.requested_backend() == "auto"
    return on_gpu and dropout_p == 0 and q.shape[-1] % 8 == 0 and q.numel() > 0


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, need_masks: bool
) -> tuple[Tensor | None, Tensor | None]:
    output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return output, _masks_only(q, k, scale) if need_masks else None


def _masks_only(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The full-width identity; joining heads that were split off a linear layer's output is a view."""
    wide_q, wide_k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # [B, C, heads * dh], [B, N, heads * dh]
    return (wide_q * (scale / q.shape[1])) @ wide_k.mT


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64 scalar on `device`: it stays there, so drawing one never waits for a GPU."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, dropout_p: float, need_masks: bool, seed: int | None
) -> None:
    check_heads(OP, q, k=k, **({} if v is None else {"v": v}))
    B, heads, _, dh = q.shape
    if k.shape[:2] != (B, heads) or k.shape[3] != dh or k.shape[2] < 1:
        raise ValueError(f"{OP}: k: expected [{B}, {heads}, N >= 1, {dh}] to fit q, got shape {list(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{OP}: v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    check_bool(OP, "need_masks", need_masks)
    if v is None and not need_masks:
        raise ValueError(f"{OP}: need_masks: expected True without v, got False: nothing to compute")
    check_number(OP, "scale", scale)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{OP}: dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{OP}: dropout_p: expected a number in [0, 1), got {dropout_p}")
    if seed is not None and not is_int(seed):
        raise TypeError(f"{OP}: seed: expected an int or None, got {type(seed).__name__}")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise ValueError(f"{OP}: seed: expected a number in [0, 2^63), got {seed}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None, need_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    masks = q.new_empty(q.shape[0], q.shape[2], k.shape[2]) if need_masks else q.new_empty(0)
    return empty_heads(q), masks, empty_lse(q)


def _fake_backward(
    grad_output: Tensor, grad_masks: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _reference_run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None, need_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output, masks, lse = _reference_with_lse(q, k, v, scale, dropout_p, seed, need_masks)
    assert output is not None
    return as_heads(output), q.new_empty(0) if masks is None else masks, lse


def _reference_backward_run(
    grad_output: Tensor,
    grad_masks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P (dP - sum_n P dP) + dM / heads, with sum_n P dP = output . grad_output; half types accumulate in fp32."""
    dtype = q.dtype
    grad_output, q, k, v, output = (x.to(lse.dtype) for x in (grad_output, q, k, v, output))
    probabilities = ((q @ k.mT) * scale - lse.unsqueeze(-1)).exp()
    gradient, dropped = grad_output @ v.mT, probabilities
    if dropout_p > 0:
        assert seed is not None
        factor = dropout_keep(_four(probabilities), dropout_p, seed) / (1 - dropout_p)
        gradient, dropped = gradient * factor, probabilities * factor
    scores = probabilities * (gradient - (output * grad_output).sum(-1, keepdim=True))
    if grad_masks is not None:
        scores = scores + grad_masks.unsqueeze(1) / q.shape[1]
    dq, dk, dv = (scores @ k) * scale, (scores.mT @ q) * scale, dropped.mT @ grad_output
    return as_heads(dq.to(dtype)), as_heads(dk.to(dtype)), as_heads(dv.to(dtype))


def _four(x: Tensor) -> tuple[int, int, int, int]:
    a, b, c, d = x.shape
    return a, b, c, d


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, ctx.dropout_p, seed, ctx.need_masks = inputs
    ctx.save_for_backward(q, k, v, output[0], output[2], seed)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad_output: Tensor, grad_masks: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, output, lse, seed = ctx.saved_tensors
    grads = torch.ops.zs3fast.attention_to_mask_backward(
        grad_output, grad_masks if ctx.need_masks else None, q, k, v, output, lse, ctx.scale, ctx.dropout_p, seed
    )
    return (*grads, None, None, None, None)


def _flops_of(products: int, q: _flops.Shape, k: _flops.Shape) -> int:
    B, heads, C, dh = q
    return _flops.attention(C, k[2], B * heads, dh, products)


torch.library.define(  # by a kernel of encoder_attention's, for tests
    f"zs3fast_cpp::{OP}_by", "(Tensor q, Tensor k, Tensor v, float scale, str kernel) -> (Tensor output, Tensor lse)"
)
register_op(
    OP,
    schema=(
        "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, bool need_masks)"
        " -> (Tensor output, Tensor mask_logits, Tensor lse)"
    ),
    fake=_fake,
    reference=_reference_run,
    flops=lambda q, k, *_: _flops_of(2, q, k),
    backends={"cpp": cpp_objections, "triton": triton_objections},
    backward=Backward(
        schema=(
            "(Tensor grad_output, Tensor? grad_masks, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse,"
            " float scale, float dropout_p, Tensor? seed) -> (Tensor dq, Tensor dk, Tensor dv)"
        ),
        fake=_fake_backward,
        reference=_reference_backward_run,
        flops=lambda _grad, _masks, q, k, *_: _flops_of(5, q, k),
        backends={"cpp": cpp_objections, "triton": triton_objections},
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
