"""attention_to_mask: cross-attention of classes over patches, and the mask logits its scores are (ZegCLIP section 3.2).

    S[b, a, c, n] = scale * q[b, a, c] . k[b, a, n]                    scores of head a
    output        = dropout(softmax_n(S)) v                            [B, heads, C, dh]
    mask_logits   = mean_a S, before softmax and dropout               [B, C, N]

Nothing of size [B, heads, C, N] is stored. Floor of the forward pass: 4 B heads C N dh FLOPs (the masks are a sum of
scores that exist anyway; made alone they are 2 B heads C N dh), and B (2 C + 2 N) heads dh + B C N elements moved. At
B = 1, heads = 8, dh = 64, C = 171, N = 1024 that is 0.36 GFLOP and 5.6 MB in fp32; the eager structure moves another
6 x 5.6 MB of scores. The backward pass recomputes the scores from the saved log-sum-exp: 10 B heads C N dh FLOPs.

Masks alone need no heads: mean_a(q_a . k_a) * scale = (q . k) * scale / heads over the full width, one plain matmul.

Dropout is defined by a formula, so every backend drops the same elements and the backward pass regenerates them: see
`dropout_keep`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul

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
    return words.flatten(2)[..., :N].unflatten(0, (B, heads)) >= dropout_threshold(dropout_p)


def _reference_with_lse(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, need_masks: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    scores = (q @ k.mT) * scale  # [B, heads, C, N]
    masks = scores.mean(1) if need_masks else None
    output = None
    if v is not None:
        probabilities = scores.softmax(-1)
        if dropout_p > 0:
            keep = dropout_keep(tuple(scores.shape), dropout_p, seed)
            probabilities = torch.where(keep, probabilities / (1 - dropout_p), 0)
        output = probabilities @ v
    return output, masks, scores.to(_accumulator(q.dtype)).logsumexp(-1)


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
    if dropout_p > 0:
        seed = _seed_tensor(seed, q.device)
    return _reference_with_lse(q, k, v, scale, dropout_p, seed, need_masks)[:2]


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
        free, and mask_logits [B, C, N] (None unless need_masks). Differentiable in q, k and v, once.
    Source: ZegCLIP (CVPR 2023) section 3.2; the mean over heads of scores, not probabilities, is what its code does.
    """
    _check(q, k, v, scale, dropout_p, need_masks, seed)
    q, k, v = _matmul.autocast(q, k, v)
    if v is None:
        return None, _masks_only(q, k, scale)
    seed_tensor = _seed_tensor(seed, q.device) if dropout_p > 0 else None
    output, masks, _ = torch.ops.zs3fast.attention_to_mask(q, k, v, scale, dropout_p, seed_tensor, need_masks)
    return output, masks if need_masks else None


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
    name = "attention_to_mask"
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x is None and label == "v":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: {label} must be floating point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name}: {label} must be [B, heads, tokens, dh], got shape {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{name}: {label} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: {label} must be on q's device {q.device}, got {x.device}")
    B, heads, _, dh = q.shape
    if heads < 1 or dh < 1:
        raise ValueError(f"{name}: q must have at least one head of at least one column, got shape {list(q.shape)}")
    if k.shape[:2] != (B, heads) or k.shape[3] != dh or k.shape[2] < 1:
        raise ValueError(f"{name}: k must be [{B}, {heads}, N >= 1, {dh}] to fit q, got shape {list(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{name}: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if v is None and not need_masks:
        raise ValueError(f"{name}: v is None and need_masks is False: nothing to compute")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: scale must be a number, got {type(scale).__name__}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{name}: dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt))):
        raise TypeError(f"{name}: seed must be an int or None, got {type(seed).__name__}")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise ValueError(f"{name}: seed must be in [0, 2^63), got {seed}")


# --- torch.library ---------------------------------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, bool need_masks)"
    " -> (Tensor output, Tensor mask_logits, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? grad_masks, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse,"
    " float scale, float dropout_p, Tensor? seed) -> (Tensor dq, Tensor dk, Tensor dv)"
)
for _namespace in ("zs3fast", "zs3fast_cpp"):
    torch.library.define(f"{_namespace}::attention_to_mask", _SCHEMA)
    torch.library.define(f"{_namespace}::attention_to_mask_backward", _BACKWARD_SCHEMA)


