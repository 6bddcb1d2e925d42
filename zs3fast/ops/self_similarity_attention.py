"""self_similarity_attention: the last block of training-free methods, q meeting q and k meeting k (SCLIP, NACLIP).

    S_l    = scale * l r^T + omega           for the pairs (l, r) of `similarity`: (q, q), (k, k), both, or (q, k)
    output = sum over the pairs of softmax(S_l) v                                           patch rows alone
    omega  = exp(-((y_i - y_j)^2 + (x_i - x_j)^2) / (2 std^2)) between patches i and j, 0 where a prefix token is one

Nothing of size T x T is stored, T = num_prefix + N. omega is separable, a[|y_i - y_j|] * b[|x_i - x_j|], by tables of h
and w. qq+kk is one pass over the keys with two online softmaxes, which share each tile of v. Floor: 4 H T N dh
FLOPs a pair and image, and (3 T + N) H dh elements moved; the plain structure stores 3 H T^2 floats a pair, 2.3 GiB at
N = 4096 with 12 heads, and omega itself another 64 MiB.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _flops, _matmul
from zs3fast.ops._attention import accumulator, as_heads, check_heads, cpp_objections, empty_heads, triton_objections
from zs3fast.ops._checks import check_number, is_int
from zs3fast.ops._register import Backward, register_op

OP = "self_similarity_attention"
_PAIRS: dict[str, list[tuple[str, str]]] = {
    "qq": [("q", "q")],
    "kk": [("k", "k")],
    "qq+kk": [("q", "q"), ("k", "k")],
    "qk": [("q", "k")],
}
SIMILARITIES = tuple(_PAIRS)


def distance_prior(
    grid: tuple[int, int], std: float, num_prefix: int = 1, *, device: torch.device | None = None
) -> Tensor:
    """omega [T, T] in full, float64: 1 between a patch and itself, 0 to and from the prefix (NACLIP section 3.2)."""
    h, w = grid
    y, x = (torch.arange(n, dtype=torch.float64, device=device) for n in (h, w))
    a, b = (torch.exp(-(t[:, None] - t).square() / (2 * std * std)) for t in (y, x))
    omega = (a[:, None, :, None] * b[None, :, None, :]).reshape(h * w, h * w)
    return F.pad(omega, (num_prefix, 0, num_prefix, 0))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int = 1,
    std: float | None = None,
) -> Tensor:
    """The definition, with every score stored: see `self_similarity_attention`."""
    tokens = {"q": q, "k": k}
    parts = [
        _probabilities(tokens[left], tokens[right], scale, grid, num_prefix, std) @ v
        for left, right in _PAIRS[similarity]
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _probabilities(
    left: Tensor, right: Tensor, scale: float, grid: tuple[int, int], num_prefix: int, std: float | None
) -> Tensor:
    """softmax(scale * left right^T + omega) of the patch rows, [B, heads, N, T]."""
    scores = (left[:, :, num_prefix:] @ right.mT) * scale
    if std is not None:
        scores = scores + distance_prior(grid, std, num_prefix, device=left.device)[num_prefix:].to(scores.dtype)
    return scores.softmax(-1)


def self_similarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int = 1,
    std: float | None = None,
) -> Tensor:
    """Attention of patches by the likeness of queries, of keys or of both, with a prior for near patches.

    output = sum over pairs (l, r) of softmax(scale * l r^T + omega) v,
    omega  = exp(-(dy^2 + dx^2) / (2 std^2)) between patches, 0 at prefix tokens

    Args:
        q, k, v:    [B, heads, T, dh], T = num_prefix + h * w: prefix tokens, then patches row by row. B = 0 gives an
                    empty result.
        similarity: "qq", "kk", "qk", or "qq+kk", the sum of two attentions, not halved (SCLIP).
        scale:      factor on the products, usually dh ** -0.5; omega is added after it.
        grid:       (h, w) patches.
        num_prefix: tokens before the patches: keys and values like any other, but not queries.
        std:        of the prior, in patches, above 0; None: no prior.
    Returns:
        [B, heads, N, dh], patch queries alone, lying in memory as [B, N, heads, dh] so that joining the heads is free.
        NaN in a key or a value reaches every row of its head. Differentiable in q, k and v, once; the backward pass
        stores the scores.
    Source: SCLIP (ECCV 2024), ClearCLIP (ECCV 2024), NACLIP (WACV 2025); RCS of ResCLIP (CVPR 2025) is a sum of these.
    """
    _check(q, k, v, similarity, scale, grid, num_prefix, std)
    q, k, v = _matmul.autocast(q, k, v)
    out: Tensor = torch.ops.zs3fast.self_similarity_attention(q, k, v, similarity, scale, tuple(grid), num_prefix, std)
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> None:
    check_heads(OP, q, k=k, v=v)
    if similarity not in SIMILARITIES:
        raise ValueError(f"{OP}: similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    check_number(OP, "scale", scale)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(map(is_int, grid)):
        raise TypeError(f"{OP}: grid: expected two ints (h, w), got {grid!r}")
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{OP}: grid: expected at least (1, 1), got {tuple(grid)}")
    if not is_int(num_prefix):
        raise TypeError(f"{OP}: num_prefix: expected an int, got {type(num_prefix).__name__}")
    if num_prefix < 0:
        raise ValueError(f"{OP}: num_prefix: expected 0 or more, got {num_prefix}")
    check_number(OP, "std", std, optional=True)
    if std is not None and not 0 < std < math.inf:
        raise ValueError(f"{OP}: std: expected a positive number of patches, got {std}")
    tokens = num_prefix + grid[0] * grid[1]
    if q.shape[2] != tokens:
        raise ValueError(
            f"{OP}: q: expected [B, heads, {tokens}, dh], {num_prefix} prefix tokens and {grid[0]} x {grid[1]} "
            f"patches, got shape {list(q.shape)}"
        )
    for label, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{OP}: {label}: expected q's shape {list(q.shape)}, got {list(x.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> Tensor:
    return empty_heads(v[:, :, num_prefix:])


def _reference_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> Tensor:
    return as_heads(reference(q, k, v, similarity=similarity, scale=scale, grid=grid, num_prefix=num_prefix, std=std))


def _count(
    q: _flops.Shape, k: _flops.Shape, v: _flops.Shape, similarity: str, _scale: float, _grid: Any, prefix: int, *_: Any
) -> int:
    B, heads, tokens, dh = q
    return len(_PAIRS[similarity]) * B * _flops.attention(tokens - prefix, tokens, heads, dh, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.zs3fast.self_similarity_attention_backward(grad_output, *ctx.saved_tensors, *ctx.arguments)
    return *grads, None, None, None, None, None


def _fake_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _reference_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P (dP - sum P dP) * scale for each pair, with its scores stored; half types accumulate in fp32."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    grad, q, k, v = (x.to(wide) for x in (grad_output, q, k, v))
    tokens, grads, dv = {"q": q, "k": k}, {"q": torch.zeros_like(q), "k": torch.zeros_like(k)}, torch.zeros_like(v)
    for left, right in _PAIRS[similarity]:
        p = _probabilities(tokens[left], tokens[right], scale, grid, num_prefix, std)
        dp = grad @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dv = dv + p.mT @ grad
        grads[left] = grads[left] + F.pad(ds @ tokens[right], (0, 0, num_prefix, 0))
        grads[right] = grads[right] + ds.mT @ tokens[left][:, :, num_prefix:]
    dq, dk, dv = (as_heads(x.to(dtype)) for x in (grads["q"], grads["k"], dv))
    return dq, dk, dv


def _count_backward(_grad: _flops.Shape, *arguments: Any) -> int:
    return 5 * _count(*arguments) // 2


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, str similarity, float scale, SymInt[2] grid, SymInt num_prefix, float? std"
register_op(
    OP,
    schema=f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": cpp_objections, "triton": triton_objections},
    backward=Backward(
        schema=f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)",
        fake=_fake_backward,
        reference=_reference_backward,
        flops=_count_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