@torch.library.impl("zs3fast::attention_to_mask", "default")
def _run(*args):
    return _dispatch.call("attention_to_mask", *args)


@torch.library.impl("zs3fast::attention_to_mask_backward", "default")
def _run_backward(*args):
    return _dispatch.call("attention_to_mask_backward", *args)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] in memory [B, tokens, heads, dh]: the next linear layer reads it without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.register_fake("zs3fast::attention_to_mask")
def _fake(q, k, v, scale, dropout_p, seed, need_masks):
    masks = q.new_empty(q.shape[0], q.shape[2], k.shape[2]) if need_masks else q.new_empty(0)
    return _empty_heads(q), masks, q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype))


@torch.library.register_fake("zs3fast::attention_to_mask_backward")
def _fake_backward(grad_output, grad_masks, q, k, v, output, lse, scale, dropout_p, seed):
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.dropout_p, seed, ctx.need_masks = inputs
    ctx.save_for_backward(q, k, v, output[0], output[2], seed)
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx, grad_output, grad_masks, _grad_lse):
    q, k, v, output, lse, seed = ctx.saved_tensors
    grads = torch.ops.zs3fast.attention_to_mask_backward(
        grad_output, grad_masks if ctx.need_masks else None, q, k, v, output, lse, ctx.scale, ctx.dropout_p, seed
    )
    return (*grads, None, None, None, None)


torch.library.register_autograd("zs3fast::attention_to_mask", _autograd, setup_context=_setup_context)


# --- backends --------------------------------------------------------------------------------------------------------


def _as_heads(x: Tensor) -> Tensor:
    return _empty_heads(x).copy_(x)


def _reference_run(q, k, v, scale, dropout_p, seed, need_masks):
    output, masks, lse = _reference_with_lse(q, k, v, scale, dropout_p, seed, need_masks)
    return _as_heads(output), masks if need_masks else q.new_empty(0), lse


def _reference_backward_run(grad_output, grad_masks, q, k, v, output, lse, scale, dropout_p, seed):
    """dS = P (dP - sum_n P dP) + dM / heads, with sum_n P dP = output . grad_output; half types accumulate in fp32."""
    dtype = q.dtype
    grad_output, q, k, v, output = (x.to(lse.dtype) for x in (grad_output, q, k, v, output))
    probabilities = ((q @ k.mT) * scale - lse.unsqueeze(-1)).exp()
    gradient, dropped = grad_output @ v.mT, probabilities
    if dropout_p > 0:
        factor = dropout_keep(tuple(probabilities.shape), dropout_p, seed) / (1 - dropout_p)
        gradient, dropped = gradient * factor, probabilities * factor
    scores = probabilities * (gradient - (output * grad_output).sum(-1, keepdim=True))
    if grad_masks is not None:
        scores = scores + grad_masks.unsqueeze(1) / q.shape[1]
    grads = (scores @ k) * scale, (scores.mT @ q) * scale, dropped.mT @ grad_output
    return tuple(_as_heads(x.to(dtype)) for x in grads)


def _cpp_run(*args):
    return torch.ops.zs3fast_cpp.attention_to_mask(*args)


def _cpp_backward_run(*args):
    return torch.ops.zs3fast_cpp.attention_to_mask_backward(*args)


def _triton_run(*args):
    from zs3fast.kernels import attention_to_mask as kernels

    return kernels.forward(*args)


def _triton_backward_run(*args):
    from zs3fast.kernels import attention_to_mask as kernels

    return kernels.backward(*args)


_CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def _cpp_objections(q: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(q, _CPP_DTYPES)


def _triton_objections(q: Tensor, *_args: object) -> list[str]:
    reasons = _matmul.triton_objections(q)
    return reasons + ([f"heads of width dh = {q.shape[-1]}, at most 128"] if q.shape[-1] > 128 else [])


_dispatch.register("attention_to_mask", "reference", _reference_run, _dispatch.never)
_dispatch.register("attention_to_mask", "cpp", _cpp_run, _cpp_objections)
_dispatch.register("attention_to_mask", "triton", _triton_run, _triton_objections)
_dispatch.register("attention_to_mask_backward", "reference", _reference_backward_run, _dispatch.never)
_dispatch.register("attention_to_mask_backward", "cpp", _cpp_backward_run, _cpp_objections)
_dispatch.register("attention_to_mask_backward", "triton", _triton_backward_run, _triton_objections)
